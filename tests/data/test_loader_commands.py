"""Training commands whose loader is killed, hangs or reads damaged records."""

import os
import shutil
import signal
import time

import pytest
from conftest import assert_one_sentence, run_python, train_arguments
from processes import (
  WORKERS,
  assert_gone,
  memory_of,
  processes_of,
  running,
  shared_files,
  training,
  wait_for_line,
)
from test_commands import losses

from dropmae_jax.runtime.errors import ExitStatus

# Kills a loader process after the third step.
LOSING = """
import multiprocessing, os, signal
from dropmae_jax import main
from dropmae_jax.runtime import cli, report
real = report.Report.after_step
def after_step(self, step, metrics):
  real(self, step, metrics)
  if step == 3:
    os.kill(multiprocessing.active_children()[1].pid, signal.SIGKILL)
report.Report.after_step = after_step
cli.run(main.main)
"""


@pytest.mark.slow
def test_a_run_whose_loader_process_dies_ends_with_the_same_losses(data_dir, tmp_path):
  """The run is longer than what was prefetched when the process died."""
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
  assert not memory_of(process.pid)


@pytest.mark.slow
def test_the_loader_of_a_killed_trainer_ends(data_dir, tmp_path):
  with training(data_dir, tmp_path, '--config.num_steps=100000') as process:
    wait_for_line(process, 'step 3/')
    pids = processes_of(process.pid)
    names = shared_files([process.pid, *pids]) | memory_of(process.pid)
    assert names
    process.kill()
    process.wait()
    assert_gone(pids, names | memory_of(process.pid))


@pytest.mark.slow
def test_the_memory_of_a_run_killed_as_a_whole_is_removed_by_the_next_run(data_dir, tmp_path):
  with training(data_dir, tmp_path, '--config.num_steps=100000') as process:
    wait_for_line(process, 'step 3/')
    os.killpg(process.pid, signal.SIGKILL)
  assert memory_of(process.pid)
  done = run_python(*train_arguments(data_dir, tmp_path / 'b', WORKERS, '--config.num_steps=8'))
  assert done.returncode == 0, done.stderr
  assert not memory_of(process.pid)


@pytest.mark.slow
def test_a_loader_that_hangs_ends_the_run_with_stacks(data_dir, tmp_path):
  more = ('--config.num_steps=100000', '--config.data.stall_seconds=20')
  with training(data_dir, tmp_path, *more) as process:
    wait_for_line(process, 'step 3/')
    pids = processes_of(process.pid)
    names = shared_files([process.pid, *pids])
    for pid in pids:
      os.kill(pid, signal.SIGSTOP)
    _, errors = process.communicate(timeout=120)
    assert_gone(pids, names | memory_of(process.pid))
  assert process.returncode == ExitStatus.HUNG
  (error,) = [line for line in errors.splitlines() if line.startswith('error: ')]
  assert 'no batch came within data.stall_seconds=20; log.txt shows where' in error
  assert 'Traceback' not in errors
  log = (tmp_path / 'log.txt').read_text()
  assert 'the loader hangs; all threads of this process:' in log
  assert 'in train' in log


@pytest.mark.slow
def test_a_signal_while_the_loader_hangs_saves_the_last_step(data_dir, tmp_path):
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


# Reads in threads of the trainer, which hang from the tenth frame on.
HANGING = """
import itertools, threading
from dropmae_jax import main
from dropmae_jax.data import video_source
from dropmae_jax.runtime import cli
count, real = itertools.count(), video_source.TfdsVideos.frame
def frame(self, video, number):
  if next(count) >= 10:
    threading.Event().wait()
  return real(self, video, number)
video_source.TfdsVideos.frame = frame
cli.run(main.main)
"""


def test_a_run_whose_own_threads_hang_ends(data_dir, tmp_path):
  done = run_python(
    '-c', HANGING, *train_arguments(data_dir, tmp_path, '--config.data.num_threads=2')[2:],
    '--config.num_steps=8', '--config.data.stall_seconds=3',
  )  # fmt: skip
  assert done.returncode == ExitStatus.HUNG, done.stderr
  assert 'error: no batch came within data.stall_seconds=3' in done.stderr
  assert 'Traceback' not in done.stderr
  assert ' in frame' in (tmp_path / 'log.txt').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('workers', ['--config.data.num_workers=0', WORKERS])
def test_too_many_damaged_records_end_the_run_in_one_sentence(data_dir, tmp_path, workers):
  shutil.copytree(data_dir, tmp_path / 'data')
  for shard in (tmp_path / 'data').glob('**/*-train.array_record*'):
    with shard.open('r+b') as file:
      file.seek(500)
      file.write(b'damage')
  done = run_python(
    *train_arguments(tmp_path / 'data', tmp_path / 'run', '--config.num_steps=100000', workers),
    '--config.data.max_damaged_records=2',
  )
  assert_one_sentence(done, 'cannot be read: record ')
  assert (
    'It is damaged record 3 of this start, and config.data.max_damaged_records=2.' in done.stderr
  )
  assert done.stdout.count('Another video is taken instead; damaged record') == 2
  assert 'a process of the loader died' not in done.stdout
