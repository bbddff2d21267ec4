"""Which implementation of attention is chosen, flash attention, and loops on many devices."""

import os
import types
import unittest.mock
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import equations, plain_attention, tokens

from dropmae_jax import sharding, train
from dropmae_jax.config import Config
from dropmae_jax.kernels import implementations
from dropmae_jax.kernels.gpu import asad_gpu
from dropmae_jax.kernels.tpu import asad_tpu
from dropmae_jax.model import asad, attention
from dropmae_jax.model.chunks import Loop
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


def mesh_of(platform, **features):
  """As much of a mesh of two devices of a kind as is asked about."""
  devices = [types.SimpleNamespace(platform=platform, **features)] * 2
  mesh = unittest.mock.Mock(spec=jax.sharding.Mesh, size=2, local_devices=devices)
  mesh.devices = np.array(devices)
  return mesh


SIZES = {'tokens_per_frame': 196, 'num_heads': 16, 'head_width': 32, 'dtype': 'bfloat16'}
HOPPER = mesh_of('gpu', compute_capability=asad_gpu.COMPUTE_CAPABILITY)
TPU = mesh_of('tpu')


def parts_of(chosen):
  return chosen.func, chosen.keywords


def test_every_kind_of_device_has_its_own_kernels_on_its_mesh():
  on_gpus = implementations.choose('fused', HOPPER, **SIZES)
  assert parts_of(on_gpus.dense) == (implementations.flash_attention, {'mesh': HOPPER})
  assert parts_of(on_gpus.dropout) == (asad_gpu.asad_attention, {'mesh': HOPPER})
  on_tpus = implementations.choose('fused', TPU, **SIZES)
  loop = Loop(implementations.ON_CHIP_LOGITS, TPU)
  assert parts_of(on_tpus.dense) == (attention.dense_attention, {'loop': loop})
  assert parts_of(on_tpus.dropout) == (asad_tpu.asad_attention, {'mesh': TPU})


@pytest.mark.parametrize(
  ('mesh', 'sizes', 'reason'),
  [
    (TPU, {'head_width': 48}, 'heads of width 48, which does not divide 128'),
    (HOPPER, {'dtype': 'float32'}, 'float32, but for bfloat16'),
    (mesh_of('gpu', compute_capability='8.0'), {}, 'GPUs of compute capability 8.0, but for 9.0'),
    (mesh_of('gpu'), {}, 'GPUs of compute capability unknown, but for 9.0'),
  ],
)
def test_sizes_without_a_kernel_are_named(mesh, sizes, reason):
  with pytest.raises(ValueError, match=f"attention='fused' has no kernel for {reason}; use att"):
    implementations.choose('fused', mesh, **SIZES | sizes)


def test_devices_of_a_cpu_share_its_caches():
  mesh = sharding.make_mesh(jax.devices()[:2])
  loop = implementations.choose('auto', mesh, **SIZES).dropout.keywords['loop']
  assert loop == Loop(implementations.logits_at_once('cpu', 2), mesh)


def test_a_rule_of_the_users_is_used_wherever_nothing_else_is_chosen(monkeypatch):
  def mine(keys, logits, *, drop_rate):
    return jnp.broadcast_to(~jnp.eye(16, dtype=bool), logits.own.shape)

  monkeypatch.setitem(asad.ATTENTION_DROPOUTS, 'mine', mine)
  arguments, keys = tokens(4), jax.random.split(jax.random.key(1), 2)
  expected = plain_attention(
    *arguments, np.broadcast_to(~np.eye(16, dtype=bool), (2, 2, 2, 16, 16))
  )
  mesh = sharding.make_mesh(jax.devices()[:1])
  for kind in ('auto', 'xla'):
    attend = implementations.choose(kind, mesh, **SIZES, rule='mine').dropout
    output = attend(*arguments, draw_keys=keys, drop_rate=0.1)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_a_rule_of_the_users_leaves_the_encoder_its_loop(monkeypatch):
  monkeypatch.setitem(asad.ATTENTION_DROPOUTS, 'mine', lambda *_, **__: None)
  choose = partial(implementations.choose, 'auto', sharding.make_mesh(jax.devices()[:1]), **SIZES)
  assert choose(rule='mine').dense.keywords == choose().dense.keywords


def test_kernels_are_refused_where_there_are_none():
  mesh = sharding.make_mesh(jax.devices()[:1])
  with pytest.raises(ValueError, match="attention='flash' is unknown; use one of auto, xla, fused"):
    implementations.choose('flash', mesh, **SIZES)
  with pytest.raises(ValueError, match="'fused' has no kernel for dropout_rule='mine'; use 'auto'"):
    implementations.choose('fused', mesh, **SIZES, rule='mine')
  size = architecture_of_size('XXS', image_size=32)
  config = Config(data_dir='', num_steps=1, batch_size=1, model=size, attention='fused')
  message = r"config: attention='fused' has no kernel for devices of the kind 'cpu'; use attention="
  with pytest.raises(UserError, match=message):
    train.build(config, mesh)
