"""What the GPU kernels of `asad_gpu` do with a tile: 64 rows of a warpgroup, and some columns.

Pallas' interpreter of Mosaic GPU knows no layouts, no loads with one, and no products of transposed
references; it gets what is the same without.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

# Rows of a warpgroup's matrix product.
TILE = 64
# Bytes.
SWIZZLE = 32

# Pallas' references have no public type.
Ref = Any


def swizzled(dtype: Any) -> tuple:
  """Returns how a matrix must lie in shared memory to be copied and multiplied.

  In rows of 32 bytes: products may then be over any multiple of 16 terms.
  """
  columns = SWIZZLE // jnp.dtype(dtype).itemsize
  return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE)


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
    return plgpu.load(source, (), layout=plgpu.Layout.WGMMA, optimized=False)

  def load_rows(self, source: Ref) -> Float[Array, ' i']:
    """Reads a number for each row of a tile from shared memory."""
    if self.interpret:
      return source[...]
    return plgpu.load(source, (), layout=plgpu.Layout.WGMMA.reduce(1))

  def rows_by_rows(self, left: Ref, right: Ref) -> Float[Array, 'i j']:
    """Multiplies every row of the one with every row of the other: left right^T."""
    if self.interpret:
      return _dot(left[...], right[...].T)
    return _wgmma(left, plgpu.transpose_ref(right, (1, 0)))

  def product(self, left: Float[Array, 'i j'], right: Ref) -> Float[Array, 'i e']:
    """Multiplies registers with a matrix in shared memory."""
    return _dot(left, right[...]) if self.interpret else _wgmma(left, right)

  def columns_by_columns(self, left: Ref, right: Ref) -> Float[Array, 'j e']:
    """Multiplies every column of the one with every column of the other: left^T right."""
    if self.interpret:
      return _dot(left[...].T, right[...])
    return _wgmma(plgpu.transpose_ref(left, (1, 0)), right)


def _dot(left: Array, right: Array) -> Array:
  return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _wgmma(left: Any, right: Ref) -> Array:
  def multiply(result: Ref) -> Array:
    plgpu.wgmma(result, left, right)
    return result[...]

  return pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))
