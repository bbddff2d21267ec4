"""Beside the second stop: what a loader process is to its machine, alive and dead.

It answers signals as the trainer needs it, ends when the trainer does, and hands over what it makes
in blocks of shared memory that bear the names of both, so that what a killed process leaves can be
told from what is in use, and removed.
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
# The exit status of a loader process that was told to end. Grain waits for ever on one that ends
# with 0; so 0 is left to those that nobody told to.
ORDERLY_END = 75
# Options of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# How long a process that is ahead of the trainer waits before it looks again.
FULL_SECONDS = 0.001
SHARED_MEMORY = pathlib.Path('/dev/shm')
MORE_MEMORY = (
  f'lower config.data.num_workers, or enlarge {SHARED_MEMORY} (of a container by --shm-size)'
)


def start_worker(worker: int, num_workers: int, *, trainer: int) -> None:
  """Prepares a loader process: one core, many files, an end when the process `trainer` ends.

  Signals are the trainer's to answer, which needs its loader until it has saved.
  """
  del worker, num_workers
  import cv2  # What else is here, processes without a loader use too.

  cv2.setNumThreads(0)
  for each in STOP_SIGNALS:
    signal.signal(each, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
  faulthandler.register(SHOW_STACKS)
  atexit.register(_end_orderly)
  threading.Thread(target=_end_without, args=(trainer,), daemon=True).start()
  allow_many_files()
  keep_freed_memory()
  NamedMemory.prefix = f'{run_prefix(trainer)}{os.getpid()}-'


def _end_orderly() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(ORDERLY_END)


def _end_without(parent: int) -> None:
  """Ends this process once its parent is gone, however that was killed."""
  while os.getppid() == parent:
    time.sleep(1)
  os._exit(1)


def allow_many_files() -> None:
  """Raises the limit of open files as far as it goes: every shard that is read stays open."""
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def keep_freed_memory() -> None:
  """Lets the C library keep the memory of pictures for the next ones, where it can be told to.

  It would give each back to the system, and taking it anew costs a page fault every 4 kB.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:  # Not every C library has it.
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
      mallopt(option, 2**30)


class NamedMemory(shared_memory.SharedMemory):
  """Shared memory that is named after the run and the process that make it.

  Attributes:
    prefix: of the names of this process's blocks.
  """

  prefix = ''

  def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
    if create and name is None:
      name = f'{self.prefix}{secrets.token_hex(8)}'
    super().__init__(name, create, size)


class Slot(NamedTuple):
  """Where in shared memory a block lies: in a ring of slots of one shape, the `number`-th made."""

  ring: str
  number: int
  slots: int
  shape: tuple[int, ...]


class _Ring:
  """Bytes in shared memory: at the front how many blocks the trainer is done with, then slots."""

  def __init__(self, memory: shared_memory.SharedMemory, slots: int, shape: Sequence[int]) -> None:
    self._memory = memory
    self.done = np.ndarray((), np.int64, buffer=memory.buf)
    self.slots = np.ndarray((slots, *shape), np.uint8, buffer=memory.buf, offset=mmap.PAGESIZE)

  def close(self) -> None:
    """Lets go of the memory and removes it; nobody may hold a slot any more."""
    del self.done, self.slots
    self._memory.close()
    self.unlink()

  def unlink(self) -> None:
    """Removes the memory, as soon as nobody holds it any more."""
    with contextlib.suppress(FileNotFoundError):  # The other side may have been faster.
      self._memory.unlink()


class RingWriter:
  """A loader process's blocks: it fills the same few slots again and again.

  Memory that is taken anew for every block, as grain does it, costs a page fault every 4 kB.
  """

  def __init__(self, slots: int, shape: Sequence[int]) -> None:
    """Takes memory for a number of slots of one shape.

    Raises:
      OSError: there is not enough.
    """
    memory = NamedMemory(create=True, size=mmap.PAGESIZE + slots * math.prod(shape))
    try:
      # Else it would be taken page by page, and where there is none, the process killed.
      with (SHARED_MEMORY / memory.name).open('r+b') as file:
        os.posix_fallocate(file.fileno(), 0, memory.size)
    except OSError:
      memory.close()
      memory.unlink()
      raise
    self._ring, self._made = _Ring(memory, slots, shape), 0
    self.name = memory.name
    atexit.register(self._ring.unlink)  # The trainer may never have opened it.

  def close(self) -> None:
    """Lets go of the memory, and removes it."""
    self._ring.close()

  def next_slot(self) -> tuple[Slot, UInt8[np.ndarray, '...']]:
    """Returns the next slot and its bytes to fill, once the trainer is done with what they hold."""
    slots = self._ring.slots
    while self._made - self._ring.done >= len(slots):
      time.sleep(FULL_SECONDS)
    self._made += 1
    number = self._made - 1
    slot = Slot(self.name, number, len(slots), slots.shape[1:])
    return slot, slots[number % len(slots)]


class RingReader:
  """The trainer's view of the rings of its loader processes."""

  def __init__(self) -> None:
    """Begins without a ring; those that slots name are opened as they come."""
    self._rings: dict[str, _Ring] = {}

  def copy(self, slot: Slot, out: UInt8[np.ndarray, '...']) -> None:
    """Copies what a slot holds, which may be overwritten from then on."""
    if slot.ring not in self._rings:
      memory = shared_memory.SharedMemory(slot.ring)
      self._rings[slot.ring] = _Ring(memory, slot.slots, slot.shape)
    ring = self._rings[slot.ring]
    np.copyto(out, ring.slots[slot.number % slot.slots])
    ring.done[...] = slot.number + 1

  def stop(self) -> None:
    """Lets the writers write on without waiting: nothing of it will be read."""
    for ring in self._rings.values():
      ring.done[...] = np.iinfo(np.int64).max

  def close(self) -> None:
    """Lets go of all memory, and removes it."""
    while self._rings:
      self._rings.popitem()[1].close()


def _machine_prefix() -> str:
  """Begins the names of blocks whose numbers of processes are meant as this process sees them.

  Containers may share the memory and not the numbers: what is dead here may be alive there.
  """
  return f'dropmae-{os.stat("/proc/self/ns/pid").st_ino}-'


def run_prefix(trainer: int) -> str:
  """Begins the names of all blocks of the run whose trainer has this process number."""
  return f'{_machine_prefix()}{trainer}-'


def unlink_blocks_of_dead_processes() -> None:
  """Removes what loader processes of this trainer have left that were killed.

  Blocks that this process has still open it removes by itself as soon as it lets go of them.
  """
  opened = pathlib.Path('/proc/self/maps').read_text()
  left = _blocks_without_owner(run_prefix(os.getpid()))
  _unlink(block for block in left if block.name not in opened)


def unlink_blocks_of_dead_runs() -> None:
  """Removes what runs have left whose processes were all killed at once."""
  _unlink(_blocks_without_owner(_machine_prefix()))


def _blocks_without_owner(prefix: str) -> Iterator[pathlib.Path]:
  """Yields the blocks under a prefix that the number of a process follows which is gone."""
  for path in SHARED_MEMORY.glob(f'{prefix}*'):
    owner = path.name.removeprefix(prefix).partition('-')[0]
    if not pathlib.Path('/proc', owner).exists():
      yield path


def _unlink(blocks: Iterable[pathlib.Path]) -> None:
  for block in blocks:
    # Another may have been faster, or owns it.
    with contextlib.suppress(FileNotFoundError, PermissionError):
      block.unlink()
      # Python's tracker would miss it at the end; it has to know what it shall forget.
      resource_tracker.register(f'/{block.name}', 'shared_memory')
      resource_tracker.unregister(f'/{block.name}', 'shared_memory')


def free_memory() -> int:
  """Bytes of shared memory that are free."""
  system = os.statvfs(SHARED_MEMORY)
  return system.f_bavail * system.f_frsize


def no_room(num_bytes: int, num_workers: int) -> UserError:
  """Returns the refusal to start a loader that would fill the memory, which kills its processes.

  Args:
    num_bytes: that the loader needs at a time.
    num_workers: of the loader.
  """
  return UserError(
    f'data.num_workers={num_workers} needs {num_bytes / 1e6:.0f} MB of shared memory, and'
    f' {SHARED_MEMORY} has {free_memory() / 1e6:.0f} MB free; {MORE_MEMORY}.'
  )


def out_of_room(error: OSError) -> UserError:
  """Returns the refusal of a loader process for which there was no room after all."""
  return UserError(f'{SHARED_MEMORY} is full ({error}); {MORE_MEMORY}.')
