"""Propagates the labels of a clip's first frame to the others, by the similarity of tokens.

The label of a token is a weighted mean of the labels of the k tokens most similar to it in earlier
frames. `protocols.PROTOCOLS` holds the settings of published evaluations. The labels that are
propagated are the soft ones, never a mask.

Earlier frames lie in slots: slot 0 is the first frame, the others are a ring of the last n.
`make_context` says which frames a frame looks at; the clip may begin with copies of its first
frame, which are indices here, not data. Labels are propagated frame by frame, as features come:
only n + 1 frames are held, however long the clip is, and ties at the k-th similarity can be kept.

Sources: as of `protocols`, and RSP 5ea2b91.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from dropmae_jax.runtime.errors import UserError

# Queries at a time; at 480 x 880 their affinities to 21 frames take 55 MB.
CHUNK = 400
# Labels of a clip are padded to a multiple of this, so that few programs are compiled.
LABELS = 8


@dataclasses.dataclass(frozen=True)
class Propagation:
  """How labels are propagated.

  Attributes:
    num_previous: n, how many frames before a frame it looks at, beside the first frame.
    has_copies: whether the clip is preceded by n copies of its first frame.
    radius: cells further away are not looked at; None: there is no limit.
    shape: of the neighbourhood: 'disk' (distance < radius), 'closed disk' (<=) or 'square'.
    is_first_limited: whether the radius holds for the entry of the first frame too; it holds for
      its copies.
    top_k: k.
    temperature: of the softmax over the k similarities; None: the weights are the similarities
      themselves, divided by their sum.
    keeps_ties: whether all that equal the k-th are kept, rather than exactly k.
  """

  num_previous: int
  has_copies: bool
  radius: float | None
  shape: str
  is_first_limited: bool
  top_k: int
  temperature: float | None
  keeps_ties: bool

  def __post_init__(self) -> None:
    for name, least, most in (
      ('num_previous', 1, 1000), ('radius', 0, 1e6), ('top_k', 1, 1000), ('temperature', 1e-6, 1e6),
    ):  # fmt: skip
      value = getattr(self, name)
      if value is not None and not least <= value <= most:
        raise UserError(f'--{name}={value} is not in {least}..{most}; give a number from there.')


class Context(NamedTuple):
  """The frames that a frame looks at, in order; the first entry is the first frame.

  Attributes:
    frames: numbers of frames; -1 in entries that are not used.
    slots: where each lies.
  """

  frames: Int[np.ndarray, ' c']
  slots: Int[np.ndarray, ' c']


def slot(frame: int, propagation: Propagation) -> int:
  """Returns where a frame lies."""
  return 0 if frame == 0 else 1 + (frame - 1) % propagation.num_previous


def make_context(frame: int, propagation: Propagation) -> Context:
  """Returns what a frame, from 1, looks at: always 1 + n entries."""
  previous = range(frame - propagation.num_previous, frame)
  least = 0 if propagation.has_copies else -1
  numbers = [0, *(max(number, least) for number in previous)]
  if not propagation.has_copies:
    numbers[1:] = [number if number > 0 else -1 for number in numbers[1:]]
  frames = np.array(numbers, np.int32)
  slots = np.array([slot(max(number, 0), propagation) for number in numbers], np.int32)
  return Context(frames, slots)


def neighbourhood(
  cell: Int[Array, ''], grid: tuple[int, int], propagation: Propagation
) -> Bool[Array, ' n']:
  """Returns which cells of a grid (height, width) a cell may look at, by their positions."""
  row, column = jnp.divmod(cell, grid[1])
  rows, columns = jnp.divmod(jnp.arange(grid[0] * grid[1]), grid[1])
  down, right = jnp.abs(rows - row), jnp.abs(columns - column)
  if propagation.radius is None:
    return jnp.ones(rows.shape, bool)
  if propagation.shape == 'square':
    return jnp.maximum(down, right) <= propagation.radius
  squared, limit = down**2 + right**2, propagation.radius**2
  return squared < limit if propagation.shape == 'disk' else squared <= limit


@runtime_checkable
class Affinities(Protocol):
  """The similarity of the frames of a clip; `readouts` has those of models."""

  def store(self, number: int) -> None:
    """Puts a frame into its slot, where later frames look at it; the first goes to all slots."""

  def propagate(
    self,
    number: int,
    context: Context,
    labels: Float[Array, 's n labels'],
    grid: tuple[int, int],
  ) -> Float[Array, 'n labels']:
    """Returns the labels of a frame that is not stored yet, from those in the slots."""


def propagate(
  affinities: Affinities,
  num_frames: int,
  labels: Float32[np.ndarray, 'gh gw labels'],
  propagation: Propagation,
) -> Iterator[Float32[np.ndarray, 'gh gw labels']]:
  """Propagates the labels of the first frame of a clip; yields those of every frame, in order.

  Args:
    affinities: of the clip.
    num_frames: of the clip.
    labels: of frame 0.
    propagation: the settings.
  """
  grid, count = labels.shape[:2], labels.shape[2]
  padded = np.pad(labels.reshape(-1, count), [(0, 0), (0, -count % LABELS)])
  slots = jnp.stack([jnp.asarray(padded)] * (1 + propagation.num_previous))
  yield labels
  affinities.store(0)
  for number in range(1, num_frames):
    propagated = affinities.propagate(number, make_context(number, propagation), slots, grid)
    if number < num_frames - 1:
      affinities.store(number)
      slots = put(slots, slot(number, propagation), propagated)
    yield np.asarray(propagated)[:, :count].reshape(labels.shape)


@functools.partial(jax.jit, donate_argnums=0)
def put(
  slots: Float[Array, 's n d'], slot: Int[Array, ''], values: Float[Array, 'n d']
) -> Float[Array, 's n d']:
  """Replaces the content of a slot, in place."""
  return slots.at[slot].set(values)


@functools.partial(jax.jit, static_argnames=('grid', 'propagation'))
def from_features(
  query: Float[Array, 'n d'],
  features: Float[Array, 's n d'],
  labels: Float[Array, 's n labels'],
  frames: Int[Array, ' c'],
  slots: Int[Array, ' c'],
  *,
  grid: tuple[int, int],
  propagation: Propagation,
) -> Float[Array, 'n labels']:
  """Returns the labels of a frame, by the products of its features with those of earlier frames.

  Products are float32 everywhere: similarities of neighbouring cells differ by 1e-4, and bfloat16
  products would reorder them.

  Args:
    query: features of the frame, of unit length.
    features: likewise, of the frames in all slots.
    labels: of the frames in all slots.
    frames: of the context (`make_context`).
    slots: likewise.
    grid: of a frame in tokens, (height, width).
    propagation: the settings.
  """

  def propagate(row: tuple[Array, Array]) -> Array:
    cell, query = row
    near = neighbourhood(cell, grid, propagation)
    affinities = jnp.einsum('d,sjd->sj', query, features, precision='highest')
    return _weighted_labels(affinities, labels, frames, slots, near, propagation)

  return jax.lax.map(propagate, (jnp.arange(len(query)), query), batch_size=CHUNK)


@functools.partial(jax.jit, static_argnames=('grid', 'propagation'))
def from_affinities(
  affinities: Float[Array, 'n s n'],
  labels: Float[Array, 's n labels'],
  frames: Int[Array, ' c'],
  slots: Int[Array, ' c'],
  *,
  grid: tuple[int, int],
  propagation: Propagation,
) -> Float[Array, 'n labels']:
  """Returns the labels of a frame, by its affinities to the cells of the frames in all slots."""

  def propagate(row: tuple[Array, Array]) -> Array:
    cell, affinities = row
    near = neighbourhood(cell, grid, propagation)
    return _weighted_labels(affinities, labels, frames, slots, near, propagation)

  return jax.lax.map(propagate, (jnp.arange(len(affinities)), affinities), batch_size=CHUNK)


def _weighted_labels(
  affinities: Float[Array, 's n'],
  labels: Float[Array, 's n labels'],
  frames: Int[Array, ' c'],
  slots: Int[Array, ' c'],
  near: Bool[Array, ' n'],
  propagation: Propagation,
) -> Float[Array, ' labels']:
  """Returns the label of one query cell."""
  is_free = (jnp.arange(len(frames)) == 0) & (not propagation.is_first_limited)
  is_used = (near | is_free[:, None]) & (frames >= 0)[:, None]
  candidates = jnp.where(is_used, affinities[slots], -jnp.inf).reshape(-1)
  choices = labels[slots].reshape(candidates.size, -1)
  top, indices = jax.lax.top_k(candidates, min(propagation.top_k, candidates.size))
  if propagation.keeps_ties:
    top, indices = jnp.where(candidates >= top[-1], candidates, -jnp.inf), slice(None)
  return jnp.matmul(_weights(top, propagation), choices[indices], precision='highest')


def _weights(affinities: Float[Array, ' k'], propagation: Propagation) -> Float[Array, ' k']:
  if propagation.temperature is not None:
    return jax.nn.softmax(affinities / propagation.temperature)
  values = jnp.where(jnp.isfinite(affinities), affinities, 0)
  return values / values.sum()
