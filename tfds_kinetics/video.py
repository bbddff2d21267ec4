"""Second stop: a video file to the JPEG bytes of its frames."""

import collections
import dataclasses
import math
import os
import stat
import time
from collections.abc import Iterator

import av
import numpy as np
import simplejpeg

av.logging.set_level(av.logging.PANIC)


class UnusableVideo(Exception):
  """The video is not taken into the dataset; the message says why."""


@dataclasses.dataclass(frozen=True)
class FrameOptions:
  """How frames are stored.

  Attributes:
    short_side: frames whose shorter side is longer are scaled down to it (bicubic); none is
      scaled up.
    jpeg_quality: 1 to 100; chroma is stored at half resolution.
    frame_stride: every how many frames one is stored, from the first on.
    max_frames: how many frames of a video are stored at most, from its start; 0 is all.
    max_damage: the share of a video's packets that may fail to decode before it is left out.
    time_limit: seconds that one video may take before it is left out.
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


def _encode(frame: av.VideoFrame, options: FrameOptions) -> bytes:
  width, height = stored_size(frame.width, frame.height, options.short_side)
  pixels = frame.reformat(width, height, 'rgb24', interpolation='BICUBIC').to_ndarray()
  # Phones store what the sensor saw and how to turn it; players turn it, the decoder does not.
  upright = np.rot90(pixels, round(frame.rotation / 90))
  return simplejpeg.encode_jpeg(
    np.ascontiguousarray(upright),
    quality=options.jpeg_quality,
    colorspace='RGB',
    colorsubsampling='420',
  )


def read_jpegs(path: str, options: FrameOptions) -> Iterator[bytes]:
  """Decodes every frame of the first video stream, in order of presentation, as JPEG.

  Packets that fail and frames that the decoder marks as corrupt are left out and counted. The
  verdict on them comes at the end: what was yielded before an exception is not to be used.

  Raises:
    UnusableVideo: it cannot be opened, has no video stream or no frame, takes too long, or too
      much of it is damaged. Nothing else is raised, whatever the file holds.
  """
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise UnusableVideo('it is not a file')  # A pipe would be waited on for ever.
    yield from _read_jpegs(path, options)
  except UnusableVideo:
    raise
  except (av.error.FFmpegError, OSError) as error:
    raise UnusableVideo(f'it cannot be opened: {error.strerror}') from error
  except Exception as error:
    raise UnusableVideo(f'{type(error).__name__}: {error}') from error


def _read_jpegs(path: str, options: FrameOptions) -> Iterator[bytes]:
  failures: list[str] = []
  packets = number = stored = 0
  deadline = time.monotonic() + options.time_limit
  # A playlist under a video's name may not fetch what it lists.
  whitelist = {'protocol_whitelist': 'file'}
  with av.open(f'file:{path}', options=whitelist) as container:
    if not container.streams.video:
      raise UnusableVideo('it has no video stream')
    stream = container.streams.video[0]
    if stream.codec_context is None:
      raise UnusableVideo('its codec is unknown')
    stream.codec_context.thread_count = 1
    demuxer = container.demux(stream)
    while stored < (options.max_frames or math.inf):
      try:
        packet = next(demuxer, None)
        if packet is None:
          break
        packets += 1
        frames = packet.decode()
      except av.error.FFmpegError as error:
        # A failed demuxer is at its end, so the next round stops.
        failures.append(error.strerror)
        continue
      for frame in frames:
        if time.monotonic() > deadline:
          raise UnusableVideo(
            f'it takes longer than --time_limit={options.time_limit:g} seconds;'
            ' --max_frames would take its beginning'
          )
        if frame.is_corrupt:
          failures.append('a corrupt frame')
        elif number % options.frame_stride == 0 and stored < (options.max_frames or math.inf):
          yield _encode(frame, options)
          stored += 1
        number += 1
  if not stored:
    raise UnusableVideo(f'no frame of it could be decoded ({_most_common(failures)})')
  if len(failures) > options.max_damage * packets:
    raise UnusableVideo(
      f'{len(failures)} of {packets} packets are damaged ({_most_common(failures)});'
      f' --max_damage={math.ceil(1000 * len(failures) / packets) / 1000} would take it'
    )


def _most_common(failures: list[str]) -> str:
  return collections.Counter(failures).most_common(1)[0][0] if failures else 'it holds none'
