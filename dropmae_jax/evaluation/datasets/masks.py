"""Masks of object numbers: to labels on the grid of tokens and back, and as palette PNGs.

Nearest is not one thing: OpenCV takes floor(i * old / new), Pillow floor((i + .5) * old / new). The
protocols differ in it, so each calls the library that its published code calls.
"""

import pathlib

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from dropmae_jax.evaluation.datasets.benchmark import IMAGE_ERRORS, Geometry, unreadable
from dropmae_jax.runtime.errors import UserError

VOID = 255


def encode(
  mask: UInt8[np.ndarray, 'h w'], geometry: Geometry, protocol: str
) -> tuple[Float32[np.ndarray, 'gh gw labels'], UInt8[np.ndarray, ' labels']]:
  """Returns the labels of a mask on the grid of tokens, and the object numbers of the labels.

  cropmae: averaged over the pixels around the centre of a cell, so that cells on a border are of
  two objects. dino, dinov3: the object at the centre of the cell, and labels for all numbers up to
  the largest (dino: of those that are at the centre of a cell).

  Args:
    mask: object numbers; 0 is background.
    geometry: of the clip.
    protocol: a name in `label_propagation.PROTOCOLS`.
  """
  if protocol == 'cropmae':
    ids = np.unique(mask)
    height, width = geometry.pixels
    resized = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    return _resize_planes(resized[..., None] == ids, geometry.grid), ids
  small = resize_nearest(mask, geometry.grid)
  highest = small.max() if protocol == 'dino' else mask.max()
  ids = np.arange(int(highest) + 1, dtype=np.uint8)
  return (small[..., None] == ids).astype(np.float32), ids


def decode(
  labels: Float32[np.ndarray, 'gh gw labels'],
  ids: UInt8[np.ndarray, ' labels'],
  geometry: Geometry,
  size: tuple[int, int],
  protocol: str,
) -> UInt8[np.ndarray, 'h w']:
  """Returns the mask of propagated labels: the object with the largest one at each pixel.

  Args:
    labels: on the grid.
    ids: object numbers of the labels.
    geometry: of the clip.
    size: (height, width) of the mask in pixels.
    protocol: a name in `label_propagation.PROTOCOLS`.
  """
  if protocol == 'cropmae':
    mask = ids[_resize_planes(labels, geometry.pixels).argmax(axis=-1)]
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
  if protocol == 'dino':
    labels = _resize_planes(labels, geometry.pixels)
    return resize_nearest(ids[_stretched(labels).argmax(axis=-1)], size)
  # The notebook enlarges by PyTorch's nearest, which is OpenCV's.
  mask = ids[_stretched(labels).argmax(axis=-1)]
  return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)


def _stretched(labels: Float32[np.ndarray, 'h w labels']) -> Float32[np.ndarray, 'h w labels']:
  """Scales each label of a frame to 0..1; one that is nowhere above 0 stays as it is."""
  least, most = labels.min(axis=(0, 1)), labels.max(axis=(0, 1))
  span = np.where(most > least, most - least, 1)
  return np.where(most > 0, (labels - least) / span, labels)


def _resize_planes(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes [h, w, labels] bilinearly, without antialiasing; returns float32."""
  planes = np.moveaxis(labels.astype(np.float32), -1, 0)
  resized = [cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR) for plane in planes]
  return np.stack(resized, axis=-1)


def resize_nearest(
  mask: UInt8[np.ndarray, 'h w'], size: tuple[int, int]
) -> UInt8[np.ndarray, 'sh sw']:
  """Resizes a mask to (height, width) as Pillow does."""
  return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


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
