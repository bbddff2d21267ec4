"""The rule and its distribution, for the definition, the fast form, the kernels and every rule."""

import itertools
from functools import partial

import attention_cases
import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from dropmae_jax.model import asad, attention, fast_asad, weighted_sampling
from dropmae_jax.model.asad import Logits, num_dropped

RULES = pytest.mark.parametrize(
  'rule', asad.ATTENTION_DROPOUTS.values(), ids=asad.ATTENTION_DROPOUTS
)


@pytest.mark.parametrize(
  ('length', 'rate', 'expected'),
  [
    (392, 0.05, 3528),
    (392, 0.1, 7448),
    (392, 0.15, 11368),
    (392, 0.2, 15288),
    (392, 0.3, 22736),
    (512, 0.1, 12800),
    (32, 0.2, 96),
    (32, 0.4, 192),
    (202, 0.29, 28 * 202),
    (202, 0.57, 56 * 202),
    (392, 0.005, 0),
    (392, 0.0, 0),
  ],
)
def test_number_dropped_is_the_published_truncation(length, rate, expected):
  assert num_dropped(length // 2, rate) == expected


@RULES
@pytest.mark.parametrize('scale', [0.0, 20.0])
@pytest.mark.parametrize('rate', [0.1, 1.0])
def test_rules_drop_the_stated_number_and_never_the_diagonal(rule, scale, rate):
  query, key, _ = attention_cases.tokens(0, scale=scale)
  keys = jax.random.split(jax.random.key(1), 2)
  drop = jax.jit(partial(rule, drop_rate=rate))
  drops = np.asarray(drop(keys, attention_cases.scaled_logits(query, key)))
  np.testing.assert_array_equal(drops.sum(axis=(1, 3, 4)), num_dropped(16, rate))
  assert not np.einsum('bfmii->bfmi', drops).any()


@RULES
def test_rules_draw_the_same_however_the_batch_is_split(rule):
  query, key, _ = attention_cases.tokens(4, b=4)
  keys = jax.random.split(jax.random.key(1), 4)
  logits = attention_cases.scaled_logits(query, key)
  drop = jax.jit(partial(rule, drop_rate=0.3))
  whole = drop(keys, logits)
  parts = [
    drop(keys[part], Logits(*(each[part] for each in logits))) for part in (slice(1), slice(1, 4))
  ]
  np.testing.assert_array_equal(whole, np.concatenate(parts))
  assert (whole[0] != whole[1]).any()


@RULES
@pytest.mark.parametrize(('scale', 'rate', 'n'), [(1.5, 0.3, 16), (0.0, 1.0, 9)])
def test_rules_are_a_masked_softmax_without_gradient_through_the_draw(rule, scale, rate, n):
  arguments = attention_cases.tokens(8, n=n, scale=scale)
  keys = jax.random.split(jax.random.key(2), 2)
  drop = jax.jit(partial(rule, drop_rate=rate))
  drops = drop(keys, attention_cases.scaled_logits(*arguments[:2]))
  ours = partial(fast_asad.attention_with_rule, draw_keys=keys, drop_rate=rate, rule=rule)
  plain = partial(attention_cases.plain_attention, is_dropped=drops)
  attention_cases.assert_near(
    attention_cases.value_and_gradients(ours, arguments),
    attention_cases.value_and_gradients(plain, arguments),
    1e-6,
  )


@pytest.mark.parametrize('implementation', draws.IMPLEMENTATIONS)
def test_every_subset_has_its_exact_probability(implementation):
  """All 924 ways to drop 6 of 12 pairs, against successive draws without replacement."""
  n, count, drawn = 3, 6, 100_000
  logits = Logits(*jax.random.normal(jax.random.key(5), (2, 1, 2, 1, n, n)) * 1.5)
  weights = np.asarray(asad.sampling_weights(logits), np.float64).ravel()
  candidates = np.flatnonzero(weights)
  assert len(candidates) == 12
  w = weights[candidates]
  subsets = np.array(list(itertools.combinations(range(12), count)))
  inside = np.zeros((len(subsets), 12), bool)
  np.put_along_axis(inside, subsets, True, axis=1)

  def density(u):
    # By exponential waiting times: all of the subset end before -log(u) / (rate of the others).
    others = (w * ~inside).sum(axis=1, keepdims=True)
    return np.where(inside, 1 - u ** (w / others), 1.0).prod(axis=1)

  probability, _ = scipy.integrate.quad_vec(density, 0, 1, epsabs=1e-9)
  assert probability.sum() == pytest.approx(1)

  draw = jax.jit(partial(draws.drops, implementation, draws=drawn, drop_rate=0.5))
  drops = np.asarray(draw(jax.random.key(6), logits)).reshape(drawn, -1)[:, candidates]
  bits = 1 << np.arange(12)
  observed = np.bincount(drops @ bits, minlength=2**12)[inside @ bits]
  assert observed.sum() == drawn
  likely = probability * drawn >= 5
  observed = np.append(observed[likely], observed[~likely].sum())
  expected = np.append(probability[likely], probability[~likely].sum()) * drawn
  assert scipy.stats.chisquare(observed, expected * drawn / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize('level', [0.0, pytest.param(20.0, marks=pytest.mark.slow), 60.0])
def test_no_position_is_favoured_and_no_two_draws_are_correlated(level):
  """At full size: how often positions are dropped, and what draws have in common."""
  n, heads, samples, count = 196, 4, 6, 7448
  logits = Logits(*(jnp.full((1, 2, 1, n, n), number) for number in (level, 0.0)))
  weights = jnp.broadcast_to(fast_asad.sampling_weights(logits), (samples, 2, heads, n, n))
  sample = jax.jit(weighted_sampling.sample_drops, static_argnums=2)
  drops = []
  for block in range(4):
    keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.split(jax.random.key(4), 6), block)
    drops_of_block = np.asarray(sample(weighted_sampling.head_seeds(keys, heads), weights, count))
    drops.append(drops_of_block.transpose(0, 2, 1, 3, 4))
  drops = np.concatenate(drops).reshape(-1, 2, n, n)
  assert (drops.sum(axis=(1, 2, 3)) == count).all()
  share = count / (2 * n * (n - 1))
  deviation = np.sqrt(len(drops) * share * (1 - share))
  for axes, size in (((0, 2, 3), n * (n - 1)), ((0, 1, 3), 2 * (n - 1))):
    by_position = drops.sum(axis=axes)
    z = (by_position - by_position.mean()) / (deviation * np.sqrt(size))
    assert np.abs(z).max() < 5, axes
  flat = drops.reshape(len(drops), -1).astype(np.float32)
  common = flat @ flat.T
  expected, spread = count * share, np.sqrt(count * share * (1 - share) ** 2)
  z = (common[np.triu_indices(len(flat), 1)] - expected) / spread
  assert np.abs(z).max() < 5.5
  assert abs(z.mean()) < 0.2
  for shift in (1, n, n * n):  # The next column, row and frame.
    z = ((flat * np.roll(flat, shift, axis=1)).sum(axis=1) - expected) / spread
    assert abs(z.mean()) < 0.8, shift


def test_draws_of_heads_samples_and_blocks_differ():
  query, key, value = attention_cases.tokens(3, m=3)
  same = [jnp.broadcast_to(x[:1, :, :1], x.shape) for x in (query, key)]
  keys = jax.random.split(jax.random.key(0), 2)
  drops = draws.drops_of_xla(*same, draw_keys=keys, drop_rate=0.2)
  flat = np.asarray(drops).transpose(0, 2, 1, 3, 4).reshape(6, -1)
  assert len({row.tobytes() for row in flat}) == 6
  blocks = attention.decoder_attentions(
    keys,
    num_blocks=2,
    tokens_per_frame=16,
    drop_rate=0.2,
    implementations=attention.Implementations(),
  )
  first, second = (jax.jit(attend)(query, key, value) for attend in blocks)
  assert not np.allclose(first, second)


@pytest.mark.parametrize('rate', [0.0, 0.05])
def test_a_rate_that_drops_nothing_is_dense_attention(rate):
  arguments = attention_cases.tokens(5)
  (attend,) = attention.decoder_attentions(
    jax.random.split(jax.random.key(0), 2),
    num_blocks=1,
    tokens_per_frame=16,
    drop_rate=rate,
    implementations=attention.Implementations(),
  )
  nothing = jnp.zeros((2, 2, 2, 16, 16), bool)
  np.testing.assert_allclose(
    attend(*arguments), fast_asad.attention_with_drops(*arguments, is_dropped=nothing), atol=1e-6
  )
