"""What one TPU program of `asad_tpu` computes: a sample's heads that fill 128 lanes.

Logits lie as [key, query], keys on sublanes: what is a sum over a query's keys is then an addition
of registers. The heads are kept apart by zeros in the queries, and not by cutting lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from dropmae_jax.kernels.tpu import search
from dropmae_jax.model import fast_asad, weighted_sampling

# From JAX 0.12 on it is among what is TPUs' alone.
_reciprocal = getattr(pltpu, 'reciprocal', None) or pl.reciprocal

LANES, SUBLANES, WORD = 128, 8, 32
# The last key drawn is about here, times the count and over the sum of the weights.
GUESS = 1.06
# Rows whose keys are made together.
PART = 48

# Pallas' references have no public type.
Ref = Any


def _dot(left: Array, right: Array) -> Array:
  return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _of_head(tokens: Array, head: int, width: int, axis: int) -> Array:
  """Zeroes the other heads, which costs less than to cut one out."""
  which = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, axis) // width
  return jnp.where(which == head, tokens, jnp.zeros_like(tokens))


def _race(
  keys: Ref, own: Array, other_max: Array, other_sum: Array, *, frame: int, words: list[Array]
) -> Array:
  """Writes noise over weight of each pair, the least of which are drawn; returns the weights' sum.

  The weights are those of `asad.sampling_weights`, for one head and frame and transposed.

  Args:
    keys: [key, query], to be written to.
    own: logits [key, query].
    other_max: the largest logit of the other frame [1, query].
    other_sum: the sum of powers relative to that [1, query].
    frame: number of the frame.
    words: two numbers that the noise is keyed by.
  """
  n = own.shape[0]
  column = jax.lax.broadcasted_iota(jnp.int32, (n, n), 0)
  row = jax.lax.broadcasted_iota(jnp.int32, (1, n), 1)
  largest = jnp.maximum(own.max(axis=0, keepdims=True), other_max)
  powers, best = jnp.exp(own - largest), jnp.exp(other_max - largest)
  total = powers.sum(axis=0, keepdims=True) + other_sum * best
  best = best / total + fast_asad.EPSILON
  is_self = column == row
  candidates = jnp.where(is_self, 0.0, powers * (1 / total) + fast_asad.EPSILON)
  share = best / candidates.sum(axis=0, keepdims=True)
  # All rows at once would spill registers.
  for at in range(0, n, PART):
    part = slice(at, min(at + PART, n))
    place = (column[part] + (frame * n + row) * n).astype(jnp.uint32)
    noise = weighted_sampling.noise_at(place, *words)
    weights = candidates[part] * share
    # A step of Newton's: exact division minds zeros and infinities, which costs time.
    inverse = _reciprocal(weights, approx=True)
    inverse = inverse * (2 - inverse * weights)
    keys[part, :n] = jnp.where(is_self[part], jnp.inf, noise * inverse)
  return best.sum(axis=1, keepdims=True)


def forward(
  words: Ref, query: Ref, key: Ref, value: Ref, output: Ref, bits: Ref, sums: Ref,
  race: Ref, logits: Ref, mixed: Ref, *, count: int, width: int
) -> None:  # fmt: skip
  """Draws, drops and attends."""
  heads, n, dtype = race.shape[0], logits.shape[-1], value.dtype
  first_head = (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * heads
  frames = [slice(0, n), slice(n, 2 * n)]
  queries = [query[0, frame].T for frame in frames]
  values = [value[0, frame].T for frame in frames]
  scale = width**-0.5
  # What of the last registers is not a pair is never drawn.
  for edge in (race.at[:, :, (n - 1) // 8 * 8 :, :], race.at[:, :, :, (n - 1) // LANES * LANES :]):
    edge[...] = jnp.full(edge.shape, jnp.inf)

  others, starts = {}, []
  for head in range(heads):
    key_words = [words[3 * (first_head + head) + k].astype(jnp.uint32) for k in range(2)]
    of_head, weight = slice(head * width, (head + 1) * width), 0.0
    for f in range(2):
      asking = _of_head(queries[f], head, width, 0)
      own = _dot(key[0, frames[f]], asking) * scale
      other = _dot(key[0, frames[1 - f]], asking) * scale
      other_max = other.max(axis=0, keepdims=True)
      powers = jnp.exp(other - other_max)
      others[head, f] = other_max, powers.sum(axis=0, keepdims=True)
      best = _race(race.at[head, f], own, *others[head, f], frame=f, words=key_words)
      logits[head, f] = own
      mixed[f, of_head] = _dot(values[1 - f][of_head], powers.astype(dtype))
      weight += best
    starts.append(GUESS * count / weight)

  def order() -> Array:
    frame, column, row = (jax.lax.broadcasted_iota(jnp.int32, race.shape, k) for k in (1, 2, 3))
    place = (frame * n + row) * n + column + 1
    head = jax.lax.broadcasted_iota(jnp.int32, race.shape, 0)
    coin = sum(jnp.where(head == k, words[3 * (first_head + k) + 2], 0) for k in range(heads))
    return jnp.where(coin > 0, 2 * n * n + 1 - place, place).astype(jnp.float32)

  last = search.select_lowest(race, count, jnp.stack(starts), order)
  for f in range(2):
    for head in range(heads):
      of_head = slice(head * width, (head + 1) * width)
      is_dropped = race[head, f] <= last[head]
      bits[0, head, f] = pack(is_dropped)
      left = jnp.where(is_dropped[:n, :n], -jnp.inf, logits[head, f])
      other_max, other_sum = others[head, f]
      # What was largest may have been dropped, and all else be nothing beside it.
      largest = jnp.maximum(left.max(axis=0, keepdims=True), other_max)
      powers, share = jnp.exp(left - largest), jnp.exp(other_max - largest)
      total = powers.sum(axis=0, keepdims=True) + other_sum * share
      found = mixed[f, of_head] * share + _dot(values[f][of_head], powers.astype(dtype))
      mixed[f, of_head] = found * (1 / total)
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
  """Returns what a mark counts in `pack`: 1, shifted by the number of its register."""
  return 1 << ((jax.lax.broadcasted_iota(jnp.int32, shape, 0) >> 3) & (WORD - 1))


def backward(
  query: Ref, key: Ref, value: Ref, bits: Ref, sums: Ref, gradient: Ref,
  of_query: Ref, of_key: Ref, of_value: Ref, key_sum: Ref, value_sum: Ref, *, width: int
) -> None:  # fmt: skip
  """The gradients of queries, keys and values."""
  heads, n, dtype = bits.shape[1], query.shape[1] // 2, value.dtype
  frames = [slice(0, n), slice(n, 2 * n)]
  queries, gradients, keys = (
    [tokens[0, frame].T for frame in frames] for tokens in (query, gradient, key)
  )
  scale = width**-0.5
  for f in range(2):
    to_queries = []
    for head in range(heads):
      of_head = slice(head * width, (head + 1) * width)
      asking, wanting = (_of_head(tokens[f], head, width, 0) for tokens in (queries, gradients))
      at = 2 * (2 * head + f)
      largest, share = sums[0, 0, at : at + 1], 1 / sums[0, 0, at + 1 : at + 2]
      is_dropped = unpack(bits[0, head, f, :, :n], n)
      powers, uppers = [], []
      for g in (f, 1 - f):
        found = _dot(key[0, frames[g]], asking) * scale
        left = jnp.where(is_dropped, -jnp.inf, found) if g == f else found
        powers.append(jnp.exp(left - largest) * share)
        uppers.append(_dot(value[0, frames[g]], wanting))
      # Not from the output, which is rounded.
      mean = sum((p * u).sum(axis=0, keepdims=True) for p, u in zip(powers, uppers, strict=True))
      asked, given = (_of_head(x[0, frames[f]], head, width, 1) for x in (query, gradient))
      to_query = 0.0
      for g, power, upper in zip((f, 1 - f), powers, uppers, strict=True):
        steep = (power * (upper - mean) * scale).astype(dtype)
        to_query += _dot(keys[g][of_head], steep)
        of_keys, of_values = _dot(steep, asked), _dot(power.astype(dtype), given)
        if f == head == 0:
          key_sum[g], value_sum[g] = of_keys, of_values
        else:
          key_sum[g] += of_keys
          value_sum[g] += of_values
      to_queries.append(to_query)
    of_query[0, frames[f]] = jnp.concatenate(to_queries).T.astype(of_query.dtype)
  for f in range(2):
    of_key[0, frames[f]] = key_sum[f].astype(of_key.dtype)
    of_value[0, frames[f]] = value_sum[f].astype(of_value.dtype)
