"""Adaptive spatial-attention dropout (ASAD): attention that is made to look at the other frame.

In every decoder block a fixed number of within-frame (query, key) pairs is removed before the
softmax, drawn without replacement with weights that grow where the query already finds a match
in the other frame (Wu et al., DropMAE, CVPR 2023, section 3.3). A pair is never a token with
itself and never crosses frames, so no query loses all of its keys.

Logits are kept as two arrays [b, f, m, i, n]: those of keys of the query's own frame, which may be
dropped, and those of keys of the other frame, which may not.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key, UInt8, UInt16, UInt32

EPSILON = 1e-6
# Ranks are positive floats of 6 bits of exponent, from 2^-4 on, and 10 of mantissa.
LEAST_RANKED = 2.0**-4
MANTISSA_BITS = 10
# The rank of what is never drawn.
NEVER = 2**16 - 1
# 5^7 is more than the number of ranks.
WAYS, PASSES = 5, 7


class Logits(NamedTuple):
  """Scaled products of queries and keys, float32."""

  own: Float[Array, 'b f m i n']
  other: Float[Array, 'b f m i n']


def num_dropped(tokens_per_frame: int, drop_rate: float) -> int:
  """Returns how many pairs one head of one sample loses: int(P (n - 1)) for each of 2n queries.

  The product is truncated in double precision, as published; below 1 / (n - 1) nothing is lost.
  """
  return int(drop_rate * (tokens_per_frame - 1)) * 2 * tokens_per_frame


def by_frame(tokens: Float[Array, 'b l m e']) -> Float[Array, 'b f n m e']:
  """Splits the tokens of two frames."""
  return rearrange(tokens, 'b (f n) m e -> b f n m e', f=2)


def scaled_logits(query: Float[Array, 'b l m e'], key: Float[Array, 'b l m e']) -> Logits:
  """Returns the attention logits; scaled after the product."""
  query, key = by_frame(query), by_frame(key)

  def products(keys: Array) -> Array:
    found = jnp.einsum('bfime,bfjme->bfmij', query, keys, preferred_element_type=jnp.float32)
    return found * query.shape[-1] ** -0.5

  return Logits(products(key), products(key[:, ::-1]))


def sampling_weights(logits: Logits) -> Float[Array, 'b f m i n']:
  """Returns the weight with which each within-frame pair is drawn; 0 on the diagonal.

  A query's weights sum to its best match in the other frame (plus 1e-6), shared out in
  proportion to its attention within its own frame (plus 1e-6 each, itself left out).
  """
  own, other = softmax(logits, row_sums(logits))
  best_match = other.max(axis=-1, keepdims=True) + EPSILON
  candidates = jnp.where(jnp.eye(own.shape[-1], dtype=bool), 0.0, own + EPSILON)
  return candidates / candidates.sum(axis=-1, keepdims=True) * best_match


class RowSums(NamedTuple):
  """What a query's softmax over the keys of both frames is normalised by."""

  largest: Float[Array, 'b f m i 1']
  total: Float[Array, 'b f m i 1']


def row_sums(logits: Logits) -> RowSums:
  """Returns each query's largest logit, and the sum of the powers relative to that."""
  largest = jnp.maximum(*(each.max(axis=-1, keepdims=True) for each in logits))
  return RowSums(largest, sum(jnp.exp(x - largest).sum(axis=-1, keepdims=True) for x in logits))


def softmax(logits: Logits, sums: RowSums) -> Logits:
  """Returns every query's attention to the keys of both frames, of sum 1."""
  return Logits(*(jnp.exp(each - sums.largest) / sums.total for each in logits))


def exponential_noise(keys: Key[Array, ' b'], shape: tuple[int, ...]) -> Float[Array, 'b f m i n']:
  """Draws from the exponential law, every number by its own place and its sample's key alone.

  The bits are a hash of the place, keyed by two words for each sample and head: nothing is stored
  or communicated, the draw is the same on any mesh, and it costs a fifth of threefry's
  instructions. The hash is two rounds of a 32-bit mixer (Ellis, "Prospecting for hash functions",
  2018) with a word of the key before each.

  Args:
    keys: one per sample.
    shape: f, m, i, n.
  """
  frames, heads, rows, columns = shape
  words = jax.vmap(lambda key: jax.random.bits(key, (2, 1, heads, 1, 1), jnp.uint32))(keys)
  frame, row, column = (
    jax.lax.broadcasted_iota(jnp.uint32, (frames, 1, rows, columns), axis) for axis in (0, 2, 3)
  )
  place = (frame * rows + row) * columns + column
  bits = mix(mix(place ^ words[:, 0]) + words[:, 1])
  return -jnp.log(((bits >> 8).astype(jnp.float32) + 0.5) * 2.0**-24)


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
  heads = (1, weights.shape[2], 1, 1)
  coins = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1), shape=heads))(keys)
  return lowest(ranks, count, coins)


# Marks the pairs to drop, from the logits and whatever else it takes.
Draw = Callable[[Logits, Array], Bool[Array, 'b f m i n']]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, source: Array, draw: Draw) -> Array:
  """Attention without the pairs that `draw` marks, given the logits and `source`."""
  return _attend_forward(query, key, value, source, draw)[0]


class _Kept(NamedTuple):
  """What the gradient needs; of the size of the logits there is one bit for each own pair."""

  query: Float[Array, 'b l m e']
  key: Float[Array, 'b l m e']
  value: Float[Array, 'b l m e']
  output: Float[Array, 'b l m e']
  sums: RowSums
  dropped_bits: UInt8[Array, 'b f m i w']


def _attend_forward(
  query: Array, key: Array, value: Array, source: Array, draw: Draw
) -> tuple[Array, _Kept]:
  logits = scaled_logits(query, key)
  is_dropped = draw(logits, source)
  left = _without(logits, is_dropped)
  sums = row_sums(left)
  attention = Logits(*(each.astype(value.dtype) for each in softmax(left, sums)))
  output = _mix_values(attention, value)
  bits = jnp.packbits(is_dropped, axis=-1)
  return output, _Kept(query, key, value, output, sums, bits)


def _attend_backward(draw: Draw, kept: _Kept, gradient: Array) -> tuple[Array | None, ...]:
  del draw
  query, key, value = kept.query, kept.key, kept.value
  logits = scaled_logits(query, key)
  n = logits.own.shape[-1]
  is_dropped = jnp.unpackbits(kept.dropped_bits, axis=-1, count=n).astype(bool)
  attention = softmax(_without(logits, is_dropped), kept.sums)
  of_output = by_frame(gradient)
  mean = jnp.einsum('blme,blme->blm', gradient, kept.output, preferred_element_type=jnp.float32)
  mean = rearrange(mean, 'b (f i) m -> b f m i 1', f=2)

  def of_logits(attention: Array, values: Array) -> Array:
    of_attention = jnp.einsum(
      'bfime,bfjme->bfmij', of_output, values, preferred_element_type=jnp.float32
    )
    return (attention * (of_attention - mean) * query.shape[-1] ** -0.5).astype(query.dtype)

  values, queries = by_frame(value), by_frame(query)
  steep = Logits(of_logits(attention.own, values), of_logits(attention.other, values[:, ::-1]))
  lower = Logits(*(each.astype(value.dtype) for each in attention))
  to_keys = partial(jnp.einsum, 'bfmij,bfime->bfjme')
  of_value = to_keys(lower.own, of_output) + to_keys(lower.other, of_output)[:, ::-1]
  of_key = to_keys(steep.own, queries) + to_keys(steep.other, queries)[:, ::-1]
  of_query = _mix_values(steep, key)
  merge = partial(rearrange, pattern='b f n m e -> b (f n) m e')
  return of_query, merge(of_key), merge(of_value), None


_attend.defvjp(_attend_forward, _attend_backward)


def _without(logits: Logits, is_dropped: Bool[Array, 'b f m i n']) -> Logits:
  return Logits(jnp.where(is_dropped, -jnp.inf, logits.own), logits.other)


def _mix_values(attention: Logits, value: Float[Array, 'b l m e']) -> Float[Array, 'b l m e']:
  """Sums the values of both frames by the attention to them."""
  values = by_frame(value)
  mixed = jnp.einsum('bfmij,bfjme->bfime', attention.own, values)
  mixed += jnp.einsum('bfmij,bfjme->bfime', attention.other, values[:, ::-1])
  return rearrange(mixed, 'b f i m e -> b (f i) m e')


def _as_recorded(logits: Logits, is_dropped: Bool[Array, 'b f m i n']) -> Array:
  del logits
  return is_dropped


def attention_with_drops(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  is_dropped: Bool[Array, 'b f m i n'],
) -> Float[Array, 'b l m e']:
  """Attention that removes the within-frame pairs it is told to remove."""
  return _attend(query, key, value, is_dropped, _as_recorded)


def _drawn(logits: Logits, keys: Key[Array, ' b'], *, count: int) -> Array:
  return sample_drops(keys, sampling_weights(logits), count)


def asad_attention(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
) -> Float[Array, 'b l m e']:
  """Attention with a fresh draw of dropped pairs; no gradient flows through the draw.

  Args:
    query: one vector per token and head; the first half of the l tokens is the earlier frame.
    key: likewise.
    value: likewise.
    draw_keys: random keys, one per sample.
    drop_rate: P, the share of within-frame pairs to drop. Must drop at least one pair: see
      `num_dropped`.
  """
  count = num_dropped(query.shape[1] // 2, drop_rate)
  return _attend(query, key, value, draw_keys, partial(_drawn, count=count))
