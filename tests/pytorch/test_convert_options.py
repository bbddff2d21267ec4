"""Every number in a converted file is right, and every option changes something.

All numbers of the checkpoint differ from the defaults and from one another.
"""

import json
import math
import sys

import numpy as np
import pytest
from flax import traverse_util
from test_layouts import TINY as ARCHITECTURE
from test_layouts import random_state

from dropmae_jax import optimizer
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Objective
from dropmae_jax.model import position_embedding
from dropmae_jax.optimizer import Moments
from dropmae_jax.pytorch import layouts, trackers, weight_files
from dropmae_jax.pytorch import main as convert_to_torch
from dropmae_jax.runtime.errors import UserError

DESCRIPTION = saved_weights.describe(
  ARCHITECTURE,
  Objective(mask_ratio=0.6, attention_dropout=0.2, normalise_targets=False),
  frame_gap=7,
  steps_per_epoch=3,
  data_fingerprint='abc',
  seed_version=2,
  config={
    'batch_size': 96,
    'num_steps': 20,
    'optimizer': {
      'base_learning_rate': 0.01, 'min_learning_rate': 0.002, 'warmup_steps': 5,
      'weight_decay': 0.3, 'beta1': 0.8, 'beta2': 0.7,
    },
  },
)  # fmt: skip
# The optimizer may have counted other updates than the run, as after an import.
STEP, OTHER_STEP, COUNT = 8, 4, 6


@pytest.fixture(scope='module')
def trees():
  """Parameters of both steps, and both moments."""
  names = (STEP, OTHER_STEP, 'mean', 'square')
  return {
    name: layouts.from_torch(random_state(ARCHITECTURE, seed), ARCHITECTURE)
    for seed, name in enumerate(names)
  }


@pytest.fixture(scope='module')
def run(trees, tmp_path_factory):
  """A workdir with two checkpoints."""
  folder = tmp_path_factory.mktemp('convert')
  for step in (STEP, OTHER_STEP):
    moments = Moments(COUNT, trees['mean'], trees['square'])
    saved_weights.save_weights(folder / str(step), trees[step], step, DESCRIPTION, moments=moments)
  made = folder / str(STEP) / saved_weights.FOLDER / str(OTHER_STEP)
  (folder / str(OTHER_STEP) / saved_weights.FOLDER / str(OTHER_STEP)).rename(made)
  return folder / str(STEP)


@pytest.fixture
def convert(monkeypatch, capsys):
  """Runs the command line in this process; returns its output."""

  def convert(*arguments):
    monkeypatch.setattr(sys, 'argv', ['convert_to_torch.py', *map(str, arguments)])
    assert convert_to_torch.main() == 0
    return capsys.readouterr().out

  return convert


def tensors_by_hand(tree):
  """The state dict of a parameter tree, by the published names and layouts."""
  tensors = {}
  for (*path, leaf), array in traverse_util.flatten_dict(tree).items():
    name = '.'.join(map(str, (*path, {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf))))
    if name == 'patch_embed.proj.weight':
      # The kernel's rows run over row, column and colour of a patch; PyTorch has the colour first.
      array = np.einsum('ijcw->wcij', np.reshape(array, (8, 8, 3, 64)))
    tensors[name] = array.T if leaf == 'kernel' and array.ndim == 2 else array
  return tensors


def assert_same(actual, expected):
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(actual[name], array, err_msg=name)


# Of a base rate of 0.01 per 256 pairs, at 3 of the 15 steps after the warm-up.
LEARNING_RATE = 0.002 + (0.01 * 96 / 256 - 0.002) * (1 + math.cos(math.pi * 3 / 15)) / 2


def test_a_file_says_what_the_checkpoint_is(run, trees, tmp_path, convert):
  torch = pytest.importorskip('torch', reason='.pth files need PyTorch')
  path = tmp_path / 'out.pth'
  convert(f'--checkpoint={run}', f'--output={path}', '--with_optimizer', '--no-verify')
  content = torch.load(path, weights_only=True)
  assert list(content) == ['model', 'epoch', 'args', 'optimizer']
  # Two epochs of three steps are done; the last of them is number 1.
  assert content['epoch'] == 1
  args = json.loads(json.dumps(DESCRIPTION)) | {'step': STEP}
  assert json.loads(json.dumps(content['args'])) == args
  assert_same(content['model'], tensors_by_hand(trees[STEP]))

  plain = [name for name, tensor in content['model'].items() if tensor.ndim == 1]
  fixed = {*plain, 'pos_embed', 'decoder_pos_embed'}
  decayed = [name for name in content['model'] if name not in fixed]
  states, groups = content['optimizer']['state'], content['optimizer']['param_groups']
  for group, names, decay in zip(groups, (plain, decayed), (0.0, 0.3), strict=True):
    first = 0 if names is plain else len(plain)
    assert group == {
      'lr': pytest.approx(LEARNING_RATE, rel=1e-6), 'betas': (0.8, 0.7), 'eps': 1e-8,
      'weight_decay': decay, 'amsgrad': False, 'params': list(range(first, first + len(names))),
    }  # fmt: skip
  for moment, tree in (('exp_avg', 'mean'), ('exp_avg_sq', 'square')):
    moments = {name: states[i][moment] for i, name in enumerate([*plain, *decayed])}
    expected = {n: a for n, a in tensors_by_hand(trees[tree]).items() if n in moments}
    assert_same(moments, expected)
  assert {float(state['step']) for state in states.values()} == {COUNT}

  card = json.loads((tmp_path / 'out.pth.json').read_text())
  named = ('versions', 'sha256', 'file')
  assert {name: value for name, value in card.items() if name not in named} == {
    'layout': 'full', 'format': 'pth', 'step': STEP, 'epoch': 1, 'normalised_targets': False,
    'data_fingerprint': 'abc', 'args': args, 'largest_relative_difference': None,
  }  # fmt: skip


@pytest.mark.parametrize('with_optimizer', [True, False])
def test_a_file_that_is_read_in_is_the_same_checkpoint(
  run, trees, tmp_path, convert, with_optimizer
):
  pytest.importorskip('torch', reason='.pth files need PyTorch')
  path, back = tmp_path / 'out.pth', tmp_path / 'back'
  convert(f'--checkpoint={run}', f'--output={path}', '--with_optimizer', '--no-verify')
  more = ['--with_optimizer'] if with_optimizer else []
  convert(f'--from_torch={path}', f'--output={back}', '--no-verify', *more)
  weights = saved_weights.load_weights(back, with_moments=with_optimizer)
  assert weights.step == (COUNT if with_optimizer else STEP)
  assert (weights.architecture, weights.objective) == (
    ARCHITECTURE, Objective(**DESCRIPTION['objective']),
  )  # fmt: skip
  assert_same(*(traverse_util.flatten_dict(tree) for tree in (weights.params, trees[STEP])))
  described = dict(weights.description)
  groups = described.pop('optimizer_groups', None)
  assert described == json.loads(json.dumps(DESCRIPTION))
  if with_optimizer:
    assert [group['weight_decay'] for group in groups] == [0.0, 0.3]
    assert weights.moments.count == COUNT
    for moments, tree in ((weights.moments.mean, 'mean'), (weights.moments.square, 'square')):
      # The fixed tables have no moments.
      expected = traverse_util.flatten_dict(trees[tree])
      expected |= {(name,): 0 * expected[name,] for name in optimizer.FIXED}
      assert_same(traverse_util.flatten_dict(moments), expected)
  else:
    assert groups is None
    with pytest.raises(UserError, match='without optimizer state'):
      saved_weights.load_weights(back, with_moments=True)


# What each option changes, of the file that was written, its card, and what was said.
EXPORTS = [
  (['--step=4'], lambda file, card, out: (card['step'], ' of step 4, ' in out), (4, True)),
  (['--layout=timm'], lambda file, *_: file.tensors['pos_embed'].shape, (1, 16, 64)),
  (['--format=pth'], lambda file, card, _: (file.key, card['format']), ('model', 'pth')),
  (['--format=safetensors'], lambda file, card, _: (file.key, card['format']), ('', 'safetensors')),
  (['--with_optimizer', '--format=pth'], lambda file, *_: 'optimizer' in file.entries, True),
  (['--no-verify'], lambda file, card, out: 'not verified: --no-verify' in out, True),
  (['--image_size=48'], lambda file, *_: file.tensors['pos_embed'].shape, (1, 37, 64)),
]


def test_names_of_tensors_forge_no_line(tmp_path, convert):
  from safetensors.numpy import save_file

  path, name = tmp_path / 'out.safetensors', 'a\nb  2 2  float32  0\x1b[2J\u202e'
  save_file({name: np.ones(2, np.float32)}, path)
  head, row, total = convert(f'--list={path}').splitlines()
  assert row.startswith(r'a\nb  2 2  float32  0\u001b[2J\u202e')
  assert (head + row + total).isprintable()


def test_safetensors_hold_the_metadata_of_the_card(run, tmp_path, convert):
  path = tmp_path / 'out.safetensors'
  convert(f'--checkpoint={run}', f'--output={path}', '--layout=mae', '--no-verify')
  entries, card = (
    weight_files.read(path).entries,
    json.loads(path.with_name(f'{path.name}.json').read_text()),
  )
  for name in ('layout', 'epoch', 'args', 'versions'):
    assert entries[name] == card[name]


@pytest.mark.parametrize(
  ('name', 'warning'),
  [
    ('OSTrack_b.safetensors', 'Warning: trackers take a file with "OSTrack" in its name'),
    ('vit_DropTrack.safetensors', 'Warning: trackers take a file with "DropTrack" in its name'),
    ('HIPTrack_ARTrackV2.safetensors', 'take a file with "HIPTrack" or "ARTrack" in its name'),
    ('SOT.safetensors', 'Warning: trackers take a file with "SOT" in its name'),
    ('my_npz/out.safetensors', 'Warning: trackers take a path with "npz" in it'),
    ('OSTrack/tracking.safetensors', ''),
  ],
)
def test_names_that_trackers_misread_are_warned_of(run, tmp_path, convert, name, warning):
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  out = convert(f'--checkpoint={run}', f'--output={path}', '--no-verify')
  assert 'See docs/convert.md' in out
  assert warning in out
  assert out.count('Warning') == bool(warning)


def test_frame_identities_are_folded_into_a_file_that_trackers_read(run, trees, tmp_path, convert):
  torch = pytest.importorskip('torch', reason='.pth files need PyTorch')
  said = {}
  for name in ('OSTrack.pth', 'other.pth'):
    said[name] = convert(
      f'--checkpoint={run}', f'--output={tmp_path / name}', '--fold_identities=16,32'
    )
  assert 'Warning' not in said['OSTrack.pth']
  assert 'Warning: OSTrack and ARTrack read such a file only if' in said['other.pth']
  assert '\nverified: ' in f'\n{said["other.pth"]}'
  content = torch.load(tmp_path / 'OSTrack.pth', weights_only=True)
  assert list(content) == ['net']
  state = layouts.to_torch(trees[STEP], ARCHITECTURE)
  expected = trackers.fold_identities(layouts.in_layout(state, 'encoder'), (16, 32))
  assert_same(content['net'], expected)
  card = json.loads((tmp_path / 'OSTrack.pth.json').read_text())
  assert (card['layout'], card['fold_identities']) == ('encoder', [16, 32])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ('--fold_identities=20,32', '20 is not a multiple of the patch size 8; give the sizes'),
    ('--fold_identities=16,0', '--fold_identities=16,0: 0 is not a multiple of the patch size 8'),
    ('--fold_identities=16', "argument --fold_identities: '16' is not two sizes in pixels"),
    ('--fold_identities --layout=full', '--fold_identities goes with --layout=encoder and'),
    ('--fold_identities --format=safetensors', 'not with encoder and safetensors; leave it out'),
  ],
)
def test_identities_that_cannot_be_folded_are_one_sentence(
  run, tmp_path, convert, options, message
):
  pytest.importorskip('torch', reason='.pth files need PyTorch')
  path = tmp_path / 'out.weights'
  with pytest.raises(UserError) as refused:
    convert(f'--checkpoint={run}', f'--output={path}', *options.split())
  assert message in str(refused.value)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('options', 'of', 'expected'), EXPORTS)
def test_every_option_of_an_export_counts(run, trees, tmp_path, convert, options, of, expected):
  if '--format=pth' in options:
    pytest.importorskip('torch', reason='.pth files need PyTorch')
  # Where the format is given, the ending says nothing.
  path = tmp_path / ('out.weights' if 'format' in str(options) else 'out.safetensors')
  quick = [] if '--no-verify' in options else ['--no-verify']
  out = convert(f'--checkpoint={run}', f'--output={path}', *options, *quick)
  file, card = weight_files.read(path), json.loads((tmp_path / f'{path.name}.json').read_text())
  assert of(file, card, out) == expected
  values = tensors_by_hand(trees[card['step']])
  tables = {name: values.pop(name) for name in layouts.POSITION_TABLES}
  same = {name: array for name, array in file.tensors.items() if name in values}
  assert len(same) >= len(file.tensors) - 2
  assert_same(same, {name: values[name] for name in same})
  if '--image_size=48' in options:
    for name, table in tables.items():
      np.testing.assert_array_equal(file.tensors[name], position_embedding.resample_table(table, 6))
    assert card['args']['architecture']['image_size'] == 48


def tracker_layout(state):
  return {f'backbone.{name}': array for name, array in layouts.in_layout(state, 'encoder').items()}


def timm_with_class_slot(state):
  return layouts.in_layout(state, 'timm') | {'pos_embed': state['pos_embed']}


@pytest.mark.parametrize(
  ('layout', 'said'),
  [
    (tracker_layout, 'not verified: layout mine has no blocks.0.'),
    (timm_with_class_slot, '\nverified: '),
  ],
)
def test_a_layout_can_be_added(run, tmp_path, convert, monkeypatch, layout, said):
  pytest.importorskip('torch', reason='verifying needs PyTorch')
  monkeypatch.setitem(layouts.LAYOUTS, 'mine', layout)
  path, back = tmp_path / 'out.pth', tmp_path / 'back'
  out = convert(f'--checkpoint={run}', f'--output={path}', '--layout=mine')
  assert said in f'\n{out}'
  # Both can be read by the importer.
  convert(f'--from_torch={path}', f'--output={back}', '--model=XXS', '--no-verify')
  blocks = [saved_weights.load_weights(folder).params['blocks'] for folder in (run, back)]
  assert_same(*map(traverse_util.flatten_dict, blocks))


IMPORTS = [
  ([], lambda weights, out: ('verified: ' in out, weights.architecture), (True, ARCHITECTURE)),
  (['--model=XXS'], lambda weights, _: weights.architecture.decoder_num_heads, 16),
  (['--no-verify'], lambda _, out: 'not verified: --no-verify' in out, True),
]


@pytest.mark.parametrize(('options', 'of', 'expected'), IMPORTS)
def test_every_option_of_an_import_counts(run, trees, tmp_path, convert, options, of, expected):
  if not options:
    pytest.importorskip('torch', reason='verifying needs PyTorch')
  path, back = tmp_path / 'out.safetensors', tmp_path / 'back'
  convert(f'--checkpoint={run}', f'--output={path}', '--no-verify')
  quick = [] if not options or '--no-verify' in options else ['--no-verify']
  out = convert(f'--from_torch={path}', f'--output={back}', *options, *quick)
  weights = saved_weights.load_weights(back)
  assert of(weights, out) == expected
  np.testing.assert_array_equal(weights.params['norm']['scale'], trees[STEP]['norm']['scale'])


@pytest.mark.parametrize('job', ['checkpoint', 'from_torch'])
def test_verification_that_is_asked_for_is_not_left_out(run, tmp_path, convert, monkeypatch, job):
  """Without PyTorch, it is skipped only if the user did not ask for it."""
  path = tmp_path / 'out.safetensors'
  monkeypatch.setattr(weight_files, 'torch_fault', lambda: 'PyTorch is gone')
  assert 'not verified: PyTorch is gone' in convert(f'--checkpoint={run}', f'--output={path}')
  source = run if job == 'checkpoint' else path
  with pytest.raises(UserError, match='PyTorch is gone, so --verify cannot run the network'):
    convert(f'--{job}={source}', f'--output={tmp_path}/other.safetensors', '--verify')
