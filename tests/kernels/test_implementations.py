"""Which implementation of attention is chosen, flash attention, and loops on many devices."""

import os
from functools import partial

import jax
import numpy as np
import pytest
from attention_cases import equations, tokens

from dropmae_jax import sharding, train
from dropmae_jax.config import Config
from dropmae_jax.kernels import implementations
from dropmae_jax.model import attention
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.runtime.errors import UserError


@pytest.mark.parametrize('width', [12, 136])
def test_heads_that_flash_attention_does_not_support_go_without(width):
  arguments = tokens(4, e=width)
  mesh = sharding.make_mesh(jax.devices()[:1])
  np.testing.assert_array_equal(
    implementations.flash_attention(*arguments, mesh=mesh), attention.dense_attention(*arguments)
  )


def test_flash_attention_is_that_of_cudnn(monkeypatch):
  """There is no GPU here, so XLA's takes its place."""
  used, attend = [], jax.nn.dot_product_attention

  def record(*arguments, implementation):
    used.append(implementation)
    return attend(*arguments, implementation='xla')

  monkeypatch.setattr(jax.nn, 'dot_product_attention', record)
  arguments = tokens(4)
  mesh = sharding.make_mesh(jax.devices()[:2])
  output = implementations.flash_attention(*arguments, mesh=mesh)
  np.testing.assert_allclose(output, attention.dense_attention(*arguments), atol=2e-6)
  assert used == ['cudnn']


@pytest.mark.parametrize(
  ('kind', 'devices', 'is_sharded'), [('auto', 2, True), ('xla', 2, False), ('auto', 1, False)]
)
def test_every_device_loops_over_chunks_of_its_own(kind, devices, is_sharded):
  mesh = sharding.make_mesh(jax.devices()[:devices])
  sizes = {'tokens_per_frame': 16, 'num_heads': 2, 'head_width': 16, 'dtype': 'float32'}
  chosen = implementations.choose(kind, mesh, **sizes)
  drawn = {'draw_keys': jax.random.split(jax.random.key(1), 2), 'drop_rate': 0.3}
  for attend in (chosen.dense, partial(chosen.dropout, **drawn)):
    traced = jax.make_jaxpr(attend)(*tokens(4)).jaxpr
    assert ('shard_map' in {each.primitive.name for each in equations(traced)}) == is_sharded


def test_how_many_logits_are_computed_at_once():
  assert implementations.logits_at_once('gpu') is None
  assert implementations.logits_at_once('tpu') == 32 * 392**2
  assert implementations.logits_at_once('tpu', 8) == 32 * 392**2
  # Devices of a CPU share its cores.
  assert implementations.logits_at_once('cpu') == len(os.sched_getaffinity(0)) * 4 * 392**2
  assert implementations.logits_at_once('cpu', 4) == implementations.logits_at_once('cpu') // 4


def test_kernels_are_refused_where_there_are_none():
  mesh = sharding.make_mesh(jax.devices()[:1])
  sizes = {'tokens_per_frame': 196, 'num_heads': 16, 'head_width': 32, 'dtype': 'bfloat16'}
  with pytest.raises(ValueError, match="attention='flash' is unknown; use one of auto, xla, fused"):
    implementations.choose('flash', mesh, **sizes)
  with pytest.raises(ValueError, match="'fused' has no kernel for dropout_rule='mine'; use 'auto'"):
    implementations.choose('fused', mesh, **sizes, rule='mine')
  size = architecture_of_size('XXS', image_size=32)
  config = Config(data_dir='', num_steps=1, batch_size=1, model=size, attention='fused')
  message = r"config: attention='fused' has no kernel for devices of the kind 'cpu'; use attention="
  with pytest.raises(UserError, match=message):
    train.build(config, mesh)
