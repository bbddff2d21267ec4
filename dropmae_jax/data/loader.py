"""Batches that threads fill and that wait on the devices: a pure function of the step.

A ring of batch buffers is used again and again. Threads fill its rows in the order of the stream,
each row in place; one more thread moves whole batches to the devices, while these compute.
"""

import collections
import ctypes
import faulthandler
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import jax

from dropmae_jax.runtime.errors import ExitStatus, RunFailed

# Batches that are ready, on the devices, and buffers that are being filled or moved.
AHEAD, BUFFERS = 2, 3
# Options of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# More threads than this only wait for Python's lock (python -m benchmarks.input_pipeline).
MOST_THREADS = 32
# How often a thread that waits looks whether it still should.
POLL_SECONDS = 0.5
# How long the threads may take to finish their rows at the end.
END_SECONDS = 30.0

Buffer, Moved = TypeVar('Buffer'), TypeVar('Moved')

_log = logging.getLogger('dropmae_jax')


class LoaderStalled(RunFailed):
  """No batch comes, for example from a storage that hangs; some threads may never end."""

  exit_status = ExitStatus.UNAVAILABLE


class Interrupted(Exception):
  """The run was asked to stop while it waited for a batch."""


class Loader(Generic[Buffer, Moved]):
  """The batches of a stream from a step on, in order and without a gap."""

  def __init__(
    self,
    fill: Callable[[int, int, Buffer], None],
    make_buffer: Callable[[], Buffer],
    move: Callable[[Buffer], Moved],
    *,
    rows: int,
    first_step: int = 0,
    num_threads: int = 0,
    stall_seconds: float = float('inf'),
    is_interrupted: Callable[[], bool] = lambda: False,
  ) -> None:
    """Starts to fill batches.

    Args:
      fill: fills a row of a buffer, given the step, the row and the buffer; called in many threads,
        at most once for each row of a step.
      make_buffer: returns memory for a batch.
      move: returns what `next` returns of a filled buffer; called in one thread, in the order of
        the steps. The buffer is filled again afterwards, so the result must not share its memory.
      rows: of a batch.
      first_step: of the first batch.
      num_threads: that fill; 0: one for each core that this process may use, but at most
        MOST_THREADS.
      stall_seconds: how long `next` may wait for a batch; time in which this process is suspended
        does not count.
      is_interrupted: whether `next` must stop waiting.
    """
    self._fill, self._move, self._rows = fill, move, rows
    self._stall_seconds, self._is_interrupted = stall_seconds, is_interrupted
    self._buffers = [make_buffer() for _ in range(BUFFERS)]
    # All below is changed under this condition alone.
    self._changed = threading.Condition()
    self._next = first_step * rows  # The row that is to be filled next, counted over all batches.
    self._unfilled = [rows] * BUFFERS
    self._errors: dict[int, dict[int, Exception]] = collections.defaultdict(dict)
    self._num_moved = first_step
    self._ready: collections.deque[Moved | _Failure] = collections.deque()
    self._closed = False
    self._has_given_up = False  # So `close` must not wait for threads that may hang.
    filling = num_threads or min(MOST_THREADS, len(os.sched_getaffinity(0)))
    targets = [('fill', self._fill_rows)] * filling + [('move', self._move_batches)]
    self._threads = [
      threading.Thread(target=target, name=f'loader {name} {number}', daemon=True)
      for number, (name, target) in enumerate(targets)
    ]
    for thread in self._threads:
      thread.start()

  def _wait_for(self, condition: Callable[[], bool]) -> bool:
    """Waits for a condition, under `_changed`; returns False if the loader is closed."""
    self._changed.wait_for(lambda: self._closed or condition())
    return not self._closed

  def _fill_rows(self) -> None:
    while True:
      with self._changed:
        if not self._wait_for(lambda: self._next < (self._num_moved + BUFFERS) * self._rows):
          return
        step, row = divmod(self._next, self._rows)
        self._next += 1
      error = None
      try:
        self._fill(step, row, self._buffers[step % BUFFERS])
      except Exception as raised:
        error = raised
      with self._changed:
        if error:
          self._errors[step][row] = error
        self._unfilled[step % BUFFERS] -= 1
        if not self._unfilled[step % BUFFERS]:
          self._changed.notify_all()

  def _may_move(self) -> bool:
    return not self._unfilled[self._num_moved % BUFFERS] and len(self._ready) < AHEAD

  def _move_batches(self) -> None:
    while True:
      buffer = self._num_moved % BUFFERS
      with self._changed:
        if not self._wait_for(self._may_move):
          return
        errors = self._errors.pop(self._num_moved, None)
      try:
        if errors:
          raise errors[min(errors)]
        ready = jax.block_until_ready(self._move(self._buffers[buffer]))
      except Exception as error:
        ready = _Failure(error)
      with self._changed:
        self._ready.append(ready)
        self._unfilled[buffer] = self._rows
        self._num_moved += 1
        self._changed.notify_all()
      if isinstance(ready, _Failure):
        return

  def __iter__(self) -> 'Loader[Buffer, Moved]':
    return self

  def __next__(self) -> Moved:
    """Returns the next batch.

    Raises:
      LoaderStalled: no batch came for `stall_seconds`.
      Interrupted: the run is to stop, and no batch is ready.
      Exception: what `fill` or `move` raised for this batch; of several rows, for the first.
    """
    polls = 0
    with self._changed:
      while not self._changed.wait_for(lambda: self._ready, POLL_SECONDS):
        polls += 1
        if self._is_interrupted():
          self._has_given_up = True
          raise Interrupted
        if polls * POLL_SECONDS > self._stall_seconds:
          self._has_given_up = True
          self._fail_stalled()
      ready = self._ready[0]
      if isinstance(ready, _Failure):
        raise ready.error
      self._ready.popleft()
      self._changed.notify_all()
    return ready

  def _fail_stalled(self) -> None:
    with tempfile.TemporaryFile('w+') as file:
      faulthandler.dump_traceback(file, all_threads=True)
      file.seek(0)
      for line in ['the loader hangs; all threads of this process:', *file.read().splitlines()]:
        _log.error(line)
    raise LoaderStalled(
      f'no batch came within data.stall_seconds={self._stall_seconds:g}; the stacks above show'
      ' where this process waits. Check the storage of config.data_dir, or raise'
      ' config.data.stall_seconds if it is that slow.'
    )

  def close(self) -> None:
    """Ends the threads, each after the row that it fills.

    Raises:
      LoaderStalled: one hangs, and would keep this process from ending.
    """
    with self._changed:
      self._closed = True
      self._ready.clear()
      self._changed.notify_all()
    if self._has_given_up:
      return
    deadline = time.monotonic() + END_SECONDS
    for thread in self._threads:
      thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in self._threads):
      raise LoaderStalled(
        f'a thread of the loader did not end within {END_SECONDS:g} s; what was saved is whole.'
        ' Check the storage of config.data_dir.'
      )


class _Failure:
  """Stands in `_ready` for a batch that could not be made."""

  def __init__(self, error: Exception) -> None:
    self.error = error


def keep_freed_memory() -> None:
  """Makes the C library reuse the memory of freed frames, where it has an option for that.

  By default it returns such memory to the system, and each new frame costs a page fault per 4 kB.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:  # Not every C library has it.
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
      mallopt(option, 2**30)
