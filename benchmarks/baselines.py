"""Other sources of frames for the same loader: video files, and records that are not decoded."""

import pathlib
import threading
from collections.abc import Iterator

import av
import numpy as np
from jaxtyping import UInt8
from tensorflow_datasets.proto import tf_example_pb2

from dropmae_jax.data.video_source import TfdsVideos


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


class FileVideos:
  """Decodes frames from video files: a `video_source.VideoSource`.

  A file is opened once for a pair, and decoded from the last keyframe before the earlier frame.
  """

  def __init__(self, paths: tuple[pathlib.Path, ...], num_frames: list[int]) -> None:
    self._paths = paths
    self._num_frames = num_frames
    self._local = threading.local()  # Of a thread: the open file, and its video.

  def __len__(self) -> int:
    return len(self._paths)

  def num_frames(self, video: int) -> int:
    """Returns the number of frames of a video, which was given."""
    return self._num_frames[video]

  def frame(self, video: int, number: int) -> UInt8[np.ndarray, 'h w c']:
    """Decodes a frame; the file stays open for the second frame of the pair only."""
    opened, reader = getattr(self._local, 'opened', (None, None))
    if opened == video:
      self._local.opened = None, None
    else:
      reader = PyAvReader(self._paths[video])
      self._local.opened = video, reader
    return reader.read(number)


class WithoutPixels(TfdsVideos):
  """Reads and parses records, but returns a small frame instead of decoding them."""

  SIZE = 8
  PIXELS = np.zeros((SIZE, SIZE, 3), np.uint8)

  def frame(self, video: int, number: int) -> UInt8[np.ndarray, 'h w c']:
    """Reads one record."""
    record = self._records[int(self._first[video]) + number]
    tf_example_pb2.Example.FromString(record)
    return self.PIXELS
