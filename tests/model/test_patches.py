"""Patch vectors: round trip, statistics, and position tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropmae_jax.model import patches, position_embedding


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_unpatchify_undoes_patchify(grid, size, seed):
  side = grid * size
  frames = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 2, side, side, 3)))
  np.testing.assert_array_equal(patches.unpatchify(patches.patchify(frames, size), size), frames)


def test_tokens_go_row_by_row_with_colour_fastest():
  frames = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.float32).reshape(1, 2, 4, 4, 3)
  vectors = patches.patchify(frames, 2)
  np.testing.assert_array_equal(vectors[0, 1, :3], frames[0, 0, 0, 2])
  np.testing.assert_array_equal(vectors[0, 1, 6:9], frames[0, 0, 1, 2])
  np.testing.assert_array_equal(vectors[0, 4, :3], frames[0, 1, 0, 0])


def test_normalised_patches_use_the_unbiased_variance():
  vectors = np.random.default_rng(0).normal(3, 2, (2, 5, 48)).astype(np.float32)
  vectors[0, 0] = 1.5
  expected = (vectors - vectors.mean(-1, keepdims=True)) / np.sqrt(
    vectors.var(-1, keepdims=True, ddof=1) + 1e-6
  )
  ours = patches.normalise_patches(jnp.asarray(vectors))
  np.testing.assert_allclose(ours, expected, atol=1e-5)
  np.testing.assert_array_equal(ours[0, 0], 0)


def test_a_constant_zero_prediction_scores_as_the_method_says():
  vectors = jax.random.normal(jax.random.key(0), (4, 8, 768))
  score = jnp.square(patches.normalise_patches(vectors)).mean()
  assert float(score) == pytest.approx(767 / 768, abs=1e-5)


def test_first_half_of_a_position_is_its_column():
  table = position_embedding.sincos_table(4, 16)[0, 1:].reshape(4, 4, 16)
  assert (table[0, 2, :8] == table[3, 2, :8]).all()
  assert (table[2, 0, 8:] == table[2, 3, 8:]).all()
  assert not (table[0, 2, :8] == table[0, 1, :8]).all()
