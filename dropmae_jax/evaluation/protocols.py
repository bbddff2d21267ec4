"""The protocols of published zero-shot evaluations: a row of PROTOCOLS holds all that differs.

(JHMDB's input size is the same in all of them.)

To add a protocol, add a row; numbers of different protocols cannot be compared.

Nearest is not one thing: OpenCV takes floor(i * old / new), Pillow floor((i + .5) * old / new). The
protocols differ in it, so each calls the library that its published code calls.

Sources: CropMAE 5d0dab2 (from videowalk), DINO 7c446df, DINOv3's notebook 6876159.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from dropmae_jax.evaluation.label_propagation import Propagation
from dropmae_jax.model import pixels

Size = tuple[int, int]  # Height and width.


class Geometry(NamedTuple):
  """The sizes of a clip in the network; both are (height, width).

  Attributes:
    pixels: of the network's input.
    grid: in tokens; pixels / patch size.
  """

  pixels: tuple[int, int]
  grid: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Protocol:
  """A row of PROTOCOLS; sizes are (height, width) in pixels.

  Attributes:
    propagation: how labels are propagated.
    top_k: k of the propagation for benchmarks that have one of their own, by name.
    resize: a frame of uint8 to (height, width), as float32 in 0..1.
    deviation: of red, green and blue, for the normalisation; the mean is ImageNet's.
    input_size: from the size of the frames and the patch size to that of the network's input, by
      the name of the benchmark; the caller fits it to patches.
    rounds_up: whether sides that are no multiple of the patch size are rounded up to one.
    encode: from a mask of object numbers and the geometry to labels on the grid of tokens, and the
      object numbers of the labels.
    enlarges_labels: whether labels are resized to the network's input before they become a mask.
    stretches_labels: whether each label is scaled to 0..1 over the frame before.
    resize_mask: a mask to (height, width), at last; by the name of the benchmark.
    reads_out_first: whether the result of frame 0 is read out of its labels, or is the truth.
  """

  propagation: Propagation
  top_k: Mapping[str, int]
  resize: Callable[[np.ndarray, Size], np.ndarray]
  deviation: tuple[float, float, float]
  input_size: Mapping[str, Callable[[Size, int], Size]]
  rounds_up: bool
  encode: Callable[[np.ndarray, Geometry], tuple[np.ndarray, np.ndarray]]
  enlarges_labels: bool
  stretches_labels: bool
  resize_mask: Mapping[str, Callable[[np.ndarray, Size], np.ndarray]]
  reads_out_first: bool

  def network_input(
    self, frame: UInt8[np.ndarray, 'h w c'], size: Size
  ) -> Float32[np.ndarray, 'nh nw c']:
    """Resizes an RGB frame to (height, width) and normalises it."""
    mean = np.array(pixels.IMAGENET_MEAN, np.float32)
    return (self.resize(frame, size) - mean) / np.array(self.deviation, np.float32)

  def decode(
    self,
    labels: Float32[np.ndarray, 'gh gw labels'],
    ids: UInt8[np.ndarray, ' labels'],
    geometry: Geometry,
    size: Size,
    benchmark: str,
  ) -> UInt8[np.ndarray, 'h w']:
    """Returns the mask of (height, width): the object with the largest label at each pixel."""
    if self.enlarges_labels:
      labels = _resize_planes(labels, geometry.pixels)
    if self.stretches_labels:
      labels = _stretched(labels)
    return self.resize_mask[benchmark](ids[labels.argmax(axis=-1)], size)


def resize_nearest(mask: UInt8[np.ndarray, 'h w'], size: Size) -> UInt8[np.ndarray, 'sh sw']:
  """Resizes a mask to (height, width) as Pillow does."""
  return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def _resize_nearest_by_opencv(mask: np.ndarray, size: Size) -> np.ndarray:
  return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)


def _resize_planes(labels: np.ndarray, size: Size) -> np.ndarray:
  """Resizes [h, w, labels] bilinearly, without antialiasing; returns float32."""
  planes = np.moveaxis(labels.astype(np.float32), -1, 0)
  resized = [cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR) for plane in planes]
  return np.stack(resized, axis=-1)


def _resize_floats(frame: np.ndarray, size: Size) -> np.ndarray:
  return cv2.resize(frame.astype(np.float32) / 255, size[::-1], interpolation=cv2.INTER_LINEAR)


def _resize_bytes(frame: np.ndarray, size: Size) -> np.ndarray:
  resized = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR)
  return resized.astype(np.float32) / 255


def _resize_bicubic(frame: np.ndarray, size: Size) -> np.ndarray:
  image = Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)
  return np.asarray(image).astype(np.float32) / 255


def _long_side_880(size: Size, patch_size: int) -> Size:
  fitted = max(64, min(size) * 880 // max(size) // 64 * 64), 880
  return fitted if size[0] < size[1] else fitted[::-1]


def _short_side_480(size: Size, patch_size: int) -> Size:
  fitted = 480, max(64, max(size) * 480 // min(size) // 64 * 64)
  return fitted[::-1] if size[0] > size[1] else fitted


def _short_side_960(size: Size, patch_size: int) -> Size:
  """The long side follows the short one after that is rounded up to patches."""
  short = -(-960 // patch_size) * patch_size
  fitted = short, -(-max(size) * short // min(size))
  return fitted[::-1] if size[0] > size[1] else fitted


def _encode_soft(mask: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
  """Averages over the pixels around the centre of a cell: one on a border is of two objects."""
  ids = np.unique(mask)
  resized = _resize_nearest_by_opencv(mask, geometry.pixels)
  return _resize_planes(resized[..., None] == ids, geometry.grid), ids


def _encode_hard(
  mask: np.ndarray, geometry: Geometry, *, has_all: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Takes the object at the centre of a cell; there are labels for all numbers up to the largest.

  The largest of the mask if has_all, else of those at the centre of a cell.
  """
  small = resize_nearest(mask, geometry.grid)
  ids = np.arange(int((mask if has_all else small).max()) + 1, dtype=np.uint8)
  return (small[..., None] == ids).astype(np.float32), ids


def _stretched(labels: Float32[np.ndarray, 'h w labels']) -> Float32[np.ndarray, 'h w labels']:
  """Scales each label of a frame to 0..1; one that is nowhere above 0 stays as it is."""
  least, most = labels.min(axis=(0, 1)), labels.max(axis=(0, 1))
  span = np.where(most > least, most - least, 1)
  return np.where(most > 0, (labels - least) / span, labels)


PROTOCOLS: dict[str, Protocol] = {
  'cropmae': Protocol(
    propagation=Propagation(
      num_previous=20, has_copies=True, radius=20, shape='disk', is_first_limited=False,
      top_k=7, temperature=0.7, keeps_ties=False,
    ),
    top_k={'vip': 10},
    resize=_resize_floats, deviation=pixels.IMAGENET_DEVIATION,
    input_size={
      'davis': lambda *_: (480, 880), 'vip': _long_side_880, 'tapvid': lambda *_: (480, 480),
    },
    rounds_up=False, encode=_encode_soft, enlarges_labels=True, stretches_labels=False,
    resize_mask={'davis': _resize_nearest_by_opencv, 'vip': resize_nearest}, reads_out_first=True,
  ),
  'dino': Protocol(
    propagation=Propagation(
      num_previous=7, has_copies=False, radius=12, shape='square', is_first_limited=True,
      top_k=5, temperature=0.1, keeps_ties=True,
    ),
    top_k={},
    resize=_resize_bytes, deviation=(0.228, 0.224, 0.225),  # Red differs from ImageNet's.
    input_size={'davis': _short_side_480, 'vip': _short_side_480, 'tapvid': lambda *_: (480, 480)},
    rounds_up=False, encode=functools.partial(_encode_hard, has_all=False),
    enlarges_labels=True, stretches_labels=True,
    resize_mask={'davis': resize_nearest, 'vip': resize_nearest}, reads_out_first=False,
  ),
  'dinov3': Protocol(
    propagation=Propagation(
      num_previous=7, has_copies=False, radius=12, shape='closed disk', is_first_limited=True,
      top_k=5, temperature=0.2, keeps_ties=True,
    ),
    top_k={},
    resize=_resize_bicubic, deviation=pixels.IMAGENET_DEVIATION,
    input_size={'davis': _short_side_960, 'vip': _short_side_960, 'tapvid': lambda *_: (960, 960)},
    rounds_up=True, encode=functools.partial(_encode_hard, has_all=True),
    enlarges_labels=False, stretches_labels=True,
    # The notebook uses PyTorch's nearest, which is OpenCV's.
    resize_mask=dict.fromkeys(('davis', 'vip'), _resize_nearest_by_opencv), reads_out_first=False,
  ),
}  # fmt: skip
