"""Masks of object numbers, as PNGs with a palette."""

import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dropmae_jax.evaluation.datasets.benchmark import IMAGE_ERRORS, unreadable
from dropmae_jax.runtime.errors import UserError

VOID = 255


def palette() -> list[int]:
  """Returns the colours of PASCAL VOC and DAVIS, as red, green, blue of 256 object numbers."""
  colours = np.zeros((256, 3), np.uint8)
  numbers = np.arange(256)
  # Every third bit of the number belongs to a channel, the lowest to the highest bit of the colour.
  for bit in range(8):
    for channel in range(3):
      colours[:, channel] |= (((numbers >> channel) & 1) << (7 - bit)).astype(np.uint8)
    numbers >>= 3
  return colours.ravel().tolist()


def read_png(path: pathlib.Path) -> UInt8[np.ndarray, 'h w']:
  """Reads the object numbers of a PNG with a palette or 8 bits of grey.

  Raises:
    UserError: there is no such file, it is damaged, or it is another kind of image.
  """
  try:
    with Image.open(path) as image:
      if image.mode not in ('P', 'L', '1'):
        raise UserError(
          f'{path} is an image of the mode {image.mode}; give object numbers up to {VOID} as a PNG'
          ' with a palette or 8 bits of grey.'
        )
      return np.asarray(image).astype(np.uint8)
  except FileNotFoundError as error:
    raise UserError(f'{path} does not exist; complete the data set.') from error
  except IMAGE_ERRORS as error:
    if isinstance(error, UserError):
      raise
    raise unreadable(path, error) from error


def write_png(path: pathlib.Path, mask: UInt8[np.ndarray, 'h w']) -> None:
  """Writes object numbers as a PNG with the palette of DAVIS."""
  image = Image.fromarray(mask, mode='P')
  image.putpalette(palette())
  image.save(path)
