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
from jaxtyping import Array, Bool, Float, Key, UInt8

from dropmae_jax import sampling

EPSILON = 1e-6


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


# Marks the pairs to drop, from the logits and whatever else it takes.
Draw = Callable[[Logits, Array], Bool[Array, 'b f m i n']]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, source: Array, draw: Draw) -> Array:
  """Attention without the pairs that `draw` marks, given the logits and `source`."""
  return _attend_forward(query, key, value, source, draw)[0]


class _Kept(NamedTuple):
  """What the gradient needs; of the size of the logits there is one bit for each own pair.

  XLA may keep logits that it has rather than compute them anew, as it does for CPUs.
  """

  query: Float[Array, 'b l m e']
  key: Float[Array, 'b l m e']
  value: Float[Array, 'b l m e']
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
  bits = jnp.packbits(is_dropped, axis=-1)
  return _mix_values(attention, value), _Kept(query, key, value, sums, bits)


def _attend_backward(draw: Draw, kept: _Kept, gradient: Array) -> tuple[Array | None, ...]:
  del draw
  query, key, value = kept.query, kept.key, kept.value
  logits = scaled_logits(query, key)
  n = logits.own.shape[-1]
  is_dropped = jnp.unpackbits(kept.dropped_bits, axis=-1, count=n).astype(bool)
  attention = softmax(_without(logits, is_dropped), kept.sums)
  of_output, values, queries = by_frame(gradient), by_frame(value), by_frame(query)

  def of_attention(values: Array) -> Array:
    return jnp.einsum('bfime,bfjme->bfmij', of_output, values, preferred_element_type=jnp.float32)

  upper = Logits(of_attention(values), of_attention(values[:, ::-1]))
  # Not from the output, whose rounding would show in a difference as small as this one.
  mean = sum((a * u).sum(axis=-1, keepdims=True) for a, u in zip(attention, upper, strict=True))
  scale = query.shape[-1] ** -0.5
  steep = Logits(
    *((a * (u - mean) * scale).astype(query.dtype) for a, u in zip(attention, upper, strict=True))
  )
  of_value = _to_keys(Logits(*(each.astype(value.dtype) for each in attention)), of_output)
  return _mix_values(steep, key), _to_keys(steep, queries), of_value, None


def _to_keys(rows: Logits, tokens: Float[Array, 'b f i m e']) -> Float[Array, 'b l m e']:
  """Sums queries' tokens for every key of both frames; added up in float32."""
  products = partial(jnp.einsum, 'bfmij,bfime->bfjme', preferred_element_type=jnp.float32)
  found = products(rows.own, tokens) + products(rows.other, tokens)[:, ::-1]
  return rearrange(found, 'b f n m e -> b (f n) m e').astype(tokens.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _without(logits: Logits, is_dropped: Bool[Array, 'b f m i n']) -> Logits:
  return Logits(jnp.where(is_dropped, -jnp.inf, logits.own), logits.other)


def _mix_values(attention: Logits, value: Float[Array, 'b l m e']) -> Float[Array, 'b l m e']:
  """Sums the values of both frames by the attention to them; added up in float32."""
  values = by_frame(value)
  products = partial(jnp.einsum, 'bfmij,bfjme->bfime', preferred_element_type=jnp.float32)
  found = products(attention.own, values) + products(attention.other, values[:, ::-1])
  return rearrange(found, 'b f i m e -> b (f i) m e').astype(value.dtype)


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
  return sampling.sample_drops(keys, sampling_weights(logits), count)


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
