"""Baselines for the dataset of frames: the same pairs, decoded from the video files.

Each is a source of frames for the same loader. A clip is opened once for a pair, and decoded from
the last keyframe before the earlier frame.
"""

import importlib.util
import pathlib
import threading
from collections.abc import Iterator

import av
import numpy as np
from jaxtyping import UInt8


class PyAvReader:
  """Seeks to the last keyframe before the first frame wanted, and decodes from there."""

  def __init__(self, path: pathlib.Path) -> None:
    container = av.open(str(path))
    self._container = container
    self._stream = container.streams.video[0]
    self._stream.codec_context.thread_count = 1
    self._step = float(1 / (self._stream.average_rate * self._stream.time_base))
    self._frame = self._frames = None

  def decode(self) -> Iterator[av.VideoFrame]:
    """Yields the frames from the current position."""
    yield from self._container.decode(self._stream)

  def read(self, number: int) -> UInt8[np.ndarray, 'h w c']:
    """Assumes a constant frame rate, as exact numbers would need a scan of the file.

    Args:
      number: not below that of the last call; past the end, it is the last frame.
    """
    earliest = (self._stream.start_time or 0) + (number - 0.5) * self._step
    if self._frames is None:
      self._container.seek(max(0, round(earliest + self._step / 2)), stream=self._stream)
      self._frames = self.decode()
    while self._frame is None or self._frame.pts < earliest:
      following = next(self._frames, None)
      if following is None:
        break
      self._frame = following
    return self._frame.to_ndarray(format='rgb24')


class DecordReader:
  """Reads as the published code does: opens the file, and gets frames by number."""

  def __init__(self, path: pathlib.Path) -> None:
    import decord

    self._reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)

  def read(self, number: int) -> UInt8[np.ndarray, 'h w c']:
    """Decodes one frame; decord continues from the previous one, as within a batch."""
    return self._reader.get_batch([min(number, len(self._reader) - 1)]).asnumpy()[0]


READERS = {'pyav': PyAvReader, 'decord': DecordReader}


def installed() -> list[str]:
  """Returns the names of the readers that are installed; decord is no dependency."""
  return [name for name in READERS if name != 'decord' or importlib.util.find_spec('decord')]


class FileVideos:
  """Random access to the frames of video files: a `video_source.VideoSource`."""

  def __init__(self, paths: tuple[pathlib.Path, ...], num_frames: list[int], reader: str) -> None:
    self._paths = paths
    self._num_frames = num_frames
    self._reader = reader
    self._of_thread = threading.local()  # The open file, and its video.

  def __len__(self) -> int:
    return len(self._paths)

  def num_frames(self, video: int) -> int:
    """Returns the number of frames of a video, which was given."""
    return self._num_frames[video]

  def frame(self, video: int, number: int) -> UInt8[np.ndarray, 'h w c']:
    """Decodes a frame; the file stays open for the second frame of the pair only."""
    opened, reader = getattr(self._of_thread, 'opened', (None, None))
    if opened == video:
      self._of_thread.opened = None, None
    else:
      reader = READERS[self._reader](self._paths[video])
      self._of_thread.opened = video, reader
    return reader.read(number)
