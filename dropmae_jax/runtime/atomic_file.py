"""Writes files atomically: checks the path first, writes a temporary file, syncs and renames it.

A file of a bucket is written to a temporary folder of this machine first. Objects appear there only
when they are whole.

Each weight file gets `<file>.sha256`, for `sha256sum -c`, and `<file>.json`, a card that describes
it.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from dropmae_jax.runtime import paths
from dropmae_jax.runtime.errors import UserError, os_errors_as_user_errors
from dropmae_jax.runtime.paths import Path, client_errors_as_os_errors, is_remote
from tfds_kinetics import files

# Of temporary folders; they hold the file under its own name, however long that is.
PREFIX = '.partial.'


def sha256_path(path: Path) -> Path:
  """Returns the path of a file's sha256."""
  return path.with_name(f'{path.name}.sha256')


def card_path(path: Path) -> Path:
  """Returns the path of a file's card."""
  return path.with_name(f'{path.name}.json')


def check_file(path: Path, *, has_card: bool = True) -> Path:
  """Checks that a file, its sha256 and its card can be written.

  Args:
    path: of the file.
    has_card: it gets a sha256 and a card; without, files of their names are left alone.

  Returns:
    The path with all symbolic links resolved; the links themselves stay.

  Raises:
    UserError: the path names no file, its folder or bucket does not exist or is not writable, or
      something other than an earlier file with its sha256 and card would be replaced; or its name
      could forge lines of the sha256.
  """
  # The parts of a bucket are those of /gs/NAME.
  if not path.name or (is_remote(path) and len(path.parts) == 3):
    raise UserError(f'--output={path} does not name a file; give the path of one.')
  with (
    os_errors_as_user_errors(f'--output={path} cannot be written', 'give another path.'),
    client_errors_as_os_errors(path),
  ):
    target = path if is_remote(path) else pathlib.Path(os.path.realpath(path))
    _check_name(target)
    if is_remote(target):
      paths.check_upload(target)
    elif not target.parent.is_dir():
      raise UserError(f'the folder of --output={path} does not exist; make it first.')
    for each in (target, *((sha256_path(target), card_path(target)) if has_card else ())):
      if each.is_dir():
        raise UserError(f'--output={path}: {each} is a folder; give the name of a file.')
      if (
        not is_remote(each) and os.path.lexists(each) and (each.is_symlink() or not each.is_file())
      ):
        raise UserError(f'--output={path}: {each} is not a regular file; give another name.')
    if has_card and card_path(target).exists() and not _is_card(card_path(target)):
      raise UserError(
        f'--output={path}: {card_path(target)} is not the card of a weight file and would be'
        ' replaced; give another name, or move it.'
      )
    if not is_remote(target):
      _check_writable(target.parent)
  return target


def check_folder(folder: Path) -> None:
  """Checks that a folder is empty or can be created.

  Raises:
    UserError: it is not empty, or not writable.
  """
  _check_name(folder)
  with (
    os_errors_as_user_errors(f'--output={folder} cannot be written', 'give another folder.'),
    client_errors_as_os_errors(folder),
  ):
    if folder.exists():
      # A folder that was made in the console of a bucket is an object in it, and has its name.
      placeholder = folder.name if is_remote(folder) else ''
      if not folder.is_dir() or any(each.name != placeholder for each in folder.iterdir()):
        raise UserError(f'--output={folder} is not empty; give a new folder.')
    if is_remote(folder):
      paths.check_upload(folder / 'new')
      return
    if folder.exists():
      _check_writable(folder)
    _check_writable(next(each for each in folder.absolute().parents if each.exists()))


def _check_name(path: Path) -> None:
  # Surrogates stand for bytes that are not UTF-8.
  if any(unicodedata.category(character) in ('Cc', 'Cs') for character in path.name):
    raise UserError(
      f'--output: the name {path.name!r} has control characters or is not UTF-8; give another name.'
    )


def _check_writable(folder: pathlib.Path) -> None:
  if not folder.is_dir():
    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
  if not os.access(folder, os.W_OK | os.X_OK):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _is_card(path: Path) -> bool:
  try:
    card = json.loads(path.read_bytes())
  except (ValueError, RecursionError):
    return False
  return isinstance(card, dict) and {'file', 'sha256'} <= card.keys()


@contextlib.contextmanager
def staged(path: Path, *, num_bytes: int, has_card: bool = True) -> Iterator[pathlib.Path]:
  """Yields a temporary path to write to; at the end it is renamed (or uploaded), with its card.

  On any failure, what was at `path` before stays.

  Args:
    path: the final path; its folder must exist.
    num_bytes: how much will be written, at least.
    has_card: as in `check_file`.

  Raises:
    UserError: `check_file` refuses the path, or writing fails, for example because the disk is
      full.
  """
  target = check_file(path, has_card=has_card)
  folder = pathlib.Path(tempfile.gettempdir()) if is_remote(target) else target.parent
  remedy = 'set TMPDIR to another folder' if is_remote(target) else 'give another folder'
  paths.check_room(folder, num_bytes, f'--output={path}', remedy=remedy)
  with (
    os_errors_as_user_errors(
      f'--output={path} cannot be written', 'what was there before is unchanged.'
    ),
    tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as temporary,
  ):
    partial = pathlib.Path(temporary) / target.name
    yield partial
    check_file(path, has_card=has_card)
    sync(partial.parent)
    if has_card:
      # If the process is killed here, no file is left with the sha256 of another one.
      with client_errors_as_os_errors(target):
        sha256_path(target).unlink(missing_ok=True)
    move = paths.upload if is_remote(target) else pathlib.Path.replace
    for written in [partial, *sorted(set(partial.parent.iterdir()) - {partial})]:
      move(written, target.with_name(written.name))


def sync(path: pathlib.Path) -> None:
  """Waits until a file, or a folder with all that is in it, is on its disk; then its name too.

  Raises:
    OSError: it could not be written.
  """
  for each in (*path.rglob('*'), path, path.parent):
    files.sync(each)


def write_card(path: pathlib.Path, card: Mapping[str, Any]) -> None:
  """Writes the sha256 and the json card of a file beside it; the card holds the sha256 too."""
  with path.open('rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  sha256_path(path).write_text(f'{digest}  {path.name}\n')
  text = json.dumps({'file': path.name, 'sha256': digest, **card}, indent=2)
  card_path(path).write_text(text + '\n')
