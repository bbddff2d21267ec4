"""Waits until files are on their disk."""

import errno
import os
import pathlib

# Of folders on file systems that cannot sync them.
NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}


def sync(path: pathlib.Path) -> None:
  """Waits until a file or folder is stored on the disk (fsync), where that can be done."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if not path.is_dir() or error.errno not in NO_SYNC:
      raise
  finally:
    os.close(descriptor)
