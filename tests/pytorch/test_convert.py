"""convert_to_torch.py as its users run it: export, import, and what can go wrong."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, needs_torch, run_python, torch, train_arguments
from test_layouts import random_state

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Architecture, Objective
from dropmae_jax.pytorch import convert, layouts, weight_files
from dropmae_jax.pytorch import main as convert_to_torch
from dropmae_jax.runtime.errors import UserError


@pytest.fixture
def command(run_here):
  """The command line; returns its status, output and errors."""

  def run(*arguments):
    done = run_here(convert_to_torch.main, *arguments)
    return done.returncode, done.stdout, done.stderr

  return run


def assert_same_weights(first, second, **steps):
  one, other = (
    saved_weights.load_weights(folder, step=steps.get(name))
    for folder, name in ((first, 'first'), (second, 'second'))
  )
  assert one.step == other.step
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
    np.testing.assert_array_equal(a, b)


def save(folder, architecture, seed=0, **description):
  """A checkpoint of random weights."""
  params = layouts.from_torch(random_state(architecture, seed), architecture)
  described = saved_weights.describe(architecture, Objective(), **description)
  saved_weights.save_weights(folder, params, 5, described)
  return folder


# As small as a model of 224 pixels and patch 16 gets.
SMALL = dataclasses.replace(
  Architecture(), width=64, num_heads=2, depth=2, decoder_width=32, decoder_depth=1
)


@needs_torch
def test_out_and_in_and_out_again(trained, tmp_path, command):
  path = tmp_path / 'dropmae.pth'
  status, out, err = command(f'--checkpoint={trained}', f'--output={path}')
  assert (status, err) == (0, '')
  assert 'verified: features in PyTorch and in JAX differ by' in out
  assert 'See docs/convert.md' in out
  content = torch.load(path, weights_only=True)
  assert list(content) == ['model', 'epoch', 'args']
  # 6 videos are one batch of 4: an epoch is a step, and the eighth is number 7.
  assert content['epoch'] == 7
  assert content['args']['objective']['mask_ratio'] == 0.75
  assert content['args']['config']['num_steps'] == 8
  assert command(f'--from_torch={path}', f'--output={tmp_path}/back')[0] == 0
  assert_same_weights(tmp_path / 'back', trained)
  again = tmp_path / 'again.pth'
  assert command(f'--checkpoint={tmp_path}/back', f'--output={again}')[0] == 0
  second = torch.load(again, weights_only=True)
  assert content['args'] == second['args']
  assert content['epoch'] == second['epoch']
  for name, tensor in content['model'].items():
    assert torch.equal(tensor, second['model'][name])


@needs_torch
def test_the_card_says_what_the_file_is(trained, data_dir, tmp_path, command):
  path = tmp_path / 'dropmae.pth'
  status, _, _ = command(f'--checkpoint={trained}', f'--output={path}', '--step=4')
  assert status == 0
  card = json.loads((tmp_path / 'dropmae.pth.json').read_text())
  assert card['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert (tmp_path / 'dropmae.pth.sha256').read_text() == f'{card["sha256"]}  dropmae.pth\n'
  report = next(data_dir.rglob('build_report.json'))
  expected = {
    'file': 'dropmae.pth', 'layout': 'full', 'format': 'pth', 'step': 4, 'epoch': 3,
    'normalised_targets': True,
    'data_fingerprint': json.loads(report.read_text())['fingerprint'],
  }  # fmt: skip
  assert {name: card[name] for name in expected} == expected
  assert 0 < card['largest_relative_difference'] < 2e-5
  assert card['args']['config']['batch_size'] == 4
  assert card['versions']['jax'] == jax.__version__
  assert card['versions']['torch'] == torch.__version__


@needs_torch
def test_training_goes_on_from_what_came_through_pytorch(trained, data_dir, tmp_path, command):
  path, back = tmp_path / 'four.pth', tmp_path / 'back'
  assert (
    command(f'--checkpoint={trained}', '--step=4', '--with_optimizer', f'--output={path}')[0] == 0
  )
  content = torch.load(path, weights_only=True)
  states, groups = content['optimizer']['state'], content['optimizer']['param_groups']
  assert [state['step'].item() for state in states.values()] == [4] * len(states)
  assert len({state['step'].data_ptr() for state in states.values()}) == len(states)
  assert [group['weight_decay'] for group in groups] == [0.0, 0.05]
  assert groups[0]['betas'] == (0.9, 0.95)
  status, out, _ = command(f'--from_torch={path}', '--with_optimizer', f'--output={back}')
  assert status == 0
  assert 'a checkpoint of step 4 with optimizer state' in out
  again = tmp_path / 'again.pth'
  assert command(f'--checkpoint={back}', '--with_optimizer', f'--output={again}')[0] == 0
  second = torch.load(again, weights_only=True)
  assert second['optimizer']['param_groups'] == groups
  assert list(second['optimizer']['state']) == list(states)
  for identity, state in states.items():
    for name, tensor in state.items():
      assert torch.equal(tensor, second['optimizer']['state'][identity][name])
  done = run_python(*train_arguments(data_dir, back, '--config.num_steps=8'))
  assert done.returncode == 0, done.stderr
  assert 'resuming after step 4 of 8' in done.stdout + done.stderr
  assert_same_weights(back, trained)


QUICK = {('timm', 'safetensors'), ('encoder', 'pth')}


@needs_torch
@pytest.mark.parametrize(
  ('layout', 'file_format'),
  [
    # Both formats and two of the other layouts; the whole one goes out and in above.
    pytest.param(
      layout,
      kind,
      marks=() if (layout, kind) in QUICK else pytest.mark.slow,
    )
    for layout in layouts.LAYOUTS
    for kind in weight_files.FORMATS
  ],
)
def test_every_layout_and_format_is_written_verified_and_read_in(
  tmp_path, command, layout, file_format
):
  source = save(tmp_path / 'source', SMALL, config={'batch_size': 4})
  path = tmp_path / f'out.{file_format}'
  status, out, err = command(f'--checkpoint={source}', f'--output={path}', f'--layout={layout}')
  assert (status, err) == (0, '')
  assert 'verified: ' in out
  shapes = layouts.tensor_shapes(SMALL, layout)
  assert f'{len(shapes)} tensors of step 5, layout {layout}' in out
  read = weight_files.read(path)
  assert read.key == ('' if file_format == 'safetensors' or layout == 'timm' else 'model')
  assert {name: array.shape for name, array in read.tensors.items()} == shapes
  if file_format == 'safetensors':
    assert read.entries['layout'] == layout
    assert read.entries['args']['config'] == {'batch_size': 4}
    assert read.entries['args']['objective']['normalise_targets'] is True
  elif layout != 'full':
    assert read.entries == {}
  status, out, _ = command(f'--from_torch={path}', f'--output={tmp_path}/back')
  assert status == 0
  assert ('initialised (seed 0)' in out) == (layout != 'full')
  back = saved_weights.load_weights(tmp_path / 'back')
  np.testing.assert_array_equal(
    back.params['blocks'][0]['attn']['qkv']['kernel'],
    saved_weights.load_weights(source).params['blocks'][0]['attn']['qkv']['kernel'],
  )
  if layout != 'full':
    out = command(f'--checkpoint={tmp_path}/back', f'--output={tmp_path}/again.pth')[1]
    assert 'of them were newly initialised' in out


@needs_torch
def test_published_files_keep_their_epoch_and_objective(tmp_path, command):
  tensors = {name: torch.from_numpy(array) for name, array in random_state(SMALL).items()}
  import argparse

  arguments = argparse.Namespace(mask_ratio=0.6, P=0.2, norm_pix_loss=False)
  torch.save({'model': tensors, 'epoch': 399, 'args': arguments}, tmp_path / 'in.pth')
  assert command(f'--from_torch={tmp_path}/in.pth', f'--output={tmp_path}/run')[0] == 0
  weights = saved_weights.load_weights(tmp_path / 'run')
  assert weights.objective.attention_dropout == 0.2
  assert weights.description['source'] == {'file': 'in.pth', 'fresh': []}
  assert command(f'--checkpoint={tmp_path}/run', f'--output={tmp_path}/out.pth')[0] == 0
  content = torch.load(tmp_path / 'out.pth', weights_only=True)
  assert content['epoch'] == 399
  for name, tensor in tensors.items():
    assert torch.equal(tensor, content['model'][name])


@needs_torch
def test_tables_of_another_grid_are_resampled_where_asked(tmp_path, command):
  tensors = {name: torch.from_numpy(array) for name, array in random_state(SMALL).items()}
  torch.save({'model': tensors}, tmp_path / 'in.pth')
  status, out, _ = command(
    f'--from_torch={tmp_path}/in.pth', f'--output={tmp_path}/run', '--image_size=256'
  )
  assert status == 0
  assert 'position tables: resampled from 224 to 256 pixels' in out
  weights = saved_weights.load_weights(tmp_path / 'run')
  assert weights.architecture == dataclasses.replace(SMALL, image_size=256)
  grid = tensors['pos_embed'][:, 1:].double().reshape(1, 14, 14, 64).permute(0, 3, 1, 2)
  expected = torch.nn.functional.interpolate(
    grid, size=(16, 16), mode='bicubic', align_corners=False
  )
  expected = expected.permute(0, 2, 3, 1).reshape(1, 256, 64)
  np.testing.assert_allclose(weights.params['pos_embed'][:, 1:], expected, atol=1e-6)
  np.testing.assert_array_equal(weights.params['pos_embed'][:, :1], tensors['pos_embed'][:, :1])

  arguments = (f'--checkpoint={tmp_path}/run', f'--output={tmp_path}/out.pth')
  status, _, err = command(*arguments)
  assert status == 2
  assert 'add --image_size=224 to resample it' in err
  status, out, _ = command(*arguments, '--image_size=224')
  assert status == 0
  assert 'position tables: for 224 pixels (trained at 256)' in out
  content = torch.load(tmp_path / 'out.pth', weights_only=True)
  assert content['model']['pos_embed'].shape == (1, 197, 64)


@needs_torch
def test_list_shows_every_tensor(trained, tmp_path, command):
  path = tmp_path / 'out.pth'
  command(f'--checkpoint={trained}', f'--output={path}')
  file_lines, folder_lines = (command(f'--list={each}')[1].splitlines() for each in (path, trained))
  weights = saved_weights.load_weights(trained)
  tensors = layouts.to_torch(weights.params, weights.architecture)
  assert file_lines[0].split() == ['name', 'shape', 'dtype', 'norm']
  assert file_lines[1 : 1 + len(tensors)] == folder_lines[1 : 1 + len(tensors)]
  for line, (name, array) in zip(file_lines[1:], tensors.items(), strict=False):
    assert line.split()[:-1] == [name, *map(str, array.shape), 'float32']
    assert float(line.split()[-1]) == pytest.approx(np.linalg.norm(array), rel=1e-5)
  values = sum(array.size for array in tensors.values())
  assert (
    file_lines[-2] == f"{len(tensors)} tensors under 'model', {values} values, {4 * values} bytes"
  )
  assert file_lines[-1] == 'other entries: epoch, args'
  first = command(f'--list={trained}', '--step=4')[1]
  assert first != '\n'.join(folder_lines) + '\n'


def test_compare_shows_the_largest_difference_per_tensor(trained, tmp_path, command):
  path = tmp_path / 'out.safetensors'
  command(f'--checkpoint={trained}', f'--output={path}')
  status, out, _ = command('--compare', trained, path)
  assert status == 0
  assert 'tensors are equal, 0 differ, 0 have no counterpart' in out.splitlines()[-1]
  changed = dict(weight_files.read(path).tensors)
  changed['norm.weight'] = changed['norm.weight'] * np.float32(1.5)
  del changed['norm.bias']
  changed['mask_token'] = changed['mask_token'][..., :3]
  changed['extra'] = changed['mask_token']
  other = tmp_path / 'other.safetensors'
  weight_files.write(other, changed, file_format='safetensors')
  status, out, _ = command('--compare', path, other)
  assert status == 1
  width = weight_files.read(path).tensors['mask_token'].shape
  assert out.splitlines() == [
    f'mask_token: {width} in {path}, (1, 1, 3) in {other}',
    f'norm.bias: only in {path}',
    f'extra: only in {other}',
    'norm.weight: 0.5',
    f'{len(changed) - 3} tensors are equal, 1 differ, 3 have no counterpart of the same shape',
  ]


def test_without_torch_a_file_is_not_verified_and_says_so(tmp_path, monkeypatch, command):
  source = save(tmp_path / 'source', SMALL)
  monkeypatch.setitem(sys.modules, 'torch', None)
  arguments = (f'--checkpoint={source}', f'--output={tmp_path}/out.safetensors')
  status, out, _ = command(*arguments)
  assert status == 0
  assert 'not verified: PyTorch is not installed' in out
  card = json.loads((tmp_path / 'out.safetensors.json').read_text())
  assert card['largest_relative_difference'] is None
  status, _, err = command(*arguments, '--verify')
  assert status == 2
  assert 'PyTorch is not installed, so --verify cannot run the network' in err
  status, _, err = command(f'--checkpoint={source}', f'--output={tmp_path}/out.pth')
  assert (status, err.count('\n')) == (2, 1)
  assert "run: pip install 'dropmae_jax[torch]', or use .safetensors" in err
  assert not (tmp_path / 'out.pth').exists()


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """Files and folders that the command must refuse."""
  pytest.importorskip('torch', reason='PyTorch is not installed')
  folder = tmp_path_factory.mktemp('inputs')
  save(folder / 'run', SMALL)
  torch.save({'model': {}, 'args': sys.exit}, folder / 'code.pth')
  state = random_state(SMALL)
  weight_files.write(folder / 'good.pth', state, file_format='pth')
  whole = (folder / 'good.pth').read_bytes()
  (folder / 'short.pth').write_bytes(whole[: len(whole) // 2])
  broken = state | {'norm.bias': np.full(64, np.nan, np.float32)}
  weight_files.write(folder / 'nan.pth', broken, file_format='pth')
  odd = random_state(dataclasses.replace(SMALL, width=72, num_heads=2))
  weight_files.write(folder / 'odd.pth', odd, file_format='pth')
  (folder / 'empty').mkdir()
  (folder / 'taken.json').mkdir()
  for name, value in (('step', -3), ('config', np.ones(2)), ('data_fingerprint', b'abc')):
    args = {'architecture': dataclasses.asdict(SMALL), name: value}
    weight_files.write(folder / f'{name}.pth', state, file_format='pth', entries={'args': args})
  args = {'mask_ratio': 0.0}
  weight_files.write(folder / 'aim.pth', state, file_format='pth', entries={'args': args})
  whole = state | {'norm.bias': np.ones(64, np.int64)}
  weight_files.write(folder / 'whole.pth', whole, file_format='pth')
  (folder / 'page.pth').write_text('<html></html>')
  (folder / 'old.pth').write_bytes(b'old')
  (folder / 'private.pth.json').write_text('{}')
  save(folder / 'damaged', SMALL)
  for file in (folder / 'damaged' / 'checkpoints' / '5' / 'params').rglob('*'):
    if file.is_file():
      file.write_bytes(b'')
  return folder


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('--checkpoint={in}/empty --output={in}/old.pth', 'holds no checkpoint'),
    ('--checkpoint={in}/run --output={in}/old.pth --step=3', 'has no step 3; it has 5.'),
    ('--checkpoint={in}/damaged --output={in}/old.pth', 'it is the only one; give another run.'),
    ('--checkpoint={in}/run/checkpoints/5 --output={in}/old.pth --step=4', 'no step 4; it has 5.'),
    ('--checkpoint={in}/run --output=', 'argument --output: it is empty'),
    ('--checkpoint={in}/run --output=.', 'does not name a file; give the path of one'),
    ('--checkpoint={in}/run --output=/', 'does not name a file; give the path of one'),
    ('--checkpoint={in}/run --output={in}/{long}', 'cannot be written (File name too long)'),
    ('--checkpoint={in}/{long} --output={in}/old.pth', 'cannot be read (File name too long)'),
    ('--checkpoint={in}/run --output=/dev/null', 'null is not a regular file'),
    ('--checkpoint={in}/run --output={in}/private.pth', 'is not the card of a weight file'),
    ('--checkpoint={in}/run --output={in}/none/o.pth', 'does not exist; make it first'),
    ('--checkpoint={in}/run --output={in}/empty', 'is a folder; give the name'),
    ('--checkpoint={in}/run --output={in}/old.pth --layout=onnx', "invalid choice: 'onnx'"),
    ('--checkpoint={in}/run --output={in}/old.pth --format=safetensors', 'do not go together'),
    ('--checkpoint={in}/run --output={in}/old.pth --with_optimizer', 'without optimizer state'),
    ('--checkpoint={in}/run --output={in}/old.pth --with_optimizer --layout=mae', 'goes with'),
    ('--checkpoint={in}/run --output={in}/old.pth --model=B', '--model does not go with'),
    ('--checkpoint={in}/run --output={in}/old.pth --image_size=230', 'not a multiple of patch'),
    ('--checkpoint={in}/run', '--checkpoint needs --output'),
    ('--from_torch={in}/none.pth --output={in}/new', 'is not a file'),
    ('--from_torch={in}/short.pth --output={in}/new', 'is truncated or damaged'),
    ('--from_torch={in}/page.pth --output={in}/new', 'is a web page and not weights'),
    ('--from_torch={in}/whole.pth --output={in}/new', 'norm.bias is int64 (1 such tensors in all)'),
    ('--from_torch={in}/{long} --output={in}/new', 'cannot be read (File name too long)'),
    ('--from_torch={in}/good.pth --output={in}/{long}', 'cannot be written (File name too long)'),
    ('--from_torch= --output={in}/new', 'argument --from_torch: it is empty'),
    ('--from_torch={in}/code.pth --output={in}/new', "holds nothing under 'model'"),
    ('--from_torch={in}/nan.pth --output={in}/new', 'not finite, in 1 tensors: norm.bias'),
    ('--from_torch={in}/odd.pth --output={in}/new', 'no row of the size table has width 72'),
    ('--from_torch={in}/good.pth --output={in}/new --model=B', '; temporal_pos_embed_x is (1, 1'),
    ('--from_torch={in}/good.pth --output={in}/new --with_optimizer', 'holds no optimizer state'),
    ('--from_torch={in}/good.pth --output={in}/run', 'is not empty; give a new folder'),
    ('--from_torch={in}/good.pth --output={in}/new --step=3', '--step does not go with'),
    ('--from_torch={in}/good.pth --output={in}/old.pth/new', 'cannot be written (Not a directory)'),
    ('--from_torch={in}/step.pth --output={in}/new', 'step=-3, which is not an integer from 0'),
    ('--from_torch={in}/config.pth --output={in}/new', 'which is not a dict of plain values'),
    ('--from_torch={in}/data_fingerprint.pth --output={in}/new', "=b'abc', which is not a string"),
    ('--from_torch={in}/aim.pth --output={in}/new', 'the file says mask_ratio=0.0 is out of range'),
    ('--checkpoint={in}/run --output={in}/taken', 'taken.json is a folder'),
    ('--list={in}/good.pth --step=3', '--step=3 is for checkpoints'),
    ('--list={in}/none', 'is not a file'),
    ('--list={in}/{long}', 'cannot be read (File name too long)'),
    ('--list={in}/empty', 'empty holds no checkpoint'),
    ('--compare {in}/run', 'expected 2 arguments'),
    ('', 'one of the arguments --checkpoint --from_torch --list --compare is required'),
  ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(inputs, command, arguments, message):
  def contents():
    return {p: p.is_file() and p.read_bytes() for p in inputs.rglob('*')}

  before = contents()
  arguments = arguments.replace('{in}', str(inputs)).replace('{long}', 'n' * 300)
  status, _, err = command(*arguments.split())
  assert status == 2
  assert message in err
  assert err.startswith('error: ')
  assert err.count('\n') == 1
  assert contents() == before


WITHOUT_PERMISSION = """
import sys
from dropmae_jax.pytorch import main as convert_to_torch
from dropmae_jax.runtime import cli

for job in sys.argv[1].split(';'):
  sys.argv[1:] = job.split()
  try:
    cli.run(convert_to_torch.main)
  except SystemExit as ended:
    print(ended.code)
"""


def test_folders_that_may_not_be_entered_are_refused(inputs, tmp_path):
  """Root may enter every folder, so it drops this capability first."""
  shut, fixed = tmp_path / 'shut', tmp_path / 'fixed'
  shut.mkdir(mode=0)
  fixed.mkdir(mode=0o500)
  run, good = f'--checkpoint={inputs}/run', f'--from_torch={inputs}/good.pth'
  jobs = [
    f'{run} --output={shut}/o.pth', f'{run} --output={fixed}/o.pth',
    f'{good} --output={shut}/new', f'{good} --output={fixed}/new',
    f'--checkpoint={shut}/run --output={tmp_path}/o.pth',
    f'--from_torch={shut}/o.pth --output={tmp_path}/new', f'--list={shut}/o.pth',
  ]  # fmt: skip
  drop = ['setpriv', '--inh-caps=-all', '--bounding-set=-all'] if os.geteuid() == 0 else []
  done = subprocess.run(
    [*drop, sys.executable, '-c', WITHOUT_PERMISSION, ';'.join(jobs)],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.stdout.split() == ['2'] * len(jobs), done.stderr
  errors = done.stderr.splitlines()
  for line, verb in zip(errors, ['written'] * 4 + ['read'] * 3, strict=True):
    assert f'cannot be {verb} (Permission denied); give ' in line
  shut.chmod(0o700)
  assert [*shut.iterdir(), *fixed.iterdir()] == []


def test_the_destination_comes_first(inputs, tmp_path, command, monkeypatch):
  """It is checked before anything is read, which may take minutes."""
  assert 'does not exist' in command('--checkpoint=none', f'--output={tmp_path}/none/o.pth')[2]
  assert 'is not empty' in command('--from_torch=none', f'--output={inputs}')[2]


@needs_torch
def test_what_a_file_did_not_tell_is_null(tmp_path, command):
  """It stays null after a second import; the model itself uses the defaults."""
  run, path = tmp_path / 'run', tmp_path / 'silent.safetensors'
  weight_files.write(path, random_state(SMALL), file_format='safetensors')
  for output in ('first.safetensors', 'second.pth'):
    shutil.rmtree(run, ignore_errors=True)
    assert command(f'--from_torch={path}', f'--output={run}')[0] == 0
    assert saved_weights.load_weights(run).objective == Objective()
    path = tmp_path / output
    assert command(f'--checkpoint={run}', f'--output={path}')[0] == 0
    card = json.loads((tmp_path / f'{output}.json').read_text())
    assert (card['normalised_targets'], card['epoch']) == (None, None)
    assert set(card['args']['objective'].values()) == {None}
  assert list(torch.load(path, weights_only=True)) == ['model', 'args']


def test_a_format_goes_with_any_name_that_has_no_known_ending(tmp_path, command):
  source, path = save(tmp_path / 'source', SMALL), tmp_path / 'out.weights'
  assert command(f'--checkpoint={source}', f'--output={path}', '--format=safetensors')[0] == 0
  assert (
    'intact: its sha256 matches' in command(f'--from_torch={path}', f'--output={tmp_path}/back')[1]
  )
  status, _, err = command('--checkpoint=x', f'--output={tmp_path}/o.pth', '--format=safetensors')
  assert (status, 'do not go together' in err) == (2, True)


@needs_torch
def test_compare_names_types_and_knows_nan(tmp_path, command):
  tensors = {
    'nan': np.array([np.nan, 1, np.inf], np.float32), 'hole': np.array([np.nan, 2], np.float32),
    'half': np.ones(3, np.float32), 'count': np.arange(3), 'turn': np.array([1j]),
  }  # fmt: skip
  weight_files.write(tmp_path / 'a.pth', tensors, file_format='pth')
  assert command('--compare', tmp_path / 'a.pth', tmp_path / 'a.pth')[::2] == (0, '')
  other = tensors | {'half': np.ones(3, np.float16), 'hole': np.array([1, 2], np.float32)}
  other['nan'] = np.array([np.nan, 2, np.inf], np.float32)
  weight_files.write(tmp_path / 'b.pth', other, file_format='pth')
  status, out, err = command('--compare', tmp_path / 'a.pth', tmp_path / 'b.pth')
  assert (status, err) == (1, '')
  assert out.splitlines() == [
    f'half: float32 in {tmp_path}/a.pth, float16 in {tmp_path}/b.pth',
    'hole: nan',
    'nan: 1',
    '2 tensors are equal, 3 differ, 0 have no counterpart of the same shape',
  ]


@needs_torch
def test_list_takes_every_type_without_a_warning(tmp_path, command, recwarn):
  tensors = {'turn': np.array([3 + 4j]), 'flag': np.array([True]), 'byte': np.array([-3], np.int8)}
  weight_files.write(tmp_path / 'in.pth', tensors, file_format='pth')
  status, out, err = command(f'--list={tmp_path}/in.pth')
  assert (status, err) == (0, '')
  assert [line.split()[-1] for line in out.splitlines()[1:4]] == ['5', '1', '3']
  assert not recwarn.list


def test_a_pytorch_that_does_not_load_is_named(tmp_path, monkeypatch, command):
  source = save(tmp_path / 'source', SMALL)
  (tmp_path / 'torch.py').write_text('raise OSError("libcudart.so: cannot open shared object")')
  monkeypatch.delitem(sys.modules, 'torch', raising=False)
  monkeypatch.syspath_prepend(tmp_path)
  fault = 'PyTorch is installed but does not load (libcudart.so: cannot open shared object)'
  status, out, _ = command(f'--checkpoint={source}', f'--output={tmp_path}/out.safetensors')
  assert status == 0
  assert f'not verified: {fault}\n' in out
  status, _, err = command(f'--checkpoint={source}', f'--output={tmp_path}/out.pth')
  assert (status, err.startswith(f'error: {fault}, and writing .pth files needs it')) == (2, True)


def test_a_run_that_diverged_is_not_exported(tmp_path, command):
  source = save(tmp_path / 'source', SMALL)
  weights = saved_weights.load_weights(source)
  params = weights.params | {'mask_token': np.full_like(weights.params['mask_token'], np.inf)}
  shutil.rmtree(source)
  saved_weights.save_weights(source, params, 6, weights.description)
  status, _, err = command(f'--checkpoint={source}', f'--output={tmp_path}/out.safetensors')
  assert status == 2
  assert "params['mask_token'] has values that are not finite" in err
  assert not (tmp_path / 'out.safetensors').exists()


def test_a_checkpoint_can_be_named_by_its_folder(trained):
  for folder in (trained / 'checkpoints' / '4', trained / 'checkpoints'):
    step = 4 if folder.name == '4' else 8
    assert saved_weights.load_weights(folder).step == step
  with pytest.raises(UserError, match=r'checkpoints/4 has no step 8; it has 4\.'):
    saved_weights.load_weights(trained / 'checkpoints' / '4', step=8)


def test_an_import_that_fails_leaves_no_folder(tmp_path, monkeypatch):
  path = tmp_path / 'in.safetensors'
  weight_files.write(path, random_state(SMALL), file_format='safetensors')

  def fail(*_, **__):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(saved_weights.ocp.CheckpointManager, 'save', fail)
  with pytest.raises(UserError, match=r'cannot be written .No space left'):
    list(convert.import_(path, tmp_path / 'new', verify=False))
  assert list(tmp_path.iterdir()) == [path]
