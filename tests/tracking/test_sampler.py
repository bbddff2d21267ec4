"""Drawn frames against the exact distribution, and that against what published code drew."""

import functools

import numpy as np
import pytest
import scipy.stats

from dropmae_jax.tracking import sampler

TAGS = ('20', '60', '300', '1000', 'holes', 'sparse')


@pytest.fixture(scope='module')
def recorded(golden):
  return golden('tracker/tracker_positions')


@functools.cache
def joint_distribution(visible):
  """[n, n] the probability of (template, search), summed over how often the gap has grown."""
  visible = np.array(visible, bool)
  place = np.arange(len(visible))
  is_template = visible & (place < len(visible) - 1)
  total, again, gap = np.zeros((len(visible),) * 2), 1.0, 200
  while again > 1e-12:
    later = place - place[:, None]
    choices = is_template[:, None] & visible & (later > 0) & (later < gap)
    num_choices = choices.sum(1, keepdims=True)
    total += again * choices / np.maximum(num_choices, 1) / is_template.sum()
    again *= (is_template & (num_choices[:, 0] == 0)).sum() / is_template.sum()
    gap += 5
  return total


def gaps_of(joint):
  return np.array([np.trace(joint, offset) for offset in range(len(joint))])


def assert_drawn_from(counts, probabilities):
  """A chi-square test; cells that are expected less than 5 times are put together."""
  counts, expected = np.ravel(counts), np.ravel(probabilities) * np.sum(counts)
  assert not counts[expected == 0].any()
  order = np.argsort(expected)[np.count_nonzero(expected == 0) :]
  counts, expected = counts[order], expected[order]
  group = np.where(expected < 5, np.cumsum(expected) // 5, np.arange(len(order)) + len(order))
  group = np.unique(group, return_inverse=True)[1]
  counts, expected = (np.bincount(group, each) for each in (counts, expected))
  assert expected.min() > 1
  statistic = ((counts - expected) ** 2 / expected).sum()
  assert scipy.stats.chi2.sf(statistic, len(counts) - 1) > 1e-4


@pytest.mark.parametrize('tag', TAGS)
def test_the_published_sampler_has_this_distribution(recorded, tag):
  of = {name.split('/')[1]: array for name, array in recorded.items() if f'sampler{tag}/' in name}
  joint = joint_distribution(tuple(of['visible'].tolist()))
  assert joint.sum() == pytest.approx(1)
  assert_drawn_from(of['template_count'], joint.sum(1))
  assert_drawn_from(of['search_count'], joint.sum(0))
  assert_drawn_from(of['gap_count'], gaps_of(joint))
  if tag == '20':
    assert_drawn_from(of['joint_count'], joint)


@pytest.mark.parametrize('tag', TAGS)
def test_ours_has_this_distribution(recorded, tag):
  visible = recorded[f'sampler{tag}/visible'].astype(bool)
  random = np.random.default_rng(0).random
  joint = joint_distribution(tuple(visible.tolist()))
  counts = np.zeros(joint.shape)
  for _ in range(5000):
    counts[sampler.draw_frames(random, visible)] += 1
  assert_drawn_from(counts, joint)
  assert_drawn_from(gaps_of(counts), gaps_of(joint))


def test_accepted_sequences(recorded):
  for length, num_visible, accepted in recorded['sequence_accepted'].tolist():
    assert sampler.sequence_accepted(np.arange(length) < num_visible) == accepted


@pytest.mark.parametrize('highest', [0.0, np.nextafter(1, 0)])
def test_the_ends_of_the_uniform_draw(highest):
  visible = np.array([0, 1, 0, 1, 1, 1], bool)
  assert sampler.draw_frames(lambda: highest, visible) == ((1, 3) if highest == 0 else (4, 5))
  expected = (0, 0) if highest == 0 else (2, 8)
  assert sampler.draw_sequence(lambda: highest, [3, 5, 9], [0.1, 0.2, 0.7]) == expected


def test_datasets_are_drawn_by_weight_and_sequences_uniformly():
  random = np.random.default_rng(0).random
  counts = np.zeros((2, 4))
  for _ in range(5000):
    counts[sampler.draw_sequence(random, [2, 4], [1, 3])] += 1
  assert_drawn_from(counts, np.array([[1 / 8, 1 / 8, 0, 0], [3 / 16] * 4]))


def test_the_gap_grows_by_5_until_a_frame_is_within_it():
  visible = np.isin(np.arange(400), [0, 300])
  draws = iter([0.2] * 1000)
  assert sampler.draw_frames(lambda: next(draws), visible) == (0, 300)
  # The gap is 200, 205, ..., 305, and a frame is as far away as the gap minus 1 at most.
  assert 1000 - len(list(draws)) == 2 * 22
