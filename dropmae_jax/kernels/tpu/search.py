"""The exact search for the last key drawn, on a TPU's vector unit, of several heads at once.

The keys of a program's heads lie in VMEM; what is sought is how far they are drawn. A probe counts
the keys up to a threshold: a compare, a select and an addition for every 8 x 128 of them, and then
the latency of a sum over a register, which the heads of a program share.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Every so many probes a range is halved, whatever is known of the law of its keys.
HALVING = 8


class Range(NamedTuple):
  """Two thresholds of every head, as the bits of floats, and the keys up to each of them.

  `below` has fewer keys than are sought, `upto` has as many or more.
  """

  below: Int[Array, 'h 1 1']
  upto: Int[Array, 'h 1 1']
  num_below: Float[Array, 'h 1 1']
  num_upto: Float[Array, 'h 1 1']

  def is_open(self, count: int) -> Array:
    """Whether a threshold between the two may have just `count` keys, and `upto` has not."""
    return (self.num_upto != count) & (self.upto - self.below > 1)


def to_bits(values: Float[Array, '...']) -> Int[Array, '...']:
  """Returns integers that order as positive floats do; within a bit of 2^23 times their log2."""
  return jax.lax.bitcast_convert_type(values, jnp.int32)


def _bits_of(number: float) -> int:
  return int(np.float32(number).view(np.int32))


def to_floats(bits: Int[Array, '...']) -> Float[Array, '...']:
  """The inverse of `to_bits`."""
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def select_lowest(
  keys: Any, count: int, start: Float[Array, 'h 1 1'], order: Any
) -> Float[Array, 'h 1 1']:
  """Returns a threshold that exactly `count` keys of every head do not exceed.

  Where the `count`-th lowest key is tied with the next one no such threshold exists, until the
  keys in `keys` are replaced: 0 for those that are lower, inf for those that are higher, and those
  that are tied by their `order`, all different. It is rare: of keys from 23 random bits.

  Args:
    keys: a reference to [h, f, j, i] float32: positive, or inf for what is never selected.
    count: less than 2^24; of every head at least so many are finite.
    start: a guess.
    order: a function without arguments to [h, f, j, i] float32 from 1 on.
  """
  shape = start.shape
  total = keys.shape[1] * keys.shape[2] * keys.shape[3]
  whole = Range(
    jnp.zeros(shape, jnp.int32),
    jnp.full(shape, _bits_of(float(np.finfo(np.float32).max))),
    # Not constants: Mosaic would lay them out otherwise than the counts that follow.
    start * 0,
    start * 0 + total,
  )
  found = _narrow(keys, count, to_bits(start), whole)
  is_tied = found.num_upto != count

  @jax.named_scope('ties')
  def replace() -> None:
    border = to_floats(found.upto)[:, None]
    each = keys[...]
    tied = jnp.where(each == border, order(), jnp.where(each < border, 0.0, jnp.inf))
    # As numbers, for TPUs do not broadcast booleans.
    use = jnp.broadcast_to(is_tied.astype(jnp.int32)[:, None], each.shape)
    keys[...] = jnp.where(use > 0, tied, each)

  jax.lax.cond(_any(is_tied), replace, lambda: None)
  of_ties = Range(
    jnp.where(is_tied, whole.below, found.below),
    jnp.where(is_tied, whole.upto, found.upto),
    found.num_below,
    found.num_upto,
  )
  middle = jnp.full(shape, _bits_of(total / 2))
  return to_floats(_narrow(keys, count, middle, of_ties).upto)


def _any(marks: Array) -> Array:
  return jnp.max(marks.astype(jnp.int32)) > 0


def _narrow(keys: Any, count: int, start: Int[Array, 'h 1 1'], first: Range) -> Range:
  """Narrows ranges until `upto` has `count` keys or is next to `below`.

  A head that is done keeps its threshold while others are probed. In the pass after ties all begin
  from one guess, from which such a head finds one with `count` keys again.
  """

  def probe(state: tuple) -> tuple:
    number, growth, found, proposed = state
    num = _count(keys, to_floats(proposed))
    less = num < count
    found = Range(
      jnp.where(less, proposed, found.below),
      jnp.where(less, found.upto, proposed),
      jnp.where(less, num, found.num_below),
      jnp.where(less, found.num_upto, num),
    )
    return number + 1, growth * 2, found, _propose(found, first, count, number, growth)

  state = (jnp.int32(1), jnp.float32(1), first, start)
  return jax.lax.while_loop(lambda state: _any(state[2].is_open(count)), probe, state)[2]


def _count(keys: Any, threshold: Float[Array, 'h 1 1']) -> Float[Array, 'h 1 1']:
  """Counts the keys of every head up to its threshold; over registers first, over lanes last."""
  heads, frames, rows, columns = keys.shape
  marks = jnp.where(keys[...] <= threshold[:, None], 1.0, 0.0)
  marks = marks.reshape(heads, frames * rows // 8, 8, columns).sum(axis=1)
  return marks.sum(axis=1, keepdims=True).sum(axis=2, keepdims=True)


def _propose(found: Range, first: Range, count: int, number: Array, growth: Array) -> Array:
  """Chooses where to probe next: where the count would be reached if it grew evenly in between.

  As long as one end is still the first one, it goes on from the other in proportion to what is
  missing, on a scale of logarithms, and twice as far every time.
  """
  width = (found.upto - found.below).astype(jnp.float32)
  missing, spare = count - found.num_below, found.num_upto - count
  # A count is reached at a key and holds until the next one; 0.3 was best in trials.
  between = width * (missing + 0.3) / (missing + spare + 0.3)

  def step(logs: Array) -> Array:
    return jnp.minimum(growth * logs.astype(jnp.float32) + 2.0**14 * growth * growth, width)

  wanted = _bits_of(count)
  up = step(wanted - to_bits(jnp.maximum(found.num_below, 0.5)))
  down = width - step(to_bits(found.num_upto) - wanted)
  part = jnp.where(found.upto == first.upto, up, jnp.where(found.below == 0, down, between))
  part = jnp.where(number % HALVING == 0, width / 2, part)
  proposed = found.below + part.astype(jnp.int32)
  return jnp.clip(proposed, found.below + 1, jnp.maximum(found.upto - 1, found.below + 1))
