"""Paths that users give: of this machine, or of a bucket (gs://, s3://).

A path of this machine is a `pathlib.Path`; one of a bucket is an `epath.Path`, which has the same
methods. Where files are opened by libraries that read this machine only, `local_path` refuses the
latter.
"""

import contextlib
import errno
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterator
from typing import Any

from etils import epath

from dropmae_jax.runtime.errors import (
  NO_DAMAGE,
  RunFailed,
  UserError,
  os_errors_as_user_errors,
)

# What reads and writes a kind of bucket; both are extras of this project.
CLIENTS = {'gs': 'gcsfs', 's3': 's3fs'}
EXTRAS = {'gs': 'gcs', 's3': 's3'}
BUCKET_REMEDY = 'check the name of the bucket, its permissions and the network'
# How gcsfs, aiohttp and TensorStore say so.
OUT_OF_REACH = re.compile(
  'Forbidden|Cannot connect to host|HTTP response code: (401|403|408|429|5..)'
  '|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED'
)

Path = pathlib.Path | epath.Path


def is_remote(path: Path) -> bool:
  """Whether a path is of a bucket."""
  return '://' in os.fspath(path)


def absolute(path: Path) -> Path:
  """Returns a path that does not depend on the folder that a process is in."""
  return path if is_remote(path) else path.absolute()


def user_path(text: str) -> Path:
  """Returns a path that a user gives: gs:// or s3://, file://, or of this machine, with `~`.

  Raises:
    UserError: it is empty, of another kind, or the client of its bucket is not installed.
  """
  if not text:
    raise UserError('it is empty')
  scheme, is_address, rest = text.partition(':/')
  if not (is_address and re.fullmatch(r'[A-Za-z][\w.+-]*', scheme)):
    try:
      return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # There is no such user.
      raise UserError(f'{text} has no home folder; give the whole path') from error
  if file := re.fullmatch('file://(?:localhost)?(/.*)', text, re.DOTALL):
    return pathlib.Path(urllib.parse.unquote(file[1]))
  if scheme not in CLIENTS:
    raise UserError(
      f'{text} is an address of a kind that is not read; give a path of this machine, or of a'
      ' bucket as gs://BUCKET/FOLDER or s3://BUCKET/FOLDER'
    )
  if not re.match('/[^/]', rest):
    raise UserError(f'{text} names no bucket; give {scheme}://BUCKET/FOLDER')
  if not importlib.util.find_spec(CLIENTS[scheme]):
    raise UserError(
      f"{text} needs {CLIENTS[scheme]}; install it with pip install 'dropmae_jax[{EXTRAS[scheme]}]'"
    )
  import fsspec

  # Otherwise it would not see what TensorStore and other processes have written since.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  fsspec.config.conf.setdefault('s3', {})['use_listings_cache'] = False
  for name in ('gcsfs', 'google.auth'):  # What goes wrong there comes as exceptions too.
    logging.getLogger(name).setLevel(logging.CRITICAL)
  return epath.Path(text)


def workdir_path(text: str) -> Path:
  """Returns where a run is to be written, as `user_path`; orbax writes to no other buckets than gs.

  Raises:
    UserError: as there, or it is a bucket of S3.
  """
  if text.startswith('s3:/'):
    raise UserError(
      f'{text}: checkpoints can be written to gs:// and to folders only; give a folder of this'
      ' machine or of a shared file system, and copy it to the bucket (aws s3 sync)'
    )
  return user_path(text)


@contextlib.contextmanager
def client_errors_as_os_errors(path: Path) -> Iterator[None]:
  """Raises what the client of a bucket raises inside as an OSError, whose `strerror` says why.

  Args:
    path: that is read or written inside; where it is of this machine, nothing is changed.
  """
  try:
    yield
  except Exception as error:
    if not is_remote(path) or isinstance(error, (UserError, RunFailed, *NO_DAMAGE)):
      raise
    if isinstance(error, FileNotFoundError):
      raise FileNotFoundError(errno.ENOENT, 'there is no such bucket or object') from error
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise OSError(errno.EIO, reason) from error


def is_out_of_reach(error: BaseException) -> bool:
  """Whether an error says that a bucket cannot be reached or read now; that is no damage."""
  if isinstance(error, ConnectionError | TimeoutError) or OUT_OF_REACH.search(str(error)):
    return True
  return error.__cause__ is not None and is_out_of_reach(error.__cause__)


def local_path(text: str) -> pathlib.Path:
  """Returns a path of this machine that a user gives, as `user_path`.

  Raises:
    UserError: it is empty, or the address of a bucket or a server.
  """
  scheme, is_address, _ = text.partition(':/')
  if is_address and re.fullmatch(r'[A-Za-z][\w.+-]*', scheme) and scheme != 'file':
    raise UserError(
      f'{text} is an address, not a path of this machine; mount that storage as a folder (buckets:'
      ' gcsfuse, mountpoint-s3), and give the path of the folder'
    )
  return user_path(text)


def is_folder(path: Path) -> bool:
  """Whether a path that is to be read names a folder.

  Raises:
    UserError: it cannot be told, for example because a permission is missing.
  """
  with (
    os_errors_as_user_errors(f'{path} cannot be read', 'give another file or folder.'),
    client_errors_as_os_errors(path),
  ):
    return path.is_dir()


def check_room(folder: pathlib.Path, num_bytes: int, what: str, *, remedy: str) -> None:
  """Checks that a folder has room for a file.

  Raises:
    UserError: it has too little.
  """
  free = shutil.disk_usage(folder).free
  if free < num_bytes:
    raise UserError(
      f'{what} needs {num_bytes / 1e6:.0f} MB and {free / 1e6:.0f} MB are free in {folder}; free'
      f' some space, or {remedy}.'
    )


@contextlib.contextmanager
def local_copy(path: Path, *beside: Path) -> Iterator[pathlib.Path]:
  """Yields a file that is on this machine: the path itself, or a copy of an object of a bucket.

  Args:
    path: of the file.
    beside: what to copy to the same folder, where it is there.

  Raises:
    OSError: it cannot be read; `strerror` says why.
    UserError: there is no room for the copy.
  """
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='dropmae_jax') as name:
    folder = pathlib.Path(name)
    with client_errors_as_os_errors(path):
      num_bytes, remedy = path.stat().length, 'set TMPDIR to another folder'
      check_room(folder, num_bytes, f'a copy of {path}', remedy=remedy)
      for each in (path, *(each for each in beside if each.exists())):
        client, stored = _client(each)
        client.get_file(stored, str(folder / each.name))
    yield folder / path.name


def upload(file: pathlib.Path, path: Path) -> None:
  """Uploads a file of this machine to a bucket; the object has its old content until the end.

  An epath.Path would be opened for writing, and an interruption would leave half of the file there.

  Raises:
    OSError: it cannot be written; `strerror` says why.
  """
  with client_errors_as_os_errors(path):
    client, stored = _client(path)
    client.put_file(str(file), stored)


def upload_folder(folder: pathlib.Path, path: Path, *, last: pathlib.Path) -> None:
  """Uploads the files of a folder of this machine to a bucket; a failure leaves none there.

  Args:
    folder: to upload.
    path: of the folder in the bucket, which has no such files yet.
    last: the file in the folder that is uploaded when all others are there.

  Raises:
    OSError: they cannot be written; `strerror` says why.
  """
  files = [*(each for each in folder.rglob('*') if each.is_file() and each != last), last]
  with client_errors_as_os_errors(path):
    client, stored = _client(path)
    names = [f'{stored}/{each.relative_to(folder).as_posix()}' for each in files]
    try:
      client.put([str(each) for each in files[:-1]], names[:-1])
      client.put_file(str(last), names[-1])
    except BaseException:
      with contextlib.suppress(Exception):
        client.rm(names)
      raise


def check_upload(path: Path) -> None:
  """Begins to write an object of a bucket and cancels that, which raises where it cannot."""
  client, stored = _client(path)
  file = client.open(stored, 'wb', autocommit=False)
  file.write(b' ')
  file.flush(force=True)
  file.discard()


def _client(path: Path) -> tuple[Any, str]:
  """Returns the file system of a bucket, and the name that an object has in it."""
  import fsspec

  return fsspec.core.url_to_fs(str(path))
