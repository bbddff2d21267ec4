"""Keeps two batches ready on the devices, and restarts the loader if a process of it dies.

A thread reads batches and copies them, while the devices compute the step. The death of a loader
process costs time but never a batch: the stream is a function of the step, so a new loader resumes
at the next one. A loader that hangs ends the run, after the stacks of all threads are logged.
"""

import contextlib
import dataclasses
import errno
import logging
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
# How long a loader that is asked to end may take to finish its current batch.
END_SECONDS = 30.0
# How long grain may take to notice that all processes were killed; it checks every second.
KILL_SECONDS = 10.0
# Replaces the exit status 0 of a loader process, which is always an unexpected exit.
UNEXPECTED_EXIT = 256
# Grain reports a dead process by a RuntimeError with this message. A dataset may raise one too.
GRAIN_DEATH = re.compile(r'Worker process was terminated unexpectedly with exit code (-?\d+)')

Batch = dict[str, np.ndarray]

_log = logging.getLogger('dropmae_jax')


class LoaderFailed(RunFailed):
  """The loader died too often; some of its threads may never end."""


class LoaderStalled(LoaderFailed):
  """The loader hangs, for example on a storage that may recover."""

  exit_status = ExitStatus.HUNG


class Interrupted(Exception):
  """The run was asked to stop while it waited for a batch."""


@dataclasses.dataclass(frozen=True)
class _Failure:
  """Why a reader ended; `death` says how a process of it died, and is '' for other errors."""

  error: Exception
  death: str


class _Reader:
  """A loader and the thread that puts its batches, and in the end a failure, into `items`."""

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
    self._other_processes = _all_processes()
    self._thread = threading.Thread(target=self._read, name='prefetch', daemon=True)
    self._thread.start()
    threading.Thread(target=self._watch, name='prefetch watch', daemon=True).start()

  def _read(self) -> None:
    # A process inherits the signal mask of the thread that starts it, and this thread starts the
    # loader's. So a signal sent to the whole process group cannot end one before it ignores the
    # signal. The resource tracker must run before, because starting it removes the mask.
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
        del batch  # Otherwise it stays in memory while the next one is made.
    except Exception as error:
      death = GRAIN_DEATH.search(str(error))
      if getattr(error, 'errno', None) == errno.ENOSPC:
        error = loader_process.out_of_room(error)
      self.items.put(_Failure(error, _describe_exit(int(death[1])) if death else ''))
    finally:
      batches.close()

  def _watch(self) -> None:
    """Makes grain notice processes that exited with status 0.

    Grain (0.2.18, `_process_failed`) takes only other statuses for a failure, and would wait for
    such a process forever. `exitcode` has no public setter, hence the private `_popen`.
    """
    while self._thread.is_alive():
      for process in self.processes():
        if process.exitcode == 0:
          process._popen.returncode = UNEXPECTED_EXIT
      self._thread.join(POLL_SECONDS)

  def processes(self) -> list[BaseProcess]:
    """Lists the processes of this loader that grain still holds, alive or dead."""
    return [each for each in _all_processes() - self._other_processes if each.pid]

  def end(self) -> bool:
    """Lets the loader finish its current batch; returns False if a thread of it did not end."""
    self._stopped.set()
    self._thread.join(END_SECONDS)
    return self.kill()

  def kill(self) -> bool:
    """Kills the processes and removes their memory; returns False if a thread did not end."""
    self._stopped.set()
    processes = self.processes()
    for process in processes:
      process.kill()
    deadline = time.monotonic() + KILL_SECONDS
    for process in processes:  # One that waits for a storage that hangs does not end.
      process.join(max(0.0, deadline - time.monotonic()))
    self._thread.join(KILL_SECONDS if processes else 0)
    if not self._thread.is_alive():
      loader_process.unlink_memory_of_dead_processes()
    return not self._thread.is_alive()


def _all_processes() -> set[BaseProcess]:
  """Returns all child processes that this process holds an object of, alive or dead.

  Grain (0.2.18) has no public way to its processes. `multiprocessing.active_children` drops a
  process that ended before the first call, as one may while this thread waits, hence the private
  `_dangling`.
  """
  while True:
    with contextlib.suppress(RuntimeError):  # The set changed while it was copied.
      return set(multiprocessing.process._dangling)


class Prefetcher:
  """The batches of a loader, in order and without a gap, as arrays on the devices."""

  def __init__(
    self,
    make_batches: Callable[[int], Iterator[Batch]],
    *,
    first_step: int,
    to_device: Callable[[Batch], jax.Array],
    stall_seconds: float,
    is_interrupted: Callable[[], bool] = lambda: False,
  ) -> None:
    """Starts to read.

    Args:
      make_batches: returns the stream from a step on, with a method `close`; called in a thread.
      first_step: where to start.
      to_device: copies what is needed of a batch to the devices; called in a thread.
      stall_seconds: how long `next` may wait for a batch.
      is_interrupted: whether `next` must stop waiting.
    """
    self._is_interrupted = is_interrupted
    self._make_batches, self._to_device = make_batches, to_device
    self._step, self._stall_seconds = first_step, stall_seconds
    self._deaths = self._deaths_in_a_row = 0
    self._failed = False
    self._reader = self._start()

  def _start(self) -> _Reader:
    return _Reader(self._make_batches, self._to_device, self._step)

  def __next__(self) -> jax.Array:
    """Returns the next batch.

    Raises:
      LoaderStalled: no batch came for `stall_seconds`.
      LoaderFailed: processes died DEATHS_IN_A_ROW times without a batch between.
      Interrupted: the run is to stop, and no batch is ready.
      Exception: any error of reading other than the death of a process.
    """
    waiting_since = time.monotonic()
    while True:
      try:
        item = self._reader.items.get(timeout=POLL_SECONDS)
      except queue.Empty:
        if self._is_interrupted():
          self._failed = True  # The loader may hang, so `close` must not wait for it.
          raise Interrupted from None
        if time.monotonic() - waiting_since > self._stall_seconds:
          self._fail_stalled()
        continue
      if not isinstance(item, _Failure):
        break
      if not item.death:
        raise item.error
      self._restart(item.death)
      waiting_since = time.monotonic()
    self._reader.room.release()
    self._step += 1
    self._deaths_in_a_row = 0
    return item

  def _restart(self, death: str) -> None:
    """Starts a new loader at the next step. Grain's own restart would skip batches."""
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
    _log.warning(
      f'a process of the loader died ({death}), death {self._deaths} of this run; the loader is'
      f' restarted from step {self._step + 1}'
    )
    self._reader = self._start()

  def _fail_stalled(self) -> None:
    self._failed = True
    processes = [each for each in self._reader.processes() if each.is_alive()]
    _log.error(f'the loader hangs; all threads of this process:\n{watchdog.stacks()}')
    for process in processes:
      os.kill(process.pid, loader_process.SHOW_STACKS)
    if processes:
      time.sleep(POLL_SECONDS)  # They write their stacks to the terminal.
    self._reader.kill()
    raise LoaderStalled(
      f'no batch came within data.stall_seconds={self._stall_seconds:g}; log.txt shows where this'
      ' process waits, and the terminal where those of the loader do. Check the storage of'
      ' config.data_dir, or raise config.data.stall_seconds if it is that slow.'
    )

  def close(self) -> None:
    """Ends the loader and its processes.

    Raises:
      LoaderStalled: a thread that reads hangs, and would keep this process from ending.
    """
    if self._failed:
      self._reader.kill()
    elif not self._reader.end():
      raise LoaderStalled(
        f'a thread of the loader did not end within {END_SECONDS:g} s; what was saved is whole.'
        ' Check the storage of config.data_dir.'
      )


def _describe_exit(exit_code: int) -> str:
  if exit_code == -signal.SIGBUS:
    return f'killed by signal {-exit_code}, as when {loader_process.SHARED_MEMORY} is full'
  if exit_code < 0:
    return f'killed by signal {-exit_code}'
  return f'exit status {0 if exit_code == UNEXPECTED_EXIT else exit_code}'
