"""Draws pairs of frames from videos and makes batches of them, as a pure function of (seed, step).

Each epoch visits every video once, in a new order. A pair depends only on the seed, the epoch and
the position in the epoch. So threads, hosts and restarts never change which pairs are read, and a
run that resumes at step s reads the same stream from s on. Each dataset of a mixture has its own
epochs.
"""

import itertools
import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Int32, UInt8

from dropmae_jax.config import DataOptions
from dropmae_jax.data import augment
from dropmae_jax.data.augment import Box, Uniform
from dropmae_jax.data.loader import Loader, keep_freed_memory
from dropmae_jax.data.mixture import Mixture, mixture_of
from dropmae_jax.data.pair_stream import FRAME_DRAWS, PAIR_DRAWS, PairKey, PairKeys
from dropmae_jax.data.video_source import DamagedRecord, VideoSource
from dropmae_jax.runtime.errors import UserError

# How many videos are tried for one pair.
MAX_TRIES = 100

_log = logging.getLogger('dropmae_jax')


def sample_pair(uniform: Uniform, num_frames: int, frame_gap: int) -> tuple[int, int]:
  """Draws an earlier and a later frame, 1 to frame_gap - 1 apart, from the published distribution.

  The earlier frame is uniform over all frames but the last. The later one is uniform over the
  frames after it that are within the gap and the clip, so gaps are shorter near the end. A clip of
  one frame returns this frame twice.

  Args:
    uniform: called FRAME_DRAWS times.
    num_frames: of the clip; at least 1.
    frame_gap: at least 2.
  """
  first, second = uniform(), uniform()
  if num_frames == 1:
    return 0, 0
  earlier = int(first * (num_frames - 1))
  choices = min(num_frames - 1 - earlier, frame_gap - 1)
  return earlier, earlier + 1 + int(second * choices)


def _too_many_damaged(messages: Collection[str], most: int) -> DamagedRecord:
  return DamagedRecord(
    f'{list(messages)[-1]} It is damaged record {len(messages)} of this start, and'
    f' config.data.max_damaged_records={most}.'
  )


class DamagedRecords:
  """Counts the damaged records that a process meets, each once, and logs them."""

  def __init__(self, most: int) -> None:
    """Starts at zero.

    Args:
      most: how many are allowed.
    """
    self._most = most
    self._messages: dict[str, None] = {}  # In the order in which they came.

  def add(self, message: str) -> None:
    """Counts a record, if its message is new.

    Args:
      message: names the record.

    Raises:
      DamagedRecord: there are more than are allowed.
    """
    if message in self._messages:
      return
    self._messages[message] = None
    if len(self._messages) > self._most:
      raise _too_many_damaged(self._messages, self._most)
    _log.warning(
      f'{message} Another video is taken instead; damaged record {len(self._messages)} of at most'
      f' {self._most}.'
    )


def _check_frame(image: np.ndarray, video: int, number: int) -> None:
  """Refuses what a dataset class of the user's own may return, and OpenCV would take silently."""
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
    raise UserError(
      f'frame {number} of video {video} of config.dataset is {image.dtype} {list(image.shape)};'
      ' its class must return uint8 [height, width, 3].'
    )


class DrawnPair(NamedTuple):
  """What was drawn and read for a pair.

  Attributes:
    video: number of the video; that of the key, unless its record was damaged.
    frame_numbers: in the video.
    images: both whole frames.
    boxes: the crop of each.
    damaged: messages on the records that could not be read and were replaced.
  """

  video: int
  frame_numbers: tuple[int, int]
  images: list[UInt8[np.ndarray, 'h w c']]
  boxes: list[Box]
  damaged: tuple[str, ...]


class PairMaker:
  """Makes pairs from their keys; reads only the two frames of each."""

  def __init__(self, videos: VideoSource | Mixture, options: DataOptions, image_size: int) -> None:
    self._datasets = mixture_of(videos).datasets
    self._options = options
    self._image_size = image_size

  def draw(self, key: PairKey) -> DrawnPair:
    """Draws two frames, reads them, and draws their crops.

    If a record is damaged, another video of the same dataset is taken instead.

    Raises:
      DamagedRecord: for this pair alone, more than `max_damaged_records` records are damaged; or
        none of MAX_TRIES videos can be read.
    """
    damaged: dict[str, None] = {}  # Each once, in the order in which they came.
    for _ in range(MAX_TRIES):
      try:
        return self._draw(key, tuple(damaged))
      except DamagedRecord as error:
        damaged[str(error)] = None
        if len(damaged) > self._options.max_damaged_records:
          raise _too_many_damaged(damaged, self._options.max_damaged_records) from error
      key = self._replacement(key)
    raise DamagedRecord(
      f'{list(damaged)[-1]} All of the {MAX_TRIES} videos that were drawn for this pair are'
      ' damaged.'
    )

  def frame_numbers(self, key: PairKey) -> tuple[int, int]:
    """Draws the numbers of two frames; reads nothing."""
    num_frames = self._datasets[key.dataset].num_frames(key.video)
    if num_frames < 1:
      raise UserError(f'video {key.video} of config.dataset has {num_frames=}; give 1 or more.')
    uniform = iter(key.uniforms[:FRAME_DRAWS].tolist()).__next__
    return sample_pair(uniform, num_frames, self._options.frame_gap)

  def _draw(self, key: PairKey, damaged: tuple[str, ...]) -> DrawnPair:
    videos, numbers = self._datasets[key.dataset], self.frame_numbers(key)
    uniform = iter(key.uniforms[FRAME_DRAWS:].tolist()).__next__
    images = [videos.frame(key.video, number) for number in numbers]
    for image, number in zip(images, numbers, strict=True):
      _check_frame(image, key.video, number)
    sizes = [image.shape[:2] for image in images]
    boxes = [augment.random_resized_crop_box(uniform, *sizes[0])]
    if self._options.shared_augmentation:
      boxes.append(augment.same_place(boxes[0], *sizes))
    else:
      boxes.append(augment.random_resized_crop_box(uniform, *sizes[1]))
    return DrawnPair(key.video, numbers, images, boxes, damaged)

  def _replacement(self, key: PairKey) -> PairKey:
    """Returns a random key, seeded by this one."""
    rng = np.random.default_rng(key.uniforms[:4].view(np.uint64))
    video = int(rng.integers(len(self._datasets[key.dataset])))
    return PairKey(key.dataset, video, rng.random(PAIR_DRAWS))

  def crop(self, drawn: DrawnPair, out: UInt8[np.ndarray, 'f size size c']) -> None:
    """Crops and resizes both frames into `out`."""
    for image, box, frame in zip(drawn.images, drawn.boxes, out, strict=True):
      augment.crop_and_resize(image, box, self._image_size, resize=self._options.resize, out=frame)


class PairBatch(NamedTuple):
  """Memory for a batch of pairs.

  Attributes:
    frames: the crops, the earlier frame first.
    dataset: numbers of the datasets in the mixture.
    video: numbers of the videos in their datasets.
    frame_numbers: in the videos.
    damaged: of each pair, messages on the records that could not be read and were replaced.
  """

  frames: UInt8[np.ndarray, 'b f size size c']
  dataset: Int32[np.ndarray, ' b']
  video: Int32[np.ndarray, ' b']
  frame_numbers: Int32[np.ndarray, 'b f']
  damaged: list[tuple[str, ...]]


def copied(batch: PairBatch) -> dict[str, np.ndarray]:
  """Returns the arrays of a batch by name, with memory of their own."""
  return {name: array.copy() for name, array in batch._asdict().items() if name != 'damaged'}


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
  report_damaged: Callable[[str], None] | None = None,
  move: Callable[[PairBatch], Any] = copied,
  is_interrupted: Callable[[], bool] = lambda: False,
) -> Loader:
  """Returns the endless stream of this host's batches, from `first_step` on.

  Args:
    videos: a dataset or a mixture.
    options: how pairs are drawn and loaded.
    image_size: side of a frame in pixels.
    batch_size: in pairs, over all hosts; each host gets an equal, contiguous share of every batch.
    seed: of the order, the pairs and the crops.
    first_step: how many batches to skip.
    host: number of this process.
    num_hosts: number of processes.
    report_damaged: called with a message for every damaged record that is met, in the order of the
      stream; may raise.
    move: what the stream returns of a filled batch; see `Loader`.
    is_interrupted: see `Loader`.

  Raises:
    ValueError: the batch size is not divisible by the number of hosts.
  """
  if batch_size % num_hosts:
    fitting = -(-batch_size // num_hosts) * num_hosts
    raise ValueError(
      f'{batch_size=} is not divisible by {num_hosts=}; use for example batch_size={fitting}.'
    )
  cv2.setNumThreads(0)
  keep_freed_memory()
  keys, maker = PairKeys(videos, seed), PairMaker(videos, options, image_size)
  share = batch_size // num_hosts

  def make_buffer() -> PairBatch:
    return PairBatch(
      np.empty((share, 2, image_size, image_size, 3), np.uint8),
      np.empty(share, np.int32),
      np.empty(share, np.int32),
      np.empty((share, 2), np.int32),
      [()] * share,
    )

  def fill(step: int, row: int, batch: PairBatch) -> None:
    key = keys[(step * num_hosts + host) * share + row]
    drawn = maker.draw(key)
    maker.crop(drawn, batch.frames[row])
    batch.dataset[row], batch.video[row] = key.dataset, drawn.video
    batch.frame_numbers[row], batch.damaged[row] = drawn.frame_numbers, drawn.damaged

  def report_and_move(batch: PairBatch) -> Any:
    for message in itertools.chain.from_iterable(batch.damaged):
      report_damaged(message)
    return move(batch)

  return Loader(
    fill,
    make_buffer,
    report_and_move if report_damaged else move,
    rows=share,
    first_step=first_step,
    num_threads=options.num_threads,
    stall_seconds=options.stall_seconds,
    is_interrupted=is_interrupted,
  )
