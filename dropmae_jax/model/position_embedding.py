"""Position tables: the fixed sine-cosine embedding of published checkpoints, and resampling."""

import numpy as np
from jaxtyping import Float32


def sincos_table(grid: int, width: int) -> Float32[np.ndarray, '1 slots d']:
  """Returns the table of a grid x grid frame: a slot of zeros, then the tokens row by row.

  The first half of an embedding depends on the column, the second half on the row. Slot 0 is for a
  class token, which this method does not have; published files have the slot, so ours do too.

  Args:
    grid: patches along one side of a frame.
    width: d, a multiple of 4.

  Returns:
    float32 [1, 1 + grid * grid, width], computed in float64.
  """
  frequency = 10000.0 ** -(np.arange(width // 4) / (width / 4))
  angle = np.arange(grid)[:, None] * frequency
  axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
  column = np.broadcast_to(axis[None, :, :], (grid, grid, width // 2))
  row = np.broadcast_to(axis[:, None, :], (grid, grid, width // 2))
  tokens = np.concatenate([column, row], axis=-1).reshape(grid * grid, width)
  return np.concatenate([np.zeros((1, width)), tokens])[None].astype(np.float32)


def resample_table(table: Float32[np.ndarray, '1 slots d'], grid: int) -> np.ndarray:
  """Resamples a position table to another grid, as the trackers do.

  The result equals torch.nn.functional.interpolate(mode='bicubic', align_corners=False): Keys'
  cubic convolution with a = -0.75, half-pixel centres, borders repeated, no antialiasing.
  (`jax.image.resize` has a = -0.5 and antialiases; it differs by 1 to 2 %.)

  Args:
    table: a slot that stays as it is, then the tokens of a square grid row by row.
    grid: patches along one side of the new grid.

  Returns:
    float32 [1, 1 + grid * grid, d].
  """
  old = _side(table)
  if old == grid:
    return table
  weights = _bicubic_weights(old, grid, grid / old)
  return _resampled(table, weights, weights)


def interpolate_table(
  table: Float32[np.ndarray, '1 slots d'], grid: tuple[int, int]
) -> Float32[np.ndarray, '1 new d']:
  """Resamples a position table to a grid of other sides, as DINO and MAE do for evaluations.

  It differs from `resample_table` in the scale, which is (new + 0.1) / old on each side; that moves
  every position. (DINO added it so that PyTorch would not round the size of the result down.)

  Args:
    table: a slot that stays as it is, then the tokens of a square grid row by row.
    grid: patches along the (height, width) of the new grid.

  Returns:
    float32 [1, 1 + height * width, d].
  """
  old = _side(table)
  if (old, old) == grid:
    return table
  rows, columns = (_bicubic_weights(old, new, (new + 0.1) / old) for new in grid)
  return _resampled(table, rows, columns)


def _side(table: np.ndarray) -> int:
  return round((table.shape[1] - 1) ** 0.5)


def _resampled(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  tokens = table[0, 1:].reshape(rows.shape[1], columns.shape[1], -1).astype(np.float64)
  tokens = np.einsum('ri,sj,ijd->rsd', rows, columns, tokens, optimize=True)
  tokens = tokens.reshape(1, len(rows) * len(columns), -1)
  return np.concatenate([table[:, :1], tokens], 1).astype(np.float32)


def _bicubic_weights(old: int, new: int, scale: float) -> np.ndarray:
  """Returns the float64 [new, old] matrix that resamples one axis, enlarged by `scale`."""
  a = -0.75
  centre = (np.arange(new) + 0.5) / scale - 0.5
  first = np.floor(centre).astype(int)
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    x = np.abs(centre - (first + tap))
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    at = np.clip(first + tap, 0, old - 1)
    np.add.at(weights, (np.arange(new), at), np.where(x <= 1, near, far))
  return weights
