"""The training step: the same on any number of devices, micro-batches and restarts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_python

from dropmae_jax import optimizer, sharding, train, train_step
from dropmae_jax.config import Config, MeshOptions, Objective, OptimizerOptions
from dropmae_jax.model import mae
from dropmae_jax.model.vit import architecture_of_size

TINY = architecture_of_size(
  'XXS', image_size=32, decoder_width=32, decoder_depth=2, decoder_num_heads=2
)
BATCH = 8


def batches(count, seed=0):
  rng = np.random.default_rng(seed)
  shape = (BATCH, 2, TINY.image_size, TINY.image_size, 3)
  return [rng.integers(0, 256, shape, np.uint8) for _ in range(count)]


# Programs are compiled once for all tests.
build = functools.cache(train.build)


class Trainer:
  """A jitted step on some devices, as train.py puts it together."""

  def __init__(self, *, devices=1, fsdp=1, accumulation_steps=1, dtype='float32', remat='none'):
    self.mesh = sharding.make_mesh(jax.devices()[:devices], MeshOptions(fsdp=fsdp))
    made = Config(
      data_dir='',
      num_steps=20,
      batch_size=BATCH,
      accumulation_steps=accumulation_steps,
      dtype=dtype,
      remat=remat,
      model=TINY,
      objective=Objective(attention_dropout=0.2),
      optimizer=OptimizerOptions(base_learning_rate=0.032, warmup_steps=2),
    )
    self.program = build(made, self.mesh)
    self.state = self.program.init(jax.random.key(0))
    self.key = jax.device_put(jax.random.key(1), sharding.replicated(self.mesh))

  def run(self, batches):
    losses = []
    for batch in batches:
      frames = sharding.to_devices(batch, self.mesh)
      self.state, metrics = self.program.step(self.state, frames, self.key)
      losses.append(float(metrics.loss))
    return losses


@pytest.fixture(scope='module')
def plain():
  trainer = Trainer()
  return trainer, trainer.run(batches(4))


def assert_same_state(first, second, *, rtol):
  for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert np.linalg.norm(one - other) <= rtol * np.linalg.norm(other)


@pytest.mark.parametrize(
  ('devices', 'fsdp', 'accumulation_steps', 'remat'),
  [
    pytest.param(8, 4, 1, 'none', marks=pytest.mark.slow),
    pytest.param(1, 1, 2, 'none', marks=pytest.mark.slow),
    (2, 2, 4, 'full'),  # Not 2 micro-batches, as in the recorded trace.
    pytest.param(8, 1, 1, 'none', marks=pytest.mark.slow),
    pytest.param(8, 8, 1, 'none', marks=pytest.mark.slow),
    pytest.param(1, 1, 1, 'full', marks=pytest.mark.slow),
    pytest.param(1, 1, 1, 'dots', marks=pytest.mark.slow),
  ],
)
def test_devices_micro_batches_and_remat_do_not_change_the_numbers(
  plain, devices, fsdp, accumulation_steps, remat
):
  trainer, losses = plain
  other = Trainer(devices=devices, fsdp=fsdp, accumulation_steps=accumulation_steps, remat=remat)
  np.testing.assert_allclose(other.run(batches(4)), losses, rtol=1e-5)
  weights, expected = other.state.params, trainer.state.params
  assert_same_state(weights['patch_embed'], expected['patch_embed'], rtol=1e-3)
  assert other.program.step._cache_size() == 1


def test_batches_are_really_split_over_the_devices():
  mesh = sharding.make_mesh(jax.devices()[:4])
  frames = sharding.to_devices(batches(1)[0], mesh)
  assert {shard.data.shape[0] for shard in frames.addressable_shards} == {BATCH // 4}
  assert len({shard.device for shard in frames.addressable_shards}) == 4


def test_micro_batches_are_of_the_samples_that_a_device_holds():
  """The numbers are the same in any order; but then devices would send frames to each other."""
  mesh = sharding.make_mesh(jax.devices()[:2])
  tx = optimizer.adamw(lambda _: 0.1, OptimizerOptions())
  params = {'scale': jnp.ones(3)}
  state = train_step.TrainState(jnp.int32(0), params, tx.init(params))
  update = functools.partial(
    train_step.update, loss_fn=lambda params, batch: (params['scale'] * batch).mean(), tx=tx,
    schedule=lambda _: 0.1, accumulation_steps=2,
  )  # fmt: skip
  places = (sharding.replicated(mesh), sharding.batch_sharding(mesh))
  step = jax.jit(update, in_shardings=places).lower(state, jnp.ones((BATCH, 3))).compile()
  assert set(re.findall(r'(all-\w+|collective-\w+)\(', step.as_text())) == {'all-reduce'}


def test_matrices_and_their_moments_are_really_split():
  trainer = Trainer(devices=2, fsdp=2, accumulation_steps=4, remat='full')
  trainer.run(batches(1))
  state = trainer.state
  adam = state.opt_state[0]
  for tree in (state.params, adam.mu, adam.nu):
    for path, leaf in jax.tree.leaves_with_path(tree):
      held = {shard.data.size for shard in leaf.addressable_shards}
      assert held == {leaf.size // (2 if leaf.ndim == 2 else 1)}, jax.tree_util.keystr(path)
  split = sum(leaf.size for leaf in jax.tree.leaves(state.params) if leaf.ndim == 2)
  assert split > 0.9 * mae.num_parameters(state.params)


def test_a_matrix_that_nothing_divides_stays_whole():
  mesh = sharding.make_mesh(jax.devices()[:4], MeshOptions(fsdp=4))
  places = sharding.state_sharding(
    mesh, [np.zeros(shape) for shape in [(6, 5), (6, 8), (8, 12), (8,), (4, 4, 4)]]
  )
  assert [tuple(place.spec) for place in places] == [(), (None, 'fsdp'), (None, 'fsdp'), (), ()]


@pytest.mark.parametrize('options', [MeshOptions(fsdp=3), MeshOptions(data=2, fsdp=2)])
def test_a_mesh_of_other_devices_is_refused(options):
  with pytest.raises(ValueError, match=r'do not share out the 8 devices that there are; mesh.fsdp'):
    sharding.make_mesh(options=options)


def test_one_compilation_and_the_old_state_is_given_up(plain):
  trainer, _ = plain
  old = trainer.state
  trainer.run(batches(1, seed=5))
  assert trainer.program.step._cache_size() == 1
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))


def test_training_learns_and_is_repeatable(plain):
  _, losses = plain
  assert Trainer().run(batches(4)) == losses
  same_batch = batches(1) * 15
  trained = Trainer().run(same_batch)
  assert trained[-1] < trained[0] - 0.05


def test_position_tables_stay_as_they_are(plain):
  trainer, _ = plain
  fresh = mae.init_params(jax.random.key(0), TINY)
  for name in optimizer.FIXED:
    np.testing.assert_array_equal(trainer.state.params[name], fresh[name])
  moved = trainer.state.params['temporal_pos_embed_x'] - fresh['temporal_pos_embed_x']
  assert float(jnp.abs(moved).max()) > 0


@pytest.mark.slow
def test_bfloat16_trains_close_to_float32(plain):
  _, losses = plain
  low = Trainer(dtype='bfloat16')
  np.testing.assert_allclose(low.run(batches(4)), losses, rtol=2e-2)
  assert {leaf.dtype for leaf in jax.tree.leaves(low.state.params)} == {jnp.dtype('float32')}


def test_keys_differ_between_steps_samples_and_streams():
  keys = [train_step.step_keys(jax.random.key(0), jnp.int32(step), 4) for step in range(3)]
  data = np.concatenate([jax.random.key_data(k) for step in keys for k in step])
  assert len({row.tobytes() for row in data}) == 3 * 3 * 4


def test_the_first_update_has_no_learning_rate(plain):
  trainer = Trainer()
  before = jax.tree.map(np.asarray, trainer.state.params)
  trainer.run(batches(1))
  assert_same_state(trainer.state.params, before, rtol=0)


@pytest.mark.parametrize(
  ('batch', 'accumulation', 'message'),
  [
    (6, 1, 'batch_size=6 is not divisible by 4 devices x accumulation_steps=1; .*batch_size=8'),
    (
      4,
      2,
      'batch_size=4 is not divisible by 4 devices x accumulation_steps=2; .*accumulation_steps=1',
    ),
  ],
)
def test_a_batch_that_does_not_divide_is_refused(batch, accumulation, message):
  mesh = sharding.make_mesh(jax.devices()[:4], MeshOptions(fsdp=2))
  with pytest.raises(ValueError, match=message):
    sharding.check_batch(batch, accumulation, mesh)
  sharding.check_batch(8, 2, mesh)


COMPILE = """
import os, pathlib, sys
del os.environ['JAX_COMPILATION_CACHE_DIR']
if sys.argv[3:]:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = sys.argv[3]
import jax, jax.numpy as jnp
jax.default_backend = lambda: sys.argv[2]
from dropmae_jax import train
train.enable_compilation_cache(pathlib.Path(sys.argv[1]))
jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3)).block_until_ready()
"""


@pytest.mark.parametrize(
  ('backend', 'elsewhere', 'is_kept'),
  [
    ('gpu', False, True),
    pytest.param('cpu', False, False, marks=pytest.mark.slow),
    pytest.param('tpu', True, False, marks=pytest.mark.slow),
  ],
)
def test_compiled_programs_are_kept_with_a_run(tmp_path, backend, elsewhere, is_kept):
  other = [tmp_path / 'other'] if elsewhere else []
  done = run_python('-c', COMPILE, tmp_path / 'run', backend, *other)
  assert done.returncode == 0, done.stderr
  assert any(tmp_path.glob('run/compiled/*')) == is_kept
  assert any(tmp_path.glob('other/*')) == elsewhere


def test_a_run_keeps_its_compiled_programs(monkeypatch, data_dir, tmp_path):
  kept = []
  monkeypatch.setattr(
    train, 'enable_compilation_cache', lambda workdir: kept.append(workdir) or 1 / 0
  )
  config = Config(data_dir=str(data_dir), num_steps=1, batch_size=BATCH, model=TINY)
  with pytest.raises(ZeroDivisionError):
    train.train(config, tmp_path / 'run', allow_changes=False)
  assert kept == [tmp_path / 'run']
