"""AdamW's state against torch.optim.AdamW itself, in the published groups."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, torch
from test_layouts import PUBLISHED, TINY, random_state

from dropmae_jax import optimizer
from dropmae_jax.config import OptimizerOptions
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.pytorch import adamw_state, layouts
from dropmae_jax.pytorch.adamw_state import TorchAdamW
from dropmae_jax.runtime.errors import UserError

GROUPS = adamw_state.group_options(1e-2, OptimizerOptions())
TRAINED = [name for group in adamw_state.parameter_groups(TINY) for name in group]


def published_groups(state):
  """The parameter groups that timm 0.3.2 makes, from the state dict alone."""
  parameters = {
    name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in state.items()
  }
  plain, decayed = [], []
  for name, parameter in parameters.items():
    if name not in ('pos_embed', 'decoder_pos_embed'):
      is_plain = parameter.ndim == 1 or name.endswith('.bias')
      (plain if is_plain else decayed).append(parameter)
  groups = [{'params': plain, 'weight_decay': 0.0}, {'params': decayed, 'weight_decay': 0.05}]
  return parameters, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def torch_update(parameters, adamw, gradients):
  for name, parameter in parameters.items():
    parameter.grad = torch.from_numpy(gradients[name].copy())
  adamw.step()


@pytest.fixture(scope='module')
def runs():
  """Three updates with equal gradients in both libraries, and gradients for a fourth."""
  pytest.importorskip('torch', reason='PyTorch is not installed')
  state = random_state(TINY)
  fixed = {name: np.zeros_like(array) for name, array in state.items() if name not in TRAINED}
  gradients = [random_state(TINY, seed) | fixed for seed in range(1, 5)]
  parameters, adamw = published_groups(state)
  tx = optimizer.adamw(optax.constant_schedule(1e-2), OptimizerOptions())
  params = jax.tree.map(jnp.asarray, layouts.from_torch(state, TINY))
  opt_state = tx.init(params)

  @jax.jit
  def update(params, opt_state, gradients):
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  for each in gradients[:3]:
    torch_update(parameters, adamw, each)
    params, opt_state = update(params, opt_state, layouts.from_torch(each, TINY))
  return parameters, adamw, params, opt_state, update, gradients[3]


def exported(opt_state):
  moments = optimizer.moments_of(jax.tree.map(np.asarray, opt_state))
  return adamw_state.to_torch(TorchAdamW(moments, GROUPS), TINY)


def as_tensors(value):
  if isinstance(value, dict):
    return {key: as_tensors(each) for key, each in value.items()}
  return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def test_vit_b_has_the_published_ids():
  import json

  recorded = json.loads((GOLDEN / 'vit_b_state_dict.json').read_text())
  assert len(PUBLISHED) == len(recorded)
  plain, decayed = adamw_state.parameter_groups(architecture_of_size('B'))
  assert (len(plain), len(decayed)) == (167, 88)
  ids = {name: i for i, name in enumerate([*plain, *decayed])}
  for row in recorded:
    assert ids.get(row['name']) == row['optimizer_index'], row


def test_the_state_is_that_of_torch(runs):
  _, adamw, _, opt_state, _, _ = runs
  theirs, ours = adamw.state_dict(), exported(opt_state)
  assert list(ours['state']) == list(theirs['state']) == list(range(len(TRAINED)))
  for mine, other in zip(ours['param_groups'], theirs['param_groups'], strict=True):
    assert mine['params'] == other['params']
    assert {name: other[name] for name in mine} == mine
  for identity, state in theirs['state'].items():
    assert ours['state'][identity].keys() == state.keys()
    assert ours['state'][identity]['step'] == state['step'] == 3
    for name in ('exp_avg', 'exp_avg_sq'):
      np.testing.assert_allclose(ours['state'][identity][name], state[name], rtol=1e-5, atol=1e-7)


def test_torch_goes_on_from_our_state(runs):
  _, _, params, opt_state, update, gradients = runs
  parameters, adamw = published_groups(layouts.to_torch(params, TINY))
  adamw.load_state_dict(as_tensors(exported(opt_state)))
  torch_update(parameters, adamw, gradients)
  params, _ = update(params, opt_state, layouts.from_torch(gradients, TINY))
  for name, array in layouts.to_torch(params, TINY).items():
    np.testing.assert_allclose(array, parameters[name].detach(), rtol=1e-5, atol=1e-6, err_msg=name)


def test_we_go_on_from_the_state_of_torch(runs):
  parameters, adamw, _, _, update, gradients = runs
  parameters, adamw = copy.deepcopy((parameters, adamw))
  state = {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
  stored = adamw.state_dict()
  plain = {
    'param_groups': stored['param_groups'],
    'state': {i: {k: v.numpy() for k, v in s.items()} for i, s in stored['state'].items()},
  }
  read = adamw_state.from_torch(plain, TINY)
  assert read.moments.count == 3
  opt_state = jax.tree.map(jnp.asarray, optimizer.state_of(read.moments))
  params = jax.tree.map(jnp.asarray, layouts.from_torch(state, TINY))
  params, _ = update(params, opt_state, layouts.from_torch(gradients, TINY))
  torch_update(parameters, adamw, gradients)
  for name, array in layouts.to_torch(params, TINY).items():
    np.testing.assert_allclose(array, parameters[name].detach(), rtol=1e-5, atol=1e-6, err_msg=name)


def assert_same_state(first, second):
  assert first['param_groups'] == second['param_groups']
  assert list(first['state']) == list(second['state'])
  for identity, state in first['state'].items():
    for name, array in state.items():
      np.testing.assert_array_equal(array, second['state'][identity][name])


def test_round_trip_is_bit_identical(runs):
  first = exported(runs[3])
  second = adamw_state.to_torch(adamw_state.from_torch(first, TINY), TINY)
  assert_same_state(first, second)


@pytest.mark.parametrize(
  'size', ['XS', *(pytest.param(size, marks=pytest.mark.slow) for size in 'SB')]
)
def test_sizes_come_back_bit_for_bit(size):
  architecture = architecture_of_size(size)
  trees = [layouts.from_torch(random_state(architecture, seed), architecture) for seed in (1, 2)]
  first = adamw_state.to_torch(TorchAdamW(optimizer.Moments(9, *trees), GROUPS), architecture)
  second = adamw_state.to_torch(adamw_state.from_torch(first, architecture), architecture)
  assert_same_state(first, second)


@pytest.mark.parametrize('size', ['L', pytest.param('H', marks=pytest.mark.slow)])
def test_the_ids_of_large_sizes_come_back(size):
  """At the true depth but narrow, because two states of the true width do not fit in memory."""
  large = architecture_of_size(size)
  narrow = dataclasses.replace(large, width=16 * large.num_heads // 4, num_heads=4)
  narrow = dataclasses.replace(narrow, image_size=2 * large.patch_size, decoder_width=64)
  assert adamw_state.parameter_groups(narrow) == adamw_state.parameter_groups(large)
  trees = [layouts.from_torch(random_state(narrow, seed), narrow) for seed in (1, 2)]
  first = adamw_state.to_torch(TorchAdamW(optimizer.Moments(9, *trees), GROUPS), narrow)
  second = adamw_state.to_torch(adamw_state.from_torch(first, narrow), narrow)
  assert_same_state(first, second)


def planted(fault):
  """A complete state of zeros with one fault."""
  shapes = layouts.tensor_shapes(TINY)
  state = {
    i: {'step': np.float32(3)} | {k: np.zeros(shapes[name]) for k in adamw_state.MOMENTS}
    for i, name in enumerate(TRAINED)
  }
  sizes = [len(group) for group in adamw_state.parameter_groups(TINY)]
  listed = [list(range(sizes[0])), list(range(sizes[0], sum(sizes)))]
  groups = [{**GROUPS[i], 'params': listed[i]} for i in range(2)]
  fault(state, groups)
  return {'state': state, 'param_groups': groups}


def transpose(state, _):
  identity = TRAINED.index('decoder_embed.weight')
  state[identity]['exp_avg_sq'] = state[identity]['exp_avg_sq'].T


@pytest.mark.parametrize(
  ('fault', 'message'),
  [
    (transpose, 'but decoder_embed.weight is (32, 64)'),
    (lambda state, _: state.pop(0), 'KeyError: 0'),
    (lambda state, _: state[1].update(step=np.float32(4)), 'have had 3 to 4 updates'),
    (lambda _, groups: groups.reverse(), 'with ids in order'),
    (lambda _, groups: groups[1]['params'].append(groups[0]['params'].pop()), 'groups do not have'),
    (lambda _, groups: groups.pop(), 'is not that of AdamW for the'),
    (lambda state, _: state[0].pop('exp_avg'), 'is not that of AdamW for the'),
    (lambda state, _: [each.update(step=-1) for each in state.values()], 'had -1 to -1 updates'),
    (lambda state, _: state[0].update(step=np.inf), 'OverflowError'),
    (
      lambda state, _: state[0].update(exp_avg=np.ones(64, int)),
      'is int64 (1 such tensors in all)',
    ),
    (lambda _, groups: groups[0].pop('betas'), "KeyError: 'betas'"),
    (lambda _, groups: groups[0].update(lr=b'1'), 'the options of a group are not plain values'),
    (lambda _, groups: groups[1].update(other=b'1'), 'the options of a group are not plain values'),
  ],
)
def test_states_that_do_not_fit_are_refused(fault, message):
  adamw_state.from_torch(planted(lambda *_: None), TINY)
  with pytest.raises(UserError) as caught:
    adamw_state.from_torch(planted(fault), TINY)
  assert message in str(caught.value)
