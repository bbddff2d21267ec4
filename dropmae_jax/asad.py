"""Adaptive spatial-attention dropout (ASAD): attention that is made to look at the other frame.

In every decoder block a fixed number of within-frame (query, key) pairs is removed before the
softmax, drawn without replacement with weights that grow where the query already finds a match
in the other frame (Wu et al., DropMAE, CVPR 2023, section 3.3). A pair is never a token with
itself and never crosses frames, so no query loses all of its keys.

Logits are kept as [b, f, m, i, j] with the keys of the query's own frame first (j < n), then
those of the other frame (j >= n): what may be dropped is then a plain slice.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key

EPSILON = 1e-6


def num_dropped(tokens_per_frame: int, drop_rate: float) -> int:
  """Returns how many pairs one head of one sample loses: int(P (n - 1)) for each of 2n queries.

  The product is truncated in double precision, as published; below 1 / (n - 1) nothing is lost.
  """
  return int(drop_rate * (tokens_per_frame - 1)) * 2 * tokens_per_frame


def own_frame_first(tokens: Float[Array, 'b l m e']) -> Float[Array, 'b f j m e']:
  """Lists for each frame the tokens that its queries see: its own n, then the other frame's."""
  by_frame = rearrange(tokens, 'b (f n) m e -> b f n m e', f=2)
  return jnp.concatenate([by_frame, by_frame[:, ::-1]], axis=2)


def scaled_logits(
  query: Float[Array, 'b l m e'], key: Float[Array, 'b l m e']
) -> Float[Array, 'b f m i j']:
  """Returns float32 attention logits, own frame's keys first; scaled after the product."""
  query = rearrange(query, 'b (f i) m e -> b f i m e', f=2)
  products = jnp.einsum(
    'bfime,bfjme->bfmij', query, own_frame_first(key), preferred_element_type=jnp.float32
  )
  return products * query.shape[-1] ** -0.5


def sampling_weights(logits: Float[Array, 'b f m i j']) -> Float[Array, 'b f m i n']:
  """Returns the weight with which each within-frame pair is drawn; 0 on the diagonal.

  A query's weights sum to its best match in the other frame (plus 1e-6), shared out in
  proportion to its attention within its own frame (plus 1e-6 each, itself left out).
  """
  n = logits.shape[-2]
  own, other = jnp.split(jax.nn.softmax(logits, axis=-1), [n], axis=-1)
  best_match = other.max(axis=-1, keepdims=True) + EPSILON
  candidates = jnp.where(jnp.eye(n, dtype=bool), 0.0, own + EPSILON)
  return candidates / candidates.sum(axis=-1, keepdims=True) * best_match


def smallest(values: Float[Array, 'b f m i n'], count: int) -> Bool[Array, 'b f m i n']:
  """Marks exactly the `count` smallest values of every (sample, head); ties by position.

  A bisection over bit patterns finds the threshold: non-negative floats order as their bits do,
  so 31 counting passes replace a sort.

  Args:
    values: float32, none negative.
    count: how many to mark; at least 1, at most the number of values.
  """
  bits = jax.lax.bitcast_convert_type(values, jnp.int32)

  def total(marks: Array) -> Int[Array, 'b 1 m 1 1']:
    return marks.sum(axis=(1, 3, 4), keepdims=True, dtype=jnp.int32)

  def halve(_: int | Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = bounds
    middle = low + (high - low) // 2
    enough = total(bits <= middle) >= count
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  shape = (values.shape[0], 1, values.shape[2], 1, 1)
  infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
  bounds = (jnp.zeros(shape, jnp.int32), jnp.full(shape, infinity))
  _, threshold = jax.lax.fori_loop(0, 31, halve, bounds)
  below = bits < threshold
  return below | _first(bits == threshold, count - total(below))


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
  exponential: the Gumbel-top-k trick, and the law of torch.multinomial.

  Args:
    keys: one per sample, so that the draw is the same on any mesh and any split of the batch.
    weights: none negative; a pair of weight 0 is never drawn.
    count: at most the number of positive weights of a (sample, head).
  """
  noise = jax.vmap(lambda key: jax.random.exponential(key, weights.shape[1:]))(keys)
  return smallest(jnp.where(weights > 0, noise / weights, jnp.inf), count)


def attend(
  logits: Float[Array, 'b f m i j'],
  value: Float[Array, 'b l m e'],
  is_dropped: Bool[Array, 'b f m i n'],
) -> Float[Array, 'b l m e']:
  """Softmax attention without the dropped pairs; the rest is renormalised by the softmax."""
  n = logits.shape[-2]
  own, other = jnp.split(logits, [n], axis=-1)
  logits = jnp.concatenate([jnp.where(is_dropped, -jnp.inf, own), other], axis=-1)
  attention = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  mixed = jnp.einsum('bfmij,bfjme->bfime', attention, own_frame_first(value))
  return rearrange(mixed, 'b f i m e -> b (f i) m e')


def attention_with_drops(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  is_dropped: Bool[Array, 'b f m i n'],
) -> Float[Array, 'b l m e']:
  """Attention that removes the within-frame pairs it is told to remove."""
  return attend(scaled_logits(query, key), value, is_dropped)


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
  logits = scaled_logits(query, key)
  weights = sampling_weights(jax.lax.stop_gradient(logits))
  count = num_dropped(logits.shape[-2], drop_rate)
  return attend(logits, value, sample_drops(draw_keys, weights, count))
