"""Batch statistics in groups, and the box that maps give."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dropmae_jax.tracking import head


def test_batch_statistics_are_those_of_groups():
  maps = np.random.default_rng(0).normal(3, 2, (6, 4, 4, 5)).astype(np.float32)
  running = {
    'running_mean': jnp.full(5, 2.0),
    'running_var': jnp.full(5, 3.0),
    'num_batches_tracked': jnp.asarray(7, jnp.int32),
  }
  norm = head.BatchNorm(5)
  normal, after = norm(jnp.asarray(maps), running, 3)
  groups = maps.astype(np.float64).reshape(2, -1, 5)
  for half, group in zip(np.split(np.asarray(normal), 2), groups, strict=True):
    expected = (group - group.mean(0)) / np.sqrt(group.var(0) + 1e-5)
    np.testing.assert_allclose(half.reshape(-1, 5), expected, atol=1e-5)
  mean, variance = groups.mean((0, 1)), groups.var(1, ddof=1).mean(0)
  np.testing.assert_allclose(after['running_mean'], 0.9 * 2 + 0.1 * mean, rtol=1e-6)
  np.testing.assert_allclose(after['running_var'], 0.9 * 3 + 0.1 * variance, rtol=1e-6)
  assert after['num_batches_tracked'] == 8
  normal, after = norm(jnp.asarray(maps), running, None)
  np.testing.assert_allclose(normal, (maps - 2) / np.sqrt(3 + 1e-5), rtol=1e-5, atol=1e-6)
  assert after is running


def test_the_box_is_that_of_the_best_cell_or_of_a_given_one():
  score = jnp.zeros((2, 4, 4)).at[0, 1, 2].set(0.9).at[1, 3, 0].set(0.9).at[1, 3, 1].set(0.9)
  size = jnp.broadcast_to(jnp.asarray([0.25, 0.5]), (2, 4, 4, 2))
  offset = jnp.broadcast_to(jnp.asarray([0.5, -0.5]), (2, 4, 4, 2))
  maps = head.Maps(score, size, offset)
  np.testing.assert_array_equal(head.best_cell(score), [6, 12])
  np.testing.assert_allclose(
    head.decode(maps), [[0.625, 0.125, 0.25, 0.5], [0.125, 0.625, 0.25, 0.5]]
  )
  given = head.decode(maps, jnp.asarray([0, 15]))
  np.testing.assert_allclose(given[:, :2], [[0.125, -0.125], [0.875, 0.625]])


def test_initial_weights_are_xavier_uniform():
  made = head.CentreHead(96, 64, dtype=jnp.float32, rngs=nnx.Rngs(params=0))
  for name, (inputs, outputs, side) in {
    'conv1_size': (96, 64, 3),
    'conv3_ctr': (32, 16, 3),
  }.items():
    kernel = getattr(made, name)[0].kernel[...]
    assert kernel.shape == (side, side, inputs, outputs)
    bound = (6 / (side**2 * (inputs + outputs))) ** 0.5
    assert float(jnp.abs(kernel).max()) == pytest.approx(bound, rel=1e-2)
    assert float(kernel.std()) == pytest.approx(bound / 3**0.5, rel=0.03)
