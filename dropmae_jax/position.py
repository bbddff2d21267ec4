"""Fixed sine-cosine position tables, as the published checkpoints store them."""

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
