"""The losses of tracker training: generalised IoU and L1 of boxes, focal loss of the score map.

As published by OSTrack (botaoye/OSTrack at 33b5e12, jimmy-dq/DropTrack at 4364304). Boxes are
fractions of the search crop. All arithmetic is in float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

GIOU_WEIGHT, L1_WEIGHT, FOCAL_WEIGHT = 2.0, 5.0, 1.0
# IoU that a corner shifted by the radius of the peak shall leave.
MIN_OVERLAP = 0.7
# The batch of one process in the published training. Each divides by its own number of positives.
GROUP_SIZE = 32


class Losses(NamedTuple):
  """The loss of a batch, its three parts unweighted, and the mean IoU for the metrics."""

  total: Float[Array, '']
  giou: Float[Array, '']
  l1: Float[Array, '']
  focal: Float[Array, '']
  iou: Float[Array, '']


class Peaks(NamedTuple):
  """Where the peak of each target map is, and how wide."""

  centre: Int[Array, 'b 2']
  radius: Int[Array, ' b']


def tracker_losses(
  scores: Float[Array, 'b s s'],
  boxes: Float[Array, 'b 4'],
  true_boxes: Float[Array, 'b 4'],
  *,
  group_size: int = GROUP_SIZE,
) -> Losses:
  """Returns the losses of a batch.

  Args:
    scores: predicted, in (0, 1).
    boxes: predicted, (cx, cy, w, h).
    true_boxes: (x, y, w, h), may reach out of the crop.
    group_size: samples whose focal losses share one divisor, see `focal_loss`.
  """
  truth = jnp.clip(corners_of_sized(true_boxes), 0, 1)
  predicted = corners_of_centred(boxes)
  iou, giou = overlaps(predicted, truth)
  giou_loss = jnp.mean(1 - giou)
  l1_loss = jnp.mean(jnp.abs(predicted - truth))
  focal = focal_loss(scores, target_maps(true_boxes, scores.shape[-1]), group_size=group_size)
  return Losses(
    total=GIOU_WEIGHT * giou_loss + L1_WEIGHT * l1_loss + FOCAL_WEIGHT * focal,
    giou=giou_loss,
    l1=l1_loss,
    focal=focal,
    iou=jnp.mean(iou),
  )


def corners_of_sized(boxes: Float[Array, '... 4']) -> Float[Array, '... 4']:
  """Returns (x1, y1, x2, y2) of boxes (x, y, w, h)."""
  corner, size = jnp.split(boxes, 2, axis=-1)
  return jnp.concatenate([corner, corner + size], axis=-1)


def corners_of_centred(boxes: Float[Array, '... 4']) -> Float[Array, '... 4']:
  """Returns (x1, y1, x2, y2) of boxes (cx, cy, w, h)."""
  centre, size = jnp.split(boxes, 2, axis=-1)
  return jnp.concatenate([centre - 0.5 * size, centre + 0.5 * size], axis=-1)


def overlaps(
  boxes: Float[Array, '... 4'], others: Float[Array, '... 4']
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
  """Returns the IoU and the generalised IoU (arXiv:1902.09630) of boxes (x1, y1, x2, y2).

  A ratio over an area of zero counts as zero, so that neither it nor its gradient is ever NaN.
  """

  def area(least: Array, most: Array) -> Array:
    return jnp.prod(jnp.maximum(most - least, 0), axis=-1)

  (least, most), (other_least, other_most) = (
    jnp.split(each, 2, axis=-1) for each in (boxes, others)
  )
  intersection = area(jnp.maximum(least, other_least), jnp.minimum(most, other_most))
  union = area(least, most) + area(other_least, other_most) - intersection
  hull = area(jnp.minimum(least, other_least), jnp.maximum(most, other_most))
  iou = _divide(intersection, union)
  return iou, iou - _divide(hull - union, hull)


def _divide(numerator: Float[Array, '...'], area: Float[Array, '...']) -> Float[Array, '...']:
  is_positive = area > 0
  return jnp.where(is_positive, numerator / jnp.where(is_positive, area, 1), 0)


def focal_loss(
  scores: Float[Array, 'b s s'], targets: Float[Array, 'b s s'], *, group_size: int = GROUP_SIZE
) -> Float[Array, '']:
  """Returns the focal loss of CornerNet (arXiv:1808.01244): alpha is 2, beta is 4.

  Positives are the cells whose target is exactly 1. The sum over a group is divided by its number
  of positives, and the mean is over groups, which is what averaging gradients over processes of
  `group_size` samples gives. A batch smaller than that is one group.

  Args:
    scores: predicted.
    targets: of `target_maps`.
    group_size: samples of a group; divides the batch, unless the batch is smaller.
  """
  scores, targets = (
    rearrange(each, '(g b) y x -> g (b y x)', b=min(group_size, len(scores)))
    for each in (scores, targets)
  )
  scores = jnp.maximum(scores, 1e-12)
  is_positive = targets == 1
  of_positive = jnp.log(scores) * (1 - scores) ** 2
  of_negative = jnp.log(1 - scores) * scores**2 * (1 - targets) ** 4
  sums = jnp.where(is_positive, of_positive, of_negative).sum(axis=-1)
  return jnp.mean(-sums / jnp.maximum(is_positive.sum(axis=-1), 1))


def target_maps(boxes: Float[Array, 'b 4'], size: int) -> Float[Array, 'b s s']:
  """Returns the target of the score map of each box (x, y, w, h): a Gaussian, cut to a square.

  It is 1 at the cell of the centre. If that is outside the crop, only the part of the square that
  reaches in is drawn, and no cell is 1.

  Args:
    boxes: fractions of the crop, not clamped to it.
    size: cells along a side of the map.
  """
  centre, radius = peaks(boxes, size)
  distance = jnp.arange(size) - centre[..., None]
  squared = jnp.square(distance[:, 0, None, :]) + jnp.square(distance[:, 1, :, None])
  is_near = jnp.abs(distance) <= radius[:, None, None]
  is_inside = is_near[:, 0, None, :] & is_near[:, 1, :, None]
  deviation = (2 * radius + 1)[:, None, None] / 6
  return jnp.where(is_inside, jnp.exp(-squared / (2 * jnp.square(deviation))), 0)


def peaks(boxes: Float[Array, 'b 4'], size: int) -> Peaks:
  """Returns the cell of the centre (x, y) of each box (x, y, w, h), and the radius of its peak.

  The radius shall be the largest by which both corners can be off at an IoU of MIN_OVERLAP, for the
  three cases of CornerNet. Two of its published roots divide by 2 where the coefficient of the
  square is not 1; every tracker is trained with them, so they stay.

  Args:
    boxes: fractions of the crop.
    size: cells along a side of the map.
  """
  boxes = boxes.astype(jnp.float32) * size
  corner, (width, height) = boxes[:, :2], (boxes[:, 2], boxes[:, 3])
  centre = jnp.round(corner + boxes[:, 2:] / 2).astype(jnp.int32)
  total, area, overlap = height + width, width * height, MIN_OVERLAP

  def root(b: Array, four_a_c: Array) -> Array:
    return (b + jnp.sqrt(jnp.square(b) - four_a_c)) / 2

  radii = jnp.stack(
    [
      root(total, 4 * area * (1 - overlap) / (1 + overlap)),
      root(2 * total, 16 * (1 - overlap) * area),
      root(-2 * overlap * total, -16 * overlap * (1 - overlap) * area),
    ]
  )
  radius = jnp.maximum(radii.min(axis=0), 0).astype(jnp.int32)
  return Peaks(centre, radius)
