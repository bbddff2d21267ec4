"""The command lines as a user meets them: the whole pipeline, stops and restarts, and bad input."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import parity
import pytest
from conftest import COMPILE_ONCE, ROOT, assert_one_sentence, run_python, train_arguments
from flax import traverse_util

from dropmae_jax import main
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import DataOptions
from dropmae_jax.data import augment, frame_pairs
from dropmae_jax.data.video_source import open_dataset
from dropmae_jax.train_step import derive_seeds


def metrics_of(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def losses(workdir):
  return [(row['step'], row['loss']) for row in metrics_of(workdir) if 'loss' in row]


def assert_same_weights(first, second):
  import jax

  one, other = (saved_weights.load_weights(folder) for folder in (first, second))
  assert one.step == other.step
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_run_reports_every_step(trained):
  rows = metrics_of(trained)
  assert [row['step'] for row in rows] == list(range(1, 9))
  assert set(rows[0]) == {
    'step', 'loss', 'loss_mean', 'learning_rate', 'gradient_norm', 'pairs_per_second', 'data_wait',
  }  # fmt: skip
  assert rows[0]['learning_rate'] == 0
  assert rows[2]['learning_rate'] == max(row['learning_rate'] for row in rows)
  assert all(row['gradient_norm'] > 0 and row['pairs_per_second'] > 0 for row in rows)
  assert all(0 <= row['data_wait'] <= 1 for row in rows)
  log = (trained / 'log.txt').read_text()
  assert 'step 8/8' in log
  assert 'left 0 s' in log
  assert 'steps 3 to 4 are traced in ' in log
  for name in ('events.out.tfevents.*', 'plugins/profile/*/*.xplane.pb'):
    assert list((trained / 'tensorboard').glob(name)), name


@pytest.fixture
def begun(trained, tmp_path):
  """A copy of the trained run, to go on with."""
  return shutil.copytree(trained, tmp_path / 'begun')


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(begun, data_dir):
  before = (begun / 'metrics.jsonl').read_text()
  done = run_python(*train_arguments(data_dir, begun, '--config.num_steps=8'))
  assert done.returncode == 0, done.stderr
  assert 'step 8 is done, so nothing is left to do' in done.stdout
  assert (begun / 'metrics.jsonl').read_text() == before


# Kills itself without warning after step 5, once the checkpoint of step 3 is on disk.
KILLED = """
import os, pathlib, signal, sys, time
from dropmae_jax import main
from dropmae_jax.runtime import cli, report
real = report.Report.after_step
workdir = next(each.partition('=')[2] for each in sys.argv if each.startswith('--workdir='))
def after_step(self, step, metrics):
  real(self, step, metrics)
  if step == 5:
    while not pathlib.Path(workdir, 'checkpoints', '3').exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
report.Report.after_step = after_step
cli.run(main.main)
"""


@pytest.mark.slow
def test_resuming_is_exact(trained, data_dir, tmp_path):
  """Eight steps in one go equal five, a kill -9, and what is left from the checkpoint of three."""
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=8', '--config.checkpoint.every_steps=3'
  )
  done = run_python('-c', KILLED, *arguments[2:])
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert [row['step'] for row in metrics_of(tmp_path)] == [1, 2, 3, 4, 5]
  done = run_python(*arguments)
  assert done.returncode == 0, done.stderr
  assert 'resuming after step 3 of 8' in done.stdout
  assert losses(tmp_path) == losses(trained)
  assert_same_weights(tmp_path, trained)


@pytest.mark.parametrize(
  ('number', 'when'),
  [
    (signal.SIGTERM, 'step 3/'),
    pytest.param(signal.SIGINT, 'steps per epoch', marks=pytest.mark.slow),
  ],
)
def test_a_signal_saves_what_there_is(data_dir, tmp_path, number, when):
  """The signal goes to all processes, as it does from a terminal or a scheduler."""
  arguments = train_arguments(data_dir, tmp_path, '--config.num_steps=100000')
  process = subprocess.Popen(
    [sys.executable, *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, **COMPILE_ONCE},
    start_new_session=True,
  )
  for line in process.stdout:
    if when in line:
      break
  os.killpg(process.pid, number)
  output, errors = process.communicate(timeout=120)
  assert process.returncode == 75, errors
  assert 'Traceback' not in errors
  name = signal.Signals(number).name
  told = [line for line in output.splitlines() if name in line][-1]
  if when == 'steps per epoch' and 'no step was made; the same command starts again' in told:
    step = 0  # The first batch had not come.
  else:
    assert 'the same command resumes from there' in told
    step = int(told.split('saved at step ')[1].split()[0])
  assert [row['step'] for row in metrics_of(tmp_path)] == list(range(1, step + 1))
  assert sorted(each.name for each in tmp_path.glob('checkpoints/*')) == [str(step)] * (step > 0)


@pytest.mark.parametrize('closed', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_output_that_nobody_reads_does_not_change_a_run(data_dir, tmp_path, closed):
  """As after `dropmae-train ... | head -1`, or with `>&- 2>&-`."""
  arguments = train_arguments(data_dir, tmp_path, '--config.num_steps=100000')
  with subprocess.Popen(
    ['bash', '-c', 'exec "$0" "$@"' + ' <&- >&- 2>&-' * closed, sys.executable, *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', **COMPILE_ONCE},
  ) as process:
    process.stdout.readline()
    process.stdout.close()
    log = tmp_path / 'log.txt'
    while not (log.exists() and 'step 3/' in log.read_text()):
      assert process.poll() is None, process.stderr.read()
      time.sleep(0.05)
    process.terminate()
    assert process.stderr.read() == ''
    assert process.wait(timeout=60) == 75
  assert 'the same command resumes from there' in log.read_text()


def assert_batch_of_step(described, step, data_dir):
  """What is listed leads to just what the step was fed, and to its noise."""
  videos = open_dataset(str(data_dir), 'kinetics_frames/folder')
  config, seeds = described['config'], derive_seeds(described['seed'])
  size = config['model']['image_size']
  stream = frame_pairs.pair_batches(
    videos,
    DataOptions(**config['data']),
    image_size=size,
    batch_size=config['batch_size'],
    seed=seeds.data,
    first_step=step - 1,
  )
  with contextlib.closing(stream):
    batch = next(stream)
  assert len(described['pairs']) == config['batch_size']
  for pair, expected in zip(described['pairs'], batch['frames'], strict=True):
    assert pair['path'] == videos.paths()[pair['video']]
    for number, crop, frame in zip(pair['frame_numbers'], pair['crops'], expected, strict=True):
      whole = videos.frame(pair['video'], number)
      again = augment.crop_and_resize(whole, augment.Box(*crop), size, resize='fast')
      np.testing.assert_array_equal(again, frame)
  key = jax.random.fold_in(seeds.steps, step - 1)
  assert described['step_key'] == jax.random.key_data(key).tolist()


@pytest.mark.slow
def test_a_diverging_run_stops_by_step_and_keeps_its_checkpoint(data_dir, tmp_path):
  done = run_python(
    *train_arguments(
      data_dir,
      tmp_path,
      '--config.num_steps=50',
      '--config.checkpoint.every_steps=1',
      '--config.optimizer.base_learning_rate=1e9',
    )
  )
  assert done.returncode == 1
  step = int(re.search(r'error: the loss of step (\d+) is', done.stderr)[1])
  assert 'Traceback' not in done.stderr
  report = tmp_path / f'non_finite_batch_{step}.json'
  assert f'The pairs of its batch are in {report}.' in done.stderr
  assert_batch_of_step(json.loads(report.read_text()), step, data_dir)
  weights = saved_weights.load_weights(tmp_path)
  leaves = traverse_util.flatten_dict(weights.params).values()
  assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.fixture
def run_train(run_here, monkeypatch):
  """Trains in this process, on its eight devices."""
  logger = main.logging.get_absl_logger()
  monkeypatch.setattr(logger, 'filters', list(logger.filters))
  monkeypatch.setattr(main.logging, 'set_verbosity', lambda _: None)

  def run(data_dir, workdir, *more):
    arguments = train_arguments(data_dir, workdir, '--config.batch_size=8', *more)
    return run_here(main.main, *arguments[2:])

  return run


def test_a_device_that_is_not_there_is_one_sentence(data_dir, tmp_path, monkeypatch):
  arguments = train_arguments(data_dir, tmp_path / 'run')
  code = f'import os, runpy; os.environ["JAX_PLATFORMS"] = "cuda"; sys.argv = {arguments[1:]}'
  done = run_python('-c', f'import sys\n{code}\nrunpy.run_module(sys.argv[0], run_name="__main__")')
  assert_one_sentence(done, 'JAX finds no device (')
  assert 'or correct JAX_PLATFORMS.' in done.stderr
  assert not (tmp_path / 'run').exists()


# Addresses and answers, of what is read from this machine only and of what may be in a bucket.
NO_HOME = 'has no home folder; give the whole path'
LOCAL = {
  'gs://bucket/run': 'is an address, not a path of this machine; mount that storage as a folder',
  's3:/bucket': 'is an address, not a path of this machine; mount that storage as a folder',
  '~nobody-here/x': NO_HOME,
}
BUCKETS = {
  'gs:/bucket': 'names no bucket; give gs://BUCKET/FOLDER',
  'http://host/x': 'is an address of a kind that is not read; give',
  '~nobody-here/x': NO_HOME,
}


@pytest.mark.parametrize(
  ('module', 'arguments', 'answers'),
  [
    ('dropmae_jax.main', '--config=quickstart --workdir={}', BUCKETS),
    ('dropmae_jax.main', '--config=quickstart --workdir=w --config.data_dir={}', LOCAL),
    ('dropmae_jax.main', '--config=quickstart --workdir=w --config.init_from={}', BUCKETS),
    ('tfds_kinetics.__main__', '--config=folder --videos={} --data_dir=d', LOCAL),
    ('tfds_kinetics.__main__', '--config=folder --videos=v --data_dir={}', LOCAL),
    ('dropmae_jax.data.synthetic_clips', '--output={}', LOCAL),
    ('dropmae_jax.evaluation.pair_sheet', '--data_dir={} --output=o.png', LOCAL),
    ('dropmae_jax.evaluation.reconstruction', '--checkpoint={} --video=v --output=o.png', BUCKETS),
    ('dropmae_jax.pytorch.main', '--checkpoint={} --output=o.pth', BUCKETS),
    ('dropmae_jax.pytorch.main', '--from_torch=f.pth --output={}', BUCKETS),
  ],
)
def test_an_address_is_no_path(run_here, tmp_path, monkeypatch, module, arguments, answers):
  """It would become a folder of that name here."""
  monkeypatch.chdir(tmp_path)
  for address, answer in answers.items():
    done = run_here(importlib.import_module(module).main, *arguments.format(address).split())
    assert done.returncode == 2
    assert f'{address} {answer}' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_workdir_of_another_model(begun, data_dir, run_train):
  before = sorted((begun / 'checkpoints').iterdir())
  done = run_train(data_dir, begun, '--config.model.image_size=64')
  assert_one_sentence(done, 'holds another model (image_size is 32 there and 64 here)')
  assert sorted((begun / 'checkpoints').iterdir()) == before


@pytest.mark.slow
def test_the_quickstart_has_the_same_losses_on_any_mesh(data_dir, tmp_path):
  """Its own config, model and batch, the first ten steps, by the command line."""
  losses_by_mesh = {}
  for data_axis, fsdp in ((1, 1), (8, 1), (1, 8), (2, 4)):
    workdir = tmp_path / f'{data_axis}x{fsdp}'
    done = subprocess.run(
      [
        sys.executable, '-m', 'dropmae_jax.main', '--config=configs/quickstart.py',
        f'--workdir={workdir}', f'--config.data_dir={data_dir}', '--config.num_steps=10',
        '--config.log_every=1', f'--config.mesh.fsdp={fsdp}',
      ],
      cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(data_axis * fsdp)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f', {data_axis * fsdp} x cpu' in done.stdout
    losses_by_mesh[workdir.name] = [loss for _, loss in losses(workdir)]
  assert len(losses_by_mesh['1x1']) == 10
  for values in losses_by_mesh.values():
    np.testing.assert_allclose(values, losses_by_mesh['1x1'], rtol=1e-5)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_dataset_of_the_same_name(begun, clips, tmp_path):
  shutil.copytree(clips, tmp_path / 'clips')
  next((tmp_path / 'clips' / 'train').glob('*/*_0000.mp4')).unlink()
  done = run_python(
    '-m', 'tfds_kinetics', '--config=folder', f'--videos={tmp_path / "clips"}',
    f'--data_dir={tmp_path / "data"}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  old, new = (
    open_dataset(str(folder), 'kinetics_frames/folder').fingerprint
    for folder in (saved_weights.load_weights(begun).description['config']['data_dir'],
                   tmp_path / 'data')
  )  # fmt: skip
  arguments = train_arguments(tmp_path / 'data', begun, '--config.num_steps=9')
  done = run_python(*arguments)
  assert_one_sentence(done, f'holds another run (data_fingerprint: {old} -> {new}); give its datas')
  assert run_python(*arguments, '--allow_changes').returncode == 0


@pytest.mark.parametrize(
  ('case', 'message'),
  [
    ('README.md', 'is not a whole recorded case'),
    ('none.npz', 'is not a file; give a recorded .npz'),
  ],
)
def test_bad_input_of_parity(run_here, case, message):
  assert_one_sentence(run_here(parity.main, f'--case={case}', '--output=o'), message)
