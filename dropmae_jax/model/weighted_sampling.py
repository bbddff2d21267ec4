"""Weighted sampling without replacement, for many heads at once: which pairs ASAD drops.

The distribution and the number of draws are exactly as published, but nothing is sorted. Noise is
a keyed hash, scores are rounded to ranks of 16 bits, and the last rank that is drawn is found by a
search that reads the ranks seven times.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt16, UInt32

# Ranks are positive floats with 6 bits of exponent, from 2^-4 on, and 10 bits of mantissa.
MIN_RANKED = 2.0**-4
MANTISSA_BITS = 10
# The rank of a pair that is never drawn.
NEVER = 2**16 - 1
# Each pass of the search divides the range of ranks by 5; 5^7 is more than the number of ranks.
WAYS, PASSES = 5, 7


class HeadSeeds(NamedTuple):
  """What is random in the draws of a head.

  Attributes:
    first: a word that keys the noise.
    second: another.
    ties_from_end: the tie-break direction. Of pairs with the rank that is drawn last, those at the
      end are drawn if True, else those at the start, in the order of (f, i, n).
  """

  first: UInt32[Array, 'b m']
  second: UInt32[Array, 'b m']
  ties_from_end: Bool[Array, 'b m']


def head_seeds(keys: Key[Array, ' b'], heads: int) -> HeadSeeds:
  """Derives the seeds of every sample's heads from its key alone, so they are equal on any mesh."""
  words = jax.vmap(lambda key: jax.random.bits(key, (2, heads), jnp.uint32))(keys)
  coins = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(heads,)))
  return HeadSeeds(words[:, 0], words[:, 1], coins(keys))


def exponential_noise(seeds: HeadSeeds, shape: tuple[int, int, int]) -> Float[Array, 'b f m i n']:
  """Draws exponential noise, each number from its own index and the seed of its head alone.

  The random bits are a hash of the index: two rounds of a 32-bit mixer (Wellons, "Prospecting for
  hash functions", 2018), before each of which a word of the seed is mixed in. Nothing is stored or
  communicated.

  Args:
    seeds: of the heads.
    shape: f, i, n.
  """
  frames, rows, columns = shape
  frame, row, column = (
    jax.lax.broadcasted_iota(jnp.uint32, (frames, 1, rows, columns), axis) for axis in (0, 2, 3)
  )
  index = (frame * rows + row) * columns + column
  return noise_at(index, *(expand_heads(words) for words in seeds[:2]))


def expand_heads(per_head: Shaped[Array, 'b m']) -> Shaped[Array, 'b 1 m 1 1']:
  """Reshapes a number per head so that it broadcasts with arrays [b, f, m, i, n]."""
  return per_head[:, None, :, None, None]


def noise_at(index: UInt32[Array, '...'], first: Array, second: Array) -> Float[Array, '...']:
  """Returns exponential noise for indices and the two words of a seed."""
  return -jnp.log(to_uniform(mix(mix(index ^ first) + second)))


def to_uniform(bits: UInt32[Array, '...']) -> Float[Array, '...']:
  """Returns multiples of 2^-24 strictly between 0 and 1, from the upper 23 bits."""
  # As the mantissa of a float these bits give a number from 1 to 2.
  one = np.float32(1).view(np.uint32)
  return jax.lax.bitcast_convert_type((bits >> 9) | one, jnp.float32) - (1 - 2.0**-24)


def mix(bits: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """Hashes 32-bit words; every input bit affects all output bits, and no two words collide."""
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
  bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
  return bits ^ (bits >> 16)


def rank_bits(scores: Float[Array, '...']) -> Int[Array, '...']:
  """Rounds positive numbers to 16-bit integers in the same order, all less than NEVER."""
  bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
  lowest_bits = int(np.float32(MIN_RANKED).view(np.int32))
  return jnp.clip((bits - lowest_bits) >> (23 - MANTISSA_BITS), 0, NEVER - 1)


def to_ranks(scores: Float[Array, 'b f m i n']) -> UInt16[Array, 'b f m i n']:
  """Returns the `rank_bits` of positive numbers, and NEVER for infinity."""
  return jnp.where(jnp.isinf(scores), NEVER, rank_bits(scores)).astype(jnp.uint16)


class Cutoff(NamedTuple):
  """Which ranks of a (sample, head) are drawn: all below a threshold, and some equal to it.

  Of those equal to it, the pairs at an index less than `tie_end` are drawn, in the order of
  (f, i, n); or, if `ties_from_end`, all others.
  """

  threshold: Int[Array, 'b 1 m 1 1']
  tie_end: Int[Array, 'b 1 m 1 1']
  ties_from_end: Bool[Array, 'b 1 m 1 1']


def lowest(
  ranks: UInt16[Array, 'b f m i n'], count: int, ties_from_end: Bool[Array, 'b 1 m 1 1']
) -> Bool[Array, 'b f m i n']:
  """Marks exactly the `count` lowest ranks of every (sample, head); see `find_cutoff`."""
  cutoff, ranks = find_cutoff(ranks, count, ties_from_end)
  _, f, _, i, n = ranks.shape
  index = rearrange(jnp.arange(f * i * n), '(f i n) -> f 1 i n', f=f, i=i)
  wins_tie = (index < cutoff.tie_end) ^ cutoff.ties_from_end
  return ranks < (cutoff.threshold + wins_tie).astype(jnp.uint16)


def find_cutoff(
  ranks: UInt16[Array, 'b f m i n'], count: int, ties_from_end: Bool[Array, 'b 1 m 1 1']
) -> tuple[Cutoff, UInt16[Array, 'b f m i n']]:
  """Finds what separates the `count` lowest ranks of every (sample, head) from the others.

  Args:
    ranks: of one or two frames. If fewer than `count` are not NEVER, fewer are found.
    count: how many ranks to find; at least 1.
    ties_from_end: the tie-break direction, see `HeadSeeds`.

  Returns:
    the cutoff, and the ranks as stored in memory: use these, or XLA may compute them again.
  """
  bounds, ranks = _search(ranks, count)
  # Ties before `tie_end`: those that are drawn, or else those that are not.
  num_ties = jnp.where(ties_from_end, bounds.up_to - count, count - bounds.below)
  tie_end = _end_of_ties(ranks, bounds.threshold, num_ties)
  return Cutoff(bounds.threshold, tie_end, ties_from_end), ranks


class _Threshold(NamedTuple):
  """The `count`-th lowest rank of every (sample, head), and how many are below and up to it."""

  threshold: Int[Array, 'b 1 m 1 1']
  below: Int[Array, 'b 1 m 1 1']
  up_to: Int[Array, 'b 1 m 1 1']


def _search(
  ranks: UInt16[Array, 'b f m i n'], count: int
) -> tuple[_Threshold, UInt16[Array, 'b f m i n']]:
  """Finds the `count`-th lowest rank, and returns it with the ranks.

  Each pass narrows the range to a fifth, by counting the ranks up to four thresholds. The four
  counts of a row are packed into one integer, 8 bits each, so that one sum gives them all. Rows of
  more than 255 are split into equal parts.
  """
  b, f, m, i, n = ranks.shape
  parts = next(parts for parts in range(1, n + 1) if n % parts == 0 and n // parts <= 255)

  def narrow(number: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
    del number
    width, low, below, up_to, ranks = state
    thresholds = [low + width * way for way in range(1, WAYS)]
    # All of this depends on the thresholds. What does not, remat would move out of the loop and
    # store as large arrays.
    packed = sum(
      (ranks <= jnp.minimum(threshold, NEVER).astype(jnp.uint16)).astype(jnp.int32) << (8 * k)
      for k, threshold in enumerate(thresholds)
    )
    row_counts = rearrange(packed, 'b f m i (s n) -> b f m i s n', s=parts).sum(axis=-1)
    for k, threshold in enumerate(thresholds):
      field = jax.lax.shift_right_logical(row_counts, jnp.int32(8 * k)) & 255
      num = _sum_frames(field.sum(axis=(3, 4)))
      is_low = num < count
      low, below = jnp.where(is_low, threshold, low), jnp.where(is_low, num, below)
      up_to = jnp.where(is_low, up_to, jnp.minimum(num, up_to))
    return width // WAYS, low, below, up_to, ranks

  zero = jnp.zeros((b, 1, m, 1, 1), jnp.int32)
  initial = (jnp.int32(WAYS ** (PASSES - 1)), zero - 1, zero, zero + f * i * n, ranks)
  # On CPUs XLA recomputes the ranks wherever they are read, unless a loop carries them. On other
  # devices an unrolled loop needs fewer kernels, the first of which also computes the ranks.
  in_loop, unrolled = (
    partial(jax.lax.fori_loop, 0, PASSES, narrow, unroll=unroll) for unroll in (False, True)
  )
  _, low, below, up_to, ranks = jax.lax.platform_dependent(initial, cpu=in_loop, default=unrolled)
  return _Threshold(low + 1, below, up_to), ranks


def _sum_frames(per_frame: Int[Array, 'b f m']) -> Int[Array, 'b 1 m 1 1']:
  """Sums over frames. As part of the sum over rows, XLA would transpose the ranks for it."""
  total = sum(per_frame[:, frame] for frame in range(per_frame.shape[1]))
  return total[:, None, :, None, None]


def _end_of_ties(
  ranks: UInt16[Array, 'b f m i n'],
  rank: Int[Array, 'b 1 m 1 1'],
  count: Int[Array, 'b 1 m 1 1'],
) -> Int[Array, 'b 1 m 1 1']:
  """Returns the index after the `count`-th pair with this rank, in the order of (f, i, n).

  Pairs are counted by row first; then only the row in which the count is reached is gathered and
  looked at pair by pair.
  """
  _, f, _, i, n = ranks.shape
  rank = rank.astype(jnp.uint16)
  needed = count[:, 0, :, 0]
  row_counts = (ranks == rank).sum(axis=-1, dtype=jnp.int32)
  row_counts = rearrange(row_counts, 'b f m i -> b m (f i)')
  reached = _cumulative_sums(row_counts)
  last = jnp.minimum((reached < needed).sum(axis=-1), f * i - 1)
  rows = jnp.take_along_axis(ranks, (last % i)[:, None, :, None, None], axis=3)[:, :, :, 0]
  row = jnp.where((last < i)[..., None], rows[:, 0], rows[:, -1]) == rank[:, 0, :, 0]
  before = jnp.max(jnp.where(reached < needed, reached, 0), axis=-1, keepdims=True)
  columns = (_cumulative_sums(row.astype(jnp.int32)) < needed - before).sum(axis=-1)
  return jnp.where(needed[..., 0] > 0, last * n + columns + 1, 0)[:, None, :, None, None]


def _cumulative_sums(numbers: Int[Array, 'b m k']) -> Int[Array, 'b m k']:
  """Returns cumulative sums, by one matrix product; exact up to 2^24."""
  triangle = jnp.triu(jnp.ones((numbers.shape[-1],) * 2, jnp.float32))
  sums = jnp.matmul(numbers.astype(jnp.float32), triangle, precision='highest')
  return sums.astype(jnp.int32)


def sample_drops(
  seeds: HeadSeeds, weights: Float[Array, 'b f m i n'], count: int
) -> Bool[Array, 'b f m i n']:
  """Draws `count` pairs per (sample, head) without replacement, jointly over all queries.

  As in `asad.draw_without_replacement`, the lowest scores E / weight are drawn, with E exponential.
  Here scores are compared by ranks of 16 bits. A few pairs in some thousand tie with the last one
  that is drawn, to within 2^-10. The random tie-break direction makes up for that: no position is
  favoured.

  Args:
    seeds: of the heads.
    weights: not negative; a pair of weight 0 is never drawn. The weights of a (sample, head) must
      not sum to much more than `count`, so that the scores around the last one drawn are in the
      range of the ranks: at most x (sum of weights) scores are expected below x, so the last one
      is about count / (sum of weights) or more. ASAD meets this, as it drops at least one pair per
      query on average, and the weights of a query sum to 1 at most.
    count: at most the number of positive weights of a (sample, head).
  """
  _, f, _, i, n = weights.shape
  noise = exponential_noise(seeds, (f, i, n))
  ranks = to_ranks(jnp.where(weights > 0, noise / weights, jnp.inf))
  return lowest(ranks, count, expand_heads(seeds.ties_from_end))
