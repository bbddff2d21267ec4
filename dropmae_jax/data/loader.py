"""Turns the keys of pairs into batches, by threads of the trainer or by loader processes.

A loader process makes chunks of a few pairs in shared memory, and the trainer copies them into
batches. So the shared memory needed grows with the number of processes, not with the batch size.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from dropmae_jax.data import loader_process

# Largest chunk of a loader process, in pairs: handing one over costs about the same whatever its
# size. Smaller ones where shared memory is short, as in a container, which has 64 MB by default.
CHUNK_PAIRS = (32, 16, 8)
# For each process: one chunk being made, one in grain's queue, one in the trainer's thread that
# reads this queue, one on the way between them, and one being copied.
CHUNKS_PER_WORKER = 5
# Largest chunk of a thread of the trainer, in pairs. A batch of one such chunk is not copied.
THREAD_CHUNK_PAIRS = 128
# For each thread: one chunk being made, and one that is ready.
CHUNKS_PER_THREAD = 2

# Arrays by name, with one entry per pair; under DAMAGED, messages on records that were not read.
Chunk = dict[str, Any]
FRAMES, DAMAGED = 'frames', 'damaged'
# Makes the chunk of some keys, with its frames in the given array, or in a new one.
MakeChunk = Callable[..., Chunk]


class HostChunks:
  """The chunks of one host, as a source for grain: an equal, contiguous share of every batch."""

  def __init__(
    self,
    keys: grain.MapDataset,
    make: MakeChunk,
    *,
    chunk: int,
    share: int,
    host: int,
    num_hosts: int,
  ) -> None:
    self._keys, self._make, self._chunk = keys, make, chunk
    self._share, self._host, self._num_hosts = share, host, num_hosts

  def __len__(self) -> int:
    return len(self._keys) // self._num_hosts // self._chunk

  def __getitem__(self, number: int) -> Chunk:
    step, offset = divmod(number * self._chunk, self._share)
    first = (step * self._num_hosts + self._host) * self._share + offset
    return self._make([self._keys[first + each] for each in range(self._chunk)])


class SharedChunks:
  """Makes chunks in a loader process, with their frames in slots of shared memory."""

  def __init__(self, make: MakeChunk, shape: tuple[int, ...]) -> None:
    self._make, self._shape = make, shape
    self._ring: loader_process.RingWriter | None = None

  def __call__(self, keys: Sequence[Any]) -> Chunk:
    """Returns the chunk, with a slot under FRAMES instead of an array."""
    if self._ring is None:  # Not in __init__, which runs in the trainer.
      self._ring = loader_process.RingWriter(CHUNKS_PER_WORKER, self._shape)
    slot, out = self._ring.next_slot()
    return self._make(keys, out) | {FRAMES: slot}


class GatheredBatches(Iterator[dict[str, np.ndarray]]):
  """Batches put together from chunks; each batch has memory of its own.

  So a device may read a batch for any length of time, even one that makes no copy of it. Each chunk
  is released as soon as it is copied.
  """

  def __init__(
    self,
    chunks: grain.DatasetIterator,
    chunks_per_batch: int,
    report_damaged: Callable[[str], None],
  ) -> None:
    self._chunks, self._chunks_per_batch = chunks, chunks_per_batch
    self._report_damaged = report_damaged
    self._rings = loader_process.RingReader()

  def __next__(self) -> dict[str, np.ndarray]:
    chunks, frames = [], None
    for number in range(self._chunks_per_batch):
      chunk = next(self._chunks)
      for message in chunk.pop(DAMAGED):
        self._report_damaged(message)
      part = chunk.pop(FRAMES)
      if self._chunks_per_batch == 1 and isinstance(part, np.ndarray):
        frames = part[None]
      else:
        if frames is None:
          frames = np.empty((self._chunks_per_batch, *part.shape), np.uint8)
        if isinstance(part, np.ndarray):
          np.copyto(frames[number], part)
        else:
          self._rings.copy(part, frames[number])
      chunks.append(chunk)
    batch = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return batch | {FRAMES: frames.reshape(-1, *frames.shape[2:])}

  def close(self) -> None:
    """Ends the loader that makes the chunks."""
    self._rings.stop()
    try:
      self._chunks.close()
    finally:
      self._rings.close()


def batches_of(
  keys: grain.MapDataset,
  make: MakeChunk,
  *,
  pair_shape: tuple[int, ...],
  batch_size: int,
  first_step: int,
  host: int,
  num_hosts: int,
  num_workers: int,
  num_threads: int,
  report_damaged: Callable[[str], None],
) -> GatheredBatches:
  """Returns this host's share of the batches of a stream of pairs; see `frame_pairs.pair_batches`.

  Args:
    keys: of the pairs of all hosts.
    make: makes the chunk of some keys.
    pair_shape: of the frames of a pair.
    batch_size: in pairs, over all hosts.
    first_step: how many batches to skip.
    host: number of this process.
    num_hosts: number of processes.
    num_workers: loader processes that make chunks; with 0, threads of this process make them.
    num_threads: how many threads.
    report_damaged: called with a message for every damaged record of a chunk; may raise.

  Raises:
    ValueError: the batch size is not divisible by the number of hosts.
    UserError: the shared memory is too small for the loader processes.
  """
  if batch_size % num_hosts:
    fitting = -(-batch_size // num_hosts) * num_hosts
    raise ValueError(
      f'{batch_size=} is not divisible by {num_hosts=}; use for example batch_size={fitting}.'
    )
  share = batch_size // num_hosts
  if num_workers:
    loader_process.unlink_memory_of_dead_runs()
    chunk = _chunk_that_fits(share, math.prod(pair_shape), num_workers)
    make = SharedChunks(make, (chunk, *pair_shape))
  else:
    chunk = _largest_divisor(share, THREAD_CHUNK_PAIRS)
  source = HostChunks(keys, make, chunk=chunk, share=share, host=host, num_hosts=num_hosts)
  chunks_per_batch = share // chunk
  chunks = grain.MapDataset.source(source)[first_step * chunks_per_batch :]
  if num_workers:
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    # Grain itself only has to send a few numbers, which are not worth shared memory of their own.
    options = grain.experimental.DatasetOptions(min_shm_size=2**62)
    stream = grain.experimental.WithOptionsIterDataset(chunks.to_iter_dataset(read), options)
    stream = stream.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1),
      worker_init_fn=functools.partial(loader_process.start_worker, trainer=os.getpid()),
    )
  else:
    buffer_size = CHUNKS_PER_THREAD * num_threads
    read = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)
    stream = chunks.to_iter_dataset(read)
  return GatheredBatches(iter(stream), chunks_per_batch, report_damaged)


def _largest_divisor(number: int, limit: int) -> int:
  return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _chunk_that_fits(share: int, pair_bytes: int, num_workers: int) -> int:
  """Returns the chunk size, in pairs, at which all chunks fit into the free shared memory.

  Raises:
    UserError: not even the smallest chunks fit.
  """
  sizes = [_largest_divisor(share, limit) for limit in CHUNK_PAIRS]
  bytes_per_size = CHUNKS_PER_WORKER * num_workers * pair_bytes
  for size in sizes:
    if size * bytes_per_size <= loader_process.free_memory():
      return size
  raise loader_process.no_room(sizes[-1] * bytes_per_size, num_workers)
