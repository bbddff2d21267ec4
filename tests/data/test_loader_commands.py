"""Training runs whose loader is killed, stopped or fed damaged records, as a user meets them."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import COMPILE_ONCE, ROOT, run_python, train_arguments
from test_commands import assert_one_sentence, losses

from dropmae_jax.data import loader_process
from dropmae_jax.runtime.watchdog import STALLED

WORKERS = '--config.data.num_workers=2'
SHM = loader_process.SHARED_MEMORY


@contextlib.contextmanager
def running(*arguments):
  process = subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1', **COMPILE_ONCE},
  )
  try:
    yield process
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def training(data_dir, workdir, *more):
  return running(*train_arguments(data_dir, workdir, WORKERS, *more))


def processes_of(trainer, ready=b'spawn_main'):
  """The loader's processes, once both are there."""
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline:
    children = ' '.join(
      task.read_text() for task in pathlib.Path(f'/proc/{trainer}/task').glob('*/children')
    )
    found = [
      int(child)
      for child in children.split()
      if ready in pathlib.Path(f'/proc/{child}/cmdline').read_bytes()
    ]
    if len(found) == 2:
      return found
    time.sleep(0.02)
  raise AssertionError('the loader has no processes')


def shared_files(pids):
  """Names in /dev/shm that processes have open: batches, and the semaphores of queues."""
  lines = [line for p in pids for line in pathlib.Path(f'/proc/{p}/maps').read_text().split('\n')]
  return {line.split('/dev/shm/')[1].split()[0] for line in lines if '/dev/shm/' in line}


def blocks_of(trainer):
  return {path.name for path in SHM.glob(f'{loader_process.run_prefix(trainer)}*')}


def assert_gone(pids, names):
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline:
    alive = [pid for pid in pids if pathlib.Path(f'/proc/{pid}').exists()]
    left = {name for name in names if (SHM / name).exists()}
    if not alive and not left:
      return
    time.sleep(0.1)
  raise AssertionError(f'{alive=}, {left=}')


def wait_for_line(process, text):
  for line in process.stdout:
    if text in line:
      return
  raise AssertionError(f'no line with {text!r}: {process.stderr.read()}')


# Kills a process of the loader once the third step is reported.
LOSING = """
import multiprocessing, os, signal
from absl import app
from dropmae_jax import main
from dropmae_jax.runtime import cli, report
real = report.Report.after_step
def after_step(self, step, metrics):
  real(self, step, metrics)
  if step == 3:
    os.kill(multiprocessing.active_children()[1].pid, signal.SIGKILL)
report.Report.after_step = after_step
cli.run(lambda: app.run(main.main, flags_parser=main.parse))
"""


@pytest.mark.slow
def test_a_run_whose_loader_loses_a_process_ends_as_any_other(data_dir, tmp_path):
  """More steps than batches lie ahead at the time of the death."""
  done = run_python(*train_arguments(data_dir, tmp_path / 'plain', '--config.num_steps=40'))
  assert done.returncode == 0, done.stderr
  arguments = train_arguments(data_dir, tmp_path / 'losing', WORKERS, '--config.num_steps=40')
  with running('-c', LOSING, *arguments[2:]) as process:
    wait_for_line(process, 'step 3/')
    killed = time.monotonic()
    wait_for_line(process, 'a process of the loader died (killed by signal 9), death 1 of this run')
    wait_for_line(process, 'step ')
    assert time.monotonic() - killed < 60
    _, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  assert 'Traceback' not in errors
  assert losses(tmp_path / 'losing') == losses(tmp_path / 'plain')
  assert not blocks_of(process.pid)


@pytest.mark.slow
def test_a_killed_trainer_takes_its_loader_along(data_dir, tmp_path):
  with training(data_dir, tmp_path, '--config.num_steps=100000') as process:
    wait_for_line(process, 'step 3/')
    pids = processes_of(process.pid)
    names = shared_files([process.pid, *pids]) | blocks_of(process.pid)
    assert names
    process.kill()
    process.wait()
    assert_gone(pids, names | blocks_of(process.pid))


def test_what_a_run_killed_as_a_whole_leaves_is_removed_by_the_next(data_dir, tmp_path):
  with training(data_dir, tmp_path, '--config.num_steps=100000') as process:
    wait_for_line(process, 'step 3/')
    os.killpg(process.pid, signal.SIGKILL)
  assert blocks_of(process.pid)
  done = run_python(*train_arguments(data_dir, tmp_path / 'b', WORKERS, '--config.num_steps=2'))
  assert done.returncode == 0, done.stderr
  assert not blocks_of(process.pid)


def test_a_loader_that_hangs_ends_the_run_with_stacks(data_dir, tmp_path):
  more = ('--config.num_steps=100000', '--config.data.stall_seconds=20')
  with training(data_dir, tmp_path, *more) as process:
    wait_for_line(process, 'step 3/')
    pids = processes_of(process.pid)
    names = shared_files([process.pid, *pids])
    for pid in pids:
      os.kill(pid, signal.SIGSTOP)
    _, errors = process.communicate(timeout=120)
    assert_gone(pids, names | blocks_of(process.pid))
  assert process.returncode == STALLED
  (told,) = [line for line in errors.splitlines() if line.startswith('error: ')]
  assert 'no batch came within data.stall_seconds=20; log.txt shows where' in told
  assert 'Traceback' not in errors
  log = (tmp_path / 'log.txt').read_text()
  assert 'the loader hangs; all threads of this process:' in log
  assert 'in train' in log


@pytest.mark.slow
def test_a_signal_while_the_loader_hangs_saves_what_there_is(data_dir, tmp_path):
  with training(data_dir, tmp_path, '--config.num_steps=100000') as process:
    wait_for_line(process, 'step 3/')
    for pid in processes_of(process.pid):
      os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    process.terminate()
    output, errors = process.communicate(timeout=120)
  assert process.returncode == os.EX_TEMPFAIL, errors
  (folder,) = (tmp_path / 'checkpoints').iterdir()
  assert f'SIGTERM: saved at step {folder.name} of 100000' in output
  assert int(folder.name) >= 3


# Reads in threads of the trainer, and from the tenth frame on for ever.
HANGING = """
import itertools, threading
from absl import app
from dropmae_jax import main
from dropmae_jax.data import video_source
from dropmae_jax.runtime import cli
count, real = itertools.count(), video_source.TfdsVideos.frame
def frame(self, video, number):
  if next(count) >= 10:
    threading.Event().wait()
  return real(self, video, number)
video_source.TfdsVideos.frame = frame
cli.run(lambda: app.run(main.main, flags_parser=main.parse))
"""


def test_a_run_whose_own_threads_hang_does_end(data_dir, tmp_path):
  done = run_python(
    '-c', HANGING, *train_arguments(data_dir, tmp_path, '--config.data.num_threads=2')[2:],
    '--config.num_steps=100', '--config.data.stall_seconds=3',
  )  # fmt: skip
  assert done.returncode == STALLED, done.stderr
  assert 'error: no batch came within data.stall_seconds=3' in done.stderr
  assert 'Traceback' not in done.stderr
  assert ' in frame' in (tmp_path / 'log.txt').read_text()


@pytest.mark.parametrize(
  'workers', [pytest.param('--config.data.num_workers=0', marks=pytest.mark.slow), WORKERS]
)
def test_too_many_damaged_records_end_the_run_in_one_sentence(data_dir, tmp_path, workers):
  shutil.copytree(data_dir, tmp_path / 'data')
  for shard in (tmp_path / 'data').glob('**/*-train.array_record*'):
    with shard.open('r+b') as file:
      file.seek(500)
      file.write(b'damage')
  done = run_python(
    *train_arguments(tmp_path / 'data', tmp_path / 'run', '--config.num_steps=100', workers),
    '--config.data.max_damaged_records=2',
  )
  assert_one_sentence(done, 'cannot be read: record ')
  assert (
    'It is damaged record 3 of this start, and config.data.max_damaged_records=2.' in done.stderr
  )
  assert done.stdout.count('Another video is taken instead; damaged record') == 2
  assert 'a process of the loader died' not in done.stdout
