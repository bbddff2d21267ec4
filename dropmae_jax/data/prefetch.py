"""Third stop: batches on the devices, two ahead of the step, whatever becomes of the loader.

A thread of its own reads and copies, so that both overlap with the step. A loader process that
dies costs time, never a batch: the stream is a function of the step and begins anew at the next
one. A loader that hangs ends the run, with the stacks of all threads.
"""

import contextlib
import dataclasses
import errno
import multiprocessing.process
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import jax
import numpy as np

from dropmae_jax.data import loader_process
from dropmae_jax.runtime import watchdog
from dropmae_jax.runtime.errors import ExitStatus, RunFailed

AHEAD = 2
DEATHS_IN_A_ROW = 3
POLL_SECONDS = 0.5
# How long a loader may take to finish the batch that it is at when it is told to end.
END_SECONDS = 30.0
# How long grain may take to notice that all processes were killed; it looks every second.
KILL_SECONDS = 10.0
# Stands for the exit status 0 of a process that nobody told to end.
SILENT_DEATH = 256
# How grain tells that a process died: by a RuntimeError, but so may a source.
GRAIN_DEATH = re.compile(r'Worker process was terminated unexpectedly with exit code (-?\d+)')

Batch = dict[str, np.ndarray]


class LoaderFailed(RunFailed):
  """The loader dies again and again; threads of it may never end."""


class LoaderStalled(LoaderFailed):
  """The loader hangs, as a storage may that comes back."""

  exit_status = ExitStatus.HUNG


class Interrupted(Exception):
  """The run is to stop, and the batch that it waits for has not come."""


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
    self._others = _all_processes()
    self._thread = threading.Thread(target=self._read, name='feed', daemon=True)
    self._thread.start()
    threading.Thread(target=self._watch, name='feed watch', daemon=True).start()

  def _read(self) -> None:
    # Processes inherit the mask of the thread that starts them, and this one starts the loader's:
    # no signal to all processes can end them before they have said that they ignore it. The
    # tracker has to be there before, because starting it takes the mask off.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, loader_process.STOP_SIGNALS)
    try:
      batches = self._make_batches(self._step)
    except Exception as error:
      self.items.put(_Failure(error, ''))
      return
    try:
      while not self._stopped.is_set():
        batch = next(batches)
        while not self.room.acquire(timeout=POLL_SECONDS):
          if self._stopped.is_set():
            return
        self.items.put(jax.block_until_ready(self._to_device(batch)))
        del batch  # Else it stays while the next one is gathered.
    except Exception as error:
      found = GRAIN_DEATH.search(str(error))
      if getattr(error, 'errno', None) == errno.ENOSPC:
        error = loader_process.out_of_room(error)
      self.items.put(_Failure(error, _how(int(found[1])) if found else ''))
    finally:
      batches.close()

  def _watch(self) -> None:
    """Lets grain notice processes that ended with status 0.

    It takes these to be alive, and would wait for them for ever.
    """
    while self._thread.is_alive():
      for process in self.processes():
        if process.exitcode == 0:
          process._popen.returncode = SILENT_DEATH
      self._thread.join(POLL_SECONDS)

  def processes(self) -> list[BaseProcess]:
    """Lists the processes of this loader that grain has not taken leave of, alive or not."""
    return [each for each in _all_processes() - self._others if each.pid]

  def end(self) -> bool:
    """Lets the loader finish what it is at; returns False if a thread of it did not end."""
    self._stopped.set()
    self._thread.join(END_SECONDS)
    return self.kill()

  def kill(self) -> bool:
    """Ends the processes and removes what they leave; returns False if a thread did not end."""
    self._stopped.set()
    processes = self.processes()
    for process in processes:
      process.kill()
    deadline = time.monotonic() + KILL_SECONDS
    for process in processes:  # One that waits for a storage which hangs does not end.
      process.join(max(0.0, deadline - time.monotonic()))
    self._thread.join(KILL_SECONDS if processes else 0)
    if not self._thread.is_alive():
      loader_process.unlink_blocks_of_dead_processes()
    return not self._thread.is_alive()


def _all_processes() -> set[BaseProcess]:
  """Returns the processes that somebody holds; grain does not hand out its own.

  `multiprocessing.active_children` would forget those that end before it is first called, as they
  may while this process is held up.
  """
  while True:
    with contextlib.suppress(RuntimeError):  # One was added meanwhile.
      return set(multiprocessing.process._dangling)


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
    is_interrupted: Callable[[], bool] = lambda: False,
  ) -> None:
    """Begins to read.

    Args:
      make_batches: returns the stream from a step on, with a `close`; called in another thread.
      first_step: where to begin.
      to_device: copies what is needed of a batch; called in another thread.
      stall_seconds: how long the loop may wait for a batch.
      say: takes what the user should know.
      is_interrupted: whether waiting for a batch has to end.
    """
    self._is_interrupted = is_interrupted
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
      LoaderStalled: none came for `stall_seconds`.
      LoaderFailed: processes died in a row.
      Interrupted: the run is to stop, and none is there.
      Exception: whatever reading raised, unless it was a process's death.
    """
    asked = time.monotonic()
    while True:
      try:
        item = self._reader.items.get(timeout=POLL_SECONDS)
      except queue.Empty:
        if self._is_interrupted():
          self._failed = True  # What it waits for may never come.
          raise Interrupted from None
        if time.monotonic() - asked > self._stall_seconds:
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
        f' the batch of step {self._step + 1} never came; if memory is short,'
        f' {loader_process.MORE_MEMORY}, else set config.data.num_workers to 0 to see the error'
        ' itself.'
      )
    self._say(
      f'a process of the loader died ({death}), death {self._deaths} of this run; it is built anew'
      f' from step {self._step + 1}'
    )
    self._reader = self._start()

  def _give_up_waiting(self) -> None:
    self._failed = True
    processes = [each for each in self._reader.processes() if each.is_alive()]
    self._say(f'the loader hangs; all threads of this process:\n{watchdog.stacks()}')
    for process in processes:
      os.kill(process.pid, loader_process.SHOW_STACKS)
    if processes:
      time.sleep(POLL_SECONDS)  # They write their stacks to the terminal.
    self._reader.kill()
    raise LoaderStalled(
      f'no batch came within data.stall_seconds={self._stall_seconds:g}; log.txt shows where this'
      ' process waits, and the terminal where those of the loader do. Look after the storage of'
      ' config.data_dir, or raise config.data.stall_seconds if it is that slow.'
    )

  def close(self) -> None:
    """Ends the loader and its processes.

    Raises:
      LoaderStalled: a thread that reads hangs, and would hold up the end of this process.
    """
    if self._failed:
      self._reader.kill()
    elif not self._reader.end():
      raise LoaderStalled(
        f'a thread of the loader did not end within {END_SECONDS:g} s; what was saved is whole.'
        ' Look after the storage of config.data_dir.'
      )


def _how(exit_code: int) -> str:
  if exit_code == -signal.SIGBUS:
    return f'killed by signal {-exit_code}, as when {loader_process.SHARED_MEMORY} is full'
  if exit_code < 0:
    return f'killed by signal {-exit_code}'
  return f'exit status {0 if exit_code == SILENT_DEATH else exit_code}'
