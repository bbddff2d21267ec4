"""How far a predicted box is from the true one in each frame, by the rules of each toolkit.

The toolkits agree neither on the frames that count, nor on the centre of a box, nor on what becomes
of boxes of zero size. `conventions` has the table that says who does what. A frame that fails
whatever the threshold has an overlap of -1 or an infinite distance.
"""

import numpy as np
from jaxtyping import Bool, Float64

from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking.sequences.sequence import Sequence

Boxes = Float64[np.ndarray, 'n 4']
# By name: 'overlap', intersection over union; 'centre', distance in pixels; 'relative', distance in
# widths and heights of the true box; of the frames that count.
Errors = dict[str, Float64[np.ndarray, ' counted']]


def got10k_val(sequence: Sequence, boxes: Boxes) -> Errors:
  """Returns the overlaps in frames where some of the target can be seen, without the first one.

  Both boxes are clipped to the frame: first x and y, then width and height, so that a box that
  begins left of the frame is moved, and not cut.

  Raises:
    UserError: the sequence has no such labels, or no size.
  """
  if sequence.cover is None or sequence.size is None:
    raise UserError(
      f'sequence {sequence.name!r} has no cover.label and meta_info.ini, which the rules of'
      ' GOT-10k need; choose another --toolkit.'
    )
  counts = sequence.cover[1:] > 0
  truth, found = (_clipped(each[1:][counts], sequence.size) for each in (sequence.boxes, boxes))
  return {'overlap': _overlap_of_got10k(found, truth)}


def _clipped(boxes: Boxes, size: tuple[int, int]) -> Boxes:
  corner = np.clip(boxes[:, :2], 0, size)
  return np.concatenate([corner, np.clip(boxes[:, 2:], 0, size - corner)], axis=1)


def _overlap_of_got10k(found: Boxes, truth: Boxes) -> Float64[np.ndarray, ' n']:
  inter, union = _areas(found, truth)
  overlap = np.clip(inter / (union + np.finfo(np.float64).eps), 0, 1)
  return np.nan_to_num(overlap, nan=0.0)


def _areas(
  found: Boxes, truth: Boxes
) -> tuple[Float64[np.ndarray, ' n'], Float64[np.ndarray, ' n']]:
  """Returns the areas of intersection and union."""
  begin = np.maximum(found[:, :2], truth[:, :2])
  end = np.minimum(found[:, :2] + found[:, 2:], truth[:, :2] + truth[:, 2:])
  inter = np.maximum(end - begin, 0).prod(axis=1)
  return inter, found[:, 2:].prod(axis=1) + truth[:, 2:].prod(axis=1) - inter


def _centre(boxes: Boxes) -> Float64[np.ndarray, 'n 2']:
  """Returns the centre of the pixels that a box covers, counted as whole pixels."""
  return boxes[:, :2] + (boxes[:, 2:] - 1) / 2


def _norm(vectors: Float64[np.ndarray, 'n 2']) -> Float64[np.ndarray, ' n']:
  return np.sqrt(np.square(vectors).sum(axis=1))


def got10k_ope(sequence: Sequence, boxes: Boxes) -> Errors:
  """Returns the errors of the GOT-10k toolkit for LaSOT, OTB and others ("one-pass evaluation")."""
  found = _with_first(boxes, sequence.boxes)
  counts = ~np.isnan(sequence.boxes).any(axis=1)
  found, truth = found[counts], sequence.boxes[counts]
  distance = _centre(found) - _centre(truth)
  return {
    'overlap': _overlap_of_got10k(found, truth),
    'centre': _norm(distance),
    'relative': _norm(distance / np.maximum(truth[:, 2:], 1)),
  }


def _with_first(boxes: Boxes, truth: Boxes) -> Boxes:
  return np.concatenate([truth[:1], boxes[1:]])


def ostrack(
  sequence: Sequence,
  boxes: Boxes,
  *,
  uses_labels: bool = False,
  hidden_relative: float = -1.0,
  invalid_centre: float = np.inf,
) -> Errors:
  """Returns the errors of the published tracker's analysis, in all frames.

  A frame is invalid if its true box is empty. It fails in overlap, but its relative distance is -1,
  which **counts as a hit** at every threshold.

  Args:
    sequence: the truth.
    boxes: the predictions; where one is of zero size, that of the frame before is taken.
    uses_labels: frames are invalid, too, if the target is not in view by the labels.
    hidden_relative: the relative distance where it is not in view.
    invalid_centre: the distance of centres in invalid frames.

  Raises:
    UserError: labels are needed, and the sequence has none.
  """
  truth = sequence.boxes
  is_valid = (truth[:, 2:] > 0).all(axis=1)
  relative_if_invalid = np.full(len(truth), -1.0)
  if uses_labels:
    in_view = _labels(sequence)
    is_valid &= in_view
    relative_if_invalid[~in_view] = hidden_relative
  found = _with_first(_repeated(boxes, truth), truth)
  inter, union = _areas(found, truth)
  with np.errstate(divide='ignore', invalid='ignore'):
    overlap = inter / union
    relative = _norm(_centre(found) / truth[:, 2:] - _centre(truth) / truth[:, 2:])
  return {
    'overlap': np.where(is_valid, overlap, -1),
    'centre': np.where(is_valid, _norm(_centre(found) - _centre(truth)), invalid_centre),
    'relative': np.where(is_valid, relative, relative_if_invalid),
  }


def _labels(sequence: Sequence) -> Bool[np.ndarray, ' n']:
  if sequence.in_view is None:
    raise UserError(
      f'sequence {sequence.name!r} has no labels of occlusion and view, which the rules of LaSOT'
      ' need; choose another --toolkit.'
    )
  return sequence.in_view


def _repeated(boxes: Boxes, truth: Boxes) -> Boxes:
  """Returns predictions, each of zero size replaced by the one before, if there is a true box."""
  is_kept = (boxes[:, 2:] != 0).all(axis=1) | np.isnan(truth).any(axis=1)
  is_kept[0] = True
  return boxes[np.maximum.accumulate(np.where(is_kept, np.arange(len(boxes)), 0))]


def trackingnet(sequence: Sequence, boxes: Boxes) -> Errors:
  """Returns the errors of TrackingNet's devkit, of boxes that are rounded to whole pixels.

  'coverage' is 1 where a prediction is not all zeros.
  """
  truth, found = np.round(sequence.boxes), np.round(boxes)
  found = _with_first(found, truth)
  inter, union = _areas(found, truth)
  distance = found[:, :2] + (found[:, 2:] + 1) / 2 - (truth[:, :2] + (truth[:, 2:] + 1) / 2)
  with np.errstate(divide='ignore', invalid='ignore'):
    overlap = inter / union
    relative = _norm(distance / truth[:, 2:])
  return {
    'overlap': np.nan_to_num(overlap, nan=-1.0),
    'centre': np.nan_to_num(_norm(distance), nan=np.inf),
    'relative': np.nan_to_num(relative, nan=np.inf),
    'coverage': (found.sum(axis=1) > 0).astype(np.float64),
  }
