"""The forward kernels of `asad_gpu`: the rank of every pair, and attention with dropped pairs."""

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
MIN_NOISE = 2.0**-24


def rank(
  words: Ref, query: Ref, key: Ref, ranks: Ref,
  queries: Ref, keys: Ref, staged: Ref, last_staged: Ref, barrier: Ref, *, sizes: Sizes
) -> None:  # fmt: skip
  """Writes the rank of every within-frame pair; the pairs with the lowest ranks are drawn.

  Args:
    words: int32 [b, m, 2], which key the noise.
    query: [b, f, r, (m e)].
    key: likewise.
    ranks: uint16 [b, f, m, r, r], written; NEVER where there is no pair.
    queries: shared memory, [tile, 64, e].
    keys: shared memory, [f, 64 tiles, e].
    staged: shared memory, [tile, 64, 64] uint16.
    last_staged: likewise, as wide as the last tile of columns.
    barrier: three arrivals of every warpgroup.
    sizes: of the arrays.
  """
  at, tiles, n = here(), sizes.tiles, sizes.n
  # The last tile ends with the rows, so it overlaps the one before; both write the same there.
  first_row = jnp.minimum(at.tile * TILE, sizes.rows - TILE)
  rows = pl.ds(first_row, TILE)
  query_tile = queries.at[at.tile]
  plgpu.copy_gmem_to_smem(
    query.at[at.sample, at.frame, rows, at.lanes(sizes.width)], query_tile, barrier
  )
  copy_frames(at, key, keys, barrier)
  plgpu.barrier_wait(barrier)

  def is_self(start: int, width: int) -> Array:
    return tiles.columns(width) + start == tiles.rows(width) + first_row

  # Per query, online over chunks: the largest logit and the sum of exponentials relative to it. The
  # candidates are all keys of the own frame except the query itself.
  own_max = own_sum = candidates_sum = None
  for start, width in sizes.chunks:
    logits = logits_of(sizes, query_tile, keys, at.frame, (start, width))
    largest = logits.max(axis=1) if own_max is None else jnp.maximum(own_max, logits.max(axis=1))
    exps = jnp.exp(logits - over(largest, width))
    sums = exps.sum(axis=1), jnp.where(is_self(start, width), 0.0, exps).sum(axis=1)
    if own_max is not None:
      rescale = jnp.exp(own_max - largest)
      sums = own_sum * rescale + sums[0], candidates_sum * rescale + sums[1]
    own_max, (own_sum, candidates_sum) = largest, sums
  other_max = other_sum = None
  for chunk in sizes.chunks:
    logits = logits_of(sizes, query_tile, keys, 1 - at.frame, chunk)
    largest = (
      logits.max(axis=1) if other_max is None else jnp.maximum(other_max, logits.max(axis=1))
    )
    total = jnp.exp(logits - over(largest, chunk[1])).sum(axis=1)
    other_sum = total if other_max is None else other_sum * jnp.exp(other_max - largest) + total
    other_max = largest

  # The weights are those of `asad.sampling_weights`.
  largest = jnp.maximum(own_max, other_max)
  own_factor, other_factor = jnp.exp(own_max - largest), jnp.exp(other_max - largest)
  inverse = 1 / (own_sum * own_factor + other_sum * other_factor)
  best_match = other_factor * inverse + fast_asad.EPSILON
  share = best_match / (candidates_sum * own_factor * inverse + (n - 1) * fast_asad.EPSILON)
  first, second = (words[at.sample, at.head, k].astype(jnp.uint32) for k in range(2))
  for start, width in sizes.chunks:
    logits = logits_of(sizes, query_tile, keys, at.frame, (start, width))
    attention = jnp.exp(logits - over(largest, width)) * over(inverse, width)
    weights = (attention + fast_asad.EPSILON) * over(share, width)
    column, row = tiles.columns(width) + start, tiles.rows(width) + first_row
    index = ((at.frame * n + row) * n + column).astype(jnp.uint32)
    # The approximate -log of a number near 1 can be negative, whose rank would be the highest.
    noise = jnp.maximum(weighted_sampling.noise_at(index, first, second), MIN_NOISE)
    bits = weighted_sampling.rank_bits(noise / weights)
    is_pair = (column != row) & (column < n) & (row < n)
    bits = jnp.where(is_pair, bits, weighted_sampling.NEVER).astype(jnp.uint16)
    target = ranks.at[at.sample, at.frame, at.head, rows, pl.ds(start, width)]
    if start:
      plgpu.wait_smem_to_gmem(0)
    store(bits, (staged if width == TILE else last_staged).at[at.tile], target)
  plgpu.wait_smem_to_gmem(0)


def attend(
  cutoff: Ref, query: Ref, key: Ref, value: Ref, ranks: Ref, output: Ref, lse: Ref, bits: Ref,
  queries: Ref, keys: Ref, values: Ref, next_ranks: Ref, last_ranks: Ref, packed: Ref, mixed: Ref,
  sums: Ref, barrier: Ref, next_ranks_barriers: Ref, *, sizes: Sizes
) -> None:  # fmt: skip
  """Drops the pairs with the lowest ranks and computes attention.

  Args:
    cutoff: int32 [b, m, 3], see `weighted_sampling.Cutoff`.
    query: [b, f, r, (m e)].
    key: likewise.
    value: likewise.
    ranks: of `rank`.
    output: float32, like queries but of whole tiles, written.
    lse: float32 [b, f, m, i], written: the logarithm of the sum of exponentials.
    bits: uint8 [b, f, m, i, 64], written: bit k of byte j tells whether the pair of query i and key
      64 k + j was dropped.
    queries: shared memory, [tile, 64, e].
    keys: shared memory, [f, 64 tiles, e].
    values: likewise.
    next_ranks: shared memory, [tile, 64, 64] uint16, for the next chunk of keys.
    last_ranks: likewise, as wide as the last tile of columns.
    packed: shared memory, [tile, 64, 64] uint8.
    mixed: shared memory, [tile, 64, e] float32.
    sums: shared memory, [tile, 64] float32.
    barrier: five arrivals of every warpgroup.
    next_ranks_barriers: one for each warpgroup, one arrival.
    sizes: of the arrays.
  """
  at, tiles = here(), sizes.tiles
  rows, is_fetched = pl.ds(at.tile * TILE, TILE), next_ranks_barriers.at[at.tile]

  def rank_tile(width: int) -> Ref:
    return (next_ranks if width == TILE else last_ranks).at[at.tile]

  def fetch(start: int, width: int) -> None:
    part = ranks.at[at.sample, at.frame, at.head, rows, pl.ds(start, width)]
    plgpu.copy_gmem_to_smem(part, rank_tile(width), is_fetched)

  fetch(*sizes.chunks[0])
  copy_tile(at, query, queries, barrier)
  copy_frames(at, key, keys, barrier)
  copy_frames(at, value, values, barrier)
  threshold, tie_end, ties_from_end = (cutoff[at.sample, at.head, k] for k in range(3))
  plgpu.barrier_wait(barrier)

  state = word = None
  for chunk in sizes.chunks:
    logits = logits_of(sizes, queries.at[at.tile], keys, 1 - at.frame, chunk)
    state = _online_softmax(state, logits, values.at[1 - at.frame, pl.ds(*chunk)], sizes)
  for k, (start, width) in enumerate(sizes.chunks):
    plgpu.barrier_wait(is_fetched)
    chunk_ranks = tiles.load(rank_tile(width)).astype(jnp.int32)
    if k + 1 < len(sizes.chunks):
      plgpu.commit_smem()  # All threads have read the ranks before a copy overwrites them.
      fetch(*sizes.chunks[k + 1])
    column, row = tiles.columns(width) + start, tiles.rows(width) + at.tile * TILE
    index = (at.frame * sizes.rows + row) * sizes.rows + column
    wins_tie = (index < tie_end).astype(jnp.int32) ^ ties_from_end
    is_dropped = chunk_ranks < threshold + wins_tie
    logits = logits_of(sizes, queries.at[at.tile], keys, at.frame, (start, width))
    masked = jnp.where(is_dropped, LOWEST, logits)
    state = _online_softmax(state, masked, values.at[at.frame, pl.ds(start, width)], sizes)
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
  largest, total, unnormalised = state
  mixed[at.tile, :, :] = unnormalised / over(total, sizes.width)
  sums[at.tile, :] = largest + jnp.log(total)
  plgpu.commit_smem()
  head = at.sample, at.frame, at.head, rows
  plgpu.copy_smem_to_gmem(packed.at[at.tile], bits.at[head])
  plgpu.copy_smem_to_gmem(sums.at[at.tile], lse.at[head])
  target = output.at[at.sample, at.frame, rows, at.lanes(sizes.width)]
  plgpu.copy_smem_to_gmem(mixed.at[at.tile], target)
  plgpu.wait_smem_to_gmem(0)


def _online_softmax(
  state: tuple[Array, Array, Array] | None, logits: Float[Array, 'i j'], values: Ref, sizes: Sizes
) -> tuple[Array, Array, Array]:
  """Adds a chunk of keys to the softmax of every row.

  The state is the largest logit, the sum of exponentials and the sum of values weighted by them.
  The first chunk must be of the other frame: none of it is dropped, so its maximum is a logit.
  """
  width = logits.shape[1]
  new = logits.max(axis=1) if state is None else jnp.maximum(state[0], logits.max(axis=1))
  exps = jnp.exp(logits - over(new, width)).astype(values.dtype)
  chunk_total = exps.astype(jnp.float32).sum(axis=1)
  chunk_mixed = sizes.tiles.product(exps, values)
  if state is None:
    return new, chunk_total, chunk_mixed
  largest, total, mixed = state
  rescale = jnp.exp(largest - new)
  return new, total * rescale + chunk_total, mixed * over(rescale, sizes.width) + chunk_mixed
