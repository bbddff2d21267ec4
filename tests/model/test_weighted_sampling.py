"""Noise, ranks, and the search for the lowest ranks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropmae_jax.model import weighted_sampling

lowest = jax.jit(weighted_sampling.lowest, static_argnums=1)


@settings(max_examples=60, deadline=None)
@given(
  st.integers(0, 2**31),
  st.sampled_from([1, 2, 3, 11, 12, 23, 24]),
  st.sampled_from([1, 2, 4, 100, 2**16 - 1]),
)
def test_lowest_marks_exactly_that_many_with_ties_by_position(seed, count, distinct):
  rng = np.random.default_rng(seed)
  ranks = rng.integers(0, distinct, (2, 2, 1, 3, 4)).astype(np.uint16)
  from_end = rng.integers(0, 2, (2, 1, 1, 1, 1)).astype(bool)
  marks = np.asarray(lowest(ranks, count, from_end))
  for sample in range(2):
    flat = ranks[sample].ravel().astype(int)
    position = np.arange(24)[:: -1 if from_end[sample].item() else 1]
    expected = np.zeros(24, bool)
    expected[np.lexsort((position, flat))[:count]] = True
    np.testing.assert_array_equal(marks[sample].ravel(), expected)


@pytest.mark.parametrize('n', [16, 196, 256, 289])
def test_rows_of_any_length_are_counted(n):
  ranks = np.random.default_rng(n).integers(0, 2**16 - 1, (1, 2, 2, n, n)).astype(np.uint16)
  for count in (1, 2 * n, 2 * n * n):
    marks = np.asarray(lowest(ranks, count, np.zeros((1, 1, 2, 1, 1), bool)))
    for head in range(2):
      head_ranks = ranks[:, :, head]
      inside, outside = head_ranks[marks[:, :, head]], head_ranks[~marks[:, :, head]]
      assert len(inside) == count
      assert not len(outside) or inside.max() <= outside.min()


def test_the_search_is_the_same_in_a_loop_and_unrolled(monkeypatch):
  """CPUs use the loop; other devices have it unrolled."""
  ranks = jax.random.randint(jax.random.key(0), (2, 2, 3, 16, 16), 0, 300).astype(jnp.uint16)
  from_end = jax.random.bernoulli(jax.random.key(1), shape=(2, 1, 3, 1, 1))
  counts = (1, 100, 512)

  def marks():
    mark = partial(weighted_sampling.lowest, ranks, ties_from_end=from_end)
    return jax.jit(lambda: [mark(count) for count in counts])()

  in_loop = marks()

  def on_other_devices(*arguments, default, **others):
    del others
    return default(*arguments)

  monkeypatch.setattr(jax.lax, 'platform_dependent', on_other_devices)
  for count, expected, unrolled in zip(counts, in_loop, marks(), strict=True):
    assert (expected.sum(axis=(1, 3, 4)) == count).all()
    np.testing.assert_array_equal(unrolled, expected)


def test_ranks_have_the_order_of_scores_over_the_whole_range():
  scores = np.float32(2.0) ** np.linspace(-3.9, 59, 4001, dtype=np.float32)
  shape = (1, 1, 1, 1, -1)
  ranks = np.asarray(weighted_sampling.to_ranks(jnp.asarray(scores).reshape(shape)))
  assert (np.diff(ranks.ravel().astype(int)) > 0).all()
  outside = jnp.asarray([0.0, 1e-3, 1e30, 3e38, jnp.inf]).reshape(shape)
  never = weighted_sampling.NEVER
  ranks = np.asarray(weighted_sampling.to_ranks(outside)).ravel().tolist()
  assert ranks == [0, 0, never - 1, never - 1, never]


def test_noise_is_positive_for_all_bits():
  bits = jnp.array([0, 1, 2**31, 2**32 - 1], jnp.uint32)
  uniform = weighted_sampling.to_uniform(bits)
  assert ((uniform > 0) & (uniform < 1)).all()
  noise = -jnp.log(uniform)
  assert (noise > 0).all()
  ranks = weighted_sampling.to_ranks(noise.reshape(1, 1, 1, 1, -1)).ravel()
  assert ranks[-1] == 0
  assert (jnp.diff(ranks.astype(int)) <= 0).all()


def test_the_tie_break_direction_is_random_and_favours_no_end(monkeypatch):
  """With all pairs equal, a head drops all of one frame: the first pairs or the last ones."""
  seeds = weighted_sampling.head_seeds(jax.random.split(jax.random.key(0), 60), 4)
  from_end = np.asarray(seeds.ties_from_end)
  assert 0.4 < from_end.mean() < 0.6
  assert (from_end[:, :1] != from_end).any()  # It differs among the heads of a sample,
  assert (from_end[:1] != from_end).any(axis=0).all()  # and among samples.
  shape = (60, 2, 4, 3, 3)
  monkeypatch.setattr(weighted_sampling, 'exponential_noise', lambda *_: jnp.ones(shape))
  weights = jnp.broadcast_to(jnp.where(jnp.eye(3, dtype=bool), 0.0, 1.0), shape)
  drops = np.asarray(jax.jit(weighted_sampling.sample_drops, static_argnums=2)(seeds, weights, 6))
  np.testing.assert_array_equal(drops[:, 1].any(axis=(2, 3)), from_end)
  np.testing.assert_array_equal(drops[:, 0].any(axis=(2, 3)), ~from_end)
