"""Weighted draws without replacement, of many at once: which pairs ASAD drops.

Exactly the published law and number, without a sort: noise by a keyed hash, ranks of 16 bits, and a
search for the border that reads the ranks seven times.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key, UInt16, UInt32

# Ranks are positive floats of 6 bits of exponent, from 2^-4 on, and 10 of mantissa.
LEAST_RANKED = 2.0**-4
MANTISSA_BITS = 10
# The rank of what is never drawn.
NEVER = 2**16 - 1
# 5^7 is more than the number of ranks.
WAYS, PASSES = 5, 7


def exponential_noise(keys: Key[Array, ' b'], shape: tuple[int, ...]) -> Float[Array, 'b f m i n']:
  """Draws from the exponential law, every number by its own place and its sample's key alone.

  The bits are a hash of the place, keyed by two words for each sample and head: nothing is stored
  or communicated, and the noise is the same on any mesh. The hash is two rounds of a 32-bit mixer
  (Wellons, "Prospecting for hash functions", 2018) with a word of the key before each.

  Args:
    keys: one per sample.
    shape: f, m, i, n.
  """
  frames, heads, rows, columns = shape
  words = key_words(keys, heads)[:, :, None, :, None, None]
  frame, row, column = (
    jax.lax.broadcasted_iota(jnp.uint32, (frames, 1, rows, columns), axis) for axis in (0, 2, 3)
  )
  place = (frame * rows + row) * columns + column
  return noise_at(place, words[:, 0], words[:, 1])


def key_words(keys: Key[Array, ' b'], heads: int) -> UInt32[Array, 'b 2 m']:
  """Returns the two words that the noise of every sample and head is keyed by."""
  return jax.vmap(lambda key: jax.random.bits(key, (2, heads), jnp.uint32))(keys)


def noise_at(place: UInt32[Array, '...'], first: Array, second: Array) -> Float[Array, '...']:
  """Returns draws from the exponential law by places and the two words of their keys."""
  return -jnp.log(to_uniform(mix(mix(place ^ first) + second)))


def to_uniform(bits: UInt32[Array, '...']) -> Float[Array, '...']:
  """Returns numbers strictly between 0 and 1; 23 bits and a half are what float32 holds exactly."""
  # 23 bits after the one of a float make it lie between 1 and 2.
  one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.uint32)
  return jax.lax.bitcast_convert_type((bits >> 9) | one, jnp.float32) - (1 - 2.0**-24)


def mix(bits: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """Spreads every bit of a word over all of it; a permutation of the words."""
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
  bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
  return bits ^ (bits >> 16)


def to_ranks(
  values: Float[Array, 'b f m i n'], scale: Float[Array, 'b 1 m 1 1']
) -> UInt16[Array, 'b f m i n']:
  """Rounds positive values, times `scale`, to 16 bits that order as they do; infinity to NEVER."""
  bits = jax.lax.bitcast_convert_type(values * scale, jnp.int32)
  least = jax.lax.bitcast_convert_type(jnp.float32(LEAST_RANKED), jnp.int32)
  ranks = jnp.clip((bits - least) >> (23 - MANTISSA_BITS), 0, NEVER - 1)
  return jnp.where(jnp.isinf(values), NEVER, ranks).astype(jnp.uint16)


def lowest(
  ranks: UInt16[Array, 'b f m i n'], count: int, from_behind: Bool[Array, 'b 1 m 1 1']
) -> Bool[Array, 'b f m i n']:
  """Marks exactly the `count` lowest ranks of every (sample, head).

  Args:
    ranks: of which at least `count` are not NEVER.
    count: how many to mark; at least 1.
    from_behind: of equal ranks at the border, whether the last ones are marked or the first.
  """
  threshold, below = _threshold(ranks, count)
  ties = ranks == threshold.astype(jnp.uint16)
  needed = count - below
  total = ties.sum(axis=(1, 3, 4), keepdims=True, dtype=jnp.int32)
  first = _first(ties, jnp.where(from_behind, total - needed, needed))
  return (ranks < threshold.astype(jnp.uint16)) | (ties & (first ^ from_behind))


def _threshold(
  ranks: UInt16[Array, 'b f m i n'], count: int
) -> tuple[Int[Array, 'b 1 m 1 1'], Int[Array, 'b 1 m 1 1']]:
  """Returns the `count`-th lowest rank of every (sample, head), and how many are lower.

  Each pass narrows the range to a fifth. Its four counts share one sum over a row, of 8 bits each;
  rows of more than 255 are cut in equal parts.
  """
  b, _, m, _, n = ranks.shape
  parts = next(parts for parts in range(1, n + 1) if n % parts == 0 and n // parts <= 255)
  wide = ranks.astype(jnp.int32)

  lower = jnp.zeros((b, 1, m, 1, 1), jnp.int32)
  low = lower - 1
  for width in (WAYS**number for number in reversed(range(PASSES))):
    borders = [low + width * way for way in range(1, WAYS)]
    marks = sum(jnp.where(wide <= border, 1 << (8 * k), 0) for k, border in enumerate(borders))
    of_row = rearrange(marks, 'b f m i (s n) -> b f m i s n', s=parts).sum(axis=-1)
    for k, border in enumerate(borders):
      field = jax.lax.shift_right_logical(of_row, jnp.int32(8 * k)) & 255
      found = field.sum(axis=(1, 3, 4)).reshape(lower.shape)
      low, lower = jnp.where(found < count, border, low), jnp.where(found < count, found, lower)
  return low + 1, lower


def _first(
  marks: Bool[Array, 'b f m i n'], count: Int[Array, 'b 1 m 1 1']
) -> Bool[Array, 'b f m i n']:
  """Keeps the first `count` marks of every (sample, head), in the order of (f, i, n).

  Only the row in which the count is reached needs a look at its single marks, so that one row is
  gathered instead of numbering all marks.
  """
  _, f, _, i, _ = marks.shape
  rows = rearrange(marks, 'b f m i n -> b m (f i) n')
  needed = count[:, 0, :, 0]
  reached = jnp.cumsum(rows.sum(axis=-1, dtype=jnp.int32), axis=-1)
  last_row = (reached < needed).sum(axis=-1, keepdims=True)
  row = jnp.take_along_axis(rows, last_row[..., None], axis=2)
  taken = jnp.take_along_axis(reached, last_row, axis=-1) - row.sum(axis=-1, dtype=jnp.int32)
  row_kept = jnp.cumsum(row, axis=-1, dtype=jnp.int32) <= (needed - taken)[..., None]
  number = jnp.arange(f * i)
  kept = (number < last_row)[..., None] | ((number == last_row)[..., None] & row_kept)
  return rearrange(rows & kept, 'b m (f i) n -> b f m i n', f=f)


def sample_drops(
  keys: Key[Array, ' b'], weights: Float[Array, 'b f m i n'], count: int
) -> Bool[Array, 'b f m i n']:
  """Draws `count` pairs per (sample, head) without replacement, jointly over all queries.

  Successive weighted draws without replacement are the `count` least of E / weight with E
  exponential: the Gumbel-top-k trick, and the law of torch.multinomial. These are compared by
  ranks of 16 bits, scaled so that the last one drawn has at least rank 2^0: E / weight is less
  than count / (sum of weights) for less than `count` pairs in the mean. What is equal within
  2^-10 at the border, a few pairs of some thousand, is taken from the front or from behind, by
  one bit of the key, which favours no place.

  Args:
    keys: one per sample, so that the draw is the same on any mesh and any split of the batch.
    weights: none negative; a pair of weight 0 is never drawn.
    count: at most the number of positive weights of a (sample, head).
  """
  noise = exponential_noise(keys, weights.shape[1:])
  scale = weights.sum(axis=(1, 3, 4), keepdims=True) / count
  ranks = to_ranks(jnp.where(weights > 0, noise / weights, jnp.inf), scale)
  return lowest(ranks, count, coins(keys, weights.shape[2])[:, None, :, None, None])


def coins(keys: Key[Array, ' b'], heads: int) -> Bool[Array, 'b m']:
  """Tells of every sample and head from which end ties are taken."""
  return jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(heads,)))(
    keys
  )
