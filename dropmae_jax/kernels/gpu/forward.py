"""The forward pass of `asad_gpu`: ranks of pairs, and attention without those that are dropped."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from dropmae_jax.kernels.gpu.tile import (
  LOWEST,
  TILE,
  Ref,
  Sizes,
  copy_frames,
  copy_tile,
  here,
  logits_of,
  over,
  store,
)
from dropmae_jax.model import fast_asad, weighted_sampling

# -log of the largest uniform number.
LEAST_NOISE = 2.0**-24


def rank(
  words: Ref, query: Ref, key: Ref, ranks: Ref,
  queries: Ref, keys: Ref, staged: Ref, last_staged: Ref, barrier: Ref, *, sizes: Sizes
) -> None:  # fmt: skip
  """Writes the rank of every within-frame pair; those are drawn whose ranks are lowest.

  Args:
    words: int32 [b, m, 2], which key the noise.
    query: [b, f, r, (m e)].
    key: likewise.
    ranks: uint16 [b, f, m, r, r], to be written; NEVER where there is no pair.
    queries: shared, [tile, 64, e].
    keys: shared, [f, 64 tiles, e].
    staged: shared, [tile, 64, 64] uint16.
    last_staged: likewise, as wide as the last tile of columns.
    barrier: three arrivals of every warpgroup.
    sizes: of all this.
  """
  at, tiles, n = here(), sizes.tiles, sizes.n
  # The last tile begins earlier, to end with the rows: what is written twice is the same.
  first_row = jnp.minimum(at.tile * TILE, sizes.rows - TILE)
  rows = pl.ds(first_row, TILE)
  asking = queries.at[at.tile]
  plgpu.copy_gmem_to_smem(
    query.at[at.sample, at.frame, rows, at.lanes(sizes.width)], asking, barrier
  )
  copy_frames(at, key, keys, barrier)
  plgpu.barrier_wait(barrier)

  def is_self(start: int, width: int) -> Array:
    return tiles.columns(width) + start == tiles.rows(width) + first_row

  # Largest logit, and sums of powers relative to it; without the query itself too.
  own_max = own_sum = rest_sum = None
  for start, width in sizes.chunks:
    logits = logits_of(sizes, asking, keys, at.frame, (start, width))
    largest = logits.max(axis=1) if own_max is None else jnp.maximum(own_max, logits.max(axis=1))
    powers = jnp.exp(logits - over(largest, width))
    sums = powers.sum(axis=1), jnp.where(is_self(start, width), 0.0, powers).sum(axis=1)
    if own_max is not None:
      shrink = jnp.exp(own_max - largest)
      sums = own_sum * shrink + sums[0], rest_sum * shrink + sums[1]
    own_max, (own_sum, rest_sum) = largest, sums
  other_max = other_sum = None
  for chunk in sizes.chunks:
    logits = logits_of(sizes, asking, keys, 1 - at.frame, chunk)
    largest = (
      logits.max(axis=1) if other_max is None else jnp.maximum(other_max, logits.max(axis=1))
    )
    total = jnp.exp(logits - over(largest, chunk[1])).sum(axis=1)
    other_sum = total if other_max is None else other_sum * jnp.exp(other_max - largest) + total
    other_max = largest

  largest = jnp.maximum(own_max, other_max)
  shrink, best = jnp.exp(own_max - largest), jnp.exp(other_max - largest)
  inverse = 1 / (own_sum * shrink + other_sum * best)
  best_match = best * inverse + fast_asad.EPSILON
  share = best_match / (rest_sum * shrink * inverse + (n - 1) * fast_asad.EPSILON)
  first, second = (words[at.sample, at.head, k].astype(jnp.uint32) for k in range(2))
  for start, width in sizes.chunks:
    logits = logits_of(sizes, asking, keys, at.frame, (start, width))
    attention = jnp.exp(logits - over(largest, width)) * over(inverse, width)
    weights = (attention + fast_asad.EPSILON) * over(share, width)
    column, row = tiles.columns(width) + start, tiles.rows(width) + first_row
    place = ((at.frame * n + row) * n + column).astype(jnp.uint32)
    # An approximate logarithm of nearly 1 may be less than 0, which would come last.
    noise = jnp.maximum(weighted_sampling.noise_at(place, first, second), LEAST_NOISE)
    found = weighted_sampling.rank_bits(noise / weights)
    is_pair = (column != row) & (column < n) & (row < n)
    found = jnp.where(is_pair, found, weighted_sampling.NEVER).astype(jnp.uint16)
    target = ranks.at[at.sample, at.frame, at.head, rows, pl.ds(start, width)]
    if start:
      plgpu.wait_smem_to_gmem(0)
    store(found, (staged if width == TILE else last_staged).at[at.tile], target)
  plgpu.wait_smem_to_gmem(0)


def attend(
  border: Ref, query: Ref, key: Ref, value: Ref, ranks: Ref, output: Ref, lse: Ref, bits: Ref,
  queries: Ref, keys: Ref, values: Ref, near: Ref, last_near: Ref, packed: Ref, mixed: Ref,
  sums: Ref, barrier: Ref, near_barriers: Ref, *, sizes: Sizes
) -> None:  # fmt: skip
  """Drops and attends.

  Args:
    border: int32 [b, m, 3], see `sampling.Border`.
    query: [b, f, r, (m e)].
    key: likewise.
    value: likewise.
    ranks: of `rank`.
    output: float32, like queries but of whole tiles, to be written.
    lse: float32 [b, f, m, i], to be written: logarithm of the sum of powers.
    bits: uint8 [b, f, m, i, 64], to be written: bit k of byte j tells whether the pair of query i
      and key 64 k + j was dropped.
    queries: shared, [tile, 64, e].
    keys: shared, [f, 64 tiles, e].
    values: likewise.
    near: shared, [tile, 64, 64] uint16.
    last_near: likewise, as wide as the last tile of columns.
    packed: shared, [tile, 64, 64] uint8.
    mixed: shared, [tile, 64, e] float32.
    sums: shared, [tile, 64] float32.
    barrier: five arrivals of every warpgroup.
    near_barriers: one of each warpgroup, one arrival.
    sizes: of all this.
  """
  at, tiles = here(), sizes.tiles
  rows, ready = pl.ds(at.tile * TILE, TILE), near_barriers.at[at.tile]

  def of_chunk(start: int, width: int) -> Ref:
    return (near if width == TILE else last_near).at[at.tile]

  def fetch(start: int, width: int) -> None:
    part = ranks.at[at.sample, at.frame, at.head, rows, pl.ds(start, width)]
    plgpu.copy_gmem_to_smem(part, of_chunk(start, width), ready)

  fetch(*sizes.chunks[0])
  copy_tile(at, query, queries, barrier)
  copy_frames(at, key, keys, barrier)
  copy_frames(at, value, values, barrier)
  threshold, cut, from_behind = (border[at.sample, at.head, k] for k in range(3))
  plgpu.barrier_wait(barrier)

  state = word = None
  for chunk in sizes.chunks:
    logits = logits_of(sizes, queries.at[at.tile], keys, 1 - at.frame, chunk)
    state = _taken_in(state, logits, values.at[1 - at.frame, pl.ds(*chunk)], sizes)
  for k, (start, width) in enumerate(sizes.chunks):
    plgpu.barrier_wait(ready)
    found = tiles.load(of_chunk(start, width)).astype(jnp.int32)
    if k + 1 < len(sizes.chunks):
      fetch(*sizes.chunks[k + 1])
    column, row = tiles.columns(width) + start, tiles.rows(width) + at.tile * TILE
    place = (at.frame * sizes.rows + row) * sizes.rows + column
    is_taken = (place < cut).astype(jnp.int32) ^ from_behind
    is_dropped = found < threshold + is_taken
    logits = logits_of(sizes, queries.at[at.tile], keys, at.frame, (start, width))
    left = jnp.where(is_dropped, LOWEST, logits)
    state = _taken_in(state, left, values.at[at.frame, pl.ds(start, width)], sizes)
    mark = is_dropped.astype(jnp.int32) << k
    if word is None:
      word = mark
    elif width == TILE:
      word = word | mark
    else:
      packed[at.tile, :, :] = word.astype(jnp.uint8)
      packed[at.tile, :, :width] = (word[:, :width] | mark).astype(jnp.uint8)
  if sizes.chunks[-1][1] == TILE:
    packed[at.tile, :, :] = word.astype(jnp.uint8)
  largest, total, mix = state
  mixed[at.tile, :, :] = mix / over(total, sizes.width)
  sums[at.tile, :] = largest + jnp.log(total)
  plgpu.commit_smem()
  head = at.sample, at.frame, at.head, rows
  plgpu.copy_smem_to_gmem(packed.at[at.tile], bits.at[head])
  plgpu.copy_smem_to_gmem(sums.at[at.tile], lse.at[head])
  target = output.at[at.sample, at.frame, rows, at.lanes(sizes.width)]
  plgpu.copy_smem_to_gmem(mixed.at[at.tile], target)
  plgpu.wait_smem_to_gmem(0)


def _taken_in(
  state: tuple[Array, Array, Array] | None, logits: Float[Array, 'i j'], values: Ref, sizes: Sizes
) -> tuple[Array, Array, Array]:
  """Takes more keys into the softmax of every row: largest logit, sum of powers, mixed values.

  The first keys must be of the other frame, of which none is dropped: the largest is a logit then.
  """
  width = logits.shape[1]
  new = logits.max(axis=1) if state is None else jnp.maximum(state[0], logits.max(axis=1))
  powers = jnp.exp(logits - over(new, width)).astype(values.dtype)
  of_keys = powers.astype(jnp.float32).sum(axis=1)
  found = sizes.tiles.product(powers, values)
  if state is None:
    return new, of_keys, found
  largest, total, mix = state
  shrink = jnp.exp(largest - new)
  return new, total * shrink + of_keys, mix * over(shrink, sizes.width) + found
