"""Ends a run whose loop hangs: on a device, on another host or on a disk.

Nothing can interrupt a thread that waits inside a call to a device or a network. So another thread
logs the stacks of all threads, and ends the process; the next start resumes.
"""

import faulthandler
import logging
import os
import sys
import tempfile
import threading
from typing import NamedTuple

from dropmae_jax.runtime.errors import ExitStatus

# Least limit for what compiles or writes to storage.
SLOW_SECONDS = 1800.0
POLL_SECONDS = 0.5
# How long the report may take, as the disk of log.txt may be what hangs.
REPORT_SECONDS = 10.0

_log = logging.getLogger('dropmae_jax')


class _Watched(NamedTuple):
  what: str
  seconds: float


class Watchdog:
  """Ends this process if an activity takes too long; the loop calls `watch` for each new one.

  It counts its own polls, so no time passes while the process is suspended.
  """

  def __init__(self, seconds: float) -> None:
    """Starts its thread; watches nothing so far.

    Args:
      seconds: how long an activity may take.
    """
    self._seconds = seconds
    self._watched: _Watched | None = None
    self._closed = threading.Event()
    threading.Thread(target=self._poll, name='watchdog', daemon=True).start()

  def watch(self, what: str, *, is_slow: bool = False) -> None:
    """Starts to count from zero.

    Args:
      what: name of the activity, for the message.
      is_slow: it compiles or writes to storage, so its limit is at least SLOW_SECONDS.
    """
    self._watched = _Watched(what, max(self._seconds, SLOW_SECONDS) if is_slow else self._seconds)

  def pause(self) -> None:
    """Watches nothing until the next `watch`."""
    self._watched = None

  def close(self) -> None:
    """Ends its thread."""
    self._closed.set()

  def _poll(self) -> None:
    previous, polls = None, 0
    while not self._closed.wait(POLL_SECONDS):
      watched = self._watched
      polls = polls + 1 if watched is previous else 0
      previous = watched
      if watched is not None and polls * POLL_SECONDS >= watched.seconds:
        report = threading.Thread(target=_report, args=(watched,), daemon=True)
        report.start()
        report.join(REPORT_SECONDS)
        os._exit(ExitStatus.HUNG)


def _report(watched: _Watched) -> None:
  found = stacks()
  # First to the terminal: log.txt may be on the disk that hangs.
  print(
    f'error: {watched.what} took more than {watched.seconds:g} s; log.txt, or the terminal of a'
    ' process other than the first, shows where it waits. Check devices, storage and the'
    ' other hosts; the same command resumes from the last checkpoint. If nothing hangs, raise'
    ' config.step_stall_seconds.',
    file=sys.stderr,
    flush=True,
  )
  _log.error(f'{watched.what} hangs; all threads of this process:\n{found}')


def stacks() -> str:
  """Returns the stacks of all threads of this process."""
  with tempfile.TemporaryFile('w+') as file:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read()
