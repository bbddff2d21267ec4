"""Second stop: videos to a stream of uint8 frame pairs that is a pure function of (seed, step).

One epoch is every video once, in an order of its own; a pair is drawn by (seed, epoch, place in
the epoch) alone. Workers, hosts and restarts therefore never change what is fed: a run that goes
on at step s takes the same stream, sliced at s. Of a mixture each dataset has its own epochs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

from dropmae_jax.config import DataOptions
from dropmae_jax.data import augment, loader, loader_process
from dropmae_jax.data.augment import Box, Uniform
from dropmae_jax.data.damaged_records import too_many_damaged
from dropmae_jax.data.loader import DAMAGED, FRAMES, Block
from dropmae_jax.data.mixture import Mixture, mixture_of
from dropmae_jax.data.pair_stream import PAIR_DRAWS, PairKey, pair_keys
from dropmae_jax.data.video_source import DamagedRecord, VideoSource

# How many videos are drawn for a pair before it is given up.
MOST_TRIES = 100


def sample_pair(uniform: Uniform, num_frames: int, frame_gap: int) -> tuple[int, int]:
  """Draws an earlier and a later frame, 1 to frame_gap - 1 apart, by the published law.

  The start is uniform over all frames but the last, the end uniform over what the gap and the
  clip's end leave; so the gap is cut near the end. A clip of one frame gives it twice.

  Args:
    uniform: called twice.
    num_frames: of the clip; at least 1.
    frame_gap: at least 2.
  """
  first, second = uniform(), uniform()
  if num_frames == 1:
    return 0, 0
  earlier = int(first * (num_frames - 1))
  choices = min(num_frames - 1 - earlier, frame_gap - 1)
  return earlier, earlier + 1 + int(second * choices)


class DrawnPair(NamedTuple):
  """What was drawn and read for a pair.

  Attributes:
    video: number of the video; that of the key, unless that one is damaged.
    frame_numbers: in the video.
    images: both frames, whole.
    boxes: the crop of each.
    damaged: what is wrong with each record that could not be read, and was replaced.
  """

  video: int
  frame_numbers: tuple[int, int]
  images: list[UInt8[np.ndarray, 'h w c']]
  boxes: list[Box]
  damaged: tuple[str, ...]


class PairMaker:
  """Makes pairs, and blocks of them, from their keys: two frames are all that is read for each."""

  def __init__(self, videos: VideoSource | Mixture, options: DataOptions, image_size: int) -> None:
    self._datasets = mixture_of(videos).datasets
    self._options = options
    self._image_size = image_size

  def draw(self, key: PairKey) -> DrawnPair:
    """Draws two frames, reads them, and draws their crops.

    Where a record is damaged, another video of the same dataset takes the place of this one.

    Raises:
      DamagedRecord: more records than `max_damaged_records` are damaged, for this pair alone; or
        nothing else is found.
    """
    damaged: dict[str, None] = {}  # Each once, in the order that they were met.
    for _ in range(MOST_TRIES):
      try:
        return self._draw(key, tuple(damaged))
      except DamagedRecord as error:
        damaged[str(error)] = None
        if len(damaged) > self._options.max_damaged_records:
          raise too_many_damaged(damaged, self._options.max_damaged_records) from error
      key = self._replacement(key)
    raise DamagedRecord(
      f'{list(damaged)[-1]} All of the {MOST_TRIES} videos that were drawn for this pair are'
      ' damaged.'
    )

  def frame_numbers(self, key: PairKey) -> tuple[int, int]:
    """Draws two frames; reads nothing."""
    return self._frame_numbers(key, iter(key.uniforms.tolist()).__next__)

  def _frame_numbers(self, key: PairKey, uniform: Uniform) -> tuple[int, int]:
    num_frames = self._datasets[key.dataset].num_frames(key.video)
    return sample_pair(uniform, num_frames, self._options.frame_gap)

  def _draw(self, key: PairKey, damaged: tuple[str, ...]) -> DrawnPair:
    videos, uniform = self._datasets[key.dataset], iter(key.uniforms.tolist()).__next__
    numbers = self._frame_numbers(key, uniform)
    images = [videos.frame(key.video, number) for number in numbers]
    sizes = [image.shape[:2] for image in images]
    boxes = [augment.random_resized_crop_box(uniform, *sizes[0])]
    if self._options.shared_augmentation:
      boxes.append(augment.same_place(boxes[0], *sizes))
    else:
      boxes.append(augment.random_resized_crop_box(uniform, *sizes[1]))
    return DrawnPair(key.video, numbers, images, boxes, damaged)

  def _replacement(self, key: PairKey) -> PairKey:
    """Returns a key that is random, and a function of this one."""
    rng = np.random.default_rng(key.uniforms[:4].view(np.uint64))
    video = int(rng.integers(len(self._datasets[key.dataset])))
    return PairKey(key.dataset, video, rng.random(PAIR_DRAWS))

  def crop(
    self, drawn: DrawnPair, out: UInt8[np.ndarray, 'f size size c'] | None = None
  ) -> UInt8[np.ndarray, 'f size size c']:
    """Crops and resizes both frames, into `out` if it is given."""
    size = self._image_size
    out = np.empty((2, size, size, 3), np.uint8) if out is None else out
    for image, box, frame in zip(drawn.images, drawn.boxes, out, strict=True):
      augment.crop_and_resize(image, box, size, resize=self._options.resize, out=frame)
    return out

  def __call__(
    self, keys: Sequence[PairKey], out: UInt8[np.ndarray, 'b f size size c'] | None = None
  ) -> Block:
    """Makes a block of pairs: uint8 `frames` [b, 2, h, w, 3], which are written into `out`.

    Beside them are `dataset` [b] and `video` [b], `frame_numbers` [b, 2], and what is `damaged`.
    """
    size = self._image_size
    frames = np.empty((len(keys), 2, size, size, 3), np.uint8) if out is None else out
    drawn = []
    for key, pair_frames in zip(keys, frames, strict=True):
      pair = self.draw(key)
      self.crop(pair, pair_frames)
      drawn.append(pair._replace(images=[]))
    return {
      FRAMES: frames,
      'dataset': np.array([key.dataset for key in keys], np.int32),
      'video': np.array([pair.video for pair in drawn], np.int32),
      'frame_numbers': np.array([pair.frame_numbers for pair in drawn], np.int32),
      DAMAGED: tuple(sentence for pair in drawn for sentence in pair.damaged),
    }


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
  tell_damaged: Callable[[str], None] | None = None,
) -> loader.GatheredBatches:
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
    tell_damaged: is told of every damaged record that was met; may raise.

  Raises:
    ValueError: the hosts do not divide the batch.
    UserError: the shared memory is too small for the loader processes.
  """
  cv2.setNumThreads(0)
  loader_process.allow_many_files()
  if not options.num_workers:
    loader_process.keep_freed_memory()
  return loader.batches_of(
    pair_keys(videos, seed),
    PairMaker(videos, options, image_size),
    pair_shape=(2, image_size, image_size, 3),
    batch_size=batch_size,
    first_step=first_step,
    host=host,
    num_hosts=num_hosts,
    num_workers=options.num_workers,
    num_threads=options.num_threads,
    tell_damaged=tell_damaged or (lambda sentence: None),
  )
