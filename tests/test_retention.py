"""Which checkpoints are kept for their score, whatever happens to a run between them."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
from test_run_checkpoints import DESCRIPTION, description_of, flip_a_bit

from dropmae_jax import checkpoint, retention, sharding
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


@pytest.mark.parametrize('restarts', [False, True])
def test_every_reason_to_keep_counts(tmp_path, state, restarts):
  """No number of them is another's, and the last step is no multiple; nor is a stop at 14."""
  losses = {
    3: [3, 4, 5], 6: [2, 3, 4], 9: [8, 9, 10], 12: [4, 5, 6],
    14: [0.25, 0.75],  # A signal comes. Fewer losses than three are no luck, however low,
    15: [6.5],  # and count when it goes on: the mean of these three is 2.5.
    18: [7, 8, 9], 21: [6, 7, 8], 24: [0, 1, 2], 27: [8, 9, 8.5], 28: [0.5],
  }  # fmt: skip
  options = {'every_steps': 3, 'keep_last': 2, 'keep_every': 12, 'keep_best': 4}
  checkpoints = opened(tmp_path, **options)
  mesh = sharding.make_mesh(jax.devices()[:1])
  abstract = sharding.abstract_on(mesh, jax.eval_shape(lambda: state))
  for step, found in losses.items():
    assert checkpoints.is_due(step) == (step not in (14, 28))
    save = checkpoints.save if checkpoints.is_due(step) else checkpoints.finish
    save(step, state, losses=found, say=pytest.fail)
    if restarts:
      checkpoints.close()
      checkpoints = opened(tmp_path, **options)
      checkpoints.restore(abstract)
    if step in (14, 15):
      assert score_of(tmp_path, step) == {14: (0.5, 2), 15: (2.5, 3)}[step]
  checkpoints.close()
  # The two newest, the multiples of twelve, and the four of the lowest mean over three steps.
  assert steps_in(tmp_path) == sorted({27, 28} | {12, 24} | {24, 15, 6, 3})


def score_of(folder, step):
  path = folder / checkpoint.FOLDER / str(step)
  deadline = time.monotonic() + 30
  while not path.exists() and time.monotonic() < deadline:
    time.sleep(0.01)  # It is written in the background.
  told = description_of(path)[1]
  return told['score'], told['score_steps']


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


def test_a_mean_of_fewer_steps_than_its_own_config_has_is_no_score():
  described = {'score': 1.5, 'score_steps': 3, 'config': {'checkpoint': {'every_steps': 4}}}
  assert retention.score_in(described, 2) is None
  assert retention.score_in(described | {'score_steps': 4}, 5) == 1.5
  del described['config']
  assert retention.score_in(described, 3) == 1.5
  assert retention.score_in(described, 4) is None
