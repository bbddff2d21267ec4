"""The exact search for the highest score that is drawn, on a TPU, for several heads at once.

Each (query, key) pair has a score in VMEM, of which the `count` lowest are drawn. A step of the
search counts the scores up to a threshold: one compare, select and add per 8 x 128 scores, then a
sum over a register. The heads of a program share the latency of that sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Every so many steps the range is halved, whatever the distribution of the scores.
HALVING = 8


class Range(NamedTuple):
  """Two thresholds per head, as the bits of floats, and the number of scores up to each of them.

  `below` has fewer scores than `count`; `upto` has at least `count`.
  """

  below: Int[Array, 'h 1 1']
  upto: Int[Array, 'h 1 1']
  num_below: Float[Array, 'h 1 1']
  num_upto: Float[Array, 'h 1 1']

  def is_open(self, count: int) -> Array:
    """Returns whether `upto` has more than `count` scores and there is a threshold in between."""
    return (self.num_upto != count) & (self.upto - self.below > 1)


def to_bits(values: Float[Array, '...']) -> Int[Array, '...']:
  """Returns integers in the order of positive floats; about 2^23 times their log2."""
  return jax.lax.bitcast_convert_type(values, jnp.int32)


def _bits_of(number: float) -> int:
  return int(np.float32(number).view(np.int32))


def to_floats(bits: Int[Array, '...']) -> Float[Array, '...']:
  """The inverse of `to_bits`."""
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def select_lowest(
  scores: Any, count: int, start: Float[Array, 'h 1 1'], tie_order: Callable[[], Array]
) -> Float[Array, 'h 1 1']:
  """Returns a threshold up to which every head has exactly `count` scores.

  If the `count`-th lowest score is tied with the next one there is no such threshold. `scores` are
  then overwritten: 0 for lower ones, inf for higher ones, and the `tie_order` for tied ones. That
  is rare, as scores come from 23 random bits.

  Args:
    scores: a reference to [h, f, j, i] float32: positive, or inf for pairs that are never drawn.
    count: less than 2^24; every head has at least so many finite scores.
    start: the first threshold to try.
    tie_order: returns [h, f, j, i] float32, at least 1 and all different in a head.
  """
  shape = start.shape
  total = scores.shape[1] * scores.shape[2] * scores.shape[3]
  whole = Range(
    jnp.zeros(shape, jnp.int32),
    jnp.full(shape, _bits_of(float(np.finfo(np.float32).max))),
    # Not constants: Mosaic would give those another layout than the counts that follow.
    start * 0,
    start * 0 + total,
  )
  bounds = _narrow(scores, count, to_bits(start), whole)
  is_tied = bounds.num_upto != count

  @jax.named_scope('ties')
  def replace() -> None:
    border = to_floats(bounds.upto)[:, None]
    old = scores[...]
    new = jnp.where(old == border, tie_order(), jnp.where(old < border, 0.0, jnp.inf))
    # As integers, because TPUs do not broadcast booleans.
    use_new = jnp.broadcast_to(is_tied.astype(jnp.int32)[:, None], old.shape)
    scores[...] = jnp.where(use_new > 0, new, old)

  jax.lax.cond(_any(is_tied), replace, lambda: None)
  range_of_ties = Range(
    jnp.where(is_tied, whole.below, bounds.below),
    jnp.where(is_tied, whole.upto, bounds.upto),
    bounds.num_below,
    bounds.num_upto,
  )
  middle = jnp.full(shape, _bits_of(total / 2))
  return to_floats(_narrow(scores, count, middle, range_of_ties).upto)


def _any(marks: Array) -> Array:
  return jnp.max(marks.astype(jnp.int32)) > 0


def _narrow(scores: Any, count: int, start: Int[Array, 'h 1 1'], first: Range) -> Range:
  """Narrows ranges until `upto` has `count` scores or is next to `below`.

  The loop runs until all heads are done; one that is done keeps a threshold with `count` scores
  meanwhile. In the second call, after ties, it starts from the common first threshold and ends at
  one with `count` scores again.
  """

  def step(state: tuple) -> tuple:
    number, growth, current, threshold = state
    num = _count(scores, to_floats(threshold))
    is_less = num < count
    current = Range(
      jnp.where(is_less, threshold, current.below),
      jnp.where(is_less, current.upto, threshold),
      jnp.where(is_less, num, current.num_below),
      jnp.where(is_less, current.num_upto, num),
    )
    return number + 1, growth * 2, current, _propose(current, first, count, number, growth)

  state = (jnp.int32(1), jnp.float32(1), first, start)
  return jax.lax.while_loop(lambda state: _any(state[2].is_open(count)), step, state)[2]


def _count(scores: Any, threshold: Float[Array, 'h 1 1']) -> Float[Array, 'h 1 1']:
  """Counts the scores of every head up to its threshold; sums over registers first, lanes last."""
  heads, frames, rows, columns = scores.shape
  marks = jnp.where(scores[...] <= threshold[:, None], 1.0, 0.0)
  marks = marks.reshape(heads, frames * rows // 8, 8, columns).sum(axis=1)
  return marks.sum(axis=1, keepdims=True).sum(axis=2, keepdims=True)


def _propose(current: Range, first: Range, count: int, number: Array, growth: Array) -> Array:
  """Chooses the next threshold: where `count` would be reached if scores were evenly distributed.

  As long as one end is still the initial one, it extrapolates from the other end: in proportion to
  the missing count, on a logarithmic scale, and twice as far in every step.
  """
  width = (current.upto - current.below).astype(jnp.float32)
  missing, excess = count - current.num_below, current.num_upto - count
  # A count holds from one score to the next, so aim a little higher; 0.3 was best in trials.
  interpolated = width * (missing + 0.3) / (missing + excess + 0.3)

  def extrapolate(logs: Array) -> Array:
    return jnp.minimum(growth * logs.astype(jnp.float32) + 2.0**14 * growth * growth, width)

  wanted = _bits_of(count)
  up = extrapolate(wanted - to_bits(jnp.maximum(current.num_below, 0.5)))
  down = width - extrapolate(to_bits(current.num_upto) - wanted)
  offset = jnp.where(
    current.upto == first.upto, up, jnp.where(current.below == 0, down, interpolated)
  )
  offset = jnp.where(number % HALVING == 0, width / 2, offset)
  proposed = current.below + offset.astype(jnp.int32)
  return jnp.clip(proposed, current.below + 1, jnp.maximum(current.upto - 1, current.below + 1))
