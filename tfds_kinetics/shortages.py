"""What a machine may be short of; it says nothing about the data that are read at the time."""

import errno
import os
import resource

import numpy as np

REMEDIES = {
  errno.EMFILE: 'raise the limit of open files (ulimit -n)',
  errno.ENFILE: 'close other programs, as this machine has too many open files',
  errno.EAGAIN: 'raise the limits of processes and memory (ulimit -u, -v), or end programs',
  errno.ENOMEM: 'free memory, or raise its limit (ulimit -v)',
  errno.ESTALE: 'mount its storage again',
}
# The text of other errors than OSError; the last two are of Python and libjpeg.
TEXTS = {os.strerror(number): number for number in REMEDIES} | {
  "can't start new thread": errno.EAGAIN,
  'Insufficient memory': errno.ENOMEM,
}


def shortage(error: BaseException) -> int | None:
  """Returns the number of the system's error if it is of REMEDIES; None if it is another one."""
  number = getattr(error, 'errno', None)
  if isinstance(error, MemoryError):
    number = errno.ENOMEM
  if number is None:
    number = next((each for text, each in TEXTS.items() if text in str(error)), None)
  return number if number in REMEDIES else None


def is_memory_short(num_bytes: int) -> bool:
  """Whether this process may not have had so much more memory, at the time when it had most."""
  limits = [resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
  limits = [limit for limit in limits if limit != resource.RLIM_INFINITY]
  if limits:
    with open('/proc/self/status') as status:
      peak = next(int(line.split()[1]) for line in status if line.startswith('VmPeak:'))
    return peak * 1024 + num_bytes > min(limits)
  try:
    np.empty(num_bytes, np.uint8)  # Only reserved.
  except MemoryError:
    return True
  return False


def is_memory_limited() -> bool:
  """Whether this process and its children have a limit of memory."""
  limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
  return any(resource.getrlimit(each)[0] != resource.RLIM_INFINITY for each in limits)
