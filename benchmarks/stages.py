"""How long each stage of the loader takes for a pair."""

import collections
import time

import jax
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from tensorflow_datasets.proto import tf_example_pb2

from benchmarks.clips import Clips
from dropmae_jax.config import DataOptions
from dropmae_jax.data import frame_pairs, pair_stream
from dropmae_jax.data.video_source import TfdsVideos

STAGES = (
  'draw keys',
  'draw frames and crops',
  'read record',
  'parse record',
  'decode JPEG',
  'crop and resize',
  'transfer to device',
)
BATCH = 32


class Laps:
  """Adds up the CPU time of this process by stage, in `seconds`."""

  def __init__(self) -> None:
    self._since = time.process_time()
    self.seconds: dict[str, float] = collections.defaultdict(float)

  def __call__(self, stage: str) -> None:
    """Adds the time since the last call to a stage."""
    now = time.process_time()
    self.seconds[stage] += now - self._since
    self._since = now


class TimedVideos(TfdsVideos):
  """Reads frames as `TfdsVideos` does, without retries, and times the parts."""

  def __init__(self, clips: Clips, lap: Laps) -> None:
    super().__init__(clips.videos.folder, clips.split)
    self._lap = lap

  def frame(self, video: int, number: int) -> UInt8[np.ndarray, 'h w c']:
    """Reads one record and decodes its JPEG to RGB."""
    self._lap('draw frames and crops')
    record = self._records[int(self._first[video]) + number]
    self._lap('read record')
    features = tf_example_pb2.Example.FromString(record).features.feature
    jpeg = features['jpeg'].bytes_list.value[0]
    self._lap('parse record')
    image = simplejpeg.decode_jpeg(jpeg, 'RGB')
    self._lap('decode JPEG')
    return image


class WithoutPixels(TfdsVideos):
  """Reads and parses records, but returns a small frame instead of decoding them."""

  SIZE = 8

  def __init__(self, clips: Clips) -> None:
    super().__init__(clips.videos.folder, clips.split)
    self._frame = np.zeros((self.SIZE, self.SIZE, 3), np.uint8)

  def frame(self, video: int, number: int) -> UInt8[np.ndarray, 'h w c']:
    """Reads one record."""
    record = self._records[int(self._first[video]) + number]
    tf_example_pb2.Example.FromString(record)
    return self._frame


def time_stages(
  clips: Clips, options: DataOptions, *, image_size: int, seed: int, pairs: int
) -> dict[str, float]:
  """Makes the first pairs of a training stream in this thread, stage by stage.

  Args:
    clips: to draw from.
    options: of the pairs.
    image_size: pixels along a side.
    seed: of the stream.
    pairs: to make, rounded up to whole batches of BATCH.

  Returns:
    Microseconds per pair by stage.
  """
  lap, videos = Laps(), clips.videos
  maker = frame_pairs.PairMaker(TimedVideos(clips, lap), options, image_size)
  keys, batches = pair_stream.pair_keys(videos, seed), -(-pairs // BATCH)
  frames = np.empty((BATCH, 2, image_size, image_size, 3), np.uint8)
  lap('draw keys')
  lap.seconds.clear()
  for batch in range(batches):
    for row in range(BATCH):
      key = keys[batch * BATCH + row]
      lap('draw keys')
      drawn = maker.draw(key)
      lap('draw frames and crops')
      maker.crop(drawn, frames[row])
      lap('crop and resize')
    jax.block_until_ready(jax.device_put(frames.copy()))
    lap('transfer to device')
  return {stage: lap.seconds[stage] / (batches * BATCH) * 1e6 for stage in STAGES}
