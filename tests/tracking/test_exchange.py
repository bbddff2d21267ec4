"""Trackers in and out of files: names and numbers, what published files hold, bad files."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import recorded_tracker as recorded
from conftest import GOLDEN, needs_torch, torch
from flax import traverse_util

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Objective
from dropmae_jax.model import mae, position_embedding
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.pytorch import layouts, weight_files
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking import exchange, model
from dropmae_jax.tracking.exchange import TrackerWeights

# Its number of heads is known by its width, as that of published files is.
SMALL = model.tracker_of_size('XXS', template_size=32, search_size=64, pretraining_size=32)
PRETRAINED = architecture_of_size(
  'XXS', image_size=32, decoder_width=32, decoder_depth=1, decoder_num_heads=2
)


@pytest.fixture(scope='module')
def state(golden):
  """The recorded state dict."""
  return recorded.with_prefix(golden('tracker/tracker_state'), 'state/')


@pytest.fixture(scope='module')
def tracker(state):
  """The recorded tracker."""
  a = recorded.ARCHITECTURE
  return TrackerWeights(*exchange.from_torch(state, a), a, [])


@pytest.fixture(scope='module')
def small():
  """The state dict of a new tracker."""
  return exchange.to_torch(
    model.init_params(jax.random.key(0), SMALL), model.init_statistics(SMALL), SMALL
  )


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """A workdir of pre-training."""
  folder = tmp_path_factory.mktemp('pretrained') / 'run'
  params = mae.init_params(jax.random.key(2), PRETRAINED)
  description = saved_weights.describe(PRETRAINED, Objective())
  saved_weights.save_weights(folder, params, 5, description)
  return folder


def assert_same_tensors(one, other):
  assert list(one) == list(other)
  for name, array in one.items():
    assert array.dtype == other[name].dtype, name
    np.testing.assert_array_equal(array, other[name], err_msg=name)


def assert_same_trackers(one, other):
  for part in ('params', 'statistics'):
    leaves, others = (traverse_util.flatten_dict(getattr(each, part)) for each in (one, other))
    assert leaves.keys() == others.keys()
    for path, leaf in leaves.items():
      np.testing.assert_array_equal(leaf, others[path], err_msg=str(path))


@pytest.mark.parametrize('size', [256, 384])
def test_names_and_shapes_are_the_published_ones(size):
  published = json.loads((GOLDEN / 'tracker' / 'tracker_state_dict.json').read_text())
  expected = published['256'] | (published['only_384'] if size == 384 else {})
  architecture = model.tracker_of_size('B', template_size=size // 2, search_size=size)
  ours = exchange.tensors(architecture)
  assert len(ours) == 244
  # In this order too, as optimizers of PyTorch count parameters by it.
  assert [each.name for each in ours] == list(expected)
  for each in ours:
    dtype = 'int64' if each.name.endswith('num_batches_tracked') else 'float32'
    assert [list(each.shape), dtype] == expected[each.name], each.name


def test_in_and_out_changes_no_bit(state, tracker):
  written = exchange.to_torch(tracker.params, tracker.statistics, tracker.architecture)
  assert_same_tensors(written, state)
  expected = recorded.of_name(state, recorded.SHAPES)
  jax.tree.map(np.testing.assert_array_equal, tracker.params, expected)


@needs_torch
def test_the_network_in_pytorch_gives_the_recorded_maps(golden, state):
  from dropmae_jax.tracking import reference

  forward = golden('tracker/tracker_forward')
  for sample in range(2):
    images = [forward[name][sample].transpose(1, 2, 0) for name in ('template', 'search')]
    maps = reference.maps(state, tuple(images), num_heads=3)
    for name, each in zip(('score', 'size', 'offset'), maps, strict=True):
      expected = forward[f'r100/{name}_map'][sample]
      np.testing.assert_allclose(each, expected, rtol=0, atol=8e-6, err_msg=name)


@needs_torch
@pytest.mark.parametrize('name', ['tracker.pth.tar', 'tracker.safetensors'])
def test_out_and_in_and_out_again(tracker, tmp_path, name):
  lines = list(exchange.write(tmp_path / name, tracker))
  assert lines[0].startswith('verified: maps in PyTorch and in JAX differ by')
  read = exchange.read(tmp_path / name)
  assert read.architecture == tracker.architecture
  assert_same_trackers(read, tracker)
  (tmp_path / 'again').mkdir()
  list(exchange.write(tmp_path / 'again' / name, read))
  first, second = (weight_files.read(path) for path in (tmp_path / name, tmp_path / 'again' / name))
  assert first.entries == second.entries
  assert_same_tensors(first.tensors, second.tensors)


@needs_torch
def test_what_the_published_programs_load(tracker, state, tmp_path):
  path = tmp_path / 'tracker.pth.tar'
  list(exchange.write(path, tracker))
  content = torch.load(path, weights_only=True)
  assert_same_tensors({name: each.numpy() for name, each in content['net'].items()}, state)
  assert content['tracker'] == {'num_heads': 3, 'elimination_blocks': (1, 2, 3)}


@needs_torch
def test_the_other_order_of_identities_is_written_in_the_published_one(tracker, tmp_path):
  a = dataclasses.replace(tracker.architecture, identity_order='xz')
  other = tracker._replace(architecture=a)
  path = tmp_path / 'tracker.pth'
  # Verified by a network that knows the published order only.
  list(exchange.write(path, other, verify=True))
  read = exchange.read(path)
  assert read.architecture.identity_order == 'zx'
  for one, two in (('x', 'z'), ('z', 'x')):
    ours, theirs = (each.params['backbone'] for each in (other, read))
    np.testing.assert_array_equal(
      ours[f'temporal_pos_embed_{one}'], theirs[f'temporal_pos_embed_{two}']
    )
  assert_same_trackers(
    other,
    TrackerWeights(
      *exchange.from_torch(exchange.to_torch(other.params, other.statistics, a), a), a, []
    ),
  )


@needs_torch
def test_folded_identities_give_the_same_maps_without_them(tracker, tmp_path):
  path = tmp_path / 'OSTrack.pth.tar'
  # Verified by a network without identities.
  list(exchange.write(path, tracker, fold=True, verify=True))
  assert not [name for name in weight_files.read(path).tensors if 'temporal' in name]
  read = exchange.read(path)
  assert any('frame identities' in line for line in read.report)
  images = tuple(np.random.default_rng(0).standard_normal((s, s, 3), np.float32) for s in (32, 64))
  for one, two in zip(*(exchange.jax_maps(each, images) for each in (tracker, read)), strict=True):
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


class Settings:
  """What published files hold beside the weights; loading it with pickle would make a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


@needs_torch
def test_a_published_file(small, tmp_path):
  trap = tmp_path / 'trap'
  tensors = {name: torch.from_numpy(each) for name, each in small.items()}
  content = {
    'epoch': 300,
    'actor_type': 'OSTrackActor',
    'net': tensors,
    'optimizer': {'state': {0: {'exp_avg': torch.zeros(3)}}, 'param_groups': [{'params': [0]}]},
    'stats': {'train': {'Loss/total': Settings(trap)}},
    'settings': Settings(trap),
  }
  path = tmp_path / 'OSTrack_ep0300.pth.tar'
  torch.save(content, path)
  read = exchange.read(path)
  assert not trap.exists()
  assert read.architecture == SMALL
  assert_same_tensors(exchange.to_torch(read.params, read.statistics, SMALL), small)
  report = '\n'.join(read.report)
  assert 'epoch 300' in report
  assert 'nothing of them is run' in report
  assert '2 attention heads' in report  # An assumption, so it is said.
  # As PyTorch's DistributedDataParallel names them.
  torch.save({'net': {f'module.{name}': each for name, each in tensors.items()}}, path)
  assert_same_trackers(exchange.read(path), read)


@needs_torch
def test_weights_that_do_not_reproduce_the_tracker_are_not_written(tracker, tmp_path, monkeypatch):
  from dropmae_jax.pytorch import reference

  gelu = reference.functional.gelu
  monkeypatch.setattr(reference.functional, 'gelu', lambda x: gelu(x, approximate='tanh'))
  with pytest.raises(UserError, match='maps in PyTorch and in JAX differ by'):
    list(exchange.write(tmp_path / 'tracker.pth', tracker))
  assert not list(tmp_path.iterdir())


def written(state, path, entries=None):
  weight_files.write(path, state, file_format='safetensors', entries=entries)
  return path


def without(name):
  return lambda state: {key: each for key, each in state.items() if key != name}


def with_value(name, change):
  return lambda state: state | {name: np.array(change(state[name]))}


NORM = 'box_head.conv1_ctr.1'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (without('backbone.norm.bias'), 'backbone.norm.bias is missing'),
    (without('backbone.cls_token'), 'backbone.cls_token is missing'),
    (without('box_head.conv1_ctr.0.weight'), 'give a file of a tracker with the centre head'),
    (without('backbone.temporal_pos_embed_x'), 'temporal_pos_embed_x is missing'),
    (lambda state: state | {'extra': np.zeros(3)}, 'extra is not part of this model'),
    (with_value('backbone.norm.bias', lambda x: x[:-1]), 'backbone.norm.bias is'),
    (with_value('backbone.pos_embed_z', lambda x: x[:, 1:]), 'pos_embed_z'),
    (with_value('backbone.norm.bias', lambda x: x + np.nan), 'not finite'),
    (with_value(f'{NORM}.running_var', lambda x: -x), 'negative variances'),
    (with_value(f'{NORM}.num_batches_tracked', lambda x: x + 0.5), 'and no count'),
    (with_value(f'{NORM}.num_batches_tracked', lambda x: x + 2**31), 'and no count'),
    (with_value('backbone.norm.bias', lambda x: x.astype(int)), 'weights must be'),
    (
      with_value('backbone.patch_embed.proj.weight', lambda x: np.zeros((60, 3, 8, 8))),
      'the size table has',
    ),
  ],
)
def test_a_file_that_is_no_tracker(small, tmp_path, change, message):
  path = written(change(small), tmp_path / 'bad.safetensors')
  with pytest.raises(UserError, match=message) as caught:
    exchange.read(path)
  assert str(path) in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'told',
  [
    {'num_heads': 3, 'elimination_blocks': [0, 1]},
    {'num_heads': '2', 'elimination_blocks': [0, 1]},
    {'num_heads': 2, 'elimination_blocks': [0, 9]},
    {'num_heads': 2, 'elimination_blocks': 1},
    {'num_heads': 2},
    {'num_heads': 2, 'elimination_blocks': [0, 1], 'depth': 2},
  ],
)
def test_a_file_that_says_what_cannot_be(small, tmp_path, told):
  path = written(small, tmp_path / 'bad.safetensors', {'tracker': told})
  with pytest.raises(UserError, match='fit no tracker'):
    exchange.read(path)


def test_half_precision_is_converted_and_said(small, tmp_path):
  half = {
    name: each.astype(np.float16) if each.dtype == np.float32 else each
    for name, each in small.items()
  }
  read = exchange.read(written(half, tmp_path / 'half.safetensors'))
  assert read.params['backbone']['norm']['scale'].dtype == np.float32
  assert any('of float16' in line for line in read.report)


def test_a_tracker_starts_from_a_run(pretrained):
  sizes = {'search_size': 64}
  started = exchange.start(jax.random.key(0), pretrained, **sizes)
  assert started.architecture == SMALL
  encoder = saved_weights.load_weights(pretrained).params
  ours = started.params['backbone']
  for name in ('blocks', 'norm', 'patch_embed', 'pos_embed', *layouts.FRAME_IDENTITIES):
    jax.tree.map(np.testing.assert_array_equal, ours[name], encoder[name])
  for name, grid in (('pos_embed_z', 4), ('pos_embed_x', 8)):
    expected = position_embedding.resample_table(np.asarray(encoder['pos_embed']), grid)[:, 1:]
    np.testing.assert_array_equal(ours[name], expected)
  head = model.init_params(jax.random.key(0), SMALL)['box_head']
  jax.tree.map(np.testing.assert_array_equal, started.params['box_head'], head)
  jax.tree.map(np.testing.assert_array_equal, started.statistics, model.init_statistics(SMALL))
  other = exchange.start(jax.random.key(0), pretrained, **sizes, identity_order='xz')
  assert other.architecture.identity_order == 'xz'
  np.testing.assert_array_equal(
    other.params['backbone']['temporal_pos_embed_x'], ours['temporal_pos_embed_x']
  )


def test_a_tracker_starts_from_a_file_with_a_class_token_and_another_decoder(pretrained, tmp_path):
  params = saved_weights.load_weights(pretrained).params
  of_run = layouts.in_layout(layouts.to_torch(params, PRETRAINED), 'mae')
  token = np.full((1, 1, 64), 0.5, np.float32)
  decoder = {'decoder_embed.weight': np.zeros((7, 64), np.float32)}
  entries = {'args': {'architecture': dataclasses.asdict(PRETRAINED)}}
  path = written(of_run | {'cls_token': token} | decoder, tmp_path / 'mae.safetensors', entries)
  sizes = {'search_size': 64}
  started = exchange.start(jax.random.key(0), path, **sizes)
  np.testing.assert_array_equal(started.params['backbone']['cls_token'], token)
  expected = exchange.start(jax.random.key(0), pretrained, **sizes)
  started.params['backbone']['cls_token'] = expected.params['backbone']['cls_token']
  assert_same_trackers(started, expected)


def test_a_start_that_cannot_be(pretrained):
  with pytest.raises(
    UserError, match='search_size=72 is not a multiple of 16, two patches; give for example 64'
  ):
    exchange.start(jax.random.key(0), pretrained, search_size=72)
