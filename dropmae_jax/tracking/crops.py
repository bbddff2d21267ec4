"""Square crops around boxes, their augmentation in training, and boxes between image and crop.

As published by OSTrack (botaoye/OSTrack at 33b5e12, jimmy-dq/DropTrack at 4364304), to the pixel.
Boxes are (x, y, w, h) in pixels unless a name or a docstring says otherwise. Arithmetic on them is
in the precision in which they come: float64 in tracking, float32 in training.

Trackers count the last column and the last row of an image as outside, if the crop reaches them.
"""

import math
from typing import NamedTuple

import cv2
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Bool, Float, UInt8

from dropmae_jax.data.augment import Uniform
from dropmae_jax.model.pixels import IMAGENET_DEVIATION, IMAGENET_MEAN
from dropmae_jax.runtime.errors import UserError

# Every so many pixels the padding of a training crop is looked at: once per token of a ViT/16.
PADDING_STRIDE = 16
GREY_RATE = 0.05
FLIP_RATE = 0.5
BRIGHTNESS = (0.8, 1.2)
# Calls of `uniform` per `draw_augmentation`.
AUGMENTATION_DRAWS = 10
# What a tracked box keeps inside the image at least, in pixels along each axis.
MARGIN = 10


class Square(NamedTuple):
  """What a crop covers, in pixels of the image; it may reach out of it."""

  left: int
  top: int
  side: int


class CropOptions(NamedTuple):
  """How crops are cut; there is jitter in training only.

  Attributes:
    template_size: pixels along a side.
    search_size: pixels along a side.
    template_factor: side of the template crop over the square root of the box's area.
    search_factor: the same of the search crop.
    centre_jitter: how far the search crop may be shifted, see `jitter`.
    scale_jitter: how much its box may be scaled, see `jitter`.
  """

  template_size: int
  search_size: int
  template_factor: float
  search_factor: float
  centre_jitter: float = 0.0
  scale_jitter: float = 0.0


# The published ones, by the size of the search crop.
CROP_OPTIONS = {
  256: CropOptions(128, 256, 2.0, 4.0, centre_jitter=3.0, scale_jitter=0.25),
  384: CropOptions(192, 384, 2.0, 5.0, centre_jitter=4.5, scale_jitter=0.5),
}


class Augmentation(NamedTuple):
  """What is random about the crops of a pair; pairs of numbers are (template, search) or (x, y).

  Attributes:
    is_grey: both frames lose their colour.
    is_flipped: both whole frames are mirrored.
    normals: of the jitter of the search box: standard normal, width first.
    uniforms: of its jitter: from [0, 1), x first.
    brightness: factor of each crop.
    crop_is_flipped: each crop is mirrored.
  """

  is_grey: bool
  is_flipped: bool
  normals: tuple[float, float]
  uniforms: tuple[float, float]
  brightness: tuple[float, float]
  crop_is_flipped: tuple[bool, bool]


class TrainingPair(NamedTuple):
  """A training sample; its brightness is changed on the device, by `brighten_and_normalise`.

  Attributes:
    template: crop.
    search: crop.
    template_box: (x, y, w, h) in fractions of the crop.
    search_box: the same of the search crop; it may reach out of the crop.
    brightness: factors of template and search crop.
  """

  template: UInt8[np.ndarray, 'h w c']
  search: UInt8[np.ndarray, 'h w c']
  template_box: Float[np.ndarray, '4']
  search_box: Float[np.ndarray, '4']
  brightness: Float[np.ndarray, '2']


def square_around(box: Float[np.ndarray, '4'], factor: float) -> Square:
  """Returns the square that is cut out around a box.

  Args:
    box: its centre becomes that of the square, to the nearest pixel, halves to the even one.
    factor: side of the square over the square root of the box's area, rounded up.

  Raises:
    UserError: the box has no area.
  """
  x, y, width, height = map(float, box)
  if not (0 < width < math.inf and 0 < height < math.inf):
    raise UserError(
      f'the box x,y,w,h = {x:g},{y:g},{width:g},{height:g} has no area; give one whose width and'
      ' height are above 0.'
    )
  side = math.ceil(math.sqrt(width * height) * factor)
  left, top = round(x + 0.5 * width - 0.5 * side), round(y + 0.5 * height - 0.5 * side)
  return Square(left, top, side)


def crop(
  image: UInt8[np.ndarray, 'h w c'], box: Float[np.ndarray, '4'], factor: float, out_size: int
) -> tuple[UInt8[np.ndarray, 'size size c'], float]:
  """Cuts a square around a box out of an image, and resizes it; what is outside is black.

  Args:
    image: RGB.
    box: of the target.
    factor: see `square_around`.
    out_size: pixels along a side of the crop.

  Returns:
    the crop, and its pixels per pixel of the image.

  Raises:
    UserError: the box has no area.
  """
  square = square_around(box, factor)
  pixels = cv2.resize(cut(image, square), (out_size, out_size))
  return pixels, out_size / square.side


def inside(start: int, side: int, length: int) -> tuple[int, int]:
  """Returns the first pixel of a square that holds image along one axis, and the end of these.

  Args:
    start: of the square, in pixels of the image.
    side: of the square.
    length: of the image along this axis.
  """
  end = start + side
  after = end - length + 1 if end >= length else 0
  first = min(max(-start, 0), side)
  return first, max(side - after, first)


def cut(image: UInt8[np.ndarray, 'h w c'], square: Square) -> UInt8[np.ndarray, 'side side c']:
  """Returns a square of an image, black outside of it."""
  (left, right), (top, bottom) = (
    inside(start, square.side, length)
    for start, length in zip(square[:2], image.shape[1::-1], strict=True)
  )
  pixels = np.zeros((square.side, square.side, 3), np.uint8)
  pixels[top:bottom, left:right] = image[
    square.top + top : square.top + bottom, square.left + left : square.left + right
  ]
  return pixels


def padding(
  square: Square, height: int, width: int, out_size: int
) -> Bool[np.ndarray, 'size size']:
  """Returns which pixels of a resized crop hold anything that is outside of the image.

  Args:
    square: which is cut out.
    height: of the image, in pixels.
    width: of the image, in pixels.
    out_size: pixels along a side of the crop.
  """
  touched = []
  for start, length in ((square.top, height), (square.left, width)):
    first, end = inside(start, square.side, length)
    is_outside = np.ones((square.side, 1))
    is_outside[first:end] = 0
    touched.append(cv2.resize(is_outside, (1, out_size))[:, 0] > 0)
  return touched[0][:, None] | touched[1]


def jitter(
  box: Float[np.ndarray, '4'],
  normals: Float[np.ndarray, '2'],
  uniforms: Float[np.ndarray, '2'],
  *,
  centre_jitter: float,
  scale_jitter: float,
) -> Float[np.ndarray, '4']:
  """Returns a box around which a search crop is cut, so that the target is not in its middle.

  Both axes are drawn separately, so the box changes its shape.

  Args:
    box: of the target.
    normals: standard normal, width first.
    uniforms: from [0, 1), x first.
    centre_jitter: the largest shift along an axis is half of this, in square roots of the area.
    scale_jitter: standard deviation of the logarithm of a side.
  """
  size = box[2:] * np.exp(normals * scale_jitter)
  reach = np.sqrt(size.prod()) * centre_jitter
  centre = box[:2] + 0.5 * box[2:] + reach * (uniforms - 0.5)
  return np.concatenate([centre - 0.5 * size, size])


def box_in_crop(
  box: Float[np.ndarray, '4'], around: Float[np.ndarray, '4'], resize_factor: float, out_size: int
) -> Float[np.ndarray, '4']:
  """Returns a box (x, y, w, h) as fractions of a crop.

  Args:
    box: in pixels of the image.
    around: the box that the crop was cut around.
    resize_factor: pixels of the crop per pixel of the image.
    out_size: pixels along a side of the crop.
  """
  shift = (box[:2] + 0.5 * box[2:]) - (around[:2] + 0.5 * around[2:])
  centre = (out_size - 1) / 2 + shift * resize_factor
  size = box[2:] * resize_factor
  return np.concatenate([centre - 0.5 * size, size]) / out_size


def box_in_image(
  box: Float[np.ndarray, '4'], around: Float[np.ndarray, '4'], resize_factor: float, out_size: int
) -> Float[np.ndarray, '4']:
  """Returns a predicted box (x, y, w, h) in pixels of the image, not clipped.

  It is not the inverse of `box_in_crop`: trackers take the centre of the crop for out_size / 2.

  Args:
    box: (cx, cy, w, h), fractions of the crop.
    around: the box that the crop was cut around.
    resize_factor: pixels of the crop per pixel of the image.
    out_size: pixels along a side of the crop.
  """
  side = out_size / resize_factor
  scaled = box.astype(np.float64) * side
  size = scaled[2:]
  centre = scaled[:2] + (around[:2] + 0.5 * around[2:]) - 0.5 * side
  return np.concatenate([centre - 0.5 * size, size])


def clip_box(box: Float[np.ndarray, '4'], height: int, width: int) -> Float[np.ndarray, '4']:
  """Returns a box of which at least MARGIN pixels along each axis are in the image.

  Args:
    box: may be anywhere.
    height: of the image, in pixels.
    width: of the image, in pixels.
  """
  length = np.array([width, height])
  start = np.clip(box[:2], 0, length - MARGIN)
  end = np.clip(box[:2] + box[2:], MARGIN, length)
  return np.concatenate([start, np.maximum(end - start, MARGIN)])


def flip_box(box: Float[np.ndarray, '4'], last: float) -> Float[np.ndarray, '4']:
  """Returns the box (x, y, w, h) of a mirrored image, or crop.

  Args:
    box: before.
    last: the x that 0 becomes: width - 1 for pixels of an image, 1 for fractions of a crop.
  """
  x, y, width, height = box
  return np.array([last - (x + width), y, width, height], box.dtype)


def draw_augmentation(uniform: Uniform, *, is_training: bool) -> Augmentation:
  """Draws what is random about the crops of a pair.

  In validation too, colour, whole frames and the search box are augmented; single crops are not.

  Args:
    uniform: called AUGMENTATION_DRAWS times.
    is_training: not validation.
  """
  draws = [uniform() for _ in range(AUGMENTATION_DRAWS)]
  least, most = BRIGHTNESS
  return Augmentation(
    is_grey=draws[0] < GREY_RATE,
    is_flipped=draws[1] < FLIP_RATE,
    normals=tuple(scipy.special.ndtri(draws[2:4]).tolist()),
    uniforms=tuple(draws[4:6]),
    brightness=tuple(least + (most - least) * each if is_training else 1.0 for each in draws[6:8]),
    crop_is_flipped=tuple(is_training and each < FLIP_RATE for each in draws[8:]),
  )


def training_pair(
  template: UInt8[np.ndarray, 'h w c'],
  search: UInt8[np.ndarray, 'search_h search_w c'],
  template_box: Float[np.ndarray, '4'],
  search_box: Float[np.ndarray, '4'],
  augmentation: Augmentation,
  options: CropOptions,
) -> TrainingPair | None:
  """Cuts and augments the crops of a pair; a pure function.

  Args:
    template: whole frame.
    search: whole frame.
    template_box: in the template.
    search_box: in the search frame.
    augmentation: what was drawn for this pair.
    options: sizes of the crops, and of the jitter.

  Returns:
    the sample, or None if a crop has no area or shows too little of its image; another pair is to
    be drawn then.
  """
  frames, boxes = [template, search], [template_box, search_box]
  boxes = [np.asarray(box, np.float32) for box in boxes]
  if augmentation.is_grey:
    frames = [np.repeat(_grey(frame)[..., None], 3, axis=2) for frame in frames]
  if augmentation.is_flipped:
    boxes = [flip_box(box, frame.shape[1] - 1) for box, frame in zip(boxes, frames, strict=True)]
    frames = [frame[:, ::-1] for frame in frames]
  jittered = jitter(
    boxes[1],
    np.array(augmentation.normals, np.float32),
    np.array(augmentation.uniforms, np.float32),
    centre_jitter=options.centre_jitter,
    scale_jitter=options.scale_jitter,
  )
  crops, targets = [], []
  for frame, box, around, factor, size, is_flipped in zip(
    frames,
    boxes,
    (boxes[0], jittered),
    (options.template_factor, options.search_factor),
    (options.template_size, options.search_size),
    augmentation.crop_is_flipped,
    strict=True,
  ):
    if not is_usable(frame, around, factor, size, is_flipped=is_flipped):
      return None
    pixels, resize_factor = crop(frame, around, factor, size)
    target = box_in_crop(box, around, resize_factor, size)
    crops.append(np.ascontiguousarray(pixels[:, ::-1]) if is_flipped else pixels)
    targets.append(flip_box(target, 1) if is_flipped else target)
  return TrainingPair(*crops, *targets, np.array(augmentation.brightness, np.float32))


def is_usable(
  frame: UInt8[np.ndarray, 'h w c'],
  around: Float[np.ndarray, '4'],
  factor: float,
  size: int,
  *,
  is_flipped: bool,
) -> bool:
  """Whether a training crop is made around a box; otherwise another pair is drawn.

  Args:
    frame: that it would be cut out of.
    around: the box.
    factor: see `square_around`.
    size: of the crop.
    is_flipped: the crop is to be mirrored, which shifts where its padding is looked at.
  """
  if not np.isfinite(around).all() or not (around[2:] > 0).all():
    return False
  is_padded = padding(square_around(around, factor), *frame.shape[:2], size)
  if is_flipped:
    is_padded = is_padded[:, ::-1]
  return not is_padded[::PADDING_STRIDE, ::PADDING_STRIDE].all()


def _grey(frame: UInt8[np.ndarray, 'h w c']) -> UInt8[np.ndarray, 'h w']:
  return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


def brighten_and_normalise(
  crops: UInt8[Array, 'b h w c'], brightness: Float[Array, ' b']
) -> Float[Array, 'b h w c']:
  """Returns crops as the model takes them in training; on the device.

  Args:
    crops: uint8.
    brightness: factor of each, 1 for none; what becomes brighter than white is white.
  """
  scaled = crops.astype(jnp.float32) * (brightness / 255)[:, None, None, None]
  return (jnp.clip(scaled, 0, 1) - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_DEVIATION)
