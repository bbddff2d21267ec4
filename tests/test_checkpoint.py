"""What is kept, what is restored, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dropmae_jax import checkpoint, mae, optimizer, sharding
from dropmae_jax.checkpoint import CheckpointOptions, Checkpoints
from dropmae_jax.command_line import BadInput
from dropmae_jax.mae import Objective
from dropmae_jax.optimizer import OptimizerOptions
from dropmae_jax.train_step import TrainState, init_state

TINY = mae.architecture_of_size(
  'XXS', image_size=16, decoder_width=32, decoder_depth=1, decoder_num_heads=2
)
DESCRIPTION = checkpoint.describe(TINY, Objective(mask_ratio=0.5), steps_per_epoch=3)
TX = optimizer.adamw(lambda _: 1e-3, OptimizerOptions())


def state_at(step) -> TrainState:
  state = init_state(jax.random.key(step), architecture=TINY, tx=TX)
  return state.replace(step=jnp.int32(step))


def abstract_on(mesh):
  shapes = jax.eval_shape(lambda: state_at(0))
  return sharding.abstract_on(mesh, shapes)


@pytest.fixture
def saved(tmp_path):
  checkpoints = Checkpoints(
    tmp_path, CheckpointOptions(every_steps=2, keep_last=2, keep_every=4), DESCRIPTION
  )
  for step in range(2, 13, 2):
    assert checkpoints.is_due(step)
    checkpoints.save(step, state_at(step))
  checkpoints.close()
  return tmp_path


def test_the_last_few_and_every_kth_are_kept(saved):
  steps = sorted(int(p.name) for p in (saved / checkpoint.FOLDER).iterdir())
  assert steps == [4, 8, 10, 12]


@pytest.mark.parametrize(('devices', 'fsdp'), [(1, 1), (4, 1), (4, 2), (8, 8)])
def test_restore_is_bit_for_bit_on_any_mesh(saved, devices, fsdp):
  checkpoints = Checkpoints(saved, CheckpointOptions(), DESCRIPTION)
  mesh = sharding.make_mesh(jax.devices()[:devices], sharding.MeshOptions(fsdp=fsdp))
  restored = checkpoints.restore(abstract_on(mesh))
  checkpoints.close()
  expected = state_at(12)
  assert jax.tree.structure(restored) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(one, other)
    assert len(one.sharding.device_set) == devices


def test_weights_come_with_what_they_belong_to(saved):
  for folder in (saved, saved / checkpoint.FOLDER):
    weights = checkpoint.load_weights(folder)
    assert (weights.step, weights.architecture) == (12, TINY)
    assert weights.objective == Objective(mask_ratio=0.5)
    expected = state_at(12).params
    assert jax.tree.structure(weights.params) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(weights.params), jax.tree.leaves(expected), strict=True):
      np.testing.assert_array_equal(one, other)


def test_saving_a_step_twice_changes_nothing(saved):
  checkpoints = Checkpoints(saved, CheckpointOptions(keep_last=9), DESCRIPTION)
  checkpoints.save(12, state_at(1))
  checkpoints.close()
  weights = checkpoint.load_weights(saved)
  np.testing.assert_array_equal(weights.params['mask_token'], state_at(12).params['mask_token'])


def test_another_model_is_refused(saved):
  other = checkpoint.describe(mae.architecture_of_size('B'), Objective())
  checkpoints = Checkpoints(saved, CheckpointOptions(), other)
  with pytest.raises(BadInput, match=r'holds another model \(image_size is 16 there and 224 here'):
    checkpoints.restore(abstract_on(sharding.make_mesh()))
  checkpoints.close()


def test_weights_alone_are_read_but_not_trained_on(tmp_path):
  params = state_at(0).params
  checkpoint.save_weights(tmp_path / 'w', params, 7, DESCRIPTION)
  assert checkpoint.load_weights(tmp_path / 'w').step == 7
  with pytest.raises(BadInput, match='is not empty; give a new folder'):
    checkpoint.save_weights(tmp_path / 'w', params, 8, DESCRIPTION)
  checkpoints = Checkpoints(tmp_path / 'w', CheckpointOptions(), DESCRIPTION)
  with pytest.raises(BadInput, match='holds weights without optimizer state'):
    checkpoints.restore(abstract_on(sharding.make_mesh()))
  checkpoints.close()


def test_an_empty_folder_is_refused(tmp_path):
  for folder in (tmp_path, tmp_path / 'none'):
    with pytest.raises(BadInput, match='holds no checkpoint; give the --workdir'):
      checkpoint.load_weights(folder)
