"""Files of a dataset: written whole and to the disk, compared by digests, and read with care."""

import errno
import hashlib
import math
import os
import pathlib
import re
import secrets
import zipfile
from collections.abc import Collection

import numpy as np

# An ArrayRecord file ends with a block of this size, near the beginning of which stands where the
# index of the records begins: a varint, followed by a magic number.
END_BYTES = 1 << 16
END_READ = 1024
INDEX_BEGINS = re.compile(rb'\x08([\x80-\xff]*[\x00-\x7f])\x10\xde\xc0\xeb\xfe\x84\xce\xc3\xc9\x71')
# The index begins with its size and checksum: 40 bytes, or 64 if a block begins among them.
INDEX_HEADER = 64
# Of deflate: no byte of it stands for more.
MOST_INFLATED = 1032
# Of folders on file systems that cannot sync them.
NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}


def index_digest(path: str | os.PathLike[str]) -> str:
  """Returns the sha256 of an ArrayRecord file's size and of the checksum of its index.

  The index has place and size of every record. So two files of frames differ in it, as frames are
  encoded to sizes of their own. Damage of a record is not seen: that has a checksum of its own.

  Raises:
    OSError: the file cannot be read.
  """
  with open(path, 'rb', buffering=0) as file:
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256(f'{size} '.encode())
    end = os.pread(file.fileno(), END_READ, max(0, size - END_BYTES))
    digest.update(end)
    begins = INDEX_BEGINS.search(end)
    if begins:  # Otherwise it is no such file, which the digest tells all the same.
      place = sum((byte & 0x7F) << (7 * number) for number, byte in enumerate(begins[1][:9]))
      digest.update(os.pread(file.fileno(), INDEX_HEADER, place))
  return digest.hexdigest()


def file_digest(path: pathlib.Path) -> str:
  """Returns the sha256 of a file.

  Raises:
    OSError: it cannot be read.
  """
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


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


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file completely or not at all, even if the power fails."""
  temporary = path.with_name(f'{path.name}.{secrets.token_hex(8)}.partial')
  temporary.write_text(text, 'utf-8')
  sync(temporary)
  os.replace(temporary, path)


def read_arrays(path: pathlib.Path, names: Collection[str]) -> dict[str, np.ndarray]:
  """Returns the arrays of an .npz that have these names; those that it lacks are left out.

  The sizes that it states are not believed: no more memory is taken than such a file can fill.

  Raises:
    ValueError: an array is stated to be of another size than is stored.
    OSError: the file cannot be read.
    Exception: of many other types, where it is damaged.
  """
  arrays = {}
  with zipfile.ZipFile(path) as archive:
    for member in archive.infolist():
      name = member.filename.removesuffix('.npy')
      if name not in names:
        continue
      with archive.open(member) as file:
        if np.lib.format.read_magic(file) != (1, 0):
          raise ValueError(f'{name} is not in the format that was written')
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        stated = file.tell() + math.prod(shape) * dtype.itemsize
        too_many = stated > MOST_INFLATED * path.stat().st_size or not dtype.itemsize
        if stated != member.file_size or too_many:
          raise ValueError(f'{name} is stated to be of {stated} bytes, which are not there')
        file.seek(0)
        arrays[name] = np.lib.format.read_array(file)
  return arrays
