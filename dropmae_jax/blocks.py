"""Between the second stop and the third: single pairs to batches, by threads or by processes.

A process makes small blocks of pairs in shared memory, which the trainer gathers. So the shared
memory that is needed grows with the number of processes, not with the batch.
"""

import functools
import os
from collections.abc import Iterator

import grain
import numpy as np

from dropmae_jax import loader_process

# The largest block: two processes then fit into the 64 MB that a container has by default.
BLOCK_PAIRS = 16
# Of each process: one block that it makes, one in grain's queue, one in grain's thread of it in the
# trainer, one on the way between these, and one that is gathered or whose memory is given back.
BLOCKS_PER_WORKER = 5


class HostPairs:
  """The pairs of one host: an equal share of every batch, in one piece; a source of grain."""

  def __init__(self, pairs: grain.MapDataset, share: int, host: int, num_hosts: int) -> None:
    self._pairs, self._share, self._host, self._num_hosts = pairs, share, host, num_hosts

  def __len__(self) -> int:
    return len(self._pairs) // self._num_hosts

  def __getitem__(self, number: int) -> dict[str, np.ndarray]:
    step, place = divmod(number, self._share)
    return self._pairs[(step * self._num_hosts + self._host) * self._share + place]


class GatheredBatches(Iterator[dict[str, np.ndarray]]):
  """Batches put together from blocks; each lies in memory of its own.

  Devices may read a batch for as long as they like, even where they make no copy of it. Blocks are
  let go one by one.
  """

  def __init__(self, blocks: grain.DatasetIterator, blocks_per_batch: int) -> None:
    self._blocks, self._blocks_per_batch = blocks, blocks_per_batch

  def __next__(self) -> dict[str, np.ndarray]:
    batch = {}
    for number in range(self._blocks_per_batch):
      for name, array in next(self._blocks).items():
        if number == 0:
          batch[name] = np.empty((self._blocks_per_batch, *array.shape), array.dtype)
        batch[name][number] = array
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}

  def close(self) -> None:
    """Ends the loader that makes the blocks."""
    self._blocks.close()


def batches_of(
  pairs: grain.MapDataset,
  *,
  pair_bytes: int,
  batch_size: int,
  first_step: int,
  host: int,
  num_hosts: int,
  num_workers: int,
  num_threads: int,
) -> GatheredBatches:
  """Returns this host's share of the batches of a stream of pairs; see `data.pair_batches`.

  Args:
    pairs: of all hosts.
    pair_bytes: of the frames of a pair.
    batch_size: of all hosts together.
    first_step: batches to leave out.
    host: number of this process.
    num_hosts: number of processes.
    num_workers: processes that make blocks; if 0, threads of this one make single pairs.
    num_threads: of those.

  Raises:
    ValueError: the hosts do not divide the batch.
    BadInput: the shared memory is too small for the loader processes.
  """
  if batch_size % num_hosts:
    fitting = -(-batch_size // num_hosts) * num_hosts
    raise ValueError(
      f'{batch_size=} is not divisible by {num_hosts=}; use for example batch_size={fitting}.'
    )
  share = batch_size // num_hosts
  # Pairs of a thread of this process need not be brought together before they are gathered.
  block = _largest_divisor(share, BLOCK_PAIRS if num_workers else 1)
  blocks_per_batch = share // block
  source = grain.MapDataset.source(HostPairs(pairs, share, host, num_hosts))
  blocks = source.batch(block)[first_step * blocks_per_batch :]
  if not num_workers:
    # Threads are ahead as far as a process is.
    ahead = BLOCKS_PER_WORKER * BLOCK_PAIRS if num_threads else 0
    read = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
    return GatheredBatches(iter(blocks.to_iter_dataset(read)), blocks_per_batch)
  loader_process.unlink_blocks_of_dead_runs()
  loader_process.check_room(BLOCKS_PER_WORKER * num_workers * block * pair_bytes, num_workers)
  read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  stream = blocks.to_iter_dataset(read).mp_prefetch(
    grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1),
    worker_init_fn=functools.partial(loader_process.start_worker, trainer=os.getpid()),
  )
  return GatheredBatches(iter(stream), blocks_per_batch)


def _largest_divisor(number: int, limit: int) -> int:
  return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)
