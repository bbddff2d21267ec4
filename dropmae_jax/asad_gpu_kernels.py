"""What one GPU program of `asad_gpu` computes: a head, of one frame's queries or keys.

A program has a warpgroup for every 64 rows. Tokens are [sample, frame, row, (head e)], zero in rows
that are no tokens. Rows past the end read zeros.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dropmae_jax import asad, sampling
from dropmae_jax.asad_gpu_tile import TILE, Ref, Tiles, over

# A logit of what is no pair; finite, so that differences are numbers.
LOWEST = -1e30


class Sizes(NamedTuple):
  """What a program is compiled for.

  n: tokens of a frame.
  rows: the same, with what fills it up.
  width: of a head.
  tiles: on a GPU or interpreted.
  """

  n: int
  rows: int
  width: int
  tiles: Tiles

  @property
  def num_tiles(self) -> int:
    """Warpgroups of a program."""
    return pl.cdiv(self.rows, TILE)

  @property
  def chunks(self) -> list[tuple[int, int]]:
    """Cuts columns into tiles, the last of which may be narrower: where it begins, how wide."""
    return [(at, min(TILE, self.rows - at)) for at in range(0, self.rows, TILE)]


class _Place(NamedTuple):
  """Which head, frame and tile of rows this is."""

  sample: Array
  frame: Array
  head: Array
  tile: Array

  def lanes(self, width: int) -> pl.Slice:
    return pl.ds(self.head * width, width)


def _place() -> _Place:
  return _Place(*(jax.lax.axis_index(name) for name in _Place._fields))


def _copy(source: Ref, target: Ref, barrier: Ref) -> None:
  plgpu.copy_gmem_to_smem(source, target, barrier)


def _copy_tile(at: _Place, source: Ref, target: Ref, barrier: Ref) -> None:
  """Copies this warpgroup's rows of its own frame."""
  rows = pl.ds(at.tile * TILE, TILE)
  _copy(source.at[at.sample, at.frame, rows, at.lanes(target.shape[-1])], target.at[at.tile], barrier)


def _copy_frames(at: _Place, source: Ref, target: Ref, barrier: Ref) -> None:
  """Copies this warpgroup's share of both frames."""
  rows = pl.ds(at.tile * TILE, TILE)
  for frame in range(2):
    part = source.at[at.sample, frame, rows, at.lanes(target.shape[-1])]
    _copy(part, target.at[frame, rows], barrier)


def _store(value: Array, staged: Ref, target: Ref) -> None:
  """Writes a tile by way of shared memory, which must not be in use."""
  staged[...] = value
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(staged, target)


def _logits(
  sizes: Sizes, queries: Ref, keys: Ref, frame: int | Array, chunk: tuple[int, int]
) -> Float[Array, 'i j']:
  """Returns scaled products of queries with some keys of a frame; `LOWEST` past the last key."""
  start, width = chunk
  logits = sizes.tiles.rows_by_rows(queries, keys.at[frame, pl.ds(start, width)])
  logits = logits * sizes.width**-0.5
  if start + width > sizes.n:
    logits = jnp.where(sizes.tiles.columns(width) + start < sizes.n, logits, LOWEST)
  return logits


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
  at, tiles, n = _place(), sizes.tiles, sizes.n
  # The last tile begins earlier, to end with the rows: what is written twice is the same.
  first_row = jnp.minimum(at.tile * TILE, sizes.rows - TILE)
  rows = pl.ds(first_row, TILE)
  asking = queries.at[at.tile]
  _copy(query.at[at.sample, at.frame, rows, at.lanes(sizes.width)], asking, barrier)
  _copy_frames(at, key, keys, barrier)
  plgpu.barrier_wait(barrier)

  def is_self(start: int, width: int) -> Array:
    return tiles.columns(width) + start == tiles.rows(width) + first_row

  # Largest logit, and sums of powers relative to it; without the query itself too.
  own_max = own_sum = rest_sum = None
  for start, width in sizes.chunks:
    logits = _logits(sizes, asking, keys, at.frame, (start, width))
    largest = logits.max(axis=1) if own_max is None else jnp.maximum(own_max, logits.max(axis=1))
    powers = jnp.exp(logits - over(largest, width))
    sums = powers.sum(axis=1), jnp.where(is_self(start, width), 0.0, powers).sum(axis=1)
    if own_max is not None:
      shrink = jnp.exp(own_max - largest)
      sums = own_sum * shrink + sums[0], rest_sum * shrink + sums[1]
    own_max, (own_sum, rest_sum) = largest, sums
  other_max = other_sum = None
  for chunk in sizes.chunks:
    logits = _logits(sizes, asking, keys, 1 - at.frame, chunk)
    largest = logits.max(axis=1) if other_max is None else jnp.maximum(other_max, logits.max(axis=1))
    total = jnp.exp(logits - over(largest, chunk[1])).sum(axis=1)
    other_sum = total if other_max is None else other_sum * jnp.exp(other_max - largest) + total
    other_max = largest

  largest = jnp.maximum(own_max, other_max)
  shrink, best = jnp.exp(own_max - largest), jnp.exp(other_max - largest)
  inverse = 1 / (own_sum * shrink + other_sum * best)
  best_match = best * inverse + asad.EPSILON
  share = best_match / (rest_sum * shrink * inverse + (n - 1) * asad.EPSILON)
  first, second = (words[at.sample, at.head, k].astype(jnp.uint32) for k in range(2))
  for start, width in sizes.chunks:
    logits = _logits(sizes, asking, keys, at.frame, (start, width))
    attention = jnp.exp(logits - over(largest, width)) * over(inverse, width)
    weights = (attention + asad.EPSILON) * over(share, width)
    column, row = tiles.columns(width) + start, tiles.rows(width) + first_row
    place = ((at.frame * n + row) * n + column).astype(jnp.uint32)
    found = sampling.rank_bits(sampling.noise_at(place, first, second) / weights)
    is_pair = (column != row) & (column < n) & (row < n)
    found = jnp.where(is_pair, found, sampling.NEVER).astype(jnp.uint16)
    target = ranks.at[at.sample, at.frame, at.head, rows, pl.ds(start, width)]
    if start:
      plgpu.wait_smem_to_gmem(0)
    _store(found, (staged if width == TILE else last_staged).at[at.tile], target)
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
  at, tiles = _place(), sizes.tiles
  rows, ready = pl.ds(at.tile * TILE, TILE), near_barriers.at[at.tile]

  def of_chunk(start: int, width: int) -> Ref:
    return (near if width == TILE else last_near).at[at.tile]

  def fetch(start: int, width: int) -> None:
    part = ranks.at[at.sample, at.frame, at.head, rows, pl.ds(start, width)]
    _copy(part, of_chunk(start, width), ready)

  fetch(*sizes.chunks[0])
  _copy_tile(at, query, queries, barrier)
  _copy_frames(at, key, keys, barrier)
  _copy_frames(at, value, values, barrier)
  threshold, cut, from_behind = (border[at.sample, at.head, k] for k in range(3))
  plgpu.barrier_wait(barrier)

  largest = total = mix = word = None

  def add(
    state: tuple, logits: Float[Array, 'i j'], frame: Array, start: int, width: int
  ) -> tuple[Array, Array, Array]:
    """Takes more keys into the softmax, whose first part is of the other frame: never empty."""
    largest, total, mix = state
    new = logits.max(axis=1) if largest is None else jnp.maximum(largest, logits.max(axis=1))
    powers = jnp.exp(logits - over(new, width)).astype(value.dtype)
    of_keys = powers.astype(jnp.float32).sum(axis=1)
    found = tiles.product(powers, values.at[frame, pl.ds(start, width)])
    if largest is None:
      return new, of_keys, found
    shrink = jnp.exp(largest - new)
    return new, total * shrink + of_keys, mix * over(shrink, sizes.width) + found

  state = largest, total, mix
  for chunk in sizes.chunks:
    logits = _logits(sizes, queries.at[at.tile], keys, 1 - at.frame, chunk)
    state = add(state, logits, 1 - at.frame, *chunk)
  for k, (start, width) in enumerate(sizes.chunks):
    plgpu.barrier_wait(ready)
    found = tiles.load(of_chunk(start, width)).astype(jnp.int32)
    if k + 1 < len(sizes.chunks):
      fetch(*sizes.chunks[k + 1])
    column, row = tiles.columns(width) + start, tiles.rows(width) + at.tile * TILE
    place = (at.frame * sizes.rows + row) * sizes.rows + column
    is_taken = (place < cut).astype(jnp.int32) ^ from_behind
    is_dropped = found < threshold + is_taken
    logits = _logits(sizes, queries.at[at.tile], keys, at.frame, (start, width))
    state = add(state, jnp.where(is_dropped, LOWEST, logits), at.frame, start, width)
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
  at, tiles = _place(), sizes.tiles
  rows = pl.ds(at.tile * TILE, TILE)
  _copy_tile(at, query, queries, barrier)
  _copy_tile(at, upper, uppers, barrier)
  _copy_frames(at, key, keys, barrier)
  _copy_frames(at, value, values, barrier)
  head = at.sample, at.frame, at.head, rows
  for source, target in ((lse, sums), (mean, means), (bits, packed)):
    _copy(source.at[head], target.at[at.tile], barrier)
  plgpu.barrier_wait(barrier)
  total, middle = (tiles.load_rows(each.at[at.tile]) for each in (sums, means))
  words = tiles.load(packed.at[at.tile]).astype(jnp.int32)
  found = None
  for frame in (1 - at.frame, at.frame):
    for k, (start, width) in enumerate(sizes.chunks):
      logits = _logits(sizes, queries.at[at.tile], keys, frame, (start, width))
      attention = jnp.exp(logits - over(total, width))
      if frame is at.frame:
        word = words if width == TILE else words[:, :width]
        attention = jnp.where(((word >> k) & 1) > 0, 0.0, attention)
      products = tiles.rows_by_rows(uppers.at[at.tile], values.at[frame, pl.ds(start, width)])
      steep = attention * (products - over(middle, width)) * sizes.width**-0.5
      part = tiles.product(steep.astype(key.dtype), keys.at[frame, pl.ds(start, width)])
      found = part if found is None else found + part
  target = of_query.at[at.sample, at.frame, rows, at.lanes(sizes.width)]
  _store(found.astype(of_query.dtype), mixed.at[at.tile], target)
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
  at, tiles = _place(), sizes.tiles
  rows = pl.ds(at.tile * TILE, TILE)
  _copy_tile(at, key, keys, barrier)
  _copy_tile(at, value, values, barrier)
  _copy_frames(at, query, queries, barrier)
  _copy_frames(at, upper, uppers, barrier)
  for frame in range(2):
    for source, target in ((lse, sums), (mean, means)):
      _copy(source.at[at.sample, frame, at.head, rows], target.at[frame, rows], barrier)
  _copy(bits.at[at.sample, at.frame, at.head, rows], packed.at[at.tile], barrier)
  plgpu.barrier_wait(barrier)
  of_keys = of_values = None
  for frame in (1 - at.frame, at.frame):
    for number in range(sizes.num_tiles):
      part = pl.ds(number * TILE, TILE)
      asking, given = queries.at[frame, part], uppers.at[frame, part]
      total, middle = (tiles.load_rows(each.at[frame, part]) for each in (sums, means))
      logits = tiles.rows_by_rows(asking, keys.at[at.tile]) * sizes.width**-0.5
      attention = jnp.exp(logits - over(total, TILE))
      if frame is at.frame:
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
    _store(found.astype(result.dtype), mixed.at[at.tile], target)
    plgpu.wait_smem_to_gmem(0)
