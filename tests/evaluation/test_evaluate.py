"""dropmae-evaluate: from a checkpoint and a data set to scores, and how it goes on after a stop."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal

import jax
import numpy as np
import pytest
import scipy.io
from conftest import assert_one_sentence, run_python
from PIL import Image
from processes import running, wait_for_line

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Architecture, Objective
from dropmae_jax.data import synthetic_clips
from dropmae_jax.evaluation import evaluate
from dropmae_jax.evaluation.datasets import masks
from dropmae_jax.evaluation.datasets.davis import Davis
from dropmae_jax.model import mae
from dropmae_jax.pytorch import layouts, weight_files
from dropmae_jax.runtime import atomic_file, workdir_lock

SMALL = Architecture(
  width=32, depth=1, num_heads=2, patch_size=8, image_size=32,
  decoder_width=32, decoder_depth=1, decoder_num_heads=2,
)  # fmt: skip
FAST = '--input_size=48x64', '--num_previous=3', '--top_k=3'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """A workdir of random weights."""
  folder = tmp_path_factory.mktemp('run')
  params = jax.tree.map(np.asarray, mae.init_params(jax.random.key(0), SMALL))
  saved_weights.save_weights(folder, params, 7, saved_weights.describe(SMALL, Objective()))
  return folder


@pytest.fixture(scope='module')
def davis(tmp_path_factory):
  """Two clips of five frames in the layout of DAVIS."""
  folder = tmp_path_factory.mktemp('data') / 'clips'
  options = synthetic_clips.ClipOptions(train=1, val=2, frames=5, height=48, width=64)
  synthetic_clips.write_clips(folder, options)
  return folder / 'davis'


@pytest.fixture
def command(run_here, checkpoint, davis, tmp_path):
  """Runs the command on both; returns what it did and its results.json, if there is one."""

  def run(*more, root=davis, output=tmp_path / 'out'):
    arguments = f'--checkpoint={checkpoint}', f'--root={root}', f'--output={output}'
    done = run_here(evaluate.main, 'davis', *arguments, *FAST, *more)
    results = output / 'results.json'
    return done, json.loads(results.read_text()) if results.exists() else None

  return run


def test_a_checkpoint_is_scored_on_davis(command, davis, tmp_path):
  done, results = command('--visualise')
  assert done.returncode == 0, done.stderr
  names = (davis / 'ImageSets' / '2017' / 'val.txt').read_text().split()
  assert list(results['clips']) == names
  # Both clips have three objects.
  means = [results['clips'][name]['J'] for name in names]
  assert results['summary']['J_mean'] == pytest.approx(np.mean(means))
  assert results['input_sizes'] == {name: [48, 64] for name in names}
  assert all(name in done.stdout for name in ('J&F', *names))
  settings = results['settings']
  assert settings['weights']['step'] == 7
  assert settings['propagation']['num_previous'] == 3
  assert (settings['split'], settings['scale']) == ('val', 'native')
  unused = settings['unused_tensors']
  assert 'temporal_pos_embed_x' in unused
  assert 'decoder_blocks.0.attn.qkv.weight' in unused
  assert not any(name.startswith('blocks.') for name in unused)
  assert settings['versions']['jax'] == jax.__version__
  for name in names:
    mask = Image.open(tmp_path / 'out' / 'results' / name / '00004.png')
    assert mask.size == (64, 48)
    assert np.asarray(mask).max() <= 3
    assert Image.open(tmp_path / 'out' / 'overlays' / f'{name}.png').size[0] > 64
    assert (tmp_path / 'out' / 'overlays' / f'{name}.mp4').stat().st_size > 1000


def test_finished_clips_are_not_computed_again(command, tmp_path, monkeypatch):
  whole = command(output=tmp_path / 'whole')[1]
  second = list(whole['clips'])[1]
  evaluate_clip, computed = evaluate.evaluate_clip, []

  def stopped(benchmark, clip, *arguments):
    computed.append(clip.name)
    for number, result in enumerate(evaluate_clip(benchmark, clip, *arguments)):
      if clip.name == second and number == 2 and computed.count(second) == 1:
        raise KeyboardInterrupt
      yield result

  monkeypatch.setattr(evaluate, 'evaluate_clip', stopped)
  assert command()[0].returncode == 130
  done, results = command()
  assert done.returncode == 0
  assert computed == [*whole['clips'], second]
  assert results == whole
  assert 'finished before' in (tmp_path / 'out' / 'log.txt').read_text()


# Hangs in the middle of the second clip.
HANGING = """
import threading
from dropmae_jax.evaluation import evaluate
from dropmae_jax.runtime import cli
real, names = evaluate.evaluate_clip, []
def evaluate_clip(benchmark, clip, *arguments):
  names.append(clip.name)
  for number, result in enumerate(real(benchmark, clip, *arguments)):
    if len(names) == 2 and number == 2:
      print('hanging', flush=True)
      threading.Event().wait()
    yield result
evaluate.evaluate_clip = evaluate_clip
cli.run(evaluate.main)
"""


def test_a_sigterm_keeps_what_is_finished(command, checkpoint, davis, tmp_path):
  whole = command(output=tmp_path / 'whole')[1]
  first, second = whole['clips']
  out = tmp_path / 'out'
  arguments = f'--checkpoint={checkpoint}', f'--root={davis}', f'--output={out}'
  with running('-c', HANGING, 'davis', *arguments, *FAST) as process:
    wait_for_line(process, 'hanging')
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM
  assert errors.splitlines()[-1] == 'stopped by SIGTERM'
  assert 'Traceback' not in errors
  assert [path.name for path in (out / 'results').iterdir()] == [first]
  kept = {path: path.stat().st_mtime_ns for path in (out / 'results' / first).iterdir()}
  done = run_python('-m', 'dropmae_jax.evaluation.evaluate', 'davis', *arguments, *FAST)
  assert done.returncode == 0, done.stderr
  assert json.loads((out / 'results.json').read_text()) == whole
  assert {path: path.stat().st_mtime_ns for path in (out / 'results' / first).iterdir()} == kept
  for name in (first, second):
    for path in (out / 'results' / name).iterdir():
      assert path.read_bytes() == (tmp_path / 'whole' / 'results' / name / path.name).read_bytes()


def test_nothing_is_compiled_for_the_second_clip(command, monkeypatch):
  evaluate_clip, compiled = evaluate.evaluate_clip, []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if 'backend_compile' in name else None
  )
  counts = []

  def counted(*arguments):
    yield from evaluate_clip(*arguments)
    counts.append(len(compiled))

  monkeypatch.setattr(evaluate, 'evaluate_clip', counted)
  jax.clear_caches()
  assert command()[0].returncode == 0
  assert counts[0] > 0
  assert counts[1] == counts[0]


def test_a_benchmark_can_be_added(run_here, checkpoint, davis, tmp_path, monkeypatch):
  class First(Davis):
    """The first clip of DAVIS."""

    def __init__(self, root):
      super().__init__(root)
      del self.names[1:]

  monkeypatch.setitem(evaluate.BENCHMARKS, 'first', First)
  arguments = f'--checkpoint={checkpoint}', f'--root={davis}', f'--output={tmp_path}/out', *FAST
  assert run_here(evaluate.main, 'first', *arguments).returncode == 0
  assert len(json.loads((tmp_path / 'out' / 'results.json').read_text())['clips']) == 1


def test_results_of_other_settings_are_not_mixed(command, tmp_path):
  assert command()[0].returncode == 0
  done, _ = command('--identity=x')
  assert_one_sentence(done, 'holds results with readout.identity = "none", not "x"; give')
  done, _ = command('--split=train')
  assert_one_sentence(done, 'holds results with split = "val", not "train"; give')
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'mine.txt').touch()
  assert_one_sentence(command(output=other)[0], 'is not empty; give a new folder.')


@pytest.mark.parametrize('readout', ['roles', 'joint', 'attention'])
def test_pairs_are_read_out(command, readout):
  done, results = command(f'--readout={readout}', '--centred')
  assert done.returncode == 0, done.stderr
  assert 0 <= results['summary']['J_mean'] <= 100
  assert ('attention' in results) == (readout == 'attention')


@pytest.mark.parametrize('protocol', ['dino', 'dinov3'])
def test_protocols_read_and_write_in_their_own_way(command, protocol, davis, tmp_path):
  done, results = command(f'--protocol={protocol}')
  assert done.returncode == 0, done.stderr
  name = next(iter(results['clips']))
  first = np.asarray(Image.open(tmp_path / 'out' / 'results' / name / '00000.png'))
  truth = np.asarray(Image.open(davis / 'Annotations' / '480p' / name / '00000.png'))
  if protocol == 'dino':
    np.testing.assert_array_equal(first, truth)


def write_vip(root):
  for folder in ('Images/a', 'Annotations/Category_ids/a', 'lists'):
    (root / folder).mkdir(parents=True)
  (root / 'lists' / 'val_videos.txt').write_text('a\n')
  for name, (image, mask) in {'01': pictures(1), '02': pictures(2)}.items():
    Image.fromarray(image).save(root / 'Images' / 'a' / f'{name}.jpg')
    Image.fromarray(mask).save(root / 'Annotations' / 'Category_ids' / 'a' / f'{name}.png')


def write_jhmdb(root):
  for folder in ('Rename_Images/run/b', 'joint_positions/run/b', 'splits'):
    (root / folder).mkdir(parents=True)
  (root / 'splits' / 'run_test_split1.txt').write_text('b.avi 2\n')
  positions = np.random.default_rng(0).uniform(5, 40, (2, 15, 2))
  scipy.io.savemat(root / 'joint_positions/run/b/joint_positions.mat', {'pos_img': positions})
  for number in (1, 2):
    Image.fromarray(pictures(number)[0]).save(root / 'Rename_Images/run/b' / f'{number:05d}.png')


def write_tapvid(root):
  root.mkdir()
  video = {
    'video': np.stack([pictures(number)[0] for number in range(4)]),
    'points': np.random.default_rng(0).random((3, 4, 2), np.float32),
    'occluded': np.array([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool),
  }
  (root / 'tapvid_davis.pkl').write_bytes(pickle.dumps({'c': video}))


def pictures(seed):
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (48, 64, 3), np.uint8)
  return image, np.repeat(rng.integers(0, 3, (48, 8), np.uint8), 8, axis=1)


@pytest.mark.parametrize(
  ('benchmark', 'write', 'number', 'clips'),
  [
    ('vip', write_vip, 'mIoU', ['a']),
    ('jhmdb', write_jhmdb, 'PCK@0.2', ['run/b']),
    ('tapvid', write_tapvid, 'pts_within_16', ['c@0000', 'c@0001']),
  ],
)
def test_the_other_benchmarks_go_the_same_way(
  run_here, checkpoint, tmp_path, benchmark, write, number, clips
):
  write(tmp_path / 'root')
  arguments = f'--checkpoint={checkpoint}', f'--root={tmp_path}/root', f'--output={tmp_path}/out'
  whole = []
  for _ in range(2):
    done = run_here(evaluate.main, benchmark, *arguments, *FAST, '--visualise')
    assert done.returncode == 0, done.stderr
    whole.append(json.loads((tmp_path / 'out' / 'results.json').read_text()))
  assert 'finished before' in done.stdout
  assert whole[0] == whole[1]
  assert list(whole[0]['clips']) == clips
  assert 0 <= whole[0]['summary'][number] <= 100
  assert (tmp_path / 'out' / 'overlays' / f'{clips[0]}.png').is_file()


def test_results_of_other_data_are_not_mixed(command, davis, tmp_path):
  root = shutil.copytree(davis, tmp_path / 'davis')
  assert command(root=root)[0].returncode == 0
  name = (root / 'ImageSets' / '2017' / 'val.txt').read_text().split()[0]
  path = root / 'Annotations' / '480p' / name / '00000.png'
  mask = np.array(Image.open(path))
  mask[20:30] = 1
  masks.write_png(path, mask)
  assert_one_sentence(command(root=root)[0], f'{name} holds results of other frames or labels')


def test_results_of_objects_with_other_numbers_are_not_mixed(command, davis, tmp_path):
  """Their labels are the same arrays."""
  root = shutil.copytree(davis, tmp_path / 'davis')
  name = (root / 'ImageSets' / '2017' / 'val.txt').read_text().split()[0]
  assert command(root=root)[0].returncode == 0
  for path in (root / 'Annotations' / '480p' / name).glob('*.png'):
    masks.write_png(path, 2 * np.array(Image.open(path)))
  assert_one_sentence(command(root=root)[0], f'{name} holds results of other frames or labels')


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda out, name: (out / 'clips' / f'{name}.json').unlink(), 'remove {out}/results/{name}.'),
    (lambda out, name: (out / 'clips' / f'{name}.json').write_text('[]'), 'remove {out}/results'),
    (
      lambda out, name: (out / 'results' / name / '00002.png').write_bytes(b'half'),
      '00002.png cannot be read',
    ),
    (
      lambda out, name: (out / 'results' / name / '00002.png').unlink(),
      '00002.png does not exist; remove {out}/results/{name}, so that it is computed again.',
    ),
    (lambda out, name: (out / 'settings.json').write_text('{'), 'settings.json is damaged'),
  ],
)
def test_damaged_results_are_told(command, tmp_path, damage, message):
  done, results = command()
  assert done.returncode == 0
  name, out = next(iter(results['clips'])), tmp_path / 'out'
  damage(out, name)
  assert_one_sentence(command()[0], message.format(out=out, name=name))


def test_what_a_killed_run_was_writing_is_removed(command, tmp_path):
  _, results = command()
  (tmp_path / 'out' / 'results.json').unlink()
  names = 'results', '.', 'other'
  folders = [tmp_path / 'out' / name / f'{atomic_file.PREFIX}abc' for name in names]
  for folder in folders:
    folder.mkdir(parents=True)
    (folder / '00000.png').touch()
  assert command()[1] == results
  assert [folder.exists() for folder in folders] == [False, False, True]
  shutil.rmtree(tmp_path / 'out' / 'other')


def test_a_run_that_was_killed_at_once_can_start_again(command, tmp_path):
  (tmp_path / 'out' / f'{atomic_file.PREFIX}abc').mkdir(parents=True)
  (tmp_path / 'out' / workdir_lock.FILE).touch()
  assert command()[0].returncode == 0


def test_a_second_start_in_the_same_folder_is_refused(command, tmp_path):
  (tmp_path / 'out').mkdir()
  with workdir_lock.held(tmp_path / 'out', '--output'):
    done, _ = command()
  assert done.returncode == 69
  assert f'--output={tmp_path}/out is in use by process' in done.stderr


def test_a_full_disk_is_told_and_the_next_start_goes_on(command, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patched:
    patched.setattr(masks, 'write_png', full)
    assert_one_sentence(command()[0], 'No space left on device); make room there.')
  assert command()[0].returncode == 0


def test_a_class_token_of_another_width_is_refused(run_here, davis, checkpoint, tmp_path):
  state = layouts.to_torch(saved_weights.load_weights(checkpoint).params, SMALL)
  state['cls_token'] = np.zeros((1, 2, 32), np.float32)
  path = tmp_path / 'two.safetensors'
  entries = {'args': {'architecture': dataclasses.asdict(SMALL)}}
  weight_files.write(path, state, file_format='safetensors', entries=entries)
  arguments = f'--checkpoint={path}', f'--root={davis}', f'--output={tmp_path}/out'
  done = run_here(evaluate.main, 'davis', *arguments)
  assert_one_sentence(done, 'add --class_token=none.')
