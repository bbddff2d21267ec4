"""Follows one object through each of several sequences: a step of the network for every frame.

The template is cut from the first frame and stays. Each search region is cut around the last box,
and the new box is read off the maps of the network there. Sequences are followed side by side, as
the samples of a batch; their boxes do not depend on how many there are.
"""

import concurrent.futures
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Float64, UInt8

from dropmae_jax.model import pixels
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking import crops, head
from dropmae_jax.tracking.crops import CropOptions
from dropmae_jax.tracking.model import TrackerArchitecture, abstract_tracker


class Source(NamedTuple):
  """What to follow.

  Attributes:
    name: for messages.
    first_box: (x, y, w, h) in pixels of the first frame.
    frames: RGB, in order; read in a thread.
  """

  name: str
  first_box: Float[np.ndarray, '4']
  frames: Iterator[UInt8[np.ndarray, 'h w c']]


class Located(NamedTuple):
  """Where the network sees the objects.

  Attributes:
    boxes: (cx, cy, w, h), fractions of the search region.
    scores: of the centre map, in the cell of the box; 0 to 1.
  """

  boxes: Float32[np.ndarray, 'b 4']
  scores: Float32[np.ndarray, ' b']


# From templates and search regions, uint8 [b, size, size, 3].
Locate = Callable[[np.ndarray, np.ndarray], Located]


class Track(NamedTuple):
  """The result for a sequence.

  Attributes:
    boxes: (x, y, w, h) in pixels; the first is the given one.
    scores: of the network; 1 for the first frame.
    seconds: that each frame took, those of a batch shared among its sequences.
  """

  boxes: Float64[np.ndarray, 'n 4']
  scores: Float32[np.ndarray, ' n']
  seconds: Float64[np.ndarray, ' n']


def cosine_window(side: int) -> Float32[np.ndarray, 'side side']:
  """Returns the Hann window that scores are weighted by, so that objects move little per frame."""
  half = 0.5 * (1 - np.cos(2 * np.pi * np.arange(1, side + 1) / (side + 1)))
  return np.outer(half, half).astype(np.float32)


def make_locate(
  architecture: TrackerArchitecture, params: dict, statistics: dict, *, keep_rate: float = 0.7
) -> Locate:
  """Returns the network's step, compiled at its first call for each size of batch.

  Args:
    architecture: of the tracker.
    params: its parameters.
    statistics: running ones of its head.
    keep_rate: share of the search tokens that each elimination keeps.
  """
  graphdef, _ = abstract_tracker(architecture)
  window = cosine_window(architecture.search_grid)
  kept = architecture.kept(keep_rate)

  @jax.jit
  def step(params: dict, statistics: dict, templates: Array, searches: Array) -> Located:
    tracker = nnx.merge(graphdef, params)
    maps, _ = tracker(
      pixels.normalise(templates), pixels.normalise(searches), statistics, kept=kept
    )
    cells = head.best_cell(maps.score * window)
    scores = jnp.take_along_axis(maps.score.reshape(len(cells), -1), cells[:, None], axis=1)
    return Located(head.decode(maps, cells), scores[:, 0])

  on_device = jax.device_put((params, statistics))

  def locate(templates: np.ndarray, searches: np.ndarray) -> Located:
    return jax.device_get(step(*on_device, templates, searches))

  return locate


class _Followed:
  """A source that is being followed; its next frame is read meanwhile."""

  def __init__(
    self, source: Source, options: CropOptions, pool: concurrent.futures.Executor
  ) -> None:
    self.source, self._options, self._pool = source, options, pool
    self._boxes = [np.asarray(source.first_box, np.float64)]
    self._scores, self._seconds = [1.0], [0.0]
    frame = next(source.frames, None)
    if frame is None:
      raise UserError(f'{source.name} has no frames; leave it out.')
    height, width = frame.shape[:2]
    if not (self._boxes[0][2:] <= [2 * width, 2 * height]).all():
      raise UserError(
        f'the first box of {source.name}, {self._boxes[0].tolist()}, is more than twice as large as'
        f' the frame of {width} x {height} pixels; correct it.'
      )
    self.template, _ = crops.crop(
      frame, self._boxes[0], options.template_factor, options.template_size
    )
    self._read_next()

  def _read_next(self) -> None:
    self._next = self._pool.submit(next, self.source.frames, None)

  def search_region(self) -> UInt8[np.ndarray, 'size size c'] | None:
    """Cuts the search region out of the next frame; returns None after the last one."""
    frame = self._next.result()
    if frame is None:
      return None
    self._image_size = frame.shape[:2]
    region, self._resize_factor = crops.crop(
      frame, self._boxes[-1], self._options.search_factor, self._options.search_size
    )
    self._read_next()
    return region

  def add(self, box: Float32[np.ndarray, '4'], score: float, seconds: float) -> None:
    """Adds the box of that frame: (cx, cy, w, h), fractions of the search region."""
    found = crops.box_in_image(box, self._boxes[-1], self._resize_factor, self._options.search_size)
    self._boxes.append(crops.clip_box(found, *self._image_size))
    self._scores.append(score)
    self._seconds.append(seconds)

  def track(self) -> Track:
    """Returns the result."""
    boxes, seconds = np.stack(self._boxes), np.array(self._seconds)
    return Track(boxes, np.array(self._scores, np.float32), seconds)


def follow(
  sources: Iterable[Source],
  locate: Locate,
  options: CropOptions,
  *,
  batch_size: int = 1,
  on_frame: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Source, Track]]:
  """Follows the objects of several sources, `batch_size` of them at a time.

  Args:
    sources: one after another takes the place of one that is finished.
    locate: the network; always called with `batch_size` samples.
    options: of the crops.
    batch_size: at least 1.
    on_frame: called when a source has one more box.

  Yields:
    A source and its result, as soon as it is finished.

  Raises:
    UserError: a first box has no area, or a frame cannot be read.
  """
  waiting, followed = iter(sources), []
  with concurrent.futures.ThreadPoolExecutor(batch_size) as pool:
    while True:
      began = time.perf_counter()
      for source in itertools.islice(waiting, batch_size - len(followed)):
        followed.append(_Followed(source, options, pool))
        on_frame()
      if not followed:
        return
      regions = [each.search_region() for each in followed]
      going_on = [pair for pair in zip(followed, regions, strict=True) if pair[1] is not None]
      if going_on:
        located = locate(*_batch(going_on, batch_size))
        seconds = (time.perf_counter() - began) / len(going_on)
        for (each, _), box, score in zip(going_on, located.boxes, located.scores, strict=False):
          each.add(box, float(score), seconds)
          on_frame()
      for each, region in zip(followed, regions, strict=True):
        if region is None:
          yield each.source, each.track()
      followed = [each for each, _ in going_on]


def _batch(
  going_on: list[tuple[_Followed, np.ndarray]], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns templates and search regions, as many as the network's program is for."""
  templates = [each.template for each, _ in going_on]
  regions = [region for _, region in going_on]
  missing = batch_size - len(going_on)
  return np.stack(templates + templates[:1] * missing), np.stack(regions + regions[:1] * missing)
