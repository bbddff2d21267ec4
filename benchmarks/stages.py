"""Where the time of a pair goes: the loader's own steps, each between two looks at the clock."""

import collections
import time
from collections.abc import Sequence

import jax
import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from benchmarks.clips import Clips
from dropmae_jax.config import DataOptions
from dropmae_jax.data import augment, frame_pairs, loader, pair_stream

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


class TimedMaker:
  """Makes blocks as `data.PairMaker` does, and adds up what each stage takes.

  Attributes:
    seconds: of this process's cores, by stage, so far.
  """

  def __init__(self, clips: Clips, options: DataOptions, image_size: int) -> None:
    builder = tfds.builder_from_directory(clips.videos.folder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    self._records = builder.as_data_source(clips.split, deserialize_method=raw)
    self._clips, self._options, self._image_size = clips, options, image_size
    self._since = time.process_time()
    self.seconds: dict[str, float] = collections.defaultdict(float)

  def lap(self, stage: str) -> None:
    """Counts the time since the last call for a stage."""
    now = time.process_time()
    self.seconds[stage] += now - self._since
    self._since = now

  def _make(self, key: pair_stream.PairKey, out: np.ndarray) -> tuple[int, int]:
    """Fills `out` with the frames of a pair; returns their numbers."""
    uniform = iter(key.uniforms.tolist()).__next__
    first = int(self._clips.first[key.video])
    num_frames = self._clips.videos.num_frames(key.video)
    numbers = frame_pairs.sample_pair(uniform, num_frames, self._options.frame_gap)
    self.lap('draw frames and crops')
    records = [self._records[first + number] for number in numbers]
    self.lap('read record')
    features = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
    jpegs = [feature['jpeg'].bytes_list.value[0] for feature in features]
    self.lap('parse record')
    images = [simplejpeg.decode_jpeg(jpeg, 'RGB') for jpeg in jpegs]
    self.lap('decode JPEG')
    boxes = [augment.random_resized_crop_box(uniform, *image.shape[:2]) for image in images]
    self.lap('draw frames and crops')
    for image, box, frame in zip(images, boxes, out, strict=True):
      augment.crop_and_resize(image, box, self._image_size, resize=self._options.resize, out=frame)
    self.lap('crop and resize')
    return numbers

  def __call__(self, keys: Sequence[pair_stream.PairKey]) -> loader.Block:
    """Returns what `data.PairMaker` returns."""
    size = self._image_size
    frames = np.empty((len(keys), 2, size, size, 3), np.uint8)
    self.lap('grain, and the rest')
    numbers = [self._make(key, out) for key, out in zip(keys, frames, strict=True)]
    return {
      'frames': frames,
      'dataset': np.array([key.dataset for key in keys], np.int32),
      'video': np.array([key.video for key in keys], np.int32),
      'frame_numbers': np.array(numbers, np.int32),
      loader.DAMAGED: (),
    }


def time_stages(
  clips: Clips, options: DataOptions, *, image_size: int, seed: int, pairs: int
) -> tuple[dict[str, float], list[dict[str, np.ndarray]]]:
  """Makes the first batches of a training stream in this process, stage by stage.

  Args:
    clips: to draw from.
    options: of the pairs; one crop for both frames is not supported.
    image_size: pixels along a side.
    seed: of the stream.
    pairs: to make, rounded up to whole batches of up to 32.

  Returns:
    Microseconds per pair by stage, and the batches.
  """
  timed, batch = TimedMaker(clips, options, image_size), min(pairs, BATCH)
  made, batches = pair_stream.pair_keys(clips.videos, seed).batch(batch, batch_fn=timed), []
  made[0]
  timed.lap('grain, and the rest')
  timed.seconds.clear()
  for number in range(-(-pairs // batch)):
    batches.append(made[number])
    del batches[-1][loader.DAMAGED]
    timed.lap('grain, and the rest')
    jax.block_until_ready(jax.device_put(batches[-1]['frames']))
    timed.lap('transfer to device')
  return {stage: timed.seconds[stage] / (batch * len(batches)) * 1e6 for stage in STAGES}, batches
