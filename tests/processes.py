"""Real training processes, for tests that stop and kill them."""

import contextlib
import os
import signal
import subprocess
import sys

import portpicker
from conftest import COMPILE_ONCE, ROOT, train_arguments


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
  return running(*train_arguments(data_dir, workdir, *more))


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
    ended = []
    for process in self.running:
      output, errors = process.communicate(timeout=200)
      ended.append((process.returncode, output, errors))
    return ended
