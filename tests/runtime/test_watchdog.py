"""A run that hangs is ended, wherever it hangs; one that takes its time or is suspended is not."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT, run_python, train_arguments
from processes import Processes, running

from dropmae_jax.runtime import watchdog
from dropmae_jax.runtime.errors import ExitStatus

ABORTED = -signal.SIGABRT

# The loss of step 6 never becomes ready on the device.
HANGING_STEP = """
import threading
import jax, jax.numpy as jnp
from dropmae_jax import main, train
from dropmae_jax.runtime import cli
real = train.compiled_step
def wait(loss):
  threading.Event().wait()
  return loss
late = jax.jit(lambda x: jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x))
def compiled_step(*arguments):
  fit = real(*arguments)
  count = iter(range(1, 9))
  def step(state, frames, key):
    state, metrics = fit.step(state, frames, key)
    return state, metrics._replace(loss=late(metrics.loss)) if next(count) == 6 else metrics
  return fit._replace(step=step)
train.compiled_step = compiled_step
cli.run(main.main)
"""


def test_a_step_that_hangs_ends_the_run_with_stacks(data_dir, tmp_path):
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=8', '--config.checkpoint.every_steps=3',
    '--config.step_stall_seconds=2',
  )  # fmt: skip
  done = run_python('-c', HANGING_STEP, *arguments[2:], timeout=120)
  assert done.returncode == ABORTED == 128 - ExitStatus.ABORTED, done.stderr
  (error,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert error.startswith('error: step 6 took more than 2 s; the stacks of all threads below')
  assert 'the same command resumes from the last checkpoint.' in error
  assert error.endswith('If nothing hangs, raise config.step_stall_seconds.')
  assert 'Traceback' not in done.stderr
  # On the terminal, and for the log of the next start.
  for stacks in (done.stderr, (tmp_path / 'crash-0.txt').read_text()):
    assert 'Fatal Python error: Aborted' in stacks
    assert ' in wait' in stacks
    assert ' in loop' in stacks
    assert 'The watchdog ended this process: step 6 took more than 2 s.\n' in stacks
  assert (tmp_path / 'checkpoints' / '3').exists()  # What the next start resumes from.


# The process says when it begins, and hangs in a way of its own.
BEGIN = """
import ctypes, os, sys, threading, time
from dropmae_jax.runtime import watchdog
watchdog.POLL_SECONDS = 0.1
watchdog = watchdog.Watchdog(1.0)
watchdog.watch('work')
"""
HANGS = {
  'a thread that sleeps': 'time.sleep(60)',
  # `PyDLL` keeps Python's lock, so that no other thread of the process runs.
  'native code that holds the GIL': 'ctypes.PyDLL(None).sleep(60)',
  'a read': 'os.read(os.pipe()[0], 1)',
  'the end of the process': 'threading.Thread(target=time.sleep, args=(60,)).start()',
}


@pytest.mark.parametrize('hang', HANGS.values(), ids=HANGS)
def test_whatever_hangs_is_ended_with_stacks(hang):
  began = time.monotonic()
  done = run_python('-c', BEGIN + hang, timeout=30)
  assert done.returncode == ABORTED, done.stderr
  assert time.monotonic() - began < 20
  assert done.stderr.startswith('error: work took more than 1 s; ')
  assert 'Fatal Python error: Aborted' in done.stderr


# Works for a second of its own time, and then hangs.
SUSPENDED = """
print('ready', flush=True)
for _ in range(7):
  time.sleep(0.1)
watchdog.watch('the last')
print('on', flush=True)
time.sleep(60)
"""


def test_no_time_passes_while_the_process_is_suspended():
  with running('-c', BEGIN + SUSPENDED) as process:
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    assert process.stdout.readline() == 'on\n', process.stderr.read()
    _, errors = process.communicate(timeout=30)
  assert process.returncode == ABORTED
  assert errors.startswith('error: the last took more than 1 s')


ONE_ACTIVITY = """
print(watchdog._process.pid, flush=True)
watchdog.watch('the last')
time.sleep(60)
"""


def test_no_time_passes_while_the_watchdog_is_suspended():
  with running('-c', BEGIN + ONE_ACTIVITY) as process:
    pid = int(process.stdout.readline())
    time.sleep(0.5)  # It has begun to count.
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
  assert time.monotonic() - began > 0.2
  assert process.returncode == ABORTED
  assert errors.startswith('error: the last took more than 1 s')


# Sends a signal to the watchdog once that has said that it ignores it; before, it would end it.
SIGNALLED = """
def ignored():
  with open(f'/proc/{watchdog._process.pid}/status') as file:
    return int(file.read().split('SigIgn:')[1].split()[0], 16)
while not ignored() >> (NUMBER - 1) & 1:
  time.sleep(0.01)
os.kill(watchdog._process.pid, NUMBER)
time.sleep(60)
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_to_all_processes_of_a_job_do_not_end_the_watchdog(number):
  program = BEGIN + SIGNALLED.replace('NUMBER', f'{number:d}')
  done = run_python('-c', program, timeout=30)
  assert done.returncode == ABORTED, done.stderr


# Nobody reads what the process says; or its pipe is full, so that its stacks cannot be written.
SILENT = """
import fcntl
end, out = os.pipe()
if sys.argv[1] == 'closed':
  os.close(end)
else:
  os.write(out, b' ' * fcntl.fcntl(out, fcntl.F_GETPIPE_SZ))
os.dup2(out, 2)
"""


@pytest.mark.parametrize(('pipe', 'status'), [('closed', signal.SIGABRT), ('full', signal.SIGKILL)])
def test_an_error_output_that_nobody_reads_does_not_keep_the_process(pipe, status):
  program = SILENT + BEGIN + 'time.sleep(60)'
  assert run_python('-c', 'import os, sys' + program, pipe, timeout=40).returncode == -status


# Longer than the limit in all: activities, a slow one, one with a limit of its own.
WORKS = """
for _ in range(6):
  watchdog.watch('a step')
  time.sleep(0.3)
watchdog.watch('a save', is_slow=True)
time.sleep(1.5)
watchdog.watch('a batch', least=100.0)
watchdog.write_crashes_to('')
time.sleep(1.5)
watchdog.watch('the end')
watchdog.close()
time.sleep(1.5)
"""


def test_what_does_not_take_too_long_is_not_ended():
  done = run_python('-c', BEGIN + WORKS, timeout=30)
  assert (done.returncode, done.stderr) == (0, '')


def test_it_ends_a_process_whose_streams_are_closed():
  """As by `>&- 2>&-`."""
  hangs = textwrap.indent(BEGIN + HANGS['a thread that sleeps'], '  ')
  code = f'from dropmae_jax.runtime import cli\ndef main():\n{hangs}\ncli.run(main)'
  done = subprocess.run(
    ['bash', '-c', 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code],
    cwd=ROOT, timeout=30, check=False,
  )  # fmt: skip
  assert done.returncode == ABORTED


def test_the_watchdog_ends_with_its_process():
  with running('-c', BEGIN + 'print(watchdog._process.pid, flush=True); time.sleep(60)') as process:
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f'/proc/{pid}/cmdline') and time.monotonic() < deadline:
      time.sleep(0.1)
    assert not os.path.exists(f'/proc/{pid}/cmdline')


# A thread of a library does not end, or JAX does not.
HANGING_END = """
import sys, threading, time
import jax
from dropmae_jax import main
from dropmae_jax.runtime.errors import UserError
main.END_SECONDS = 1.0
def end():
  if sys.argv[1] == 'thread':
    threading.Thread(target=time.sleep, args=(60,)).start()
  else:
    jax.distributed.shutdown = lambda: time.sleep(60)
  if sys.argv[2] == 'error':
    raise UserError('why')
  return 75
main.main = end
main.command()
"""


@pytest.mark.parametrize(('end', 'status'), [('status', 75), ('error', 2)])
def test_a_thread_does_not_keep_the_process(end, status):
  done = run_python('-c', HANGING_END, 'thread', end, timeout=40)
  assert (done.returncode, done.stderr) == (status, 'error: why\n' if end == 'error' else '')


@pytest.mark.parametrize('end', ['status', 'error'])
def test_a_process_that_does_not_end_is_ended(end):
  done = run_python('-c', HANGING_END, 'JAX', end, timeout=40)
  assert done.returncode == ABORTED, done.stderr
  assert '\nerror: the end of the process took more than 1 s; ' in '\n' + done.stderr
  assert 'step_stall_seconds' not in done.stderr
  assert ' in _end\n' in done.stderr


@pytest.mark.parametrize(
  ('seconds', 'is_slow', 'least', 'limit'),
  [
    (20, False, 0, 20), (20, True, 0, 1800), (4000, True, 0, 4000), (20, False, 30, 30),
    (20, False, 10, 20),
  ],
)  # fmt: skip
def test_the_longest_limit_applies(seconds, is_slow, least, limit):
  watching = watchdog.Watchdog(seconds)
  watching.watch('a save', is_slow=is_slow, least=least)
  for path in ('', '/a/crash.txt', ''):
    watching.write_crashes_to(path)  # Changes nothing else.
    heartbeat = watchdog.HEARTBEAT.unpack(watching._memory[:])[1:]
    assert [heartbeat[0], *(each.rstrip(b'\0').decode() for each in heartbeat[1:])] == [
      limit, 'a save', path
    ]  # fmt: skip
  watching.close()


@pytest.mark.slow
@pytest.mark.parametrize('fault', [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize('faulty', [0, 1])
def test_a_host_that_hangs_or_dies_ends_the_others_too(data_dir, tmp_path, fault, faulty):
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=100000', '--config.step_stall_seconds=5'
  )
  both = Processes(arguments)
  both.wait_for('step 3/')
  both.running[faulty].send_signal(fault)
  _, errors = both.running[1 - faulty].communicate(timeout=60)
  assert both.running[1 - faulty].returncode == ABORTED, errors
  both.running[faulty].send_signal(signal.SIGCONT)
  both.running[faulty].communicate(timeout=60)
  assert both.running[faulty].returncode != 0
