"""First stop: a video file to the JPEG bytes of its frames."""

import collections
import dataclasses
import math

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
    max_damage: the share of a video's packets that may fail to decode before it is left out.
  """

  short_side: int = 256
  jpeg_quality: int = 90
  frame_stride: int = 1
  max_damage: float = 0.0


def stored_size(width: int, height: int, short_side: int) -> tuple[int, int]:
  """Returns the width and height at which a frame is stored; the aspect ratio is kept."""
  scale = short_side / min(width, height)
  if scale >= 1:
    return width, height
  return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def _encode(frame: av.VideoFrame, options: FrameOptions) -> bytes:
  width, height = stored_size(frame.width, frame.height, options.short_side)
  pixels = frame.reformat(width, height, 'rgb24', interpolation='BICUBIC').to_ndarray()
  return simplejpeg.encode_jpeg(
    np.ascontiguousarray(pixels),
    quality=options.jpeg_quality,
    colorspace='RGB',
    colorsubsampling='420',
  )


def read_jpegs(path: str, options: FrameOptions) -> list[bytes]:
  """Decodes every frame of the first video stream, in order of presentation, as JPEG.

  Packets that fail and frames that the decoder marks as corrupt are left out and counted.

  Raises:
    UnusableVideo: it cannot be opened, has no video stream or no frame, or too much of it is
      damaged.
  """
  jpegs: list[bytes] = []
  failures: list[str] = []
  packets = number = 0
  try:
    with av.open(path) as container:
      if not container.streams.video:
        raise UnusableVideo('it has no video stream')
      stream = container.streams.video[0]
      stream.codec_context.thread_count = 1
      demuxer = container.demux(stream)
      while True:
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
          if frame.is_corrupt:
            failures.append('a corrupt frame')
          elif number % options.frame_stride == 0:
            jpegs.append(_encode(frame, options))
          number += 1
  except (av.error.FFmpegError, OSError) as error:
    raise UnusableVideo(f'it cannot be opened: {error.strerror}') from error
  if not jpegs:
    raise UnusableVideo(f'no frame of it could be decoded ({_most_common(failures)})')
  if len(failures) > options.max_damage * packets:
    raise UnusableVideo(
      f'{len(failures)} of {packets} packets are damaged ({_most_common(failures)});'
      f' --max_damage={math.ceil(1000 * len(failures) / packets) / 1000} would take it'
    )
  return jpegs


def _most_common(failures: list[str]) -> str:
  return collections.Counter(failures).most_common(1)[0][0] if failures else 'it holds none'
