"""Attention with dropped pairs, fast: what training runs, and the fast form of `asad.asad`.

Same distribution and number of drops as the definition, by 16-bit ranks instead of a sort
(`weighted_sampling`); one bit per pair is stored for the backward pass, which rematerialises the
logits. A dropped pair is never a token with itself and never crosses frames, so no query loses all
of its keys.

Logits are kept as two arrays [b, f, m, i, n] (`asad.Logits`), here not scaled yet.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key, UInt8

from dropmae_jax.model import weighted_sampling
from dropmae_jax.model.asad import EPSILON, DropoutRule, Logits, num_dropped
from dropmae_jax.model.chunks import AT_ONCE, Loop, by_groups
from dropmae_jax.model.weighted_sampling import HeadSeeds


def by_frame(tokens: Float[Array, 'b l m e']) -> Float[Array, 'b f m n e']:
  """Splits the tokens of two frames, and brings the heads forward, as matrix products want them."""
  return rearrange(tokens, 'b (f n) m e -> b f m n e', f=2)


def products(rows: Float[Array, 'b f m i e'], keys: Float[Array, 'b f m n e']) -> Logits:
  """Multiplies every row with the keys of its own and of the other frame; adds up in float32."""
  multiply = partial(jnp.einsum, 'bfmie,bfmje->bfmij', preferred_element_type=jnp.float32)
  return Logits(multiply(rows, keys), multiply(rows, keys[:, ::-1]))


def sampling_weights(logits: Logits, scale: float = 1.0) -> Float[Array, 'b f m i n']:
  """Returns the weight with which each within-frame pair is drawn; 0 on the diagonal.

  A query's weights sum to its best match in the other frame (plus 1e-6), shared out in
  proportion to its attention within its own frame (plus 1e-6 each, itself left out).

  Args:
    logits: of the attention.
    scale: what they are still to be multiplied by.
  """
  is_self = jnp.eye(logits.own.shape[-1], dtype=bool)
  own, other = _power_sums(logits.own, scale, ~is_self), _power_sums(logits.other, scale, None)
  largest = jnp.maximum(own.largest, other.largest)
  shrink, best = power(own.largest, largest, scale), power(other.largest, largest, scale)
  total = own.total * shrink + other.total * best
  best_match = best / total + EPSILON
  share = best_match / (own.marked * shrink / total + (is_self.shape[-1] - 1) * EPSILON)
  # Not the powers of the sums: these XLA would store, to use them once more.
  attention = jnp.exp((logits.own - largest) * scale - jnp.log(total))
  return jnp.where(is_self, 0.0, (attention + EPSILON) * share)


class _PowerSums(NamedTuple):
  """A row's largest logit, and the sums of powers relative to it: of all, and of those marked."""

  largest: Float[Array, 'b f m i 1']
  total: Float[Array, 'b f m i 1']
  marked: Float[Array, 'b f m i 1'] | None


def _power_sums(
  logits: Float[Array, 'b f m i j'], scale: float, marks: Bool[Array, 'i j'] | None
) -> _PowerSums:
  at_once = partial(_power_sums_at_once, scale=scale, marks=marks)
  in_passes = partial(_power_sums_in_passes, scale=scale, marks=marks)
  found = jax.lax.platform_dependent(logits, cuda=at_once, rocm=at_once, default=in_passes)
  return _PowerSums(*found, *(() if len(found) == 3 else (None,)))


def _power_sums_in_passes(logits: Array, *, scale: float, marks: Array | None) -> tuple[Array, ...]:
  largest = logits.max(axis=-1, keepdims=True)
  powers = power(logits, largest, scale)
  kinds = (powers,) if marks is None else (powers, jnp.where(marks, powers, 0.0))
  return largest, *(each.sum(axis=-1, keepdims=True) for each in kinds)


def _power_sums_at_once(logits: Array, *, scale: float, marks: Array | None) -> tuple[Array, ...]:
  """Reads logits once: rows are put together of parts with a largest and sums each.

  GPUs have the time to raise twice as many powers meanwhile; CPUs have not.
  """

  def join(one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
    largest = jnp.maximum(one[0], other[0])
    first, second = (jnp.exp((part[0] - largest) * scale) for part in (one, other))
    sums = (x * first + y * second for x, y in zip(one[1:], other[1:], strict=True))
    return largest, *sums

  ones = jnp.ones_like(logits)
  counted = (ones,) if marks is None else (ones, jnp.where(marks, ones, 0.0))
  # A number, so that differences are.
  start = (jnp.finfo(jnp.float32).min / 2, *(0.0 for _ in counted))
  found = jax.lax.reduce((logits, *counted), jax.tree.map(jnp.float32, start), join, (4,))
  return tuple(each[..., None] for each in found)


def power(
  logits: Float[Array, 'b f m i j'], largest: Float[Array, 'b f m i 1'], scale: float
) -> Float[Array, 'b f m i j']:
  """Returns attention before it is divided by its sum; the largest is 1."""
  return jnp.exp((logits - largest) * scale)


def powers(logits: Logits, largest: Array, scale: float, dtype: DTypeLike) -> Logits:
  """Returns `power` of both, rounded to what products are taken in."""
  return Logits(*(power(each, largest, scale).astype(dtype) for each in logits))


class RowSums(NamedTuple):
  """What a query's softmax over the keys of both frames is normalised by."""

  largest: Float[Array, 'b f m i 1']
  total: Float[Array, 'b f m i 1']


# Marks the pairs to drop, from the logits and whatever else it takes.
Draw = Callable[[Logits, Any], Bool[Array, 'b f m i n']]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, source: Any, draw: Draw) -> Array:
  """Attention without the pairs that `draw` marks, given the logits and `source`; by frame."""
  return _attend_forward(query, key, value, source, draw)[0]


class _Residuals(NamedTuple):
  """What the backward pass reads; of the size of the logits there is one bit for each own pair.

  The output is float32: rounded, it would show in differences as small as those of the gradient.
  XLA may store logits rather than rematerialise them, as it does for CPUs.
  """

  query: Float[Array, 'b f m n e']
  key: Float[Array, 'b f m n e']
  value: Float[Array, 'b f m n e']
  output: Float[Array, 'b f m n e']
  sums: RowSums
  dropped_bits: UInt8[Array, 'b f m w n']


def _attend_forward(
  query: Array, key: Array, value: Array, source: Any, draw: Draw
) -> tuple[Array, _Residuals]:
  scale, dtype = query.shape[-1] ** -0.5, value.dtype
  logits = products(query, key)
  is_dropped = draw(logits, source)
  left = _without(logits, is_dropped)
  largest = jnp.maximum(*(each.max(axis=-1, keepdims=True) for each in left))
  rows = powers(left, largest, scale, dtype)
  # A one beside each value, so that it is powers as rounded for the product that are summed. Else
  # values that are all alike would have a gradient for queries.
  ones = jnp.ones((*value.shape[:-1], 1), dtype)
  mixed = _to_queries(rows, jnp.concatenate([value, ones], axis=-1))
  # Divided after the product, which is smaller.
  total = mixed[..., -1:]
  output = mixed[..., :-1] / total
  sums = RowSums(largest, total)
  return output.astype(dtype), _Residuals(query, key, value, output, sums, packed(is_dropped))


def _attend_backward(
  draw: Draw, residuals: _Residuals, gradient: Array
) -> tuple[Array | None, ...]:
  del draw
  query, key, value, output, sums, dropped_bits = residuals
  scale, dtype = query.shape[-1] ** -0.5, query.dtype
  left = _without(products(query, key), unpacked(dropped_bits, query.shape[3]))
  attention = powers(left, sums.largest, scale, dtype)
  d_mixed = (gradient / sums.total).astype(dtype)
  mean = (d_mixed * output).sum(axis=-1, keepdims=True)
  d_probs = products(d_mixed, value)
  d_logits = (p * (d - mean) * scale for p, d in zip(attention, d_probs, strict=True))
  d_logits = Logits(*(each.astype(dtype) for each in d_logits))
  gradients = _to_queries(d_logits, key), _to_keys(d_logits, query), _to_keys(attention, d_mixed)
  return *(each.astype(dtype) for each in gradients), None


_attend.defvjp(_attend_forward, _attend_backward)


def packed(marks: Bool[Array, 'b f m i n']) -> UInt8[Array, 'b f m w n']:
  """Packs the marks of eight rows into a row of bytes; bit k of row j is row k w + j."""
  rows = jnp.pad(marks, [(0, 0)] * 3 + [(0, -marks.shape[3] % 8), (0, 0)])
  return jax.lax.platform_dependent(rows, cpu=_packed_by_eighths, default=_packed_at_once)


def _packed_at_once(rows: Bool[Array, 'b f m i n']) -> UInt8[Array, 'b f m w n']:
  eighths = rearrange(rows, 'b f m (k w) n -> b f m k w n', k=8).astype(jnp.uint8)
  places = jnp.arange(8, dtype=jnp.uint8)[:, None, None]
  return (eighths << places).sum(axis=3, dtype=jnp.uint8)


def _packed_by_eighths(rows: Bool[Array, 'b f m i n']) -> UInt8[Array, 'b f m w n']:
  """Packs in a loop: on CPUs, XLA would make marks and bits anew wherever they are read."""
  width = rows.shape[3] // 8

  def add(k: Array, bits: Array) -> Array:
    eighth = jax.lax.dynamic_slice_in_dim(rows, k * width, width, axis=3)
    return bits | (eighth.astype(jnp.uint8) << k.astype(jnp.uint8))

  return jax.lax.fori_loop(0, 8, add, jnp.zeros_like(rows[:, :, :, :width], jnp.uint8))


def unpacked(bits: UInt8[Array, 'b f m w n'], num_rows: int) -> Bool[Array, 'b f m i n']:
  """The inverse of `packed`."""
  eighths = (bits[:, :, :, None] >> jnp.arange(8, dtype=jnp.uint8)[:, None, None]) & 1
  return rearrange(eighths, 'b f m k w n -> b f m (k w) n')[:, :, :, :num_rows].astype(bool)


def _without(logits: Logits, is_dropped: Bool[Array, 'b f m i n']) -> Logits:
  return Logits(jnp.where(is_dropped, -jnp.inf, logits.own), logits.other)


def _to_queries(rows: Logits, keys: Float[Array, 'b f m n e']) -> Float[Array, 'b f m i e']:
  """Sums keys' vectors of both frames for every query; added up in float32."""
  mix = partial(jnp.einsum, 'bfmij,bfmje->bfmie', preferred_element_type=jnp.float32)
  return mix(rows.own, keys) + mix(rows.other, keys[:, ::-1])


def _to_keys(rows: Logits, queries: Float[Array, 'b f m i e']) -> Float[Array, 'b f m n e']:
  """Sums queries' vectors of both frames for every key; added up in float32."""
  mix = partial(jnp.einsum, 'bfmij,bfmie->bfmje', preferred_element_type=jnp.float32)
  return mix(rows.own, queries) + mix(rows.other, queries)[:, ::-1]


def _attend_tokens(
  query: Array, key: Array, value: Array, source: Any, draw: Draw
) -> Float[Array, 'b l m e']:
  mixed = _attend(by_frame(query), by_frame(key), by_frame(value), source, draw)
  return rearrange(mixed, 'b f m n e -> b (f n) m e')


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
  return _attend_tokens(query, key, value, is_dropped, _as_recorded)


def _fast_asad(logits: Logits, seeds: HeadSeeds, *, scale: float, count: int) -> Array:
  return weighted_sampling.sample_drops(seeds, sampling_weights(logits, scale), count)


def asad_attention(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  loop: Loop = AT_ONCE,
) -> Float[Array, 'b l m e']:
  """Attention with the pairs dropped that `asad.asad` draws, by other noise.

  No gradient flows through the draw.

  Args:
    query: one vector per token and head; the first half of the l tokens is the earlier frame.
    key: likewise.
    value: likewise.
    draw_keys: random keys, one per sample.
    drop_rate: P, the share of within-frame pairs to drop; at least one pair: see `num_dropped`.
    loop: over groups of heads.
  """
  count = num_dropped(query.shape[1] // 2, drop_rate)
  draw = partial(_fast_asad, scale=query.shape[-1] ** -0.5, count=count)
  seeds = weighted_sampling.head_seeds(draw_keys, query.shape[2])
  attend = partial(_attend_tokens, draw=draw)
  return by_groups(attend, query, key, value, seeds, loop)


def attention_with_rule(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  rule: DropoutRule,
) -> Float[Array, 'b l m e']:
  """As `asad_attention`, with the pairs dropped that a rule of `asad.ATTENTION_DROPOUTS` marks."""
  scale = query.shape[-1] ** -0.5

  def draw(logits: Logits, keys: Array) -> Array:
    scaled = Logits(*(each * scale for each in logits))
    return rule(keys, scaled, drop_rate=drop_rate)

  return _attend_tokens(query, key, value, draw_keys, draw)
