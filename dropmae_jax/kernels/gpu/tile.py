"""Operations on tiles that the GPU kernels of `asad_gpu` share.

A program computes one head for the queries or the keys of one frame. It has a warpgroup for every
64 rows, a tile. Tokens are [sample, frame, row, (head e)], padded with rows of zeros; reads past
the end give zeros.

Pallas' interpreter of Mosaic GPU does not support layouts, loads with a layout, and products of
transposed references; for it, `Tiles` has equivalent code without these.
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

# The index for `load` to read everything; it has this argument up to JAX 0.11.
_WHOLE = ((),) if 'idx' in inspect.signature(plgpu.load).parameters else ()

# The logit where there is no pair; finite, so that differences are not nan.
LOWEST = -1e30

# Pallas has no public type for references.
Ref = Any


def shared(*shape: int, dtype: DTypeLike = jnp.bfloat16, plain: bool = False) -> Any:
  """Returns an array in shared memory.

  Args:
    *shape: its shape.
    dtype: its dtype.
    plain: row-major. Otherwise tiled and swizzled by 32 bytes, as matrices must be to be copied and
      multiplied; with 32 bytes, products can be over any multiple of 16 terms.
  """
  columns = SWIZZLE // jnp.dtype(dtype).itemsize
  transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE)
  return plgpu.SMEM(shape, dtype, transforms=() if plain else transforms)


def over(row_values: Float[Array, ' i'], columns: int) -> Float[Array, 'i j']:
  """Broadcasts a number per row over the columns."""
  return jax.lax.broadcast_in_dim(row_values, (*row_values.shape, columns), [0])


class Tiles(NamedTuple):
  """Operations on tiles, for a GPU or for the interpreter."""

  interpret: bool

  def columns(self, width: int) -> Int[Array, 'i j']:
    """Returns the column index of every element of a tile."""
    return self._iota(width, 1)

  def rows(self, width: int) -> Int[Array, 'i j']:
    """Returns the row index of every element of a tile."""
    return self._iota(width, 0)

  def _iota(self, width: int, axis: int) -> Int[Array, 'i j']:
    if self.interpret:
      return jax.lax.broadcasted_iota(jnp.int32, (TILE, width), axis)
    return plgpu.broadcasted_iota(jnp.int32, (TILE, width), axis, layout=plgpu.Layout.WGMMA)

  def load(self, source: Ref) -> Array:
    """Reads a tile from shared memory, in the layout of products."""
    if self.interpret:
      return source[...]
    return plgpu.load(source, *_WHOLE, layout=plgpu.Layout.WGMMA, optimized=False)

  def load_rows(self, source: Ref) -> Float[Array, ' i']:
    """Reads a number for each row of a tile from shared memory."""
    if self.interpret:
      return source[...]
    return plgpu.load(source, *_WHOLE, layout=plgpu.Layout.WGMMA.reduce(1))

  def rows_by_rows(self, left: Ref, right: Ref) -> Float[Array, 'i j']:
    """Returns left right^T, of matrices in shared memory."""
    if self.interpret:
      return _dot(left[...], right[...].T)
    return _wgmma(left, right.transpose((1, 0)))

  def product(self, left: Float[Array, 'i j'], right: Ref) -> Float[Array, 'i e']:
    """Returns left right, of registers and a matrix in shared memory."""
    return _dot(left, right[...]) if self.interpret else _wgmma(left, right)

  def columns_by_columns(self, left: Ref, right: Ref) -> Float[Array, 'j e']:
    """Returns left^T right, of matrices in shared memory."""
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

  Attributes:
    n: tokens per frame.
    rows: the same with padding.
    width: e, the width of a head.
    tiles: for a GPU or for the interpreter.
  """

  n: int
  rows: int
  width: int
  tiles: Tiles

  @property
  def num_tiles(self) -> int:
    """The number of tiles in the rows of a frame: the warpgroups of a program."""
    return pl.cdiv(self.rows, TILE)

  @property
  def chunks(self) -> list[tuple[int, int]]:
    """Start and width of each tile of columns; the last one may be narrower than a tile."""
    return [(at, min(TILE, self.rows - at)) for at in range(0, self.rows, TILE)]


class Place(NamedTuple):
  """The sample, frame, head and tile of rows of a warpgroup."""

  sample: Array
  frame: Array
  head: Array
  tile: Array

  def lanes(self, width: int) -> pl.Slice:
    """The lanes of a token that belong to the head."""
    return pl.ds(self.head * width, width)


def here() -> Place:
  """Returns the place of this warpgroup."""
  return Place(*(jax.lax.axis_index(name) for name in Place._fields))


def copy_tile(at: Place, source: Ref, target: Ref, barrier: Ref) -> None:
  """Copies the rows of this warpgroup, of its own frame."""
  rows = pl.ds(at.tile * TILE, TILE)
  part = source.at[at.sample, at.frame, rows, at.lanes(target.shape[-1])]
  plgpu.copy_gmem_to_smem(part, target.at[at.tile], barrier)


def copy_frames(at: Place, source: Ref, target: Ref, barrier: Ref) -> None:
  """Copies the rows of this warpgroup, of both frames."""
  rows = pl.ds(at.tile * TILE, TILE)
  for frame in range(2):
    part = source.at[at.sample, frame, rows, at.lanes(target.shape[-1])]
    plgpu.copy_gmem_to_smem(part, target.at[frame, rows], barrier)


def store(value: Array, staged: Ref, target: Ref) -> None:
  """Writes a tile via a buffer in shared memory, which no copy may be using."""
  staged[...] = value
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(staged, target)


def logits_of(
  sizes: Sizes, queries: Ref, keys: Ref, frame: int | Array, chunk: tuple[int, int]
) -> Float[Array, 'i j']:
  """Returns the scaled logits of queries with a chunk of a frame's keys; `LOWEST` in padding."""
  start, width = chunk
  logits = sizes.tiles.rows_by_rows(queries, keys.at[frame, pl.ds(start, width)])
  logits = logits * sizes.width**-0.5
  if start + width > sizes.n:
    logits = jnp.where(sizes.tiles.columns(width) + start < sizes.n, logits, LOWEST)
  return logits
