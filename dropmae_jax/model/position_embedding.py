"""Position tables: fixed sine-cosine codes as published checkpoints store them, and resampling."""

import numpy as np
from jaxtyping import Float32


def sincos_axis(grid: int, width: int) -> np.ndarray:
  """Returns the float64 code of the positions 0..grid-1 on one axis: [grid, width / 2]."""
  frequency = 10000.0 ** -(np.arange(width // 4) / (width / 4))
  angle = np.arange(grid)[:, None] * frequency
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_table(grid: int, width: int) -> Float32[np.ndarray, '1 slots d']:
  """Returns the table of a grid x grid frame: one zero slot, then the tokens row by row.

  The first half of a token's code is its column, the second half its row. Slot 0 stands for a
  class token that this method does not have; the files in the field carry it, and so do ours.

  Args:
    grid: patches along one side of a frame.
    width: length of a token's code; a multiple of 4.

  Returns:
    float32 [1, 1 + grid * grid, width], computed in float64.

  Raises:
    ValueError: `width` is not a multiple of 4.
  """
  if width % 4:
    raise ValueError(f'{width=} is not a multiple of 4, which a sine-cosine table needs.')
  axis = sincos_axis(grid, width)
  column = np.broadcast_to(axis[None, :, :], (grid, grid, width // 2))
  row = np.broadcast_to(axis[:, None, :], (grid, grid, width // 2))
  tokens = np.concatenate([column, row], axis=-1).reshape(grid * grid, width)
  return np.concatenate([np.zeros((1, width)), tokens])[None].astype(np.float32)


def resample_table(table: Float32[np.ndarray, '1 slots d'], grid: int) -> np.ndarray:
  """Resamples a position table to another grid, as the trackers do.

  The law is that of torch.nn.functional.interpolate(mode='bicubic', align_corners=False): Keys'
  cubic convolution with a = -0.75, pixel centres at halves, borders repeated, no antialiasing.
  (`jax.image.resize` has a = -0.5 and antialiases, which is 1 to 2 % off.)

  Args:
    table: one slot that is kept as it is, then a square grid's tokens row by row.
    grid: patches along one side of the new grid.

  Returns:
    float32 [1, 1 + grid * grid, d].
  """
  old = round((table.shape[1] - 1) ** 0.5)
  if old == grid:
    return table
  weights = _bicubic_weights(old, grid)
  tokens = table[0, 1:].reshape(old, old, -1).astype(np.float64)
  tokens = np.einsum('ri,sj,ijd->rsd', weights, weights, tokens, optimize=True)
  return np.concatenate([table[:, :1], tokens.reshape(1, grid * grid, -1)], 1).astype(np.float32)


def _bicubic_weights(old: int, new: int) -> np.ndarray:
  """Returns the float64 [new, old] matrix that resamples one axis."""
  a = -0.75
  centre = (np.arange(new) + 0.5) * (old / new) - 0.5
  first = np.floor(centre).astype(int)
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    x = np.abs(centre - (first + tap))
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    at = np.clip(first + tap, 0, old - 1)
    np.add.at(weights, (np.arange(new), at), np.where(x <= 1, near, far))
  return weights
