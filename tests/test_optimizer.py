"""The decay rule and the schedule."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from flax import traverse_util

from dropmae_jax import optimizer
from dropmae_jax.config import Config, OptimizerOptions
from dropmae_jax.model import mae
from dropmae_jax.model.vit import architecture_of_size


def test_decay_follows_the_published_groups():
  recorded = {
    row['name']: row for row in json.loads((GOLDEN / 'vit_b_state_dict.json').read_text())
  }
  _, params = mae.abstract_model(architecture_of_size('B'))
  decayed = traverse_util.flatten_dict(optimizer.is_decayed(params))
  assert sum(decayed.values()) == 88
  for path, decays in decayed.items():
    name = '.'.join(map(str, path)).replace('kernel', 'weight').replace('scale', 'weight')
    assert decays == bool(recorded[name]['weight_decay']), name
    assert (path[-1] not in optimizer.FIXED) == recorded[name]['trainable'], name


def test_fixed_tables_never_move_and_the_mask_token_decays():
  architecture = architecture_of_size(
    'XXS', image_size=16, decoder_width=32, decoder_depth=1, decoder_num_heads=2
  )
  _, shapes = mae.abstract_model(architecture)
  params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3), shapes)
  zero = jax.tree.map(jnp.zeros_like, shapes)
  tx = optimizer.adamw(lambda _: 0.1, OptimizerOptions(weight_decay=0.5))
  updates, _ = jax.jit(tx.update)(zero, jax.jit(tx.init)(params), params)
  for name in optimizer.FIXED:
    assert not updates[name].any()
  np.testing.assert_allclose(updates['mask_token'], -0.05 * params['mask_token'], rtol=1e-6)
  assert not updates['norm']['scale'].any()


@pytest.mark.parametrize(
  ('step', 'expected'), [(0, 0.0), (5, 0.5), (10, 1.0), (55, 0.55), (100, 0.1)]
)
def test_schedule(step, expected):
  schedule = optimizer.learning_rate(peak=1.0, floor=0.1, warmup_steps=10, num_steps=100)
  assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('num_steps', [1, 10])
def test_a_run_shorter_than_its_warm_up_just_warms_up(num_steps):
  schedule = optimizer.learning_rate(peak=1.0, floor=0.0, warmup_steps=10, num_steps=num_steps)
  for step in range(num_steps):
    assert float(schedule(step)) == pytest.approx(step / 10, abs=1e-6)


def test_learning_rate_scales_with_the_batch():
  made = Config(data_dir='', num_steps=10, batch_size=4096, model=architecture_of_size('B'))
  assert made.peak_learning_rate == pytest.approx(2.4e-3)
