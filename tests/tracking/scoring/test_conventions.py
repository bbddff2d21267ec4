"""The scoring conventions against numbers recorded from the toolkits (tests/golden)."""

import pathlib

import numpy as np
import pytest

from dropmae_jax.tracking.scoring import conventions
from dropmae_jax.tracking.scoring.conventions import CONVENTIONS
from dropmae_jax.tracking.sequences.sequence import Sequence

# Recorded names of one number, by ours; recorded fractions are marked by a factor of 100.
OPE = {'success': 'success', 'success_rate': 'success_rate50', 'precision': 'precision'}
OSTRACK = {name: name.lower() for name in ('AUC', 'OP50', 'OP75', 'precision', 'norm_precision')}
RECORDED = {
  'got10k_lasot': ('got10k', 100, {**OPE, 'norm_precision': 'norm_precision'}),
  'got10k_otb': ('got10k', 100, OPE),
  'got10k': ('got10k-got10k', 100, {'AO': 'ao', 'SR0.50': 'sr50', 'SR0.75': 'sr75'}),
  'pytracking_otb': ('ostrack', 1, OSTRACK),
  'pytracking_lasot': ('ostrack-lasot', 1, OSTRACK),
  'pytracking_lasot_extension_subset': ('ostrack-lasot_ext', 1, OSTRACK),
  'pytracking_uav': ('ostrack-uav', 1, OSTRACK),
  'trackingnet': (
    'trackingnet', 1, {key: key for key in ('coverage', 'success', 'precision', 'norm_precision')}
  ),
}  # fmt: skip
# Recorded curves, by ours; those of data sets, then those of sequences.
CURVES = {'success': 'success_curve', 'precision': 'precision_curve',
          'norm_precision': 'norm_precision_curve'}  # fmt: skip
TOLERANCE = 1e-6


@pytest.fixture(scope='module')
def recorded(golden):
  return golden('tracker/tracker_scores')


def sequences_of(recorded):
  """The recorded sequences, and the predictions for each."""
  for name in recorded['names']:
    part = {key: recorded[f'{name}/{key}'] for key in ('gt', 'pred', 'cover', 'size_wh')}
    labels = [recorded[f'{name}/{key}'] for key in ('full_occlusion', 'out_of_view')]
    frames = tuple(f'{number}.jpg' for number in range(len(part['gt'])))
    sequence = Sequence(
      str(name),
      pathlib.Path('frames'),
      frames,
      part['gt'],
      in_view=(labels[0] == 0) & (labels[1] == 0),
      cover=part['cover'],
      size=tuple(part['size_wh'].tolist()),
    )
    yield sequence, part['pred']


def measured_of(recorded, name):
  convention = CONVENTIONS[name]
  each = [
    conventions.measure(convention, convention.errors(sequence, boxes))
    for sequence, boxes in sequences_of(recorded)
  ]
  return convention, each, conventions.combine(convention, each)


def test_every_convention_was_recorded():
  assert {name for name, _, _ in RECORDED.values()} == CONVENTIONS.keys()


@pytest.mark.parametrize('tag', RECORDED)
def test_numbers_are_as_recorded(recorded, tag):
  name, factor, names = RECORDED[tag]
  convention, _, total = measured_of(recorded, name)
  numbers = conventions.in_percent(convention.numbers, total)
  scalars = {key for key in recorded if key.startswith(f'{tag}/') and not recorded[key].shape}
  assert scalars == {f'{tag}/{theirs}' for theirs in names.values()}
  for ours, theirs in names.items():
    expected = factor * recorded[f'{tag}/{theirs}']
    assert numbers[ours] == pytest.approx(expected, rel=TOLERANCE), ours


@pytest.mark.parametrize('tag', RECORDED)
def test_curves_are_as_recorded(recorded, tag):
  name, factor, _ = RECORDED[tag]
  _, each, total = measured_of(recorded, name)
  names = {'success': 'curve'} if tag == 'got10k' else CURVES
  for curve, theirs in names.items():
    if f'{tag}/{theirs}' in recorded:
      expected = factor * recorded[f'{tag}/{theirs}']
      np.testing.assert_allclose(100 * total.curves[curve], expected, rtol=TOLERANCE)
    if f'{tag}/sequence_{theirs}' in recorded:
      expected = recorded[f'{tag}/sequence_{theirs}']
      np.testing.assert_allclose([m.curves[curve] for m in each], expected, rtol=TOLERANCE)


@pytest.mark.parametrize(
  ('key', 'number', 'factor'),
  [
    ('got10k/sequence_ao', 'AO', 100),
    ('got10k/sequence_sr50', 'SR0.50', 100),
    ('got10k_lasot/sequence_success', 'success', 100),
    ('got10k_otb/sequence_success', 'success', 100),
    *((f'{tag}/sequence_mean_overlap', 'mean_overlap', 100)
      for tag in RECORDED if tag.startswith('pytracking')),
    ('trackingnet/sequence', ('coverage', 'success', 'precision', 'norm_precision'), 1),
  ],
)  # fmt: skip
def test_numbers_of_sequences_are_as_recorded(recorded, key, number, factor):
  convention, each, _ = measured_of(recorded, RECORDED[key.partition('/')[0]][0])
  numbers = {**convention.numbers, **convention.sequence_numbers}
  found = [conventions.in_percent(numbers, measured) for measured in each]
  expected = factor * recorded[key]
  columns = number if isinstance(number, tuple) else (number,)
  for column, values in zip(columns, expected.reshape(len(found), -1).T, strict=True):
    np.testing.assert_allclose([row[column] for row in found], values, rtol=TOLERANCE)


def test_all_recorded_arrays_are_compared(recorded):
  """Every array is an input, or is compared above."""
  compared = {'got10k/curve', 'trackingnet/sequence', 'pytracking_thresholds', 'names'}
  for tag, (_, _, names) in RECORDED.items():
    compared |= {f'{tag}/{each}' for each in names.values()}
    compared |= {
      f'{tag}/{before}{each}' for each in CURVES.values() for before in ('', 'sequence_')
    }
    compared |= {f'{tag}/sequence_{each}' for each in ('ao', 'sr50', 'success', 'mean_overlap')}
  inputs = {f'{name}/{key}' for name in recorded['names'] for key in
            ('gt', 'pred', 'full_occlusion', 'out_of_view', 'cover', 'size_wh')}  # fmt: skip
  assert recorded.keys() <= compared | inputs
  thresholds = CONVENTIONS['ostrack'].curves['success'].thresholds
  np.testing.assert_allclose(thresholds, recorded['pytracking_thresholds'], atol=1e-7)


def sequence_of(truth):
  truth = np.array(truth, float)
  labels = {'in_view': np.ones(len(truth), bool), 'cover': np.full(len(truth), 8)}
  return Sequence('a', pathlib.Path('a'), ('0.jpg',) * len(truth), truth, size=(99, 99), **labels)


NOWHERE = [np.nan] * 4


@pytest.mark.parametrize('name', CONVENTIONS)
def test_frames_without_a_true_box(name):
  """Some data sets say so with NaN. One frame of two is found, besides the first one."""
  sequence = sequence_of([[5, 5, 9, 9], [6, 5, 9, 9], NOWHERE, [7, 5, 9, 9]])
  boxes = np.array([[5.0, 5, 9, 9], [6, 5, 9, 9], [6, 5, 9, 9], [80, 80, 9, 9]])
  measured = conventions.measure(CONVENTIONS[name], CONVENTIONS[name].errors(sequence, boxes))
  # The GOT-10k toolkit leaves such frames out, except in its own data set, which has none.
  found, counted = {'got10k': (2, 3), 'got10k-got10k': (1, 3)}.get(name, (2, 4))
  assert measured.curves['success'][5] == pytest.approx(found / counted)


def test_a_prediction_without_size_repeats_the_one_before():
  """But not where there is no true box: then that empty one is repeated."""
  errors_of = CONVENTIONS['ostrack'].errors
  truth, gone, lost = [5, 5, 9, 9], [5, 5, 0, 9], [0, 0, 9, 9]
  boxes = np.array([lost, gone, gone, truth, gone], float)
  for third, expected in ((truth, [1, 0, 0, 1, 1]), (NOWHERE, [1, 0, -1, 1, 1])):
    overlap = errors_of(sequence_of([truth, truth, third, truth, truth]), boxes)['overlap']
    np.testing.assert_array_equal(overlap > 0.9, np.array(expected) == 1)
  boxes = np.array([truth, truth, gone, gone], float)
  overlap = errors_of(sequence_of([truth, truth, NOWHERE, truth]), boxes)['overlap']
  np.testing.assert_array_equal(overlap, [1, 1, -1, 0])


def test_targets_below_a_pixel_count_as_one_in_the_got10k_toolkit():
  sequence = sequence_of([[5, 5, 9, 9], [5, 5, 0.5, 0.25]])
  boxes = np.array([[5, 5, 9, 9], [5.4, 5.3, 0.5, 0.25]])
  relative = CONVENTIONS['got10k'].errors(sequence, boxes)['relative']
  np.testing.assert_allclose(relative, [0, 0.5])
