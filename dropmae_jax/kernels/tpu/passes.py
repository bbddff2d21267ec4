"""The forward and the backward kernel of `asad_tpu`.

A program computes the heads of one sample that fill 128 lanes. Logits are [key, query] with keys on
sublanes, so that a sum over the keys of a query is an addition of registers. Heads are separated by
zeros in the queries instead of slicing lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from dropmae_jax.kernels.tpu import search
from dropmae_jax.model import fast_asad, weighted_sampling

# JAX 0.12 moved it.
_reciprocal = getattr(pltpu, 'reciprocal', None) or pl.reciprocal

LANES, SUBLANES, WORD = 128, 8, 32
# The highest score drawn is about this, times the count, over the sum of the weights.
GUESS = 1.06
# Rows of scores that are computed together.
PART = 48

# Pallas has no public type for references.
Ref = Any


def _dot(left: Array, right: Array) -> Array:
  return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _only_head(tokens: Array, head: int, width: int, axis: int) -> Array:
  """Zeroes the other heads, which is cheaper than slicing one out."""
  which = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, axis) // width
  return jnp.where(which == head, tokens, jnp.zeros_like(tokens))


def _write_scores(
  scores: Ref, own: Array, other_max: Array, other_sum: Array, *, frame: int, words: list[Array]
) -> Array:
  """Writes the scores, noise / weight, of one head and frame; returns the sum of the weights.

  The pairs with the lowest scores are drawn. The weights are those of `asad.sampling_weights`,
  transposed.

  Args:
    scores: [key, query], written.
    own: logits [key, query].
    other_max: the largest logit of the other frame [1, query].
    other_sum: the sum of exponentials of the other frame, relative to that [1, query].
    frame: 0 or 1.
    words: two, which key the noise.
  """
  n = own.shape[0]
  column = jax.lax.broadcasted_iota(jnp.int32, (n, n), 0)
  row = jax.lax.broadcasted_iota(jnp.int32, (1, n), 1)
  largest = jnp.maximum(own.max(axis=0, keepdims=True), other_max)
  exps, other_factor = jnp.exp(own - largest), jnp.exp(other_max - largest)
  total = exps.sum(axis=0, keepdims=True) + other_sum * other_factor
  best_match = other_factor / total + fast_asad.EPSILON
  is_self = column == row
  candidates = jnp.where(is_self, 0.0, exps * (1 / total) + fast_asad.EPSILON)
  share = best_match / candidates.sum(axis=0, keepdims=True)
  # In parts, because all rows at once would spill registers.
  for start in range(0, n, PART):
    part = slice(start, min(start + PART, n))
    index = (column[part] + (frame * n + row) * n).astype(jnp.uint32)
    noise = weighted_sampling.noise_at(index, *words)
    weights = candidates[part] * share
    # With one step of Newton's method. An exact division would also handle zeros and infinities,
    # which takes longer.
    inverse = _reciprocal(weights, approx=True)
    inverse = inverse * (2 - inverse * weights)
    scores[part, :n] = jnp.where(is_self[part], jnp.inf, noise * inverse)
  return best_match.sum(axis=1, keepdims=True)


def forward(
  words: Ref, query: Ref, key: Ref, value: Ref, output: Ref, bits: Ref, sums: Ref,
  scores: Ref, logits: Ref, mixed: Ref, *, count: int, width: int
) -> None:  # fmt: skip
  """Draws pairs, drops them, and computes attention.

  Args:
    words: int32 [3 b m], of each head: two that key its noise, and its tie-break direction.
    query: [1, l, (h e)], of the h heads of a program.
    key: likewise.
    value: likewise.
    output: likewise, written.
    bits: int32 [1, h, f, w, i], written: which pairs were dropped, see `pack`.
    sums: float32 [1, 1, 4 h, n], written: of head and frame, the largest logit of each query and
      its sum of exponentials.
    scores: scratch, [h, f, rows, columns].
    logits: scratch, [h, f, n, n], of the own frame.
    mixed: scratch, [f, (h e), n], the output so far.
    count: how many pairs to drop.
    width: e.
  """
  heads, n, dtype = scores.shape[0], logits.shape[-1], value.dtype
  first_head = (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * heads
  frames = [slice(0, n), slice(n, 2 * n)]
  queries = [query[0, frame].T for frame in frames]
  values = [value[0, frame].T for frame in frames]
  scale = width**-0.5
  # The last registers of rows and columns are partly padding, which is never drawn.
  for edge in (
    scores.at[:, :, (n - 1) // 8 * 8 :, :],
    scores.at[:, :, :, (n - 1) // LANES * LANES :],
  ):
    edge[...] = jnp.full(edge.shape, jnp.inf)

  others, starts = {}, []
  for head in range(heads):
    key_words = [words[3 * (first_head + head) + k].astype(jnp.uint32) for k in range(2)]
    lanes, weight = slice(head * width, (head + 1) * width), 0.0
    for f in range(2):
      head_queries = _only_head(queries[f], head, width, 0)
      own = _dot(key[0, frames[f]], head_queries) * scale
      other = _dot(key[0, frames[1 - f]], head_queries) * scale
      other_max = other.max(axis=0, keepdims=True)
      exps = jnp.exp(other - other_max)
      others[head, f] = other_max, exps.sum(axis=0, keepdims=True)
      weight_of_frame = _write_scores(
        scores.at[head, f], own, *others[head, f], frame=f, words=key_words
      )
      logits[head, f] = own
      mixed[f, lanes] = _dot(values[1 - f][lanes], exps.astype(dtype))
      weight += weight_of_frame
    starts.append(GUESS * count / weight)

  def tie_order() -> Array:
    frame, column, row = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, k) for k in (1, 2, 3))
    index = (frame * n + row) * n + column + 1
    head = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    from_end = sum(jnp.where(head == k, words[3 * (first_head + k) + 2], 0) for k in range(heads))
    return jnp.where(from_end > 0, 2 * n * n + 1 - index, index).astype(jnp.float32)

  last = search.select_lowest(scores, count, jnp.stack(starts), tie_order)
  for f in range(2):
    for head in range(heads):
      lanes = slice(head * width, (head + 1) * width)
      is_dropped = scores[head, f] <= last[head]
      bits[0, head, f] = pack(is_dropped)
      own = jnp.where(is_dropped[:n, :n], -jnp.inf, logits[head, f])
      other_max, other_sum = others[head, f]
      # Find the maximum again: if it was dropped, all others may underflow relative to it.
      largest = jnp.maximum(own.max(axis=0, keepdims=True), other_max)
      exps, other_factor = jnp.exp(own - largest), jnp.exp(other_max - largest)
      total = exps.sum(axis=0, keepdims=True) + other_sum * other_factor
      unnormalised = mixed[f, lanes] * other_factor + _dot(values[f][lanes], exps.astype(dtype))
      mixed[f, lanes] = unnormalised * (1 / total)
      at = 2 * (2 * head + f)
      sums[0, 0, at : at + 1], sums[0, 0, at + 1 : at + 2] = largest, total
    output[0, frames[f]] = mixed[f].T.astype(output.dtype)


def pack(marks: Bool[Array, 'j i']) -> Int[Array, 'w i']:
  """Packs marks of 32 registers into one: bit t % 32 of row r + 8 (t // 32) is mark r + 8 t."""
  bits = jnp.where(marks, _bit_of_row(marks.shape), 0)
  words = [bits[at : at + SUBLANES * WORD] for at in range(0, len(bits), SUBLANES * WORD)]
  return jnp.concatenate([word.reshape(-1, SUBLANES, bits.shape[1]).sum(axis=0) for word in words])


def unpack(words: Int[Array, 'w i'], rows: int) -> Bool[Array, 'j i']:
  """The inverse of `pack`."""
  tiles = [words[tile // WORD * SUBLANES :][:SUBLANES] for tile in range(pl.cdiv(rows, SUBLANES))]
  bits = jnp.concatenate(tiles)[:rows]
  return (bits & _bit_of_row(bits.shape)) != 0


def _bit_of_row(shape: tuple[int, ...]) -> Int[Array, 'j i']:
  """Returns the bit of each mark in `pack`: 1, shifted by the number of its register."""
  return 1 << ((jax.lax.broadcasted_iota(jnp.int32, shape, 0) >> 3) & (WORD - 1))


def backward(
  query: Ref, key: Ref, value: Ref, bits: Ref, sums: Ref, d_output: Ref,
  d_query: Ref, d_key: Ref, d_value: Ref, d_keys: Ref, d_values: Ref, *, width: int
) -> None:  # fmt: skip
  """Computes the gradients of queries, keys and values.

  Args:
    query: [1, l, (h e)], of the h heads of a program.
    key: likewise.
    value: likewise.
    bits: of `forward`.
    sums: of `forward`.
    d_output: likewise, the gradient of the output.
    d_query: likewise, written.
    d_key: likewise, written.
    d_value: likewise, written.
    d_keys: scratch, [f, n, (h e)], the sum over queries so far.
    d_values: scratch, likewise.
    width: e.
  """
  heads, n, dtype = bits.shape[1], query.shape[1] // 2, value.dtype
  frames = [slice(0, n), slice(n, 2 * n)]
  queries, d_outputs, keys = (
    [tokens[0, frame].T for frame in frames] for tokens in (query, d_output, key)
  )
  scale = width**-0.5
  for f in range(2):
    d_queries = []
    for head in range(heads):
      lanes = slice(head * width, (head + 1) * width)
      head_queries, head_d_outputs = (
        _only_head(tokens[f], head, width, 0) for tokens in (queries, d_outputs)
      )
      at = 2 * (2 * head + f)
      largest, inverse = sums[0, 0, at : at + 1], 1 / sums[0, 0, at + 1 : at + 2]
      is_dropped = unpack(bits[0, head, f, :, :n], n)
      probs, d_probs = [], []
      for g in (f, 1 - f):
        logits = _dot(key[0, frames[g]], head_queries) * scale
        masked = jnp.where(is_dropped, -jnp.inf, logits) if g == f else logits
        probs.append(jnp.exp(masked - largest) * inverse)
        d_probs.append(_dot(value[0, frames[g]], head_d_outputs))
      # Not computed from the output, which is rounded.
      mean = sum((p * d).sum(axis=0, keepdims=True) for p, d in zip(probs, d_probs, strict=True))
      query_rows, d_output_rows = (
        _only_head(x[0, frames[f]], head, width, 1) for x in (query, d_output)
      )
      d_query_of_head = 0.0
      for g, p, d in zip((f, 1 - f), probs, d_probs, strict=True):
        d_logits = (p * (d - mean) * scale).astype(dtype)
        d_query_of_head += _dot(keys[g][lanes], d_logits)
        to_keys, to_values = _dot(d_logits, query_rows), _dot(p.astype(dtype), d_output_rows)
        if f == head == 0:
          d_keys[g], d_values[g] = to_keys, to_values
        else:
          d_keys[g] += to_keys
          d_values[g] += to_values
      d_queries.append(d_query_of_head)
    d_query[0, frames[f]] = jnp.concatenate(d_queries).T.astype(d_query.dtype)
  for f in range(2):
    d_key[0, frames[f]] = d_keys[f].astype(d_key.dtype)
    d_value[0, frames[f]] = d_values[f].astype(d_value.dtype)
