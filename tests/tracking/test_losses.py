"""Target maps and losses against recorded ones, and where their formulas have no value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dropmae_jax.tracking import losses


@pytest.fixture(scope='module')
def recorded(golden):
  return {
    name: jnp.asarray(array)
    for name, array in golden('tracker/tracker_loss').items()
    if array.dtype.kind != 'U'
  }


@pytest.mark.parametrize('size', [16, 24])
def test_target_maps(recorded, size):
  boxes, expected = recorded['boxes'], recorded[f'map{size}']
  peaks = jax.jit(losses.peaks, static_argnums=1)(boxes, size)
  np.testing.assert_array_equal(peaks.centre, recorded[f'centre{size}'])
  np.testing.assert_array_equal(peaks.radius, recorded[f'radius{size}'])
  maps = np.asarray(jax.jit(losses.target_maps, static_argnums=1)(boxes, size))
  np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-7)
  for value in (0, 1):
    np.testing.assert_array_equal(maps == value, expected == value)


def test_overlaps(recorded):
  iou, giou = jax.jit(losses.overlaps)(recorded['pair_pred'], recorded['pair_true'])
  np.testing.assert_allclose(iou, recorded['pair_iou'], rtol=0, atol=1e-6)
  np.testing.assert_allclose(giou, recorded['pair_giou'], rtol=0, atol=1e-6)


def test_the_losses_of_pairs_of_boxes(recorded):
  (start, end), (true_start, true_end) = (
    jnp.split(recorded[name], 2, axis=-1) for name in ('pair_pred', 'pair_true')
  )
  of_pairs = losses.tracker_losses(
    jnp.full((len(start), 16, 16), 0.5),
    jnp.concatenate([(start + end) / 2, end - start], axis=-1),
    jnp.concatenate([true_start, true_end - true_start], axis=-1),
    group_size=len(start),
  )
  assert float(of_pairs.giou) == pytest.approx(float(recorded['pair_giou_loss']), abs=8e-7)
  assert float(of_pairs.l1) == pytest.approx(float(recorded['pair_l1_loss']), abs=8e-7)


@pytest.mark.parametrize('place', [(0.2, 0.3), (0.5, 0.5)])
def test_boxes_without_area_overlap_nothing_and_have_a_gradient(place):
  true = jnp.array([[0.5, 0.5, 0.5, 0.5]])
  boxes = jnp.array([[*place, *place]])
  assert losses.overlaps(boxes, true)[0] == 0
  gradient = jax.grad(lambda boxes: losses.overlaps(boxes, true)[1].sum())(boxes)
  assert np.isfinite(gradient).all()


def test_focal_loss_with_and_without_a_positive(recorded):
  scores = recorded['focal_pred'][:, 0]
  targets = recorded['map16'][recorded['focal_target_rows']]
  expected = pytest.approx(float(recorded['focal_loss']), rel=1e-6)
  assert float(losses.focal_loss(scores, targets)) == expected
  targets = jnp.minimum(targets, recorded['focal_no_positive_clip'])
  expected = pytest.approx(float(recorded['focal_loss_no_positive']), rel=1e-6)
  assert float(losses.focal_loss(scores, targets)) == expected


def test_each_group_divides_by_its_own_positives(recorded):
  scores = jnp.full((64, 16, 16), 0.3)
  # Those without a positive first: 22 of 64.
  targets = recorded['map16'][jnp.argsort((recorded['map16'] == 1).any((1, 2)))]
  halves = [float(losses.focal_loss(scores[:32], half)) for half in jnp.split(targets, 2)]
  mean = float(losses.focal_loss(scores, targets, group_size=32))
  assert mean == pytest.approx(sum(halves) / 2, rel=1e-6)
  assert mean != pytest.approx(float(losses.focal_loss(scores, targets, group_size=64)), rel=0.1)


def test_the_losses_of_a_batch(recorded):
  row = 1  # Epoch 45, for which the score map is recorded.
  batch_losses = jax.jit(losses.tracker_losses)(
    recorded['score_map'][:, 0], recorded['pred_boxes'][row], recorded['search_boxes']
  )
  for name, value in batch_losses._asdict().items():
    expected = pytest.approx(float(recorded[f'loss_{name}'][row]), rel=1e-6)
    assert float(value) == expected, name
