"""Random access to the records of many ArrayRecord files, of which only some are open."""

import bisect
import functools
import itertools
import resource
from collections.abc import Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

# Of all datasets of a process. An open shard of 8,000 records takes some 70 kB, most of it their
# offsets. To open one takes some 0.4 ms, half as long as a pair of frames.
MAX_OPEN = 4096
# Files that the rest of the process may open.
OTHER_FILES = 256
# Records are read one by one; a thread pool and the prefetching of the footer cost more.
OPTIONS = 'readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0'
# An index is read in chunks of this size; a record of 10 to 20 kB needs one.
BUFFER_BYTES = 32768


class Shards:
  """The records of all shards, in order; those that were read last are open."""

  def __init__(self, shards: Sequence[Any], *, num_datasets: int = 1) -> None:
    """Opens nothing yet.

    Args:
      shards: as TFDS describes them (`FileInstruction`): `filename`, and `take` for the number of
        its records, all of which are read.
      num_datasets: that share the files which this process may open.
    """
    self._names = [each.filename for each in shards]
    self._ends = list(itertools.accumulate(each.take for each in shards))
    # One that leaves the cache is closed when the last thread that reads from it is done.
    self._opened = functools.lru_cache(allow_open_shards(num_datasets))(_open)

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, record: int) -> bytes:
    """Returns a record; may be called in many threads."""
    shard, position = self._locate(record)
    return self._opened(self._names[shard]).read([position])[0]

  def file_of(self, record: int) -> str:
    """Returns the file that a record is in."""
    return self._names[self._locate(record)[0]]

  def _locate(self, record: int) -> tuple[int, int]:
    """Returns the number of a record's shard, and its position there."""
    shard = bisect.bisect_right(self._ends, record)
    return shard, record - (self._ends[shard - 1] if shard else 0)


def _open(name: str) -> ArrayRecordReader:
  return ArrayRecordReader(name, options=OPTIONS, file_reader_buffer_size=BUFFER_BYTES)


def allow_open_shards(num_datasets: int) -> int:
  """Raises this process's limit of open files to the most, and returns how many shards may be open.

  Args:
    num_datasets: that share them; the number is for each.
  """
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
  return max(1, min(MAX_OPEN, hard - OTHER_FILES) // num_datasets)
