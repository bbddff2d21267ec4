"""The backward kernels of `asad_gpu`: the gradient of queries, and those of keys and values."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dropmae_jax.kernels.gpu.tile import (
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


def query_gradient(
  query: Ref, key: Ref, value: Ref, d_output: Ref, lse: Ref, mean: Ref, bits: Ref, d_query: Ref,
  queries: Ref, upstream: Ref, keys: Ref, values: Ref, sums: Ref, means: Ref, packed: Ref,
  mixed: Ref, barrier: Ref, *, sizes: Sizes
) -> None:  # fmt: skip
  """Computes the gradient of every query: a sum over keys.

  Args:
    query: [b, f, r, (m e)].
    key: likewise.
    value: likewise.
    d_output: likewise, the gradient of the output.
    lse: of `attend`.
    mean: float32 [b, f, m, i], the products of output and gradient.
    bits: of `attend`.
    d_query: like queries but of whole tiles, written.
    queries: shared memory, [tile, 64, e].
    upstream: likewise, for `d_output`.
    keys: shared memory, [f, 64 tiles, e].
    values: likewise.
    sums: shared memory, [tile, 64] float32, for `lse`.
    means: likewise.
    packed: shared memory, [tile, 64, 64] uint8.
    mixed: shared memory, [tile, 64, e].
    barrier: nine arrivals of every warpgroup.
    sizes: of the arrays.
  """
  at, tiles = here(), sizes.tiles
  rows = pl.ds(at.tile * TILE, TILE)
  copy_tile(at, query, queries, barrier)
  copy_tile(at, d_output, upstream, barrier)
  copy_frames(at, key, keys, barrier)
  copy_frames(at, value, values, barrier)
  head = at.sample, at.frame, at.head, rows
  for source, target in ((lse, sums), (mean, means), (bits, packed)):
    plgpu.copy_gmem_to_smem(source.at[head], target.at[at.tile], barrier)
  plgpu.barrier_wait(barrier)
  row_lse, row_mean = (tiles.load_rows(each.at[at.tile]) for each in (sums, means))
  words = tiles.load(packed.at[at.tile]).astype(jnp.int32)
  total = None
  for is_own, frame in ((False, 1 - at.frame), (True, at.frame)):
    for k, (start, width) in enumerate(sizes.chunks):
      logits = logits_of(sizes, queries.at[at.tile], keys, frame, (start, width))
      probs = jnp.exp(logits - over(row_lse, width))
      if is_own:
        word = words if width == TILE else words[:, :width]
        probs = jnp.where(((word >> k) & 1) > 0, 0.0, probs)
      d_probs = tiles.rows_by_rows(upstream.at[at.tile], values.at[frame, pl.ds(start, width)])
      d_logits = probs * (d_probs - over(row_mean, width)) * sizes.width**-0.5
      part = tiles.product(d_logits.astype(key.dtype), keys.at[frame, pl.ds(start, width)])
      total = part if total is None else total + part
  target = d_query.at[at.sample, at.frame, rows, at.lanes(sizes.width)]
  store(total.astype(d_query.dtype), mixed.at[at.tile], target)
  plgpu.wait_smem_to_gmem(0)


def key_gradients(
  query: Ref, key: Ref, value: Ref, d_output: Ref, lse: Ref, mean: Ref, bits: Ref,
  d_key: Ref, d_value: Ref, queries: Ref, upstream: Ref, keys: Ref, values: Ref, sums: Ref,
  means: Ref, packed: Ref, mixed: Ref, rounded: Ref, barrier: Ref, *, sizes: Sizes
) -> None:  # fmt: skip
  """Computes the gradients of every key and value: sums over queries.

  Args:
    query: [b, f, r, (m e)].
    key: likewise.
    value: likewise.
    d_output: likewise, the gradient of the output.
    lse: of `attend`.
    mean: float32 [b, f, m, i], the products of output and gradient.
    bits: of `attend`.
    d_key: like keys but of whole tiles, written.
    d_value: likewise.
    queries: shared memory, [f, 64 tiles, e].
    upstream: likewise, for `d_output`.
    keys: shared memory, [tile, 64, e].
    values: likewise.
    sums: shared memory, [f, 64 tiles] float32, for `lse`.
    means: likewise.
    packed: shared memory, [tile, 64, 64] uint8.
    mixed: shared memory, [tile, 64, e].
    rounded: shared memory, [tile, 64, 64].
    barrier: eleven arrivals of every warpgroup.
    sizes: of the arrays.
  """
  at, tiles = here(), sizes.tiles
  rows = pl.ds(at.tile * TILE, TILE)
  copy_tile(at, key, keys, barrier)
  copy_tile(at, value, values, barrier)
  copy_frames(at, query, queries, barrier)
  copy_frames(at, d_output, upstream, barrier)
  for frame in range(2):
    for source, target in ((lse, sums), (mean, means)):
      plgpu.copy_gmem_to_smem(
        source.at[at.sample, frame, at.head, rows], target.at[frame, rows], barrier
      )
  plgpu.copy_gmem_to_smem(bits.at[at.sample, at.frame, at.head, rows], packed.at[at.tile], barrier)
  plgpu.barrier_wait(barrier)
  key_total = value_total = None
  for is_own, frame in ((False, 1 - at.frame), (True, at.frame)):
    for number in range(sizes.num_tiles):
      part = pl.ds(number * TILE, TILE)
      query_tile, d_output_tile = queries.at[frame, part], upstream.at[frame, part]
      row_lse, row_mean = (tiles.load_rows(each.at[frame, part]) for each in (sums, means))
      logits = tiles.rows_by_rows(query_tile, keys.at[at.tile]) * sizes.width**-0.5
      probs = jnp.exp(logits - over(row_lse, TILE))
      if is_own:
        word = tiles.load(packed.at[number]).astype(jnp.int32)
        probs = jnp.where(((word >> at.tile) & 1) > 0, 0.0, probs)
      operand = rounded.at[at.tile]
      operand[...] = probs.astype(key.dtype)
      plgpu.commit_smem()
      value_part = tiles.columns_by_columns(operand, d_output_tile)
      d_probs = tiles.rows_by_rows(d_output_tile, values.at[at.tile])
      d_logits = probs * (d_probs - over(row_mean, TILE)) * sizes.width**-0.5
      operand[...] = d_logits.astype(key.dtype)
      plgpu.commit_smem()
      key_part = tiles.columns_by_columns(operand, query_tile)
      key_total = key_part if key_total is None else key_total + key_part
      value_total = value_part if value_total is None else value_total + value_part
  for total, result in ((key_total, d_key), (value_total, d_value)):
    target = result.at[at.sample, at.frame, rows, at.lanes(sizes.width)]
    store(total.astype(result.dtype), mixed.at[at.tile], target)
    plgpu.wait_smem_to_gmem(0)
