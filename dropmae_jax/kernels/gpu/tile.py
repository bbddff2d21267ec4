"""What the GPU kernels of `asad_gpu` are made of.

A program is a head, of one frame's queries or keys, with a warpgroup for every 64 rows: a tile.
Tokens are [sample, frame, row, (head e)], zero in rows that are no tokens; past the end they read
as zeros.

Pallas' interpreter of Mosaic GPU knows no layouts, no loads with one, and no products of
transposed references; it gets what is the same without.
"""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

# Rows of a warpgroup's matrix product.
TILE = 64
# Bytes.
SWIZZLE = 32

# What `load` is told to read all; up to JAX 0.11 it asks for an index.
_WHOLE = ((),) if 'idx' in inspect.signature(plgpu.load).parameters else ()

# A logit of what is no pair; finite, so that differences are numbers.
LOWEST = -1e30

# Pallas' references have no public type.
Ref = Any


def shared(*shape: int, dtype: DTypeLike = jnp.bfloat16, plain: bool = False) -> Any:
  """Returns an array in shared memory.

  If it is not plain it lies in rows of 32 bytes, as matrices must to be copied and multiplied:
  products may then be over any multiple of 16 terms.
  """
  columns = SWIZZLE // jnp.dtype(dtype).itemsize
  transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE)
  return plgpu.SMEM(shape, dtype, transforms=() if plain else transforms)


def over(row_values: Float[Array, ' i'], columns: int) -> Float[Array, 'i j']:
  """Repeats a number of every row along it."""
  return jax.lax.broadcast_in_dim(row_values, (*row_values.shape, columns), [0])


class Tiles(NamedTuple):
  """Operations on tiles, on a GPU or interpreted."""

  interpret: bool

  def columns(self, width: int) -> Int[Array, 'i j']:
    """Numbers the columns of a tile."""
    return self._iota(width, 1)

  def rows(self, width: int) -> Int[Array, 'i j']:
    """Numbers the rows of a tile."""
    return self._iota(width, 0)

  def _iota(self, width: int, axis: int) -> Int[Array, 'i j']:
    if self.interpret:
      return jax.lax.broadcasted_iota(jnp.int32, (TILE, width), axis)
    return plgpu.broadcasted_iota(jnp.int32, (TILE, width), axis, layout=plgpu.Layout.WGMMA)

  def load(self, source: Ref) -> Array:
    """Reads a whole tile from shared memory, laid out as products are."""
    if self.interpret:
      return source[...]
    return plgpu.load(source, *_WHOLE, layout=plgpu.Layout.WGMMA, optimized=False)

  def load_rows(self, source: Ref) -> Float[Array, ' i']:
    """Reads a number for each row of a tile from shared memory."""
    if self.interpret:
      return source[...]
    return plgpu.load(source, *_WHOLE, layout=plgpu.Layout.WGMMA.reduce(1))

  def rows_by_rows(self, left: Ref, right: Ref) -> Float[Array, 'i j']:
    """Multiplies every row of the one with every row of the other: left right^T."""
    if self.interpret:
      return _dot(left[...], right[...].T)
    return _wgmma(left, right.transpose((1, 0)))

  def product(self, left: Float[Array, 'i j'], right: Ref) -> Float[Array, 'i e']:
    """Multiplies registers with a matrix in shared memory."""
    return _dot(left, right[...]) if self.interpret else _wgmma(left, right)

  def columns_by_columns(self, left: Ref, right: Ref) -> Float[Array, 'j e']:
    """Multiplies every column of the one with every column of the other: left^T right."""
    if self.interpret:
      return _dot(left[...].T, right[...])
    return _wgmma(left.transpose((1, 0)), right)


def _dot(left: Array, right: Array) -> Array:
  return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _wgmma(left: Any, right: Ref) -> Array:
  def multiply(result: Ref) -> Array:
    plgpu.wgmma(result, left, right)
    return result[...]

  return pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


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


class Place(NamedTuple):
  """Which head, frame and tile of rows this is."""

  sample: Array
  frame: Array
  head: Array
  tile: Array

  def lanes(self, width: int) -> pl.Slice:
    """The head's share of a token."""
    return pl.ds(self.head * width, width)


def here() -> Place:
  """Returns where this program's warpgroup is."""
  return Place(*(jax.lax.axis_index(name) for name in Place._fields))


def copy_tile(at: Place, source: Ref, target: Ref, barrier: Ref) -> None:
  """Copies this warpgroup's rows of its own frame."""
  rows = pl.ds(at.tile * TILE, TILE)
  part = source.at[at.sample, at.frame, rows, at.lanes(target.shape[-1])]
  plgpu.copy_gmem_to_smem(part, target.at[at.tile], barrier)


def copy_frames(at: Place, source: Ref, target: Ref, barrier: Ref) -> None:
  """Copies this warpgroup's share of both frames."""
  rows = pl.ds(at.tile * TILE, TILE)
  for frame in range(2):
    part = source.at[at.sample, frame, rows, at.lanes(target.shape[-1])]
    plgpu.copy_gmem_to_smem(part, target.at[frame, rows], barrier)


def store(value: Array, staged: Ref, target: Ref) -> None:
  """Writes a tile by way of shared memory, which must not be in use."""
  staged[...] = value
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(staged, target)


def logits_of(
  sizes: Sizes, queries: Ref, keys: Ref, frame: int | Array, chunk: tuple[int, int]
) -> Float[Array, 'i j']:
  """Returns scaled products of queries with some keys of a frame; `LOWEST` past the last key."""
  start, width = chunk
  logits = sizes.tiles.rows_by_rows(queries, keys.at[frame, pl.ds(start, width)])
  logits = logits * sizes.width**-0.5
  if start + width > sizes.n:
    logits = jnp.where(sizes.tiles.columns(width) + start < sizes.n, logits, LOWEST)
  return logits
