"""Between the second stop and the third: keys of pairs to batches, by threads or by processes.

A process makes small blocks of pairs in shared memory, which the trainer gathers. So the shared
memory that is needed grows with the number of processes, not with the batch.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from dropmae_jax.data import loader_process

# The largest block of a process: handing one over costs about the same, however large it is. The
# shared memory may have no room for it, as in a container, which has 64 MB by default.
BLOCK_PAIRS = (32, 16, 8)
# Of each process: one block that it makes, one in grain's queue, one in grain's thread of it in the
# trainer, one on the way between these, and one that is gathered or whose memory is given back.
BLOCKS_PER_WORKER = 5
# The largest block of a thread of the trainer. A batch of one such block is copied nowhere.
THREAD_BLOCK_PAIRS = 128
# Of each thread: one block that it makes, and one that is made.
BLOCKS_PER_THREAD = 2

# Arrays of the same first axis by name, and under DAMAGED sentences on records that were not read.
Block = dict[str, Any]
FRAMES, DAMAGED = 'frames', 'damaged'
# Makes a block of keys, with its frames in the array that is given; in a new one if none is.
MakeBlock = Callable[..., Block]


class HostBlocks:
  """The blocks of one host: of an equal share of every batch, in one piece; a source of grain."""

  def __init__(
    self,
    keys: grain.MapDataset,
    make: MakeBlock,
    *,
    block: int,
    share: int,
    host: int,
    num_hosts: int,
  ) -> None:
    self._keys, self._make, self._block = keys, make, block
    self._share, self._host, self._num_hosts = share, host, num_hosts

  def __len__(self) -> int:
    return len(self._keys) // self._num_hosts // self._block

  def __getitem__(self, number: int) -> Block:
    step, place = divmod(number * self._block, self._share)
    first = (step * self._num_hosts + self._host) * self._share + place
    return self._make([self._keys[first + each] for each in range(self._block)])


class SharedBlocks:
  """Makes blocks in a loader process, with their frames in slots of shared memory."""

  def __init__(self, make: MakeBlock, shape: tuple[int, ...]) -> None:
    self._make, self._shape = make, shape
    self._ring: loader_process.RingWriter | None = None

  def __call__(self, keys: Sequence[Any]) -> Block:
    """Returns the block, under FRAMES the slot instead of the array."""
    if self._ring is None:  # Not before the process is the one that writes.
      self._ring = loader_process.RingWriter(BLOCKS_PER_WORKER, self._shape)
    slot, out = self._ring.next_slot()
    return self._make(keys, out) | {FRAMES: slot}


class GatheredBatches(Iterator[dict[str, np.ndarray]]):
  """Batches put together from blocks; each lies in memory of its own.

  Devices may read a batch for as long as they like, even where they make no copy of it. Blocks are
  let go one by one.
  """

  def __init__(
    self,
    blocks: grain.DatasetIterator,
    blocks_per_batch: int,
    tell_damaged: Callable[[str], None],
  ) -> None:
    self._blocks, self._blocks_per_batch = blocks, blocks_per_batch
    self._tell_damaged = tell_damaged
    self._rings = loader_process.RingReader()

  def __next__(self) -> dict[str, np.ndarray]:
    blocks, frames = [], None
    for number in range(self._blocks_per_batch):
      block = next(self._blocks)
      for sentence in block.pop(DAMAGED):
        self._tell_damaged(sentence)
      part = block.pop(FRAMES)
      if self._blocks_per_batch == 1 and isinstance(part, np.ndarray):
        frames = part[None]
      else:
        if frames is None:
          frames = np.empty((self._blocks_per_batch, *part.shape), np.uint8)
        self._take(part, frames[number])
      blocks.append(block)
    batch = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    return batch | {FRAMES: frames.reshape(-1, *frames.shape[2:])}

  def _take(self, part: np.ndarray | loader_process.Slot, out: np.ndarray) -> None:
    if isinstance(part, np.ndarray):
      np.copyto(out, part)
    else:
      self._rings.copy(part, out)

  def close(self) -> None:
    """Ends the loader that makes the blocks."""
    self._rings.stop()
    try:
      self._blocks.close()
    finally:
      self._rings.close()


def batches_of(
  keys: grain.MapDataset,
  make: MakeBlock,
  *,
  pair_shape: tuple[int, ...],
  batch_size: int,
  first_step: int,
  host: int,
  num_hosts: int,
  num_workers: int,
  num_threads: int,
  tell_damaged: Callable[[str], None],
) -> GatheredBatches:
  """Returns this host's share of the batches of a stream of pairs; see `data.pair_batches`.

  Args:
    keys: of the pairs of all hosts.
    make: a block of its keys.
    pair_shape: of the frames of a pair.
    batch_size: of all hosts together.
    first_step: batches to leave out.
    host: number of this process.
    num_hosts: number of processes.
    num_workers: processes that make blocks; if 0, threads of this one do.
    num_threads: of those.
    tell_damaged: is told of what is damaged in a block; may raise.

  Raises:
    ValueError: the hosts do not divide the batch.
    UserError: the shared memory is too small for the loader processes.
  """
  if batch_size % num_hosts:
    fitting = -(-batch_size // num_hosts) * num_hosts
    raise ValueError(
      f'{batch_size=} is not divisible by {num_hosts=}; use for example batch_size={fitting}.'
    )
  share = batch_size // num_hosts
  if num_workers:
    loader_process.unlink_blocks_of_dead_runs()
    block = _fitting_block(share, math.prod(pair_shape), num_workers)
    make = SharedBlocks(make, (block, *pair_shape))
  else:
    block = _largest_divisor(share, THREAD_BLOCK_PAIRS)
  made = HostBlocks(keys, make, block=block, share=share, host=host, num_hosts=num_hosts)
  blocks_per_batch = share // block
  blocks = grain.MapDataset.source(made)[first_step * blocks_per_batch :]
  if num_workers:
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    # What is left to grain are a few numbers, which are not worth shared memory of their own.
    options = grain.experimental.DatasetOptions(min_shm_size=2**62)
    stream = grain.experimental.WithOptionsIterDataset(blocks.to_iter_dataset(read), options)
    stream = stream.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1),
      worker_init_fn=functools.partial(loader_process.start_worker, trainer=os.getpid()),
    )
  else:
    ahead = BLOCKS_PER_THREAD * num_threads
    read = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
    stream = blocks.to_iter_dataset(read)
  return GatheredBatches(iter(stream), blocks_per_batch, tell_damaged)


def _largest_divisor(number: int, limit: int) -> int:
  return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _fitting_block(share: int, pair_bytes: int, num_workers: int) -> int:
  """Returns of how many pairs a block is, so that all that are there at a time find room.

  Raises:
    UserError: not even small ones do.
  """
  sizes = [_largest_divisor(share, limit) for limit in BLOCK_PAIRS]
  of_pair = BLOCKS_PER_WORKER * num_workers * pair_bytes
  for size in sizes:
    if size * of_pair <= loader_process.free_memory():
      return size
  raise loader_process.no_room(sizes[-1] * of_pair, num_workers)
