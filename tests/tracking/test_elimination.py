"""The schedule of keep rates, and both forms of removing tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_tracker import places_of

from dropmae_jax.tracking import elimination


@pytest.mark.parametrize(('recipe', 'decay_epochs'), [('got10k', 50), ('alldata', 80)])
def test_rates_and_counts_are_the_published_ones_in_every_epoch(golden, recipe, decay_epochs):
  recorded = golden('tracker/tracker_forward')
  rates = recorded[f'schedule/{recipe}_rate']
  for epoch, expected in enumerate(rates, start=1):
    rate = elimination.keep_rate(epoch, decay_epochs=decay_epochs)
    assert rate == pytest.approx(expected, abs=3e-16)
    for tokens in (256, 576):
      counts = recorded[f'schedule/{recipe}_count{tokens}'][epoch - 1]
      assert elimination.kept_counts(tokens, rate, 3) == tuple(counts)


@pytest.mark.parametrize(
  ('grid', 'expected'), [(7, (3, 3)), (8, (3, 3)), (12, (5, 5)), (14, (6, 6))]
)
def test_the_centre_of_the_template(grid, expected):
  assert divmod(elimination.centre_token(grid), grid) == expected


def test_both_forms_keep_the_best_of_those_that_are_left():
  # Of equal scores, the first.
  scores = jnp.asarray([[3.0, 1, 2, 0, 2, 5], [0.0, 0, 0, 0, 0, 0]])
  search = jnp.arange(12.0).reshape(2, 6, 1) + 1
  expected = [[[0, 2, 4, 5], [0, 1, 2, 3]], [[0, 5], [0, 1]]]
  everything = elimination.everything(2, 6)
  gathered, masked = (search, everything), (search, everything)
  for count, places in zip((4, 2), expected, strict=True):
    now = jnp.take_along_axis(scores, gathered[1].places, 1)
    gathered = elimination.eliminate(*gathered, now, count)
    masked = jax.jit(elimination.eliminate)(*masked, scores, count)
    assert places_of(gathered[1]) == places_of(masked[1]) == places
    assert gathered[0].shape == (2, count, 1)
  for form in (gathered, masked):
    grid = elimination.on_grid(*form, 6)
    np.testing.assert_array_equal(grid[..., 0], [[1, 0, 0, 0, 0, 6], [7, 8, 0, 0, 0, 0]])


def test_a_count_of_all_changes_nothing():
  search, everything = jnp.ones((1, 6, 2)), elimination.everything(1, 6)
  scores = jnp.arange(6.0)[None]
  assert elimination.eliminate(search, everything, scores, 6) == (search, everything)
  _, standing = elimination.eliminate(search, everything, scores, jnp.asarray(6))
  assert standing.present.all()


def test_scores_are_the_mean_softmax_over_the_heads_of_present_tokens():
  query, key = jnp.zeros((1, 2, 4)), jnp.zeros((1, 3, 2, 4))
  # One head attends to token 1 alone, the other to all alike; the scale is 1/2.
  query, key = query.at[0, 0, 0].set(2.0), key.at[0, 1, 0, 0].set(100.0)
  received = elimination.attention_received(query, key, None)
  np.testing.assert_allclose(received, [[1 / 6, 2 / 3, 1 / 6]], atol=1e-6)
  present = jnp.asarray([[True, False, True]])
  received = elimination.attention_received(query, key, present)
  np.testing.assert_allclose(received, [[1 / 2, 0, 1 / 2]], atol=1e-6)
