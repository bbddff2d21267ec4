"""Where the time of a pair goes: the loader's own steps, each between two looks at the clock."""

import collections
import time

import grain
import jax
import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from benchmarks.clips import Clips
from dropmae_jax import augment, data

STAGES = (
  'draw frames and crops',
  'read record',
  'parse record',
  'decode JPEG',
  'crop and resize',
  'stack the batch',
  'transfer to device',
  'grain, and the rest',
)
BATCH = 32


class TimedPair(grain.transforms.RandomMap):
  """Does what `data.FramePair` does, and adds up what each stage takes.

  Attributes:
    seconds: of this process's cores, by stage, so far.
  """

  def __init__(self, clips: Clips, options: data.DataOptions, image_size: int) -> None:
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

  def random_map(self, element: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns what `data.FramePair` returns."""
    self.lap('grain, and the rest')
    video, size = int(element), self._image_size
    first = int(self._clips.first[video])
    num_frames = self._clips.videos.num_frames(video)
    numbers = data.sample_pair(rng, num_frames, self._options.frame_gap)
    self.lap('draw frames and crops')
    records = [self._records[first + number] for number in numbers]
    self.lap('read record')
    features = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
    jpegs = [feature['jpeg'].bytes_list.value[0] for feature in features]
    self.lap('parse record')
    images = [simplejpeg.decode_jpeg(jpeg, 'RGB') for jpeg in jpegs]
    self.lap('decode JPEG')
    boxes = [augment.random_resized_crop_box(rng, *image.shape[:2]) for image in images]
    self.lap('draw frames and crops')
    frames = np.empty((2, size, size, 3), np.uint8)
    for image, box, out in zip(images, boxes, frames, strict=True):
      augment.crop_and_resize(image, box, size, resize=self._options.resize, out=out)
    self.lap('crop and resize')
    return {
      'frames': frames,
      'dataset': np.int32(0),
      'video': np.int32(video),
      'frame_numbers': np.array(numbers, np.int32),
    }


def time_stages(
  clips: Clips, options: data.DataOptions, *, image_size: int, seed: int, pairs: int
) -> tuple[dict[str, float], list[dict[str, np.ndarray]]]:
  """Makes the first batches of a training stream in this process, stage by stage.

  Args:
    clips: to draw from.
    options: of the pairs; one crop for both frames is not supported.
    image_size: pixels along a side.
    seed: of the stream.
    pairs: to make, in batches of up to 32.

  Returns:
    Microseconds per pair by stage, and the batches.
  """
  timed = TimedPair(clips, options, image_size)
  stream, batches = data.pair_stream(clips.videos, timed, seed), []
  stream[0]
  timed.seconds.clear()
  timed.lap('grain, and the rest')
  timed.seconds.clear()
  for start in range(0, pairs, BATCH):
    rows = [stream[number] for number in range(start, min(pairs, start + BATCH))]
    timed.lap('grain, and the rest')
    batches.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    timed.lap('stack the batch')
    jax.block_until_ready(jax.device_put(batches[-1]['frames']))
    timed.lap('transfer to device')
  return {stage: timed.seconds[stage] / pairs * 1e6 for stage in STAGES}, batches
