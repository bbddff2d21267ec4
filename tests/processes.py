"""Real training processes, and their loader's, for tests that stop and kill them."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import portpicker
from conftest import COMPILE_ONCE, ROOT, train_arguments

from dropmae_jax.data import loader_process

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
  """The process ids of both loader processes, once they run."""
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
  """Names in /dev/shm that processes have open: chunks, and the semaphores of queues."""
  lines = [line for p in pids for line in pathlib.Path(f'/proc/{p}/maps').read_text().split('\n')]
  return {line.split('/dev/shm/')[1].split()[0] for line in lines if '/dev/shm/' in line}


def memory_of(trainer):
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


class Processes:
  """Two training processes of one run, with two devices each."""

  def __init__(self, arguments, *, mine=((), ()), program=None):
    """Starts both.

    Args:
      arguments: of the command, as of `train_arguments`.
      mine: further arguments of each.
      program: source to run instead of the module.
    """
    port = portpicker.pick_unused_port()
    self.running = []
    for number in range(2):
      begin = ['-c', program, *arguments[2:]] if program else arguments
      command = [
        *begin,
        *mine[number],
        f'--coordinator_address=localhost:{port}',
        '--num_processes=2',
        f'--process_id={number}',
      ]
      self.running.append(
        subprocess.Popen(
          [sys.executable, *map(str, command)],
          cwd=ROOT,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
          env={**os.environ, **COMPILE_ONCE, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'},
        )
      )

  def wait_for(self, text):
    """Reads the output of process 0 up to a line with a text."""
    for line in self.running[0].stdout:
      if text in line:
        return
    raise AssertionError(self.running[0].stderr.read())

  def ends(self):
    """Waits for both; returns (status, output, errors) of each."""
    found = []
    for process in self.running:
      output, errors = process.communicate(timeout=200)
      found.append((process.returncode, output, errors))
    return found
