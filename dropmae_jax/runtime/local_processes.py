"""Starts the processes of a run on this machine, each with its own device, and waits for them."""

import ctypes
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from dropmae_jax.runtime.multihost import HEARTBEAT_SECONDS

POLL_SECONDS = 0.1
# Once one has failed, how long the others may take to notice and to end.
END_SECONDS = HEARTBEAT_SECONDS + 60.0
# Option of prctl(2).
PR_SET_PDEATHSIG = 1


def connected(command: Sequence[str], count: int) -> list[list[str]]:
  """Returns a command of training `count` times, with the options that make them one run.

  Process I uses device I of this machine, if it has GPUs.
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  run_of_all = [f'--coordinator_address=localhost:{port}', f'--num_processes={count}']
  return [
    [*command, *run_of_all, f'--process_id={number}', f'--local_device_ids={number}']
    for number in range(count)
  ]


def run(commands: Sequence[Sequence[str]]) -> int:
  """Runs commands at the same time; returns the status of the first that failed, or 0.

  Ctrl-C and SIGTERM reach all of them; and they are stopped like this if this process is killed.
  """
  end_with_parent = ctypes.CDLL(None).prctl
  processes = [
    subprocess.Popen(command, preexec_fn=lambda: end_with_parent(PR_SET_PDEATHSIG, signal.SIGTERM))
    for command in commands
  ]

  def forward(number: int, frame: object) -> None:
    del number, frame
    for process in processes:
      process.send_signal(signal.SIGTERM)

  for each in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(each) is not signal.SIG_IGN:
      signal.signal(each, forward)
  return _wait_for(processes)


def _wait_for(processes: Sequence[subprocess.Popen]) -> int:
  failed, deadline = 0, float('inf')
  while any(process.poll() is None for process in processes):
    time.sleep(POLL_SECONDS)
    ended = [process.returncode for process in processes if process.poll()]
    if ended and not failed:
      failed, deadline = ended[0], time.monotonic() + END_SECONDS
    if time.monotonic() > deadline:
      print('error: the other processes do not end; they are killed', file=sys.stderr)
      for process in processes:
        process.kill()
      deadline = float('inf')
  failed = failed or next((each.returncode for each in processes if each.returncode), 0)
  return 128 - failed if failed < 0 else failed
