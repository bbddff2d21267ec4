"""What a loader process needs from its machine, and the shared memory that it fills.

A loader process ignores the signals that the trainer handles, and ends when the trainer ends. The
chunks of pairs that it makes lie in shared memory whose name contains the process ids of both, so
that memory left by a killed process can be told from memory in use, and removed.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import math
import mmap
import os
import pathlib
import resource
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker, shared_memory
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dropmae_jax.runtime.errors import UserError

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
# On this signal a loader process writes the stacks of its threads to the terminal.
SHOW_STACKS = signal.SIGUSR1
# Exit status of a loader process that ends normally. Grain would wait forever for a process that
# exits with 0, so 0 is kept free: it always means an unexpected exit (see prefetch.py).
NORMAL_EXIT = 75
# Options of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# How long a process whose slots are all full waits before it checks again.
FULL_SECONDS = 0.001
SHARED_MEMORY = pathlib.Path('/dev/shm')
MORE_MEMORY = (
  f'lower config.data.num_workers, or enlarge {SHARED_MEMORY} (of a container by --shm-size)'
)


def start_worker(worker: int, num_workers: int, *, trainer: int) -> None:
  """Prepares a loader process: one core, many open files, an end when `trainer` ends.

  It ignores Ctrl-C and SIGTERM: the trainer handles them, and needs its loader until the last
  checkpoint is written.

  Args:
    worker: given by grain, not used.
    num_workers: likewise.
    trainer: process id of the parent.
  """
  del worker, num_workers
  import cv2  # The trainer imports this module too, and does not need OpenCV.

  cv2.setNumThreads(0)
  for each in STOP_SIGNALS:
    signal.signal(each, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
  faulthandler.register(SHOW_STACKS)
  atexit.register(_exit_normally)
  threading.Thread(target=_exit_with_parent, args=(trainer,), daemon=True).start()
  allow_many_files()
  keep_freed_memory()
  NamedMemory.prefix = f'{run_prefix(trainer)}{os.getpid()}-'


def _exit_normally() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(NORMAL_EXIT)


def _exit_with_parent(parent: int) -> None:
  """Ends this process once its parent is gone, even if the parent was killed."""
  while os.getppid() == parent:
    time.sleep(1)
  os._exit(1)


def allow_many_files() -> None:
  """Raises the limit of open files to the hard limit: every shard that is read stays open."""
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_freed_memory() -> None:
  """Makes the C library reuse the memory of freed frames, where it has an option for that.

  By default it returns such memory to the system, and each new frame costs a page fault per 4 kB.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:  # Not every C library has it.
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
      mallopt(option, 2**30)


class NamedMemory(shared_memory.SharedMemory):
  """Shared memory whose name contains the run and the process that make it.

  Attributes:
    prefix: of the names of this process's shared memory.
  """

  prefix = ''

  def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
    if create and name is None:
      name = f'{self.prefix}{secrets.token_hex(8)}'
    super().__init__(name, create, size)


class Slot(NamedTuple):
  """Where a chunk lies: the `number`-th one written to a ring of `slots` slots of one shape."""

  ring: str
  number: int
  slots: int
  shape: tuple[int, ...]


class _Ring:
  """A ring buffer in shared memory: a counter of the chunks that were read, then the slots."""

  def __init__(self, memory: shared_memory.SharedMemory, slots: int, shape: Sequence[int]) -> None:
    self._memory = memory
    self.num_read = np.ndarray((), np.int64, buffer=memory.buf)
    self.slots = np.ndarray((slots, *shape), np.uint8, buffer=memory.buf, offset=mmap.PAGESIZE)

  def close(self) -> None:
    """Releases the memory and removes it; no array of a slot may be in use any more."""
    del self.num_read, self.slots
    self._memory.close()
    self.unlink()

  def unlink(self) -> None:
    """Removes the name of the memory, which is freed once both sides have released it."""
    with contextlib.suppress(FileNotFoundError):  # The other side may have been faster.
      self._memory.unlink()


class RingWriter:
  """The loader process's side of a ring: it fills the same few slots again and again.

  New memory for every chunk, as grain takes it, costs a page fault per 4 kB.
  """

  def __init__(self, slots: int, shape: Sequence[int]) -> None:
    """Allocates a number of slots of one shape.

    Raises:
      OSError: there is not enough shared memory.
    """
    memory = NamedMemory(create=True, size=mmap.PAGESIZE + slots * math.prod(shape))
    try:
      # Without this, pages are allocated on first use, and a full memory kills the process.
      with (SHARED_MEMORY / memory.name).open('r+b') as file:
        os.posix_fallocate(file.fileno(), 0, memory.size)
    except OSError:
      memory.close()
      memory.unlink()
      raise
    self._ring, self._num_written = _Ring(memory, slots, shape), 0
    self.name = memory.name
    atexit.register(self._ring.unlink)  # The trainer may never have opened it.

  def close(self) -> None:
    """Releases the memory, and removes it."""
    self._ring.close()

  def next_slot(self) -> tuple[Slot, UInt8[np.ndarray, '...']]:
    """Returns the next slot and its bytes to fill, once the trainer has read what they hold."""
    slots = self._ring.slots
    while self._num_written - self._ring.num_read >= len(slots):
      time.sleep(FULL_SECONDS)
    number = self._num_written
    self._num_written += 1
    slot = Slot(self.name, number, len(slots), slots.shape[1:])
    return slot, slots[number % len(slots)]


class RingReader:
  """The trainer's side of the rings of all its loader processes."""

  def __init__(self) -> None:
    """Starts without a ring; each is opened when the first slot of it arrives."""
    self._rings: dict[str, _Ring] = {}

  def copy(self, slot: Slot, out: UInt8[np.ndarray, '...']) -> None:
    """Copies what a slot holds; the writer may overwrite the slot from then on."""
    if slot.ring not in self._rings:
      memory = shared_memory.SharedMemory(slot.ring)
      self._rings[slot.ring] = _Ring(memory, slot.slots, slot.shape)
    ring = self._rings[slot.ring]
    np.copyto(out, ring.slots[slot.number % slot.slots])
    ring.num_read[...] = slot.number + 1

  def stop(self) -> None:
    """Lets the writers continue without waiting, as nothing more will be read."""
    for ring in self._rings.values():
      ring.num_read[...] = np.iinfo(np.int64).max

  def close(self) -> None:
    """Releases the memory of all rings, and removes it."""
    while self._rings:
      self._rings.popitem()[1].close()


def _machine_prefix() -> str:
  """Returns the prefix of shared memory whose process ids mean the same as in this process.

  Containers may share /dev/shm but not process ids: an id that is dead here may be alive there.
  """
  return f'dropmae-{os.stat("/proc/self/ns/pid").st_ino}-'


def run_prefix(trainer: int) -> str:
  """Returns the prefix of all shared memory of the run whose trainer has this process id."""
  return f'{_machine_prefix()}{trainer}-'


def unlink_memory_of_dead_processes() -> None:
  """Removes the shared memory of loader processes of this trainer that were killed.

  What this process still has open is left: closing it removes it.
  """
  opened = pathlib.Path('/proc/self/maps').read_text()
  left = _memory_without_owner(run_prefix(os.getpid()))
  _unlink(path for path in left if path.name not in opened)


def unlink_memory_of_dead_runs() -> None:
  """Removes the shared memory of runs whose processes were all killed at once."""
  _unlink(_memory_without_owner(_machine_prefix()))


def _memory_without_owner(prefix: str) -> Iterator[pathlib.Path]:
  """Yields shared memory in whose name the prefix is followed by the id of a dead process."""
  for path in SHARED_MEMORY.glob(f'{prefix}*'):
    owner = path.name.removeprefix(prefix).partition('-')[0]
    if not pathlib.Path('/proc', owner).exists():
      yield path


def _unlink(paths: Iterable[pathlib.Path]) -> None:
  for path in paths:
    # Another process may have been faster, or another user may own it.
    with contextlib.suppress(FileNotFoundError, PermissionError):
      path.unlink()
      # Python's resource tracker would warn at exit that the file is gone. It only unregisters
      # what was registered.
      resource_tracker.register(f'/{path.name}', 'shared_memory')
      resource_tracker.unregister(f'/{path.name}', 'shared_memory')


def free_memory() -> int:
  """Returns the bytes of shared memory that are free."""
  system = os.statvfs(SHARED_MEMORY)
  return system.f_bavail * system.f_frsize


def no_room(num_bytes: int, num_workers: int) -> UserError:
  """Returns the error for a loader that would fill the shared memory, which kills its processes.

  Args:
    num_bytes: that the loader needs at a time.
    num_workers: of the loader.
  """
  return UserError(
    f'data.num_workers={num_workers} needs {num_bytes / 1e6:.0f} MB of shared memory, and'
    f' {SHARED_MEMORY} has {free_memory() / 1e6:.0f} MB free; {MORE_MEMORY}.'
  )


def out_of_room(error: OSError) -> UserError:
  """Returns the error for a loader process that found the shared memory full."""
  return UserError(f'{SHARED_MEMORY} is full ({error}); {MORE_MEMORY}.')
