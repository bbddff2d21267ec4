"""Third stop: batches on the devices, two ahead of the step, whatever becomes of the loader.

A thread of its own reads and copies, so that both overlap with the step. A loader process that
dies costs time, never a batch: the stream is a function of the step and begins anew at the next
one. A loader that hangs ends the run, with the stacks of all threads.
"""

import dataclasses
import faulthandler
import multiprocessing
import os
import queue
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import jax
import numpy as np

from dropmae_jax import data

AHEAD = 2
DEATHS_IN_A_ROW = 3
POLL_SECONDS = 0.5
# How long a loader may take to finish the batch that it is at when it is told to end.
END_SECONDS = 30.0
# How grain tells that a process died: by a RuntimeError, but so may a source.
GRAIN_DEATH = re.compile(r'Worker process was terminated unexpectedly with exit code (-?\d+)')

Batch = dict[str, np.ndarray]


class LoaderFailed(RuntimeError):
  """The loader hangs or dies again and again; threads of it may never end."""


@dataclasses.dataclass(frozen=True)
class _Failure:
  """What ended a reader; `death` says how a process of it died, '' if it was no death."""

  error: Exception
  death: str


class _Reader:
  """One life of the loader: a thread that fills `items` with batches, and last a failure."""

  def __init__(
    self,
    make_batches: Callable[[int], Iterator[Batch]],
    to_device: Callable[[Batch], jax.Array],
    step: int,
  ) -> None:
    self.items: queue.Queue[jax.Array | _Failure] = queue.Queue()
    self.room = threading.Semaphore(AHEAD)
    self._make_batches, self._to_device, self._step = make_batches, to_device, step
    self._stopped = threading.Event()
    self._others = set(multiprocessing.active_children())
    self._processes: set[BaseProcess] = set()
    self._thread = threading.Thread(target=self._read, name='feed', daemon=True)
    self._thread.start()

  def _read(self) -> None:
    # Processes inherit the mask of the thread that starts them, and this one starts the loader's:
    # no signal to all processes can end them before they have said that they ignore it. The
    # tracker has to be there before, because starting it takes the mask off.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, data.STOP_SIGNALS)
    try:
      batches = self._make_batches(self._step)
    except Exception as error:
      self.items.put(_Failure(error, ''))
      return
    try:
      while not self._stopped.is_set():
        batch = next(batches)
        self.processes()
        while not self.room.acquire(timeout=POLL_SECONDS):
          if self._stopped.is_set():
            return
        self.items.put(jax.block_until_ready(self._to_device(batch)))
    except Exception as error:
      found = GRAIN_DEATH.search(str(error))
      self.items.put(_Failure(error, _how(int(found[1])) if found else ''))
    finally:
      batches.close()

  def processes(self) -> list[BaseProcess]:
    """Lists the processes of this loader, those that have ended too; has to be asked often.

    Grain does not hand them out, and multiprocessing forgets those that have ended.
    """
    self._processes.update(set(multiprocessing.active_children()) - self._others)
    return list(self._processes)

  def silent_death(self) -> str:
    """Says how a process ended that nobody told to, or returns ''.

    With status 0, that is; every other death grain notices, and this thread hears of it.
    """
    return _how(0) if any(process.exitcode == 0 for process in self.processes()) else ''

  def end(self) -> bool:
    """Lets the loader finish what it is at; returns False if it had to be killed."""
    self._stopped.set()
    deadline = time.monotonic() + END_SECONDS
    while self._thread.is_alive() and time.monotonic() < deadline and not self.silent_death():
      self._thread.join(POLL_SECONDS)
    if self._thread.is_alive():
      self.kill()
    return not self._thread.is_alive()

  def kill(self) -> None:
    """Ends the processes; the thread stays, if grain waits for one of them for ever."""
    self._stopped.set()
    for process in self.processes():
      process.kill()


class Feed:
  """The batches of a loader, in order and without a gap, as arrays on the devices."""

  def __init__(
    self,
    make_batches: Callable[[int], Iterator[Batch]],
    *,
    first_step: int,
    to_device: Callable[[Batch], jax.Array],
    stall_seconds: float,
    say: Callable[[str], None],
  ) -> None:
    """Begins to read.

    Args:
      make_batches: returns the stream from a step on, with a `close`; called in another thread.
      first_step: where to begin.
      to_device: copies what is needed of a batch; called in another thread.
      stall_seconds: how long the loop may wait for a batch.
      say: takes what the user should know.
    """
    self._make_batches, self._to_device = make_batches, to_device
    self._step, self._stall_seconds, self._say = first_step, stall_seconds, say
    self._deaths = self._deaths_in_a_row = 0
    self._failed = False
    self._reader = self._start()

  def _start(self) -> _Reader:
    return _Reader(self._make_batches, self._to_device, self._step)

  def __next__(self) -> jax.Array:
    """Returns the next batch.

    Raises:
      LoaderFailed: none came for `stall_seconds`, or processes died in a row.
      Exception: whatever reading raised, unless it was a process's death.
    """
    asked = time.monotonic()
    while True:
      try:
        item = self._reader.items.get(timeout=POLL_SECONDS)
      except queue.Empty:
        if death := self._reader.silent_death():
          self._build_anew(death)
          asked = time.monotonic()
        elif time.monotonic() - asked > self._stall_seconds:
          self._give_up_waiting()
        continue
      if not isinstance(item, _Failure):
        break
      if not item.death:
        raise item.error
      self._build_anew(item.death)
      asked = time.monotonic()
    self._reader.room.release()
    self._step += 1
    self._deaths_in_a_row = 0
    return item

  def _build_anew(self, death: str) -> None:
    """Begins a new loader at the next step: grain's own would leave out the dead one's batches."""
    self._reader.end()
    self._deaths += 1
    self._deaths_in_a_row += 1
    if self._deaths_in_a_row == DEATHS_IN_A_ROW:
      self._failed = True
      raise LoaderFailed(
        f'processes of the loader died {DEATHS_IN_A_ROW} times in a row (the last: {death}), and'
        f' the batch of step {self._step + 1} never came; if memory is short, lower'
        ' config.data.num_workers, else set it to 0 to see the error itself.'
      )
    self._say(
      f'a process of the loader died ({death}), death {self._deaths} of this run; it is built anew'
      f' from step {self._step + 1}'
    )
    self._reader = self._start()

  def _give_up_waiting(self) -> None:
    self._failed = True
    processes = [each for each in self._reader.processes() if each.is_alive()]
    self._say(f'the loader hangs; all threads of this process:\n{_stacks()}')
    for process in processes:
      os.kill(process.pid, data.SHOW_STACKS)
    if processes:
      time.sleep(POLL_SECONDS)  # They write their stacks to the terminal.
    self._reader.kill()
    raise LoaderFailed(
      f'no batch came within data.stall_seconds={self._stall_seconds:g}; log.txt shows where this'
      ' process waits, and the terminal where those of the loader do. Look after the storage of'
      ' config.data_dir, or raise config.data.stall_seconds if it is that slow.'
    )

  def close(self) -> None:
    """Ends the loader and its processes.

    Raises:
      LoaderFailed: a thread that reads hangs, and would hold up the end of this process.
    """
    if self._failed:
      self._reader.kill()
    elif not self._reader.end() and not self._reader.processes():
      raise LoaderFailed(
        f'a thread of the loader did not end within {END_SECONDS:g} s; what was saved is whole.'
        ' Look after the storage of config.data_dir.'
      )


def _how(exit_code: int) -> str:
  return f'killed by signal {-exit_code}' if exit_code < 0 else f'exit status {exit_code}'


def _stacks() -> str:
  with tempfile.TemporaryFile('w+') as file:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read()
