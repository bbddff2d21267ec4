"""Weighted draws without replacement, of many at once: which pairs ASAD drops.

Exactly the published law and number, without a sort: noise by a keyed hash, ranks of 16 bits, and a
search for the border that reads the ranks seven times.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt16, UInt32

# Ranks are positive floats of 6 bits of exponent, from 2^-4 on, and 10 of mantissa.
LEAST_RANKED = 2.0**-4
MANTISSA_BITS = 10
# The rank of what is never drawn.
NEVER = 2**16 - 1
# 5^7 is more than the number of ranks.
WAYS, PASSES = 5, 7


class HeadSeeds(NamedTuple):
  """What is random in the draws of every head: two words for its noise, and from where ties go."""

  first: UInt32[Array, 'b m']
  second: UInt32[Array, 'b m']
  from_behind: Bool[Array, 'b m']


def head_seeds(keys: Key[Array, ' b'], heads: int) -> HeadSeeds:
  """Makes seeds for the heads of every sample, from its key alone: the same on any mesh."""
  words = jax.vmap(lambda key: jax.random.bits(key, (2, heads), jnp.uint32))(keys)
  coins = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(heads,)))
  return HeadSeeds(words[:, 0], words[:, 1], coins(keys))


def exponential_noise(seeds: HeadSeeds, shape: tuple[int, int, int]) -> Float[Array, 'b f m i n']:
  """Draws from the exponential law, every number by its own place and its head's seed alone.

  The bits are a hash of the place, keyed by two words: nothing is stored or communicated. The hash
  is two rounds of a 32-bit mixer (Wellons, "Prospecting for hash functions", 2018) with a word of
  the key before each.

  Args:
    seeds: of the heads.
    shape: f, i, n.
  """
  frames, rows, columns = shape
  frame, row, column = (
    jax.lax.broadcasted_iota(jnp.uint32, (frames, 1, rows, columns), axis) for axis in (0, 2, 3)
  )
  place = (frame * rows + row) * columns + column
  return noise_at(place, *(of_heads(words) for words in seeds[:2]))


def of_heads(numbers: Shaped[Array, 'b m']) -> Shaped[Array, 'b 1 m 1 1']:
  """Lets a number for every head meet arrays of pairs."""
  return numbers[:, None, :, None, None]


def noise_at(place: UInt32[Array, '...'], first: Array, second: Array) -> Float[Array, '...']:
  """Returns draws from the exponential law by places and the two words of their keys."""
  return -jnp.log(to_uniform(mix(mix(place ^ first) + second)))


def to_uniform(bits: UInt32[Array, '...']) -> Float[Array, '...']:
  """Returns numbers strictly between 0 and 1; 23 bits and a half are what float32 holds exactly."""
  # 23 bits after the one of a float make it lie between 1 and 2.
  one = np.float32(1).view(np.uint32)
  return jax.lax.bitcast_convert_type((bits >> 9) | one, jnp.float32) - (1 - 2.0**-24)


def mix(bits: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """Spreads every bit of a word over all of it; a permutation of the words."""
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
  bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
  return bits ^ (bits >> 16)


def rank_bits(values: Float[Array, '...']) -> Int[Array, '...']:
  """Rounds positive values to 16 bits that order as they do, all less than NEVER."""
  bits = jax.lax.bitcast_convert_type(values, jnp.int32)
  least = int(np.float32(LEAST_RANKED).view(np.int32))
  return jnp.clip((bits - least) >> (23 - MANTISSA_BITS), 0, NEVER - 1)


def to_ranks(values: Float[Array, 'b f m i n']) -> UInt16[Array, 'b f m i n']:
  """Ranks positive values as `rank_bits` does, and infinity as NEVER."""
  return jnp.where(jnp.isinf(values), NEVER, rank_bits(values)).astype(jnp.uint16)


class Border(NamedTuple):
  """Which ranks of a (sample, head) are the lowest ones: those below a threshold, and some ties.

  Ties are taken that lie at less than `cut` in the order of (f, i, n), or else, if they are taken
  from behind, the other ones.
  """

  threshold: Int[Array, 'b 1 m 1 1']
  cut: Int[Array, 'b 1 m 1 1']
  from_behind: Bool[Array, 'b 1 m 1 1']


def lowest(
  ranks: UInt16[Array, 'b f m i n'], count: int, from_behind: Bool[Array, 'b 1 m 1 1']
) -> Bool[Array, 'b f m i n']:
  """Marks exactly the `count` lowest ranks of every (sample, head); see `find_border`."""
  border, ranks = find_border(ranks, count, from_behind)
  _, f, _, i, n = ranks.shape
  place = rearrange(jnp.arange(f * i * n), '(f i n) -> f 1 i n', f=f, i=i)
  is_taken = (place < border.cut) ^ border.from_behind
  return ranks < (border.threshold + is_taken).astype(jnp.uint16)


def find_border(
  ranks: UInt16[Array, 'b f m i n'], count: int, from_behind: Bool[Array, 'b 1 m 1 1']
) -> tuple[Border, UInt16[Array, 'b f m i n']]:
  """Finds what parts the `count` lowest ranks of every (sample, head) from the others.

  Args:
    ranks: of one frame or two, of which at least `count` are not NEVER; else fewer are found.
    count: how many are sought; at least 1.
    from_behind: of equal ranks at the border, whether the last ones are taken or the first.

  Returns:
    the border, and the ranks, which should be read from here: they are in memory.
  """
  found, ranks = _search(ranks, count)
  num_ties = jnp.where(from_behind, found.up_to - count, count - found.below)
  cut = _end_of(ranks, found.threshold, num_ties)
  return Border(found.threshold, cut, from_behind), ranks


class _Found(NamedTuple):
  """The `count`-th lowest rank of every (sample, head), how many are below it, and up to it."""

  threshold: Int[Array, 'b 1 m 1 1']
  below: Int[Array, 'b 1 m 1 1']
  up_to: Int[Array, 'b 1 m 1 1']


def _search(
  ranks: UInt16[Array, 'b f m i n'], count: int
) -> tuple[_Found, UInt16[Array, 'b f m i n']]:
  """Finds the `count`-th lowest rank, and returns it with the ranks.

  Each pass narrows the range to a fifth. Its four counts share one sum over a row, of 8 bits each;
  rows of more than 255 are cut in equal parts.
  """
  b, f, m, i, n = ranks.shape
  parts = next(parts for parts in range(1, n + 1) if n % parts == 0 and n // parts <= 255)

  def narrow(number: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
    del number
    width, low, lower, upper, ranks = found
    borders = [low + width * way for way in range(1, WAYS)]
    # What does not depend on the borders, remat would take out of the loop, as large arrays.
    marks = sum(
      (ranks <= jnp.minimum(border, NEVER).astype(jnp.uint16)).astype(jnp.int32) << (8 * k)
      for k, border in enumerate(borders)
    )
    of_row = rearrange(marks, 'b f m i (s n) -> b f m i s n', s=parts).sum(axis=-1)
    for k, border in enumerate(borders):
      field = jax.lax.shift_right_logical(of_row, jnp.int32(8 * k)) & 255
      up_to = _over_frames(field.sum(axis=(3, 4)))
      is_low = up_to < count
      low, lower = jnp.where(is_low, border, low), jnp.where(is_low, up_to, lower)
      upper = jnp.where(is_low, upper, jnp.minimum(up_to, upper))
    return width // WAYS, low, lower, upper, ranks

  zero = jnp.zeros((b, 1, m, 1, 1), jnp.int32)
  begin = (jnp.int32(WAYS ** (PASSES - 1)), zero - 1, zero, zero + f * i * n, ranks)
  # CPUs would compute ranks anew wherever they are read; what goes through a loop is in memory.
  # Elsewhere, passes written out need fewer kernels, and the first one makes the ranks too.
  in_loop, written_out = (
    partial(jax.lax.fori_loop, 0, PASSES, narrow, unroll=unroll) for unroll in (False, True)
  )
  _, low, lower, upper, ranks = jax.lax.platform_dependent(begin, cpu=in_loop, default=written_out)
  return _Found(low + 1, lower, upper), ranks


def _over_frames(numbers: Int[Array, 'b f m']) -> Int[Array, 'b 1 m 1 1']:
  """Adds up frames. As one sum with what it is of, XLA would copy that into another order."""
  return sum(numbers[:, frame] for frame in range(numbers.shape[1]))[:, None, :, None, None]


def _end_of(
  ranks: UInt16[Array, 'b f m i n'],
  rank: Int[Array, 'b 1 m 1 1'],
  count: Int[Array, 'b 1 m 1 1'],
) -> Int[Array, 'b 1 m 1 1']:
  """Returns the place after the `count`-th of a rank, in the order of (f, i, n).

  Only the row in which the count is reached needs a look at its single pairs, so that one row is
  gathered instead of numbering all that have this rank.
  """
  _, f, _, i, n = ranks.shape
  rank = rank.astype(jnp.uint16)
  needed = count[:, 0, :, 0]
  of_row = (ranks == rank).sum(axis=-1, dtype=jnp.int32)
  of_row = rearrange(of_row, 'b f m i -> b m (f i)')
  reached = _running_sums(of_row)
  last = jnp.minimum((reached < needed).sum(axis=-1), f * i - 1)
  rows = jnp.take_along_axis(ranks, (last % i)[:, None, :, None, None], axis=3)[:, :, :, 0]
  row = jnp.where((last < i)[..., None], rows[:, 0], rows[:, -1]) == rank[:, 0, :, 0]
  before = jnp.max(jnp.where(reached < needed, reached, 0), axis=-1, keepdims=True)
  columns = (_running_sums(row.astype(jnp.int32)) < needed - before).sum(axis=-1)
  return jnp.where(needed[..., 0] > 0, last * n + columns + 1, 0)[:, None, :, None, None]


def _running_sums(numbers: Int[Array, 'b m k']) -> Int[Array, 'b m k']:
  """Sums up to every place, by one matrix product; exact up to 2^24."""
  upper = jnp.triu(jnp.ones((numbers.shape[-1],) * 2, jnp.float32))
  sums = jnp.matmul(numbers.astype(jnp.float32), upper, precision='highest')
  return sums.astype(jnp.int32)


def sample_drops(
  seeds: HeadSeeds, weights: Float[Array, 'b f m i n'], count: int
) -> Bool[Array, 'b f m i n']:
  """Draws `count` pairs per (sample, head) without replacement, jointly over all queries.

  Successive weighted draws without replacement are the `count` least of E / weight with E
  exponential: the Gumbel-top-k trick, and the law of torch.multinomial. These are compared by
  ranks of 16 bits. What is equal within 2^-10 at the border, a few pairs of some thousand, is taken
  from the front or from behind, as the seed says, which favours no place.

  Args:
    seeds: of the heads.
    weights: none negative; a pair of weight 0 is never drawn. Those of a (sample, head) sum to
      `count` at most, or not much more: the border then has at least rank 2^0, for E / weight is
      less than count / (sum of weights) for less than `count` pairs in the mean. So it is for
      ASAD, where a query's weights sum to 1 at most.
    count: at most the number of positive weights of a (sample, head).
  """
  _, f, _, i, n = weights.shape
  noise = exponential_noise(seeds, (f, i, n))
  ranks = to_ranks(jnp.where(weights > 0, noise / weights, jnp.inf))
  return lowest(ranks, count, of_heads(seeds.from_behind))
