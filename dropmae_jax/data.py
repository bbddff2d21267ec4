"""Second stop: videos to a stream of uint8 frame pairs that is a pure function of (seed, step).

One epoch is every video once, in an order of its own; a pair is drawn by (seed, epoch, place in
the epoch) alone. Workers, hosts and restarts therefore never change what is fed: a run that goes
on at step s takes the same stream, sliced at s. Of a mixture each dataset has its own epochs.
"""

import dataclasses
import functools
from fractions import Fraction
from typing import NamedTuple

import cv2
import grain
import numpy as np
from jaxtyping import UInt8

from dropmae_jax import augment, blocks, loader_process
from dropmae_jax.augment import Box
from dropmae_jax.videos import Mixture, VideoSource

# More than any run takes.
EPOCHS = 10**9


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """How pairs are drawn and fed; the defaults are the published recipe, but for the fast resize.

  Attributes:
    frame_gap: the frames of a pair are 1 to frame_gap - 1 apart.
    resize: 'fast' (OpenCV bicubic) or 'exact' (PIL bicubic, as published).
    shared_augmentation: both frames get the same crop and flip.
    num_workers: processes that decode and crop; 0 does it in threads of this one.
    num_threads: threads of a process without workers; 0 works only when a batch is asked for.
    stall_seconds: a run ends with an error when no batch came for so long.
  """

  frame_gap: int = 50
  resize: str = 'fast'
  shared_augmentation: bool = False
  num_workers: int = 0
  num_threads: int = 2
  stall_seconds: float = 300.0

  def __post_init__(self) -> None:
    if self.frame_gap < 2:
      raise ValueError(
        f'frame_gap={self.frame_gap} leaves no second frame: pairs are 1 to frame_gap - 1 apart;'
        ' use 2 or more (published: 50).'
      )
    if self.resize not in augment.RESIZES:
      raise ValueError(
        f'resize={self.resize!r} is unknown; use one of {", ".join(augment.RESIZES)}.'
      )
    for name in ('num_workers', 'num_threads'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} is negative; use 0 or more.')
    if not self.stall_seconds > 0:
      raise ValueError(
        f'stall_seconds={self.stall_seconds} is not positive; use the longest time that a batch may'
        ' take to come.'
      )


def sample_pair(rng: np.random.Generator, num_frames: int, frame_gap: int) -> tuple[int, int]:
  """Draws an earlier and a later frame, 1 to frame_gap - 1 apart, by the published law.

  The start is uniform over all frames but the last, the end uniform over what the gap and the
  clip's end leave; so the gap is cut near the end. A clip of one frame gives it twice.

  Args:
    rng: consumed by two draws, or none for a single frame.
    num_frames: of the clip; at least 1.
    frame_gap: at least 2.
  """
  if num_frames == 1:
    return 0, 0
  earlier = int(rng.integers(0, num_frames - 1))
  later = int(rng.integers(earlier + 1, min(num_frames, earlier + frame_gap)))
  return earlier, later


class DrawnPair(NamedTuple):
  """The numbers of a pair's frames, both frames whole, and the crop of each."""

  frame_numbers: tuple[int, int]
  images: list[UInt8[np.ndarray, 'h w c']]
  boxes: list[Box]


class FramePair(grain.transforms.RandomMap):
  """A video's number to an augmented pair: the two frames are all that is read of it."""

  def __init__(
    self, videos: VideoSource, options: DataOptions, image_size: int, *, dataset: int = 0
  ) -> None:
    self._videos = videos
    self._options = options
    self._image_size = image_size
    self.dataset = dataset

  def draw(self, video: int, rng: np.random.Generator) -> DrawnPair:
    """Draws two frames, reads them, and draws their crops."""
    numbers = sample_pair(rng, self._videos.num_frames(video), self._options.frame_gap)
    images = [self._videos.frame(video, number) for number in numbers]
    sizes = [image.shape[:2] for image in images]
    boxes = [augment.random_resized_crop_box(rng, *size) for size in sizes]
    if self._options.shared_augmentation:
      boxes[1] = augment.same_place(boxes[0], *sizes)
    return DrawnPair(numbers, images, boxes)

  def crop(self, drawn: DrawnPair) -> UInt8[np.ndarray, 'f size size c']:
    """Crops and resizes both frames."""
    size = self._image_size
    frames = np.empty((2, size, size, 3), np.uint8)
    for image, box, out in zip(drawn.images, drawn.boxes, frames, strict=True):
      augment.crop_and_resize(image, box, size, resize=self._options.resize, out=out)
    return frames

  def random_map(self, element: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns uint8 `frames` [2, h, w, 3], `dataset` and `video` of it, and `frame_numbers` [2]."""
    drawn = self.draw(int(element), rng)
    return {
      'frames': self.crop(drawn),
      'dataset': np.int32(self.dataset),
      'video': np.int32(element),
      'frame_numbers': np.array(drawn.frame_numbers, np.int32),
    }


class EpochOrders:
  """The numbers of all videos, epoch after epoch, each in an order of its own; a source of grain.

  Grain's own shuffle costs up to milliseconds an element where there are few videos
  (benchmarks/input_pipeline.py), as it looks for each in a range of 2^16 numbers or more.
  """

  def __init__(self, num_videos: int, seed: int) -> None:
    self._num_videos, self._seed = num_videos, seed

  def __len__(self) -> int:
    return self._num_videos * EPOCHS

  def __getitem__(self, place: int) -> int:
    epoch, number = divmod(place, self._num_videos)
    return int(_epoch_order(self._num_videos, self._seed, epoch)[number])


@functools.lru_cache(maxsize=16)
def _epoch_order(num_videos: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(num_videos)


def pair_stream(
  videos: VideoSource, transform: grain.transforms.RandomMap, seed: int
) -> grain.MapDataset:
  """Returns the pairs of all epochs: `transform` of a video and a generator of (seed, place)."""
  orders = EpochOrders(len(videos), seed)
  return grain.MapDataset.source(orders).seed(seed).random_map(transform)


def pairs_of(
  videos: VideoSource | Mixture,
  options: DataOptions,
  *,
  image_size: int,
  seed: int,
  pair: type[FramePair] = FramePair,
) -> grain.MapDataset:
  """Returns the endless stream of single pairs, by number.

  Args:
    videos: where frames come from. A mixture takes its datasets in turn, as evenly as their
      weights allow; ratios of weights that are no whole multiples of 1/100 are off by up to 1 %.
    options: how pairs are drawn.
    image_size: pixels along a side.
    seed: of order, pairs and crops.
    pair: what makes a pair of a video.
  """
  mixture = videos if isinstance(videos, Mixture) else Mixture((videos,), (Fraction(1),))
  parts = [
    pair_stream(
      each,
      pair(each, options, image_size, dataset=number),
      seed if number == 0 else int(np.random.SeedSequence((seed, number)).generate_state(1)[0]),
    )
    for number, each in enumerate(mixture.datasets)
  ]
  return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, mixture.weights)


def pair_batches(
  videos: VideoSource | Mixture,
  options: DataOptions,
  *,
  image_size: int,
  batch_size: int,
  seed: int,
  first_step: int = 0,
  host: int = 0,
  num_hosts: int = 1,
) -> blocks.GatheredBatches:
  """Returns the endless stream of this host's batches, from `first_step` on.

  Args:
    videos: where frames come from.
    options: how pairs are drawn and fed.
    image_size: pixels along a side.
    batch_size: of all hosts together; every host gets an equal share of each.
    seed: of order, pairs and crops.
    first_step: batches to leave out.
    host: number of this process.
    num_hosts: number of processes.

  Raises:
    ValueError: the hosts do not divide the batch.
    BadInput: the shared memory is too small for the loader processes.
  """
  cv2.setNumThreads(0)
  loader_process.allow_many_files()
  if not options.num_workers:
    loader_process.keep_freed_memory()
  return blocks.batches_of(
    pairs_of(videos, options, image_size=image_size, seed=seed),
    pair_bytes=2 * 3 * image_size**2,
    batch_size=batch_size,
    first_step=first_step,
    host=host,
    num_hosts=num_hosts,
    num_workers=options.num_workers,
    num_threads=options.num_threads,
  )
