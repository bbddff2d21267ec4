"""Which checkpoints are kept for their score, whatever happens to a run between them."""

import json

import jax
import jax.numpy as jnp
import pytest
from test_run_checkpoints import DESCRIPTION, description_of, flip_a_bit

from dropmae_jax import checkpoint, sharding
from dropmae_jax.config import CheckpointOptions
from dropmae_jax.run_checkpoints import Checkpoints
from dropmae_jax.train_step import TrainState

# The mean loss of the two steps before each checkpoint.
LOSSES = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 4.0, 12: 6.0}


@pytest.fixture(scope='module')
def state():
  """What is in it does not matter here."""
  return TrainState(jnp.int32(0), {'a': jnp.ones(2)}, {'b': jnp.ones(2)})


def opened(folder, **options):
  return Checkpoints(
    folder, CheckpointOptions(**{'every_steps': 2, 'keep_last': 1, 'keep_best': 2, **options}),
    DESCRIPTION,
  )  # fmt: skip


def save(checkpoints, state, steps, say=pytest.fail):
  for step in steps:
    losses = [LOSSES[step] - 0.5, LOSSES[step] + 0.5]
    checkpoints.save(step, state, losses=losses, say=say)


def steps_in(folder):
  return sorted(int(p.name) for p in (folder / checkpoint.FOLDER).iterdir() if p.name.isdecimal())


@pytest.mark.parametrize('restarts', [False, True])
def test_the_best_are_kept_beside_the_newest(tmp_path, state, restarts):
  """Scores outlive the process that has seen the losses."""
  kept = {4: [2, 4], 6: [4, 6], 8: [4, 8], 10: [4, 8, 10], 12: [4, 8, 12]}
  checkpoints = opened(tmp_path)
  for step in LOSSES:
    save(checkpoints, state, [step])
    if restarts or step == 12:
      checkpoints.close()
      assert steps_in(tmp_path) == kept.get(step, [2])
      checkpoints = opened(tmp_path)
      assert checkpoints.latest_step == step
  checkpoints.close()


def test_every_reason_to_keep_counts(tmp_path, state):
  checkpoints = opened(tmp_path, keep_last=2, keep_every=6, keep_best=1)
  save(checkpoints, state, LOSSES)
  checkpoints.close()
  assert steps_in(tmp_path) == [4, 6, 10, 12]


def test_scores_are_there_for_who_wants_them_later(tmp_path, state):
  checkpoints = opened(tmp_path, keep_last=4, keep_best=0)
  save(checkpoints, state, [2, 4, 6, 8])
  checkpoints.close()
  checkpoints = opened(tmp_path)
  save(checkpoints, state, [10])
  checkpoints.close()
  assert steps_in(tmp_path) == [4, 8, 10]


def forget(path):
  """As a checkpoint from before there were scores."""
  told = description_of(path)[1]
  del told['score'], told['score_steps']
  (path / 'description' / 'metadata').write_text(json.dumps(checkpoint.seal(told)))


def damage(path):
  flip_a_bit(path / 'description' / 'metadata')


def set_aside(path):
  path.rename(path.with_name(f'{path.name}.damaged'))


@pytest.mark.parametrize('deed', [forget, damage, set_aside])
def test_a_checkpoint_without_a_score_is_none_of_the_best(tmp_path, state, deed):
  checkpoints = opened(tmp_path, keep_last=9)
  save(checkpoints, state, [2, 4, 6, 8])
  checkpoints.close()
  deed(tmp_path / checkpoint.FOLDER / '4')
  checkpoints = opened(tmp_path)
  assert checkpoints.latest_step == 8
  save(checkpoints, state, [10])
  checkpoints.close()
  assert steps_in(tmp_path) == [6, 8, 10]


def test_few_steps_are_no_luck(tmp_path, state):
  """What a signal saves is the mean of fewer losses; the steps after it make up for them."""
  checkpoints = opened(tmp_path)
  save(checkpoints, state, [2, 4])
  checkpoints.save(5, state, losses=[0.25], say=pytest.fail)
  checkpoints.close()
  assert description_of(tmp_path / checkpoint.FOLDER / '5')[1]['score'] == 0.25
  checkpoints = opened(tmp_path)
  mesh = sharding.make_mesh(jax.devices()[:1])
  checkpoints.restore(sharding.abstract_on(mesh, jax.eval_shape(lambda: state)))
  checkpoints.save(6, state, losses=[1.0], say=pytest.fail)
  save(checkpoints, state, [8])
  checkpoints.close()
  assert steps_in(tmp_path) == [4, 6, 8]
  _, told = description_of(tmp_path / checkpoint.FOLDER / '6')
  assert (told['score'], told['score_steps']) == (0.625, 2)


def test_a_save_that_failed_is_none_of_the_best(tmp_path, state, monkeypatch):
  told = []
  checkpoints = opened(tmp_path)
  save(checkpoints, state, [2])
  real = checkpoints._manager.save

  def full(step, **_):
    raise OSError('no space left')

  monkeypatch.setattr(checkpoints._manager, 'save', full)
  save(checkpoints, state, [4], told.append)
  monkeypatch.setattr(checkpoints._manager, 'save', real)
  save(checkpoints, state, [6, 8, 10])
  checkpoints.close()
  assert steps_in(tmp_path) == [6, 8, 10]
  assert 'the checkpoint of step 4 could not be written (no space left)' in told[0]
