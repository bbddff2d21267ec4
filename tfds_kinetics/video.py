"""Decodes a video file to the JPEG bytes of its frames."""

import collections
import contextlib
import dataclasses
import errno
import math
import os
import stat
import time
from collections.abc import Iterator

import av
import numpy as np
import simplejpeg
from av.stream import Disposition

from tfds_kinetics import shortages

av.logging.set_level(av.logging.PANIC)

# A title that is not UTF-8 is no reason to skip a video. PyAV before 19 raises without this
# argument; PyAV 19 never raises and has no such argument.
_LENIENT_METADATA = {'metadata_errors': 'replace'} if int(av.__version__.split('.')[0]) < 19 else {}
# Limit of libjpeg along a side.
MOST_PIXELS = 65500


class UnusableVideo(Exception):
  """The video is skipped; the message says why."""


class MachineFault(Exception):
  """The machine could not read a video; the message says what it was short of, and the remedy."""


MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ESTALE}
# FFmpeg allocates no more at once (INT_MAX), whatever there is: a damaged header may ask for more.
LARGEST_ALLOCATION = 1 << 31
# Where there is less, decoders call whole files invalid.
LEAST_MEMORY = 1 << 29


@dataclasses.dataclass(frozen=True)
class FrameOptions:
  """How frames are stored.

  Attributes:
    short_side: in pixels; frames with a longer shorter side are scaled down to it (bicubic), none
      is scaled up.
    jpeg_quality: 1 to 100; chroma is stored at half resolution.
    frame_stride: every n-th frame is stored, from the first on.
    max_frames: frames of a video that are stored at most, from its start; 0 stores all.
    max_damage: share of a video's packets that may fail to decode before it is skipped.
    time_limit: seconds of processor time that a video may take before it is skipped.
  """

  short_side: int = 256
  jpeg_quality: int = 90
  frame_stride: int = 1
  max_frames: int = 0
  max_damage: float = 0.0
  time_limit: float = 600.0


def stored_size(width: int, height: int, short_side: int) -> tuple[int, int]:
  """Returns the width and height at which a frame is stored; the aspect ratio is kept."""
  scale = short_side / min(width, height)
  if scale >= 1:
    return width, height
  return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def _pixels(frame: av.VideoFrame, options: FrameOptions) -> np.ndarray:
  width, height = stored_size(frame.width, frame.height, options.short_side)
  if max(width, height) > MOST_PIXELS:
    raise UnusableVideo(f'its frames are {width} x {height} pixels; JPEG has {MOST_PIXELS} at most')
  pixels = frame.reformat(width, height, 'rgb24', interpolation='BICUBIC').to_ndarray()
  # Phones store unrotated frames and an angle; players rotate them, the decoder does not.
  return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _encode(pixels: np.ndarray, options: FrameOptions) -> bytes:
  try:
    return simplejpeg.encode_jpeg(
      pixels,
      quality=options.jpeg_quality,
      colorspace='RGB',
      colorsubsampling='420',
    )
  except ValueError as error:
    if shortages.shortage(error) is not None:  # Of libjpeg.
      raise MemoryError(str(error)) from error
    raise


def read_jpegs(path: str, options: FrameOptions) -> Iterator[bytes]:
  """Decodes a video as `read_frames` does, to JPEGs.

  Raises:
    UnusableVideo, MachineFault: as there.
  """
  with _video_errors(path):
    for pixels in _read_frames(path, options):
      yield _encode(pixels, options)


def read_frames(path: str, options: FrameOptions) -> Iterator[np.ndarray]:
  """Decodes every frame of the first video stream, in order of presentation.

  Packets that fail and frames that the decoder marks as corrupt are left out and counted. Whether
  they are too many is known only at the end: after an exception, discard what was yielded.

  Raises:
    UnusableVideo: it cannot be opened, has no video stream or no frame, takes too long, or too
      much of it is damaged. The content of a file raises nothing else.
    MachineFault: the machine could not read it, or has too little memory for a verdict.
    Exception: any other, such as a TypeError, is a bug in a program and not the video's fault.

  Yields:
    uint8 RGB [h, w, 3], upright, of the size at which frames are stored.
  """
  with _video_errors(path):
    yield from _read_frames(path, options)


@contextlib.contextmanager
def _video_errors(path: str) -> Iterator[None]:
  """Turns whatever reading a video raises into UnusableVideo or MachineFault."""
  try:
    yield
  except UnusableVideo as verdict:
    if shortages.is_memory_short(LEAST_MEMORY):
      raise machine_fault(path, MemoryError(f'too little memory to tell why: {verdict}')) from None
    raise
  except (av.error.FFmpegError, OSError, MemoryError) as error:
    if _is_of_the_machine(error):
      raise machine_fault(path, error) from error
    raise UnusableVideo(f'it cannot be opened: {error.strerror}') from error


def machine_fault(path: str, error: BaseException) -> MachineFault:
  """Returns the exception that says that the machine cannot read a video, and the remedy."""
  reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
  remedy = shortages.REMEDIES[shortages.shortage(error)]
  return MachineFault(f'{path} cannot be read now ({reason}), which is not its fault; {remedy}')


def _is_of_the_machine(error: av.error.FFmpegError | OSError | MemoryError) -> bool:
  """Whether an error says nothing about the video."""
  if isinstance(error, MemoryError):
    is_of_ffmpeg = isinstance(error, av.error.FFmpegError)
    return not is_of_ffmpeg or shortages.is_memory_short(LARGEST_ALLOCATION)
  return error.errno in MACHINE_ERRORS


@contextlib.contextmanager
def _demuxing() -> Iterator[None]:
  """Turns a ValueError that PyAV raises while it opens or decodes into UnusableVideo.

  FFmpeg has its own errors for nearly everything. PyAV raises ValueError for text that is not
  UTF-8, times without a unit and codecs without a decoder.
  """
  try:
    yield
  except av.error.FFmpegError:  # Some are ValueErrors too.
    raise
  except ValueError as error:
    raise UnusableVideo(f'{type(error).__name__}: {error}') from error


def _read_frames(path: str, options: FrameOptions) -> Iterator[np.ndarray]:
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise UnusableVideo('it is not a file')  # Reading a pipe would never end.
  failures: collections.Counter[str] = collections.Counter()
  packets = number = stored = 0
  # Processor time, not wall-clock time: a busy or suspended machine is not the video's fault.
  deadline = time.process_time() + options.time_limit
  with open_video(path) as container:
    if container.format.name in ('concat', 'hls'):
      raise UnusableVideo('it is a playlist')
    stream = first_stream(container)
    if stream.codec_context is None:
      raise UnusableVideo('its codec is unknown')
    stream.codec_context.thread_count = 1
    demuxer = container.demux(stream)
    while stored < (options.max_frames or math.inf):
      try:
        with _demuxing():
          packet = next(demuxer, None)
          if packet is None:
            break
          packets += packet.size > 0  # The last, empty packet flushes the decoder.
          frames = packet.decode()
      except av.error.FFmpegError as error:
        if _is_of_the_machine(error):
          raise
        # A demuxer that failed is at its end, so the next iteration stops.
        failures[error.strerror] += 1
        continue
      for frame in frames:
        if time.process_time() > deadline:
          raise UnusableVideo(
            f'it takes longer than --time_limit={options.time_limit:g} seconds;'
            ' --max_frames would take its beginning'
          )
        if frame.is_corrupt:
          failures['a corrupt frame'] += 1
        elif number % options.frame_stride == 0 and stored < (options.max_frames or math.inf):
          yield _pixels(frame, options)
          stored += 1
        number += 1
    # The header of an mp4 has the number of packets, so those missing at its end can be counted.
    if 'mp4' in container.format.name and stream.frames > packets and not options.max_frames:
      missing = max(0, stream.frames - _count_packets(path, stream.index))
      failures['the file is cut short'] += missing
      packets += missing
  if not stored:
    raise UnusableVideo(f'no frame of it could be decoded ({_most_common(failures)})')
  damaged = failures.total()
  if damaged > options.max_damage * packets:
    raise UnusableVideo(
      f'{damaged} of {packets} packets are damaged ({_most_common(failures)});'
      f' --max_damage={math.ceil(1000 * damaged / packets) / 1000} would take it'
    )


def open_video(path: str, **options: str) -> av.container.InputContainer:
  """Opens a video, with any characters in its name and titles; options are of the demuxer.

  Raises:
    FFmpegError, UnusableVideo: it is no video.
  """
  # `file:` stops FFmpeg from reading the name as a URL. What is opened so may open files only, so a
  # playlist that is named like a video downloads nothing.
  with _demuxing():
    return av.open(f'file:{path}', options=options, **_LENIENT_METADATA)


def first_stream(container: av.container.InputContainer) -> av.VideoStream:
  """Returns the first video stream that is no cover picture.

  Raises:
    UnusableVideo: there is none.
  """
  streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
  if not streams:
    raise UnusableVideo('it has no video stream')
  return streams[0]


def _count_packets(path: str, stream: int) -> int:
  """Counts the packets in the file, including those that an edit list leaves out of playback."""
  with open_video(path, ignore_editlist='1') as container, _demuxing():
    return sum(packet.size > 0 for packet in container.demux(container.streams[stream]))


def _most_common(failures: collections.Counter[str]) -> str:
  return failures.most_common(1)[0][0] if failures.total() else 'it holds none'
