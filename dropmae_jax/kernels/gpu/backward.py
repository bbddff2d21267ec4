"""The gradient of `asad_gpu`: for queries, and for keys and values."""

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
  query: Ref, key: Ref, value: Ref, upper: Ref, lse: Ref, mean: Ref, bits: Ref, of_query: Ref,
  queries: Ref, uppers: Ref, keys: Ref, values: Ref, sums: Ref, means: Ref, packed: Ref, mixed: Ref,
  barrier: Ref, *, sizes: Sizes
) -> None:  # fmt: skip
  """Sums over keys, for every query.

  Args:
    query: [b, f, r, (m e)].
    key: likewise.
    value: likewise.
    upper: gradient of the output, likewise.
    lse: of `attend`.
    mean: float32 [b, f, m, i], products of output and gradient.
    bits: of `attend`.
    of_query: like queries but of whole tiles, to be written.
    queries: shared, [tile, 64, e].
    uppers: likewise.
    keys: shared, [f, 64 tiles, e].
    values: likewise.
    sums: shared, [tile, 64] float32.
    means: likewise.
    packed: shared, [tile, 64, 64] uint8.
    mixed: shared, [tile, 64, e].
    barrier: nine arrivals of every warpgroup.
    sizes: of all this.
  """
  at, tiles = here(), sizes.tiles
  rows = pl.ds(at.tile * TILE, TILE)
  copy_tile(at, query, queries, barrier)
  copy_tile(at, upper, uppers, barrier)
  copy_frames(at, key, keys, barrier)
  copy_frames(at, value, values, barrier)
  head = at.sample, at.frame, at.head, rows
  for source, target in ((lse, sums), (mean, means), (bits, packed)):
    plgpu.copy_gmem_to_smem(source.at[head], target.at[at.tile], barrier)
  plgpu.barrier_wait(barrier)
  total, middle = (tiles.load_rows(each.at[at.tile]) for each in (sums, means))
  words = tiles.load(packed.at[at.tile]).astype(jnp.int32)
  found = None
  for is_own, frame in ((False, 1 - at.frame), (True, at.frame)):
    for k, (start, width) in enumerate(sizes.chunks):
      logits = logits_of(sizes, queries.at[at.tile], keys, frame, (start, width))
      attention = jnp.exp(logits - over(total, width))
      if is_own:
        word = words if width == TILE else words[:, :width]
        attention = jnp.where(((word >> k) & 1) > 0, 0.0, attention)
      products = tiles.rows_by_rows(uppers.at[at.tile], values.at[frame, pl.ds(start, width)])
      steep = attention * (products - over(middle, width)) * sizes.width**-0.5
      part = tiles.product(steep.astype(key.dtype), keys.at[frame, pl.ds(start, width)])
      found = part if found is None else found + part
  target = of_query.at[at.sample, at.frame, rows, at.lanes(sizes.width)]
  store(found.astype(of_query.dtype), mixed.at[at.tile], target)
  plgpu.wait_smem_to_gmem(0)


def key_gradients(
  query: Ref, key: Ref, value: Ref, upper: Ref, lse: Ref, mean: Ref, bits: Ref,
  of_key: Ref, of_value: Ref, queries: Ref, uppers: Ref, keys: Ref, values: Ref, sums: Ref,
  means: Ref, packed: Ref, mixed: Ref, rounded: Ref, barrier: Ref, *, sizes: Sizes
) -> None:  # fmt: skip
  """Sums over queries, for every key and value.

  Args:
    query: [b, f, r, (m e)].
    key: likewise.
    value: likewise.
    upper: gradient of the output, likewise.
    lse: of `attend`.
    mean: float32 [b, f, m, i], products of output and gradient.
    bits: of `attend`.
    of_key: like keys but of whole tiles, to be written.
    of_value: likewise.
    queries: shared, [f, 64 tiles, e].
    uppers: likewise.
    keys: shared, [tile, 64, e].
    values: likewise.
    sums: shared, [f, 64 tiles] float32.
    means: likewise.
    packed: shared, [tile, 64, 64] uint8.
    mixed: shared, [tile, 64, e].
    rounded: shared, [tile, 64, 64].
    barrier: eleven arrivals of every warpgroup.
    sizes: of all this.
  """
  at, tiles = here(), sizes.tiles
  rows = pl.ds(at.tile * TILE, TILE)
  copy_tile(at, key, keys, barrier)
  copy_tile(at, value, values, barrier)
  copy_frames(at, query, queries, barrier)
  copy_frames(at, upper, uppers, barrier)
  for frame in range(2):
    for source, target in ((lse, sums), (mean, means)):
      plgpu.copy_gmem_to_smem(
        source.at[at.sample, frame, at.head, rows], target.at[frame, rows], barrier
      )
  plgpu.copy_gmem_to_smem(bits.at[at.sample, at.frame, at.head, rows], packed.at[at.tile], barrier)
  plgpu.barrier_wait(barrier)
  of_keys = of_values = None
  for is_own, frame in ((False, 1 - at.frame), (True, at.frame)):
    for number in range(sizes.num_tiles):
      part = pl.ds(number * TILE, TILE)
      asking, given = queries.at[frame, part], uppers.at[frame, part]
      total, middle = (tiles.load_rows(each.at[frame, part]) for each in (sums, means))
      logits = tiles.rows_by_rows(asking, keys.at[at.tile]) * sizes.width**-0.5
      attention = jnp.exp(logits - over(total, TILE))
      if is_own:
        word = tiles.load(packed.at[number]).astype(jnp.int32)
        attention = jnp.where(((word >> at.tile) & 1) > 0, 0.0, attention)
      mixing = rounded.at[at.tile]
      mixing[...] = attention.astype(key.dtype)
      plgpu.commit_smem()
      to_values = tiles.columns_by_columns(mixing, given)
      products = tiles.rows_by_rows(given, values.at[at.tile])
      steep = attention * (products - over(middle, TILE)) * sizes.width**-0.5
      mixing[...] = steep.astype(key.dtype)
      plgpu.commit_smem()
      to_keys = tiles.columns_by_columns(mixing, asking)
      of_keys = to_keys if of_keys is None else of_keys + to_keys
      of_values = to_values if of_values is None else of_values + to_values
  for found, result in ((of_keys, of_key), (of_values, of_value)):
    target = result.at[at.sample, at.frame, rows, at.lanes(sizes.width)]
    store(found.astype(result.dtype), mixed.at[at.tile], target)
    plgpu.wait_smem_to_gmem(0)
