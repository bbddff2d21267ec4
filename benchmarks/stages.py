"""How long each stage of the loader takes for a pair."""

import collections
import time
from collections.abc import Sequence

import jax
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from tensorflow_datasets.proto import tf_example_pb2

from benchmarks.clips import Clips
from dropmae_jax.config import DataOptions
from dropmae_jax.data import frame_pairs, loader, pair_stream
from dropmae_jax.data.video_source import TfdsVideos

STAGES = (
  'draw frames and crops',
  'read record',
  'parse record',
  'decode JPEG',
  'crop and resize',
  'transfer to device',
  'grain, and the rest',
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


class TimedMaker(frame_pairs.PairMaker):
  """Makes chunks as `PairMaker` does, and times the parts."""

  def __init__(self, videos: TimedVideos, options: DataOptions, size: int, lap: Laps) -> None:
    super().__init__(videos, options, size)
    self._lap = lap

  def crop(self, drawn: frame_pairs.DrawnPair, out: np.ndarray) -> np.ndarray:
    """Crops and resizes both frames."""
    self._lap('draw frames and crops')
    out = super().crop(drawn, out)
    self._lap('crop and resize')
    return out

  def __call__(self, keys: Sequence[pair_stream.PairKey]) -> loader.Chunk:
    """Makes a chunk of pairs."""
    self._lap('grain, and the rest')
    return super().__call__(keys)


def time_stages(
  clips: Clips, options: DataOptions, *, image_size: int, seed: int, pairs: int
) -> tuple[dict[str, float], list[dict[str, np.ndarray]]]:
  """Makes the first batches of a training stream in this process, stage by stage.

  Args:
    clips: to draw from.
    options: of the pairs.
    image_size: pixels along a side.
    seed: of the stream.
    pairs: to make, rounded up to whole batches of up to 32.

  Returns:
    Microseconds per pair by stage, and the batches.
  """
  lap, batch = Laps(), min(pairs, BATCH)
  timed = TimedMaker(TimedVideos(clips, lap), options, image_size, lap)
  made, batches = pair_stream.pair_keys(clips.videos, seed).batch(batch, batch_fn=timed), []
  made[0]
  lap('grain, and the rest')
  lap.seconds.clear()
  for number in range(-(-pairs // batch)):
    batches.append(made[number])
    del batches[-1][loader.DAMAGED]
    lap('grain, and the rest')
    jax.block_until_ready(jax.device_put(batches[-1]['frames']))
    lap('transfer to device')
  return {stage: lap.seconds[stage] / (batch * len(batches)) * 1e6 for stage in STAGES}, batches
