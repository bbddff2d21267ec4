"""Ends a run whose loop stands still on a device, on another host or on a disk.

Nothing can interrupt a thread that waits in a device's or a network's call; so another thread tells
where all of them are, and ends the process for the next start.
"""

import faulthandler
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import NamedTuple

from dropmae_jax.runtime.errors import ExitStatus

# What compiles or writes to storage may take so long at least.
SLOW_SECONDS = 1800.0
POLL_SECONDS = 0.5
# How long telling may take; the disk of log.txt may be what hangs.
TELL_SECONDS = 10.0


class _Watched(NamedTuple):
  what: str
  seconds: float


class Watchdog:
  """Ends this process if what is watched takes too long; to be told as often as it gets on.

  Counts its own polls: while the process is suspended, no time passes.

  Attributes:
    say: takes what the user should know; may be replaced by what reaches more of them.
  """

  def __init__(self, seconds: float, *, say: Callable[[str], None]) -> None:
    """Begins to look, at nothing so far.

    Args:
      seconds: that what is watched may take.
      say: takes what the user should know; called in another thread.
    """
    self._seconds, self.say = seconds, say
    self._watched: _Watched | None = None
    self._closed = threading.Event()
    threading.Thread(target=self._look, name='watchdog', daemon=True).start()

  def watch(self, what: str, *, is_slow: bool = False) -> None:
    """Begins to count anew.

    Args:
      what: is done now, for the message.
      is_slow: it compiles or writes.
    """
    self._watched = _Watched(what, max(self._seconds, SLOW_SECONDS) if is_slow else self._seconds)

  def pause(self) -> None:
    """Watches nothing until the next `watch`."""
    self._watched = None

  def close(self) -> None:
    """Watches nothing any more."""
    self._closed.set()

  def _look(self) -> None:
    seen, polls = None, 0
    while not self._closed.wait(POLL_SECONDS):
      watched = self._watched
      polls = polls + 1 if watched is seen else 0
      seen = watched
      if watched is not None and polls * POLL_SECONDS >= watched.seconds:
        self._end(watched)

  def _end(self, watched: _Watched) -> None:
    telling = threading.Thread(target=self._tell, args=(watched,), daemon=True)
    telling.start()
    telling.join(TELL_SECONDS)
    os._exit(ExitStatus.HUNG)

  def _tell(self, watched: _Watched) -> None:
    found = stacks()
    # First to the terminal: log.txt may be on the disk that hangs.
    print(
      f'error: {watched.what} took more than {watched.seconds:g} s; log.txt, or the terminal of a'
      ' process other than the first, shows where it waits. Look after devices, storage and the'
      ' other hosts; the same command goes on from the last checkpoint. If nothing hangs, raise'
      ' config.step_stall_seconds.',
      file=sys.stderr,
      flush=True,
    )
    self.say(f'{watched.what} hangs; all threads of this process:\n{found}')


def stacks() -> str:
  """Returns the stacks of all threads of this process."""
  with tempfile.TemporaryFile('w+') as file:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read()
