"""J, F and their statistics, and VIP's IoU: recorded numbers, and a direct loop over pixels."""

import itertools
import math
import unittest.mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dropmae_jax.evaluation.datasets import measures


@pytest.fixture(scope='module')
def recorded(golden):
  return golden('evaluation/davis_measures')


def test_pairs_of_masks_have_the_recorded_measures(recorded):
  """Equal, shifted, empty, full, single pixels, at every border and corner, with a hole, noise."""
  for name in recorded['pair_names']:
    pair = {key: recorded[f'pair/{name}/{key}'] for key in ('truth', 'found', 'J', 'F')}
    for side in ('truth', 'found'):
      boundary = recorded[f'pair/{name}/boundary_{side}']
      np.testing.assert_array_equal(measures.boundary_map(pair[side]), boundary, name)
    tolerance = measures.boundary_tolerance(pair['truth'].shape)
    assert tolerance == recorded[f'pair/{name}/tolerance']
    got = (
      measures.region_similarity(pair['truth'], pair['found']),
      measures.boundary_accuracy(pair['truth'], pair['found']),
    )
    np.testing.assert_allclose(got, (pair['J'], pair['F']), rtol=0, atol=1e-12, err_msg=name)


def test_the_tolerance_of_boundaries_at_usual_sizes(recorded):
  got = [measures.boundary_tolerance(tuple(size)) for size in recorded['tolerance/sizes'].tolist()]
  assert got == recorded['tolerance/pixels'].tolist()
  assert measures.boundary_tolerance((480, 854)) == 8
  assert measures.boundary_tolerance((480, 880)) == 9


def direct_boundary(mask):
  """Pixels that differ from one of their neighbours to the right, below, and right below."""
  height, width = mask.shape
  return [
    (y, x)
    for y, x in itertools.product(range(height), range(width))
    if any(
      y + dy < height and x + dx < width and mask[y, x] != mask[y + dy, x + dx]
      for dy, dx in ((0, 1), (1, 0), (1, 1))
    )
  ]


def direct_measures(truth, predicted, tolerance):
  """J and F by loops over pixels and over pairs of boundary pixels."""
  both = either = 0
  for is_truth, is_predicted in zip(truth.flat, predicted.flat, strict=True):
    both += int(is_truth and is_predicted)
    either += int(is_truth or is_predicted)
  region = both / either if either else 1

  def share(these, those):
    near = sum(any((y - v) ** 2 + (x - u) ** 2 <= tolerance**2 for v, u in those) for y, x in these)
    return near / len(these)

  truth, predicted = direct_boundary(truth), direct_boundary(predicted)
  if not truth or not predicted:
    return region, float(not truth and not predicted)
  precision, recall = share(predicted, truth), share(truth, predicted)
  return region, 2 * precision * recall / (precision + recall) if precision + recall else 0


@st.composite
def mask_pairs(draw):
  """Unrelated masks, or such that differ in few pixels; dense and sparse ones."""
  shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=10))
  truth = draw(hnp.arrays(bool, shape, fill=st.booleans()))
  other = draw(hnp.arrays(bool, shape, fill=st.just(False)))
  return truth, truth ^ other if draw(st.booleans()) else other


@settings(max_examples=150, deadline=None)
@given(mask_pairs(), st.sampled_from([0.008, 0.15, 0.25, 0.4]))
def test_measures_are_those_of_a_direct_loop(pair, share):
  """The tolerance of so small masks is 1; larger shares of the diagonal are up to 6 pixels."""
  truth, predicted = pair
  tolerance = math.ceil(share * math.hypot(*truth.shape))
  with unittest.mock.patch.object(measures, 'BOUNDARY_TOLERANCE', share):
    got = measures.region_similarity(truth, predicted), measures.boundary_accuracy(truth, predicted)
  np.testing.assert_allclose(got, direct_measures(truth, predicted, tolerance), rtol=0, atol=1e-6)


def test_sequences_have_the_recorded_measures(recorded):
  """Objects that leave, are never found, are missing below the highest number; void pixels."""
  for name in recorded['seq_names']:
    sequence = {key: recorded[f'seq/{name}/{key}'] for key in ('truth', 'found', 'J', 'F')}
    got = measures.object_measures(list(sequence['truth']), list(sequence['found']))
    np.testing.assert_allclose(got.region, sequence['J'], rtol=0, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(got.boundary, sequence['F'], rtol=0, atol=1e-12, err_msg=name)


def direct_statistics(values):
  """Quarters with both ends included, which are rounded half up in whole numbers."""
  ends = [(quarter * (len(values) - 1) + 2) // 4 for quarter in range(5)]
  first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
  mean = sum(values) / len(values)
  recall = sum(value > 0.5 for value in values) / len(values)
  return mean, recall, sum(first) / len(first) - sum(last) / len(last)


def test_statistics_of_series_of_any_length(recorded):
  """From 256 values on the recorded decay is wrong: the published code counts in 8 bits."""
  lengths = {int(key.split('/')[1]) for key in recorded if key.startswith('statistics/')}
  assert max(lengths) > 255
  for length in sorted(lengths):
    values = recorded[f'statistics/{length}/values']
    got, expected = measures.statistics(values), direct_statistics(values.tolist())
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12, err_msg=str(length))
    if length <= 255:
      published = recorded[f'statistics/{length}/mean_recall_decay']
      np.testing.assert_allclose(got, published, rtol=0, atol=1e-12, err_msg=str(length))


def test_a_value_at_the_threshold_is_not_recalled():
  assert measures.statistics(np.array([0.5, 0.5, 0.75, 1.0])).recall == 0.5


def test_a_data_set_is_the_mean_over_objects(recorded):
  got = measures.summarise_objects(recorded['all/J_per_object'], recorded['all/F_per_object'])
  assert list(got) == ['J&F', 'J_mean', 'J_recall', 'J_decay', 'F_mean', 'F_recall', 'F_decay']
  np.testing.assert_allclose(list(got.values()), recorded['all/global'], rtol=0, atol=1e-12)


def test_iou_of_classes_known_beforehand():
  truth = np.array([[0, 0, 1, 255], [1, 1, 2, 20]], np.uint8)
  predicted = np.array([[0, 1, 1, 3], [1, 0, 4, 3]], np.uint8)
  ious = measures.class_ious(measures.confusion_matrix(truth, predicted))
  # Class 2 is never found, 4 is never true, and 3 is found only where nothing counts.
  np.testing.assert_allclose(ious[:5], [1 / 3, 1 / 2, 0, np.nan, 0])
  assert np.isnan(ious[5:]).all()
