"""A step that hangs ends the run, and one that takes its time does not."""

import logging
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, run_python, train_arguments
from processes import (
  WORKERS,
  Processes,
  assert_gone,
  memory_of,
  processes_of,
  running,
  shared_files,
  wait_for_line,
)

from dropmae_jax.runtime import watchdog
from dropmae_jax.runtime.errors import ExitStatus
from dropmae_jax.runtime.watchdog import Watchdog

# The loss of step 6 never becomes ready on the device.
HANGING = """
import threading
import jax, jax.numpy as jnp
from dropmae_jax import main, train
from dropmae_jax.runtime import cli
real = train.build
def wait(loss):
  threading.Event().wait()
  return loss
late = jax.jit(lambda x: jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x))
def build(*arguments):
  model = real(*arguments)
  count = iter(range(1, 9))
  def step(state, frames, key):
    state, metrics = model.step(state, frames, key)
    return state, metrics._replace(loss=late(metrics.loss)) if next(count) == 6 else metrics
  return model._replace(step=step)
train.build = build
cli.run(main.main)
"""


def test_a_step_that_hangs_ends_the_run_with_stacks(data_dir, tmp_path):
  arguments = train_arguments(
    data_dir, tmp_path, WORKERS, '--config.num_steps=8', '--config.checkpoint.every_steps=3',
    '--config.step_stall_seconds=2',
  )  # fmt: skip
  with running('-c', HANGING, *arguments[2:]) as process:
    pids = processes_of(process.pid)
    wait_for_line(process, 'step 1/')
    names = shared_files([process.pid, *pids])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == ExitStatus.HUNG == 69
    assert_gone(pids, names | memory_of(process.pid))
  (error,) = [line for line in errors.splitlines() if line.startswith('error: ')]
  assert error.startswith('error: step 6 took more than 2 s; log.txt, or the terminal of a process')
  assert 'the same command resumes from the last checkpoint.' in error
  assert 'Traceback' not in errors
  log = (tmp_path / 'log.txt').read_text()
  assert 'step 6 hangs; all threads of this process:' in log
  assert ' in wait' in log
  assert ' in train' in log
  assert (tmp_path / 'checkpoints' / '3').exists()  # What the next start resumes from.


@pytest.mark.slow
@pytest.mark.parametrize('fault', [signal.SIGSTOP, signal.SIGKILL])
def test_a_host_that_hangs_or_dies_ends_the_others_too(data_dir, tmp_path, fault):
  """Before JAX's heartbeat notices, if the limit is shorter."""
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=100000', '--config.step_stall_seconds=5'
  )
  both = Processes(arguments)
  both.wait_for('step 3/')
  both.running[1].send_signal(fault)
  _, errors = both.running[0].communicate(timeout=60)
  both.running[1].send_signal(signal.SIGCONT)
  assert both.running[0].returncode == ExitStatus.HUNG, errors
  assert ' took more than 5 s; ' in errors
  assert ' in train' in (tmp_path / 'log.txt').read_text()
  both.running[1].communicate(timeout=60)
  assert both.running[1].returncode != 0


# Works for a second of its own time, and then hangs.
SUSPENDED = """
import time
from dropmae_jax.runtime import watchdog
watchdog.POLL_SECONDS = 0.1
watchdog = watchdog.Watchdog(2.0)
watchdog.watch('work')
time.sleep(0.3)  # The watchdog has started to count.
print('ready', flush=True)
for _ in range(10):
  time.sleep(0.1)
watchdog.watch('the last')
print('on', flush=True)
time.sleep(60)
"""


def test_no_time_passes_while_the_process_is_suspended():
  process = subprocess.Popen(
    [sys.executable, '-c', SUSPENDED], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGSTOP)
  time.sleep(3)
  process.send_signal(signal.SIGCONT)
  assert process.stdout.readline() == 'on\n', process.stderr.read()
  _, errors = process.communicate(timeout=30)
  assert process.returncode == ExitStatus.HUNG
  assert errors.startswith('error: the last took more than 2 s')
  # Also before a report is open.
  assert '\nthe last hangs; all threads of this process:\n' in errors


# Both a device and the disk of log.txt hang.
HANGING_LOG = """
import logging, time
from dropmae_jax.runtime import watchdog
class Disk(logging.Handler):
  def emit(self, record):
    time.sleep(60)
logging.getLogger('dropmae_jax').addHandler(Disk())
watchdog.REPORT_SECONDS = 1.0
watchdog.Watchdog(0.5).watch('step 7')
time.sleep(60)
"""


def test_a_log_that_cannot_be_written_does_not_delay_the_end():
  done = run_python('-c', HANGING_LOG, timeout=30)
  assert done.returncode == ExitStatus.HUNG
  assert done.stderr.startswith('error: step 7 took more than 0.5 s')


class Ended(BaseException):
  """Raised in place of the end of this process."""


def test_only_an_activity_that_takes_too_long_ends_the_process(monkeypatch, caplog):
  ended = []

  def end(status):
    ended.append(status)
    raise Ended

  monkeypatch.setattr(watchdog.os, '_exit', end)
  monkeypatch.setattr(watchdog, 'POLL_SECONDS', 0.02)
  monkeypatch.setattr(threading, 'excepthook', lambda _: None)
  watching, closed = Watchdog(0.5), Watchdog(0.5)
  closed.watch('after the end')
  closed.close()
  for _ in range(10):
    watching.watch('a step')
    time.sleep(0.1)
  watching.watch('a save', is_slow=True)
  time.sleep(0.8)
  watching.watch('a batch')
  watching.pause()
  time.sleep(0.8)
  assert (ended, caplog.records) == ([], [])
  watching.watch('the last')
  time.sleep(1.5)
  assert ended == [ExitStatus.HUNG]
  (record,) = caplog.records
  assert (record.name, record.levelno) == ('dropmae_jax', logging.ERROR)
  assert record.message.startswith('the last hangs; all threads of this process:\n')


@pytest.mark.parametrize(
  ('seconds', 'is_slow', 'limit'), [(20, False, 20), (20, True, 1800), (4000, True, 4000)]
)
def test_the_longer_limit_applies_to_slow_activities(seconds, is_slow, limit):
  watching = Watchdog(seconds)
  watching.watch('a save', is_slow=is_slow)
  assert watching._watched == ('a save', limit)
  watching.close()
