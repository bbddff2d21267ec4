"""A step that hangs ends the run, and one that takes its time does not."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, run_python, train_arguments
from test_commands import assert_same_weights, losses
from test_hosts import Processes
from test_loader_commands import (
  WORKERS,
  assert_gone,
  blocks_of,
  processes_of,
  running,
  shared_files,
  wait_for_line,
)

from dropmae_jax.runtime import watchdog as stalls

# What the metrics of step 6 need waits on the device for ever.
HANGING = """
import threading
from absl import app
import jax, jax.numpy as jnp
from dropmae_jax import main
from dropmae_jax.runtime import cli
real = train.build
def wait(loss):
  threading.Event().wait()
  return loss
late = jax.jit(lambda x: jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x))
def build_program(*arguments):
  program = real(*arguments)
  count = iter(range(1, 9))
  def step(state, frames, key):
    state, metrics = program.step(state, frames, key)
    return state, metrics._replace(loss=late(metrics.loss)) if next(count) == 6 else metrics
  return program._replace(step=step)
train.build = build_program
cli.run(lambda: app.run(main.main, flags_parser=main.parse))
"""


def test_a_step_that_hangs_ends_the_run_with_stacks(trained, data_dir, tmp_path):
  arguments = train_arguments(
    data_dir, tmp_path, WORKERS, '--config.num_steps=8', '--config.checkpoint.every_steps=3',
    '--config.step_stall_seconds=2',
  )  # fmt: skip
  with running('-c', HANGING, *arguments[2:]) as process:
    pids = processes_of(process.pid)
    wait_for_line(process, 'step 1/')
    names = shared_files([process.pid, *pids])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == stalls.STALLED == 69
    assert_gone(pids, names | blocks_of(process.pid))
  (told,) = [line for line in errors.splitlines() if line.startswith('error: ')]
  assert told.startswith('error: step 6 took more than 2 s; log.txt, or the terminal of a process')
  assert 'the same command goes on from the last checkpoint.' in told
  assert 'Traceback' not in errors
  log = (tmp_path / 'log.txt').read_text()
  assert 'step 6 hangs; all threads of this process:' in log
  assert ' in wait' in log
  assert ' in train' in log
  done = run_python(*arguments)
  assert done.returncode == 0, done.stderr
  assert 'going on after step 3 of 8' in done.stdout
  assert losses(tmp_path) == losses(trained)
  assert_same_weights(tmp_path, trained)


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
  assert both.running[0].returncode == stalls.STALLED, errors
  assert ' took more than 5 s; ' in errors
  assert ' in train' in (tmp_path / 'log.txt').read_text()
  both.running[1].communicate(timeout=60)
  assert both.running[1].returncode != 0


# Works for a second, as its own clock has it, and then hangs.
SUSPENDED = """
import time
from dropmae_jax.runtime import watchdog
watchdog.POLL_SECONDS = 0.1
watchdog = watchdog.Watchdog(2.0, say=print)
watchdog.watch('work')
time.sleep(0.3)  # By now it counts.
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
  output, errors = process.communicate(timeout=30)
  assert process.returncode == stalls.STALLED
  assert errors.startswith('error: the last took more than 2 s')
  assert output.startswith('the last hangs; all threads of this process:')


# Both the disk of log.txt and a device hang.
SILENT = """
import time
from dropmae_jax.runtime import watchdog
watchdog.TELL_SECONDS = 1.0
watchdog.Watchdog(0.5, say=lambda text: time.sleep(60)).watch('step 7')
time.sleep(60)
"""


def test_a_log_that_cannot_be_written_does_not_hold_up_the_end():
  done = run_python('-c', SILENT, timeout=30)
  assert done.returncode == stalls.STALLED
  assert done.stderr.startswith('error: step 7 took more than 0.5 s')


class Ended(BaseException):
  """Instead of the end of this process."""


def test_only_what_does_not_get_on_is_ended(monkeypatch):
  ended, said = [], []

  def end(status):
    ended.append(status)
    raise Ended

  monkeypatch.setattr(stalls.os, '_exit', end)
  monkeypatch.setattr(stalls, 'POLL_SECONDS', 0.02)
  monkeypatch.setattr(threading, 'excepthook', lambda _: None)
  watchdog = stalls.Watchdog(0.5, say=said.append)
  for _ in range(10):
    watchdog.watch('a step')
    time.sleep(0.1)
  watchdog.watch('a save', is_slow=True)
  time.sleep(0.8)
  watchdog.watch('a batch')
  watchdog.pause()
  time.sleep(0.8)
  closed = stalls.Watchdog(0.5, say=pytest.fail)
  closed.watch('what is over')
  closed.close()
  assert (ended, said) == ([], [])
  watchdog.watch('the last')
  time.sleep(1.5)
  assert ended == [stalls.STALLED]
  assert [text.partition(';')[0] for text in said] == ['the last hangs']


@pytest.mark.parametrize(
  ('seconds', 'is_slow', 'limit'), [(20, False, 20), (20, True, 1800), (4000, True, 4000)]
)
def test_the_longer_limit_counts_for_what_is_slow(seconds, is_slow, limit):
  watchdog = stalls.Watchdog(seconds, say=pytest.fail)
  watchdog.watch('a save', is_slow=is_slow)
  assert watchdog._watched == ('a save', limit)
  watchdog.close()
