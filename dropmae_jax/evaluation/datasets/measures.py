"""The measures of DAVIS-2017 (J and F) and VIP (mIoU), as their official evaluations compute them.

All are fractions of 1. The official code of DAVIS goes wrong beyond 255 frames, this one does not;
DAVIS itself has at most 104.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

# Of masks of DAVIS: pixels that belong to no object. They count as background.
VOID = 255
# Boundaries match within this share of the diagonal of a mask.
BOUNDARY_TOLERANCE = 0.008
# An object counts as found in a frame, for the recall, above this value of J or F.
RECALL_THRESHOLD = 0.5
# Of VIP, with the background.
NUM_CLASSES = 20


class Statistics(NamedTuple):
  """What DAVIS says of an object's values in the frames of a sequence.

  Attributes:
    mean: of all values.
    recall: share of the values above 0.5.
    decay: mean of the first quarter minus that of the last.
  """

  mean: float
  recall: float
  decay: float


class ObjectMeasures(NamedTuple):
  """J and F of every object of a sequence in every frame that counts.

  Attributes:
    region: J.
    boundary: F.
  """

  region: Float64[np.ndarray, 'objects frames']
  boundary: Float64[np.ndarray, 'objects frames']


def region_similarity(truth: Bool[np.ndarray, 'h w'], predicted: Bool[np.ndarray, 'h w']) -> float:
  """Returns J, intersection over union, of two masks of an object; 1 if both are empty."""
  union = np.count_nonzero(truth | predicted)
  return np.count_nonzero(truth & predicted) / union if union else 1.0


def boundary_map(mask: Bool[np.ndarray, 'h w']) -> Bool[np.ndarray, 'h w']:
  """Returns where a mask differs from the pixel to the right, below, or right below.

  The last row is compared to the right only, the last column downwards only. So a mask that fills
  the frame has no boundary, nor has a single pixel in the lower right corner.
  """
  boundary = np.zeros_like(mask)
  inside = mask[:-1, :-1]
  boundary[:-1, :-1] = (inside ^ mask[:-1, 1:]) | (inside ^ mask[1:, :-1]) | (inside ^ mask[1:, 1:])
  boundary[-1, :-1] = mask[-1, :-1] ^ mask[-1, 1:]
  boundary[:-1, -1] = mask[:-1, -1] ^ mask[1:, -1]
  return boundary


def boundary_tolerance(size: tuple[int, int]) -> int:
  """Returns how many pixels apart boundaries still match, in masks of (height, width) pixels."""
  return int(np.ceil(BOUNDARY_TOLERANCE * np.linalg.norm(size)))


@functools.cache
def _disk(radius: int) -> UInt8[np.ndarray, 'side side']:
  offsets = np.square(np.arange(-radius, radius + 1))
  return (offsets[:, None] + offsets <= radius**2).astype(np.uint8)


def boundary_accuracy(truth: Bool[np.ndarray, 'h w'], predicted: Bool[np.ndarray, 'h w']) -> float:
  """Returns F, the harmonic mean of precision and recall of the boundary of an object's mask.

  A pixel of one boundary is right if the other has one within `boundary_tolerance`. F is 1 if
  neither mask has a boundary, and 0 if one has none.
  """
  boundaries = [boundary_map(mask).view(np.uint8) for mask in (truth, predicted)]
  # The rest of the frame is in neither boundary, so dilating these parts is enough.
  left, top, width, height = cv2.boundingRect(boundaries[0] | boundaries[1])
  truth_part, predicted_part = (
    np.ascontiguousarray(each[top : top + height, left : left + width]) for each in boundaries
  )
  num_truth, num_predicted = np.count_nonzero(truth_part), np.count_nonzero(predicted_part)
  if not num_truth or not num_predicted:
    return float(num_truth == num_predicted)
  disk = _disk(boundary_tolerance(truth.shape))
  precision = np.count_nonzero(predicted_part & cv2.dilate(truth_part, disk)) / num_predicted
  recall = np.count_nonzero(truth_part & cv2.dilate(predicted_part, disk)) / num_truth
  return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(values: Float64[np.ndarray, ' frames']) -> Statistics:
  """Returns the statistics of J or F of an object over the frames of a sequence; at least one."""
  # The ends of the quarters; neighbours share the value at which they meet.
  ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
  first, last = values[: ends[1] + 1], values[ends[3] :]
  return Statistics(
    mean=float(values.mean()),
    recall=float((values > RECALL_THRESHOLD).mean()),
    decay=float(first.mean() - last.mean()),
  )


def num_objects(first_truth: UInt8[np.ndarray, 'h w']) -> int:
  """Returns the objects of a sequence of DAVIS: the largest number in its first mask.

  A number that is missing below it is an object too; where it is not found it scores 1.
  """
  return int(np.where(first_truth == VOID, 0, first_truth).max())


def object_measures(
  truths: Sequence[UInt8[np.ndarray, 'h w']], predicted: Sequence[UInt8[np.ndarray, 'h w']]
) -> ObjectMeasures:
  """Compares the masks of a sequence of DAVIS.

  The first and the last frame do not count, nor do objects that are not in the first. An object
  that is found nowhere has an empty mask.

  Args:
    truths: of all frames, the first and the last included; object numbers, 0 is background, and so
      is `VOID`.
    predicted: the same.
  """
  objects = range(1, num_objects(truths[0]) + 1)
  shape = len(objects), len(truths) - 2
  measures = ObjectMeasures(np.empty(shape), np.empty(shape))
  for frame, (truth, mask) in enumerate(zip(truths[1:-1], predicted[1:-1], strict=True)):
    for row, number in enumerate(objects):
      is_truth, is_predicted = truth == number, mask == number
      measures.region[row, frame] = region_similarity(is_truth, is_predicted)
      measures.boundary[row, frame] = boundary_accuracy(is_truth, is_predicted)
  return measures


def summarise_objects(
  region: Float64[np.ndarray, 'objects statistics'],
  boundary: Float64[np.ndarray, 'objects statistics'],
) -> dict[str, float]:
  """Returns the numbers of DAVIS for a data set: means over all objects, not over sequences.

  Args:
    region: `Statistics` of J of the objects of all sequences.
    boundary: of F.
  """
  numbers = {
    f'{letter}_{name}': float(value)
    for letter, objects in (('J', region), ('F', boundary))
    for name, value in zip(Statistics._fields, objects.mean(axis=0), strict=True)
  }
  return {'J&F': (numbers['J_mean'] + numbers['F_mean']) / 2, **numbers}


def confusion_matrix(
  truth: UInt8[np.ndarray, 'h w'], predicted: UInt8[np.ndarray, 'h w']
) -> Int64[np.ndarray, 'truth predicted']:
  """Counts the pixels of every pair of a true and a predicted class of VIP.

  Args:
    truth: classes; pixels of others than 0..19 do not count.
    predicted: classes; all in 0..19.
  """
  counts = truth < NUM_CLASSES
  pairs = NUM_CLASSES * truth[counts].astype(np.int64) + predicted[counts]
  return np.bincount(pairs, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def class_ious(confusion: Int64[np.ndarray, 'truth predicted']) -> Float64[np.ndarray, ' classes']:
  """Returns intersection over union of every class; NaN of one neither in truth nor predicted."""
  right = confusion.diagonal()
  union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
  return np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)
