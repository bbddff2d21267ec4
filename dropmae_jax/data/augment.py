"""Random crops of frames, resized to one size: the part of the augmentation that runs on the host.

Flips and normalisation work on frames of one size and run on the device: `model/pixels`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

CROP_AREA = (0.2, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
LOG_CROP_RATIO = tuple(np.log(np.float32(CROP_RATIO)).tolist())
CROP_ATTEMPTS = 10
CROP_DRAWS = 2 * CROP_ATTEMPTS + 2

# Draws a number from [0, 1), such as the method `random` of a NumPy generator.
Uniform = Callable[[], float]


class Box(NamedTuple):
  """A crop, in pixels."""

  top: int
  left: int
  height: int
  width: int


def random_resized_crop_box(uniform: Uniform, height: int, width: int) -> Box:
  """Draws a crop from the distribution of torchvision's RandomResizedCrop.

  Up to ten times it draws an area, 0.2 to 1 of the frame, and a log-uniform aspect ratio in
  3/4..4/3. If no such crop fits, it is the largest centred crop with a ratio in that range.

  Args:
    uniform: called twice per attempt, and twice for the position; at most CROP_DRAWS times.
    height: of the frame, in pixels.
    width: of the frame, in pixels.
  """
  area, (least, most), (low, high) = height * width, CROP_AREA, LOG_CROP_RATIO
  for _ in range(CROP_ATTEMPTS):
    target = area * (least + (most - least) * uniform())
    ratio = math.exp(low + (high - low) * uniform())
    crop_width = round(math.sqrt(target * ratio))
    crop_height = round(math.sqrt(target / ratio))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      top = int(uniform() * (height - crop_height + 1))
      left = int(uniform() * (width - crop_width + 1))
      return Box(top, left, crop_height, crop_width)
  return centre_box(height, width)


def same_place(box: Box, frame: tuple[int, int], other: tuple[int, int]) -> Box:
  """Returns the box of another frame at the same relative position as a box of this frame.

  It is the same box if both frames have the same size, and it is never empty.

  Args:
    box: inside the frame.
    frame: height and width of this frame.
    other: height and width of the other frame.
  """
  (height, width), (other_height, other_width) = frame, other
  top, left = box.top * other_height // height, box.left * other_width // width
  bottom = -(-(box.top + box.height) * other_height // height)
  right = -(-(box.left + box.width) * other_width // width)
  return Box(top, left, bottom - top, right - left)


def centre_box(height: int, width: int) -> Box:
  """Returns the largest centred crop whose aspect ratio is within 3/4..4/3."""
  low, high = CROP_RATIO
  crop_width = width if width / height <= high else round(height * high)
  crop_height = height if width / height >= low else round(width / low)
  return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def resize_fast(crop: UInt8[np.ndarray, 'h w c'], out: UInt8[np.ndarray, 'size size c']) -> None:
  """Resizes with OpenCV's bicubic (a = -0.75, no antialiasing), which is much faster than PIL's."""
  cv2.resize(crop, out.shape[:2], dst=out, interpolation=cv2.INTER_CUBIC)


def resize_exact(crop: UInt8[np.ndarray, 'h w c'], out: UInt8[np.ndarray, 'size size c']) -> None:
  """Resizes with PIL's bicubic (a = -0.5, antialiased), as the published code does.

  PIL stores four bytes for a pixel. OpenCV adds and drops the fourth, because PIL holds the GIL
  while it converts. `out` is contiguous.
  """
  pixels = cv2.cvtColor(crop, cv2.COLOR_RGB2RGBA)
  image = Image.frombytes('RGB', pixels.shape[1::-1], pixels, 'raw', 'RGBX')
  resized = image.resize(out.shape[:2], Image.Resampling.BICUBIC).tobytes('raw', 'RGBX')
  cv2.cvtColor(np.frombuffer(resized, np.uint8).reshape(*out.shape[:2], 4), cv2.COLOR_RGBA2RGB, out)


RESIZES = {'fast': resize_fast, 'exact': resize_exact}


def crop_and_resize(
  frame: UInt8[np.ndarray, 'h w c'],
  box: Box,
  size: int,
  *,
  resize: str,
  out: UInt8[np.ndarray, 'size size c'] | None = None,
) -> UInt8[np.ndarray, 'size size c']:
  """Cuts a box out of a frame and resizes it to `size` x `size` pixels.

  Args:
    frame: not changed.
    box: inside the frame.
    size: pixels along a side of the result.
    resize: one of RESIZES.
    out: contiguous array for the result, which saves a copy; by default a new one.

  Raises:
    ValueError: an array is not uint8 with three channels.
  """
  out = np.empty((size, size, frame.shape[2]), np.uint8) if out is None else out
  for each in (frame, out):
    if each.dtype != np.uint8 or each.shape[2:] != (3,):
      raise ValueError(f'{each.dtype} {list(each.shape)} is not uint8 [height, width, 3]')
  RESIZES[resize](frame[box.top : box.top + box.height, box.left : box.left + box.width], out)
  return out
