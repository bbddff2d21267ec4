"""Random access to the records of many ArrayRecord files, of which only some are open.

Whenever one is opened, again too, its digest must be that of the file that was built.
"""

import bisect
import concurrent.futures
import functools
import itertools
import os
import resource
from collections.abc import Sequence
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader

from dropmae_jax.runtime.errors import UserError
from tfds_kinetics.files import index_digest

# Of all datasets of a process. An open shard of 8,000 records takes some 70 kB, most of it their
# offsets. To open one took 0.4 ms before digests were compared, half as long as a pair of frames.
MAX_OPEN = 4096
# Files that the rest of the process may open.
OTHER_FILES = 256
# Records are read one by one; a thread pool and the prefetching of the footer cost more.
OPTIONS = 'readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0'
# An index is read in chunks of this size; a record of 10 to 20 kB needs one.
BUFFER_BYTES = 32768
# They wait for the storage when a dataset is opened.
DIGEST_THREADS = 16


class ChangedDataset(UserError):
  """A file of a dataset is not the one that was built, or not the one that was opened."""


class _Opened(NamedTuple):
  reader: ArrayRecordReader
  modified_ns: int


class Shards:
  """The records of all shards, in order; those that were read last are open."""

  def __init__(
    self, shards: Sequence[Any], digests: Sequence[str] | None = None, *, num_datasets: int = 1
  ) -> None:
    """Compares the digests of all shards; opens none yet.

    Args:
      shards: as TFDS describes them (`FileInstruction`): `filename`, and `take` for the number of
        its records, all of which are read.
      digests: by `index_digest`, when they were built; None if that is not known, and they must
        stay as they are now.
      num_datasets: that share the files which this process may open.

    Raises:
      ChangedDataset: one has another digest.
      OSError: one cannot be read.
    """
    self._names = [each.filename for each in shards]
    self._ends = list(itertools.accumulate(each.take for each in shards))
    # Before the digests, whose threads have files open too.
    most_open = allow_open_shards(num_datasets)
    with concurrent.futures.ThreadPoolExecutor(DIGEST_THREADS) as threads:
      current = list(threads.map(index_digest, self._names))
    self._digests = current if digests is None else list(digests)
    for name, expected, digest in zip(self._names, self._digests, current, strict=True):
      if digest != expected:
        raise ChangedDataset(
          f'{os.path.basename(name)} is another file than the one that was built'
        )
    # One that leaves the cache is closed when the last thread that reads from it is done.
    self._opened = functools.lru_cache(most_open)(self._open)

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, record: int) -> bytes:
    """Returns a record; may be called in many threads.

    Raises:
      ChangedDataset: its file was replaced since the dataset was opened.
    """
    shard, position = self._locate(record)
    return self._opened(shard).reader.read([position])[0]

  def check(self, record: int) -> None:
    """Checks that a record's file, which is open, is still the same.

    Raises:
      ChangedDataset: it was replaced or written to.
      OSError: it cannot be read.
    """
    shard, _ = self._locate(record)
    self._check(shard)
    if os.stat(self._names[shard]).st_mtime_ns != self._opened(shard).modified_ns:
      raise self._changed(shard)

  def file_of(self, record: int) -> str:
    """Returns the file that a record is in."""
    return self._names[self._locate(record)[0]]

  def _locate(self, record: int) -> tuple[int, int]:
    """Returns the number of a record's shard, and its position there."""
    shard = bisect.bisect_right(self._ends, record)
    return shard, record - (self._ends[shard - 1] if shard else 0)

  def _open(self, shard: int) -> _Opened:
    name = self._names[shard]
    reader = ArrayRecordReader(name, options=OPTIONS, file_reader_buffer_size=BUFFER_BYTES)
    modified_ns = os.stat(name).st_mtime_ns
    self._check(shard)  # Last, so that what is replaced meanwhile is seen.
    return _Opened(reader, modified_ns)

  def _check(self, shard: int) -> None:
    if index_digest(self._names[shard]) != self._digests[shard]:
      raise self._changed(shard)

  def _changed(self, shard: int) -> ChangedDataset:
    return ChangedDataset(
      f'{self._names[shard]} was replaced while it was in use; no pair of the new file was made.'
      ' Put the dataset back as it was and give the same command again, or begin another run.'
    )


def allow_open_shards(num_datasets: int) -> int:
  """Raises this process's limit of open files to the most, and returns how many shards may be open.

  Args:
    num_datasets: that share them; the number is for each.
  """
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
  return max(1, min(MAX_OPEN, hard - OTHER_FILES) // num_datasets)
