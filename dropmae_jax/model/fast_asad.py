"""Attention with dropped pairs, in the fast form that training uses; `asad.asad` defines it.

It has the same distribution and the same number of drops as the definition. Three things make it
fast: pairs are selected by 16-bit ranks instead of a sort (`weighted_sampling`); attention is
computed in chunks of heads and samples (`chunks`); and the backward pass rematerialises the logits,
so that only one bit per within-frame pair is stored. Chunks and the backward pass need the queries,
keys and values, so `asad_attention` takes these, where `asad.asad` takes logits and returns drops.

No query loses all of its keys: a token keeps itself and the keys of the other frame. Here, unlike
in `asad`, logits are not yet scaled by the inverse root of the head width.
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
from dropmae_jax.model.chunks import NO_LOOP, Loop, in_chunks
from dropmae_jax.model.weighted_sampling import HeadSeeds


def by_frame(tokens: Float[Array, 'b l m e']) -> Float[Array, 'b f m n e']:
  """Splits tokens by frame and moves heads before tokens, as matrix products need them."""
  return rearrange(tokens, 'b (f n) m e -> b f m n e', f=2)


def products(rows: Float[Array, 'b f m i e'], keys: Float[Array, 'b f m n e']) -> Logits:
  """Multiplies each row by the keys of its own and of the other frame; sums in float32."""
  multiply = partial(jnp.einsum, 'bfmie,bfmje->bfmij', preferred_element_type=jnp.float32)
  return Logits(multiply(rows, keys), multiply(rows, keys[:, ::-1]))


def sampling_weights(logits: Logits, scale: float = 1.0) -> Float[Array, 'b f m i n']:
  """Returns the same weights as `asad.sampling_weights`, in fewer passes over the logits.

  Args:
    logits: of the attention.
    scale: by which the logits are multiplied.
  """
  is_self = jnp.eye(logits.own.shape[-1], dtype=bool)
  own, other = _exp_sums(logits.own, scale, ~is_self), _exp_sums(logits.other, scale, None)
  # The sums of the two frames are relative to different maxima; the factors correct for that.
  largest = jnp.maximum(own.largest, other.largest)
  own_factor = exp_relative(own.largest, largest, scale)
  other_factor = exp_relative(other.largest, largest, scale)
  total = own.total * own_factor + other.total * other_factor
  # `other_factor` is also the exponential of the best match.
  best_match = other_factor / total + EPSILON
  candidates_total = own.masked_total * own_factor / total + (is_self.shape[-1] - 1) * EPSILON
  share = best_match / candidates_total
  # Not `exp_relative`, which the sums use: XLA would store those exponentials to reuse them here.
  attention = jnp.exp((logits.own - largest) * scale - jnp.log(total))
  return jnp.where(is_self, 0.0, (attention + EPSILON) * share)


class _ExpSums(NamedTuple):
  """The largest logit of each row, and sums of exponentials relative to it.

  `total` is over all keys, `masked_total` over those for which a mask is True.
  """

  largest: Float[Array, 'b f m i 1']
  total: Float[Array, 'b f m i 1']
  masked_total: Float[Array, 'b f m i 1'] | None


def _exp_sums(
  logits: Float[Array, 'b f m i j'], scale: float, mask: Bool[Array, 'i j'] | None
) -> _ExpSums:
  online = partial(_exp_sums_online, scale=scale, mask=mask)
  two_pass = partial(_exp_sums_two_pass, scale=scale, mask=mask)
  sums = jax.lax.platform_dependent(logits, cuda=online, rocm=online, default=two_pass)
  return _ExpSums(*sums, *(() if len(sums) == 3 else (None,)))


def _exp_sums_two_pass(logits: Array, *, scale: float, mask: Array | None) -> tuple[Array, ...]:
  """First finds the maximum, then sums."""
  largest = logits.max(axis=-1, keepdims=True)
  exps = exp_relative(logits, largest, scale)
  summands = (exps,) if mask is None else (exps, jnp.where(mask, exps, 0.0))
  return largest, *(each.sum(axis=-1, keepdims=True) for each in summands)


def _exp_sums_online(logits: Array, *, scale: float, mask: Array | None) -> tuple[Array, ...]:
  """Reads the logits once: merges parts of a row that each have a maximum and sums.

  This needs twice as many exponentials. On GPUs reading is the bottleneck, on CPUs it is not.
  """

  def merge(one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
    largest = jnp.maximum(one[0], other[0])
    first, second = (jnp.exp((part[0] - largest) * scale) for part in (one, other))
    sums = (x * first + y * second for x, y in zip(one[1:], other[1:], strict=True))
    return largest, *sums

  ones = jnp.ones_like(logits)
  counts = (ones,) if mask is None else (ones, jnp.where(mask, ones, 0.0))
  # Finite instead of -inf, so that the difference of two initial values is not nan.
  initial = (jnp.finfo(jnp.float32).min / 2, *(0.0 for _ in counts))
  merged = jax.lax.reduce((logits, *counts), jax.tree.map(jnp.float32, initial), merge, (4,))
  return tuple(each[..., None] for each in merged)


def exp_relative(
  logits: Float[Array, 'b f m i j'], largest: Float[Array, 'b f m i 1'], scale: float
) -> Float[Array, 'b f m i j']:
  """Returns the exponentials of scaled logits, relative to the largest of a row, which gives 1."""
  return jnp.exp((logits - largest) * scale)


def unnormalised_probs(logits: Logits, largest: Array, scale: float, dtype: DTypeLike) -> Logits:
  """Returns the exponentials for both frames, in the dtype of the matrix products."""
  return Logits(*(exp_relative(each, largest, scale).astype(dtype) for each in logits))


class RowSums(NamedTuple):
  """The largest logit and the sum of exponentials of each query, which normalise its softmax."""

  largest: Float[Array, 'b f m i 1']
  total: Float[Array, 'b f m i 1']


# Marks the pairs to drop, from logits and a source: seeds, keys or recorded marks.
Draw = Callable[[Logits, Any], Bool[Array, 'b f m i n']]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, source: Any, draw: Draw) -> Array:
  """Attention without the pairs that `draw(logits, source)` marks; arrays are [b, f, m, n, e]."""
  return _attend_forward(query, key, value, source, draw)[0]


class _Residuals(NamedTuple):
  """What the backward pass reads. Of the logits' size it has one bit per within-frame pair.

  The output is float32: gradients are small differences, in which its rounding would show.
  For CPUs, XLA may store the logits all the same instead of rematerialising them.
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
  masked = _mask_dropped(logits, is_dropped)
  largest = jnp.maximum(*(each.max(axis=-1, keepdims=True) for each in masked))
  probs = unnormalised_probs(masked, largest, scale, dtype)
  # A column of ones beside the values: the total is then the sum of exponentials as rounded for the
  # product. With any other total, values that are all equal would give queries a gradient.
  ones = jnp.ones((*value.shape[:-1], 1), dtype)
  mixed = _sum_over_keys(probs, jnp.concatenate([value, ones], axis=-1))
  # Normalised after the product, which is smaller than the probabilities.
  total = mixed[..., -1:]
  output = mixed[..., :-1] / total
  sums = RowSums(largest, total)
  return output.astype(dtype), _Residuals(query, key, value, output, sums, pack_bits(is_dropped))


def _attend_backward(
  draw: Draw, residuals: _Residuals, d_output: Array
) -> tuple[Array | None, ...]:
  del draw
  query, key, value, output, sums, dropped_bits = residuals
  scale, dtype = query.shape[-1] ** -0.5, query.dtype
  masked = _mask_dropped(products(query, key), unpack_bits(dropped_bits, query.shape[3]))
  probs = unnormalised_probs(masked, sums.largest, scale, dtype)
  d_mixed = (d_output / sums.total).astype(dtype)
  mean = (d_mixed * output).sum(axis=-1, keepdims=True)
  d_probs = products(d_mixed, value)
  d_logits = (p * (d - mean) * scale for p, d in zip(probs, d_probs, strict=True))
  d_logits = Logits(*(each.astype(dtype) for each in d_logits))
  d_query, d_key = _sum_over_keys(d_logits, key), _sum_over_queries(d_logits, query)
  d_value = _sum_over_queries(probs, d_mixed)
  return *(each.astype(dtype) for each in (d_query, d_key, d_value)), None


_attend.defvjp(_attend_forward, _attend_backward)


def pack_bits(marks: Bool[Array, 'b f m i n']) -> UInt8[Array, 'b f m w n']:
  """Packs the marks of eight rows into a row of bytes; bit k of row j is row k w + j."""
  rows = jnp.pad(marks, [(0, 0)] * 3 + [(0, -marks.shape[3] % 8), (0, 0)])
  return jax.lax.platform_dependent(rows, cpu=_pack_in_loop, default=_pack_at_once)


def _pack_at_once(rows: Bool[Array, 'b f m i n']) -> UInt8[Array, 'b f m w n']:
  eighths = rearrange(rows, 'b f m (k w) n -> b f m k w n', k=8).astype(jnp.uint8)
  shifts = jnp.arange(8, dtype=jnp.uint8)[:, None, None]
  return (eighths << shifts).sum(axis=3, dtype=jnp.uint8)


def _pack_in_loop(rows: Bool[Array, 'b f m i n']) -> UInt8[Array, 'b f m w n']:
  """Stores marks and bits: without a loop, XLA recomputes them on CPUs wherever they are read."""
  width = rows.shape[3] // 8

  def add(k: Array, bits: Array) -> Array:
    eighth = jax.lax.dynamic_slice_in_dim(rows, k * width, width, axis=3)
    return bits | (eighth.astype(jnp.uint8) << k.astype(jnp.uint8))

  return jax.lax.fori_loop(0, 8, add, jnp.zeros_like(rows[:, :, :, :width], jnp.uint8))


def unpack_bits(bits: UInt8[Array, 'b f m w n'], num_rows: int) -> Bool[Array, 'b f m i n']:
  """The inverse of `pack_bits`."""
  eighths = (bits[:, :, :, None] >> jnp.arange(8, dtype=jnp.uint8)[:, None, None]) & 1
  return rearrange(eighths, 'b f m k w n -> b f m (k w) n')[:, :, :, :num_rows].astype(bool)


def _mask_dropped(logits: Logits, is_dropped: Bool[Array, 'b f m i n']) -> Logits:
  return Logits(jnp.where(is_dropped, -jnp.inf, logits.own), logits.other)


def _sum_over_keys(probs: Logits, vectors: Float[Array, 'b f m n e']) -> Float[Array, 'b f m i e']:
  """Sums the vectors of the keys of both frames for every query, in float32."""
  mix = partial(jnp.einsum, 'bfmij,bfmje->bfmie', preferred_element_type=jnp.float32)
  return mix(probs.own, vectors) + mix(probs.other, vectors[:, ::-1])


def _sum_over_queries(
  probs: Logits, vectors: Float[Array, 'b f m i e']
) -> Float[Array, 'b f m n e']:
  """Sums the vectors of the queries of both frames for every key, in float32."""
  mix = partial(jnp.einsum, 'bfmij,bfmie->bfmje', preferred_element_type=jnp.float32)
  return mix(probs.own, vectors) + mix(probs.other, vectors)[:, ::-1]


def _attend_tokens(
  query: Array, key: Array, value: Array, source: Any, draw: Draw
) -> Float[Array, 'b l m e']:
  mixed = _attend(by_frame(query), by_frame(key), by_frame(value), source, draw)
  return rearrange(mixed, 'b f m n e -> b (f n) m e')


def attention_with_drops(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  is_dropped: Bool[Array, 'b f m i n'],
) -> Float[Array, 'b l m e']:
  """Attention without the within-frame pairs that are marked as dropped."""
  return _attend_tokens(query, key, value, is_dropped, _recorded)


def _recorded(logits: Logits, is_dropped: Bool[Array, 'b f m i n']) -> Array:
  del logits
  return is_dropped


def asad_attention(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  loop: Loop = NO_LOOP,
) -> Float[Array, 'b l m e']:
  """Attention with ASAD: the distribution of `asad.asad`, with other random numbers.

  No gradient flows through the draw.

  Args:
    query: one vector per token and head; the first half of the l tokens is the earlier frame.
    key: likewise.
    value: likewise.
    draw_keys: random keys, one per sample.
    drop_rate: P, the share of within-frame pairs to drop; `num_dropped` must not be 0.
    loop: over chunks of heads and samples.
  """
  count = num_dropped(query.shape[1] // 2, drop_rate)
  draw = partial(_sample, scale=query.shape[-1] ** -0.5, count=count)
  seeds = weighted_sampling.head_seeds(draw_keys, query.shape[2])
  attend = partial(_attend_tokens, draw=draw)
  return in_chunks(attend, query, key, value, seeds, loop)


def _sample(logits: Logits, seeds: HeadSeeds, *, scale: float, count: int) -> Array:
  return weighted_sampling.sample_drops(seeds, sampling_weights(logits, scale), count)


def attention_with_rule(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  rule: DropoutRule,
) -> Float[Array, 'b l m e']:
  """As `asad_attention`, with any rule of `asad.ATTENTION_DROPOUTS`, and without a loop."""
  scale = query.shape[-1] ** -0.5

  def draw(logits: Logits, keys: Array) -> Array:
    scaled = Logits(*(each * scale for each in logits))
    return rule(keys, scaled, drop_rate=drop_rate)

  return _attend_tokens(query, key, value, draw_keys, draw)
