"""Scores of weights while they train."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dropmae_jax import sharding
from dropmae_jax.checkpoints.saved_weights import Weights
from dropmae_jax.config import Architecture, DataOptions, MeshOptions, Objective
from dropmae_jax.evaluation import scores
from dropmae_jax.model import mae, pixels
from dropmae_jax.runtime.errors import UserError

ARCHITECTURE = Architecture(
  image_size=16, patch_size=8, width=16, depth=1, num_heads=2,
  decoder_width=16, decoder_depth=1, decoder_num_heads=2,
)  # fmt: skip


class Colours:
  """Eight videos of one colour each; only the split `val` is there."""

  def __init__(self, data_dir, split):
    assert (data_dir, split) == ('colours', 'val')

  def __len__(self):
    return 8

  def num_frames(self, video):
    return 5

  def frame(self, video, number):
    return np.full((20, 30, 3), 30 * video, np.uint8)


def make_weights(params, dataset='its_colours:Colours'):
  config = {'data_dir': 'colours', 'dataset': dataset, 'data': dataclasses.asdict(DataOptions())}
  objective = Objective(attention_dropout=0.4, normalise_targets=False)
  return Weights(params, 7, ARCHITECTURE, objective, {'config': config})


@pytest.fixture
def zeros(monkeypatch):
  module = types.ModuleType('its_colours')
  module.Colours = Colours
  monkeypatch.setitem(sys.modules, 'its_colours', module)
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), mae.abstract_model(ARCHITECTURE)[1])


def test_the_held_out_loss_has_a_known_value(zeros):
  """A model that predicts zeros loses the mean square of the pixels of the split `val`."""
  colours = np.stack([np.full(3, 30 * video, np.uint8) for video in range(8)])
  expected = np.square(np.asarray(pixels.normalise(jnp.asarray(colours)))).mean()
  assert scores.held_out(make_weights(zeros))['loss'] == pytest.approx(expected, rel=1e-5)


def test_scores_that_fail_are_left_out(zeros, monkeypatch, caplog):
  monkeypatch.setitem(scores.SCORES, 'bug', lambda weights: {'x': 1 / 0})
  monkeypatch.setitem(scores.SCORES, 'mine', lambda weights: {'step': weights.step})
  weights = make_weights(zeros, dataset='kinetics_frames/none')
  assert scores.take(['held_out', 'bug', 'mine'], weights) == {'mine/step': 7.0}
  assert "there is no score 'held_out' of step 7: there is no dataset" in caplog.text
  assert "the score 'bug' has failed at step 7; training goes on" in caplog.text


def test_an_unknown_score_is_refused():
  assert scores.parse_names('held_out, ') == ['held_out']
  with pytest.raises(UserError, match=r"^config\.scores='heldout' is unknown; .*held_out"):
    scores.parse_names('held_out,heldout')


def test_they_get_whole_arrays():
  mesh = sharding.make_mesh(jax.devices()[:4], MeshOptions(fsdp=2))
  tree = {'a': np.arange(32.0).reshape(4, 8), 'b': np.arange(3.0)}
  on_devices = jax.device_put(tree, sharding.state_sharding(mesh, tree))
  assert not on_devices['a'].is_fully_replicated
  jax.tree.map(np.testing.assert_array_equal, sharding.gather(on_devices), tree)
