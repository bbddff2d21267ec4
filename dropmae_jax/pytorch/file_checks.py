"""What can be told of a file of weights before it is read: what it is, and whether it is whole."""

import hashlib
import pathlib
import re
import zipfile
import zlib

from dropmae_jax.runtime.atomic_file import sha256_path
from dropmae_jax.runtime.errors import UserError

FORMATS = ('pth', 'safetensors')
ENDINGS = {'.safetensors': 'safetensors', '.pth': 'pth', '.pt': 'pth', '.tar': 'pth'}
# What downloads turn out to be: how such files begin, what they are, and what to do.
_MISTAKEN = (
  (rb'\Z', 'is empty', 'get it again'),
  (rb'\s*<', 'is a web page and no weights', 'get the file that the page offers'),
  (rb'version https://git-lfs', 'is a pointer of git-lfs and no weights', 'run: git lfs pull'),
  (rb'\s*[{\[]', 'is json and no weights', 'give the file that it belongs to'),
  (rb'\x1f\x8b', 'is compressed', 'unpack it with gunzip'),
)


def format_of(path: pathlib.Path) -> str:
  """Tells the format by the file's ending; one that is not known stands for PyTorch's own."""
  return ENDINGS.get(path.suffix, 'pth')


def format_in(path: pathlib.Path) -> str:
  """Tells the format of what is there by its first bytes, and by the ending if they say nothing.

  Raises:
    UserError: the file is something else, such as the web page of a failed download, or PyTorch's
      under a name for which PyTorch itself expects safetensors.
  """
  with path.open('rb') as file:
    head = file.read(512)
  header_length = int.from_bytes(head[:8], 'little')
  if head[8:9] == b'{' and header_length <= path.stat().st_size - 8:
    return 'safetensors'
  if head.startswith((b'PK', b'\x80')):
    if format_of(path) != 'pth':
      raise UserError(f'{path} is a file of PyTorch under another name; let it end in .pth.')
    return 'pth'
  for start, what, remedy in _MISTAKEN:
    if re.match(start, head):
      raise UserError(f'{path} {what}; {remedy}.')
  return format_of(path)


def check_whole(path: pathlib.Path) -> str:
  """Compares a file with the sum beside it, or with the checksums in it.

  Returns:
    A line that says what was checked, or that nothing could be.

  Raises:
    UserError: the file is damaged.
  """
  for listed in {sha256_path(path), sha256_path(path.resolve())}:
    if listed.is_file():
      _check_sha256(path, listed)
      return f'whole: its sha256 is that of {listed}'
  with path.open('rb') as file:
    is_zip = file.read(2) == b'PK'
  if is_zip and _has_checksums(path):
    _check_records(path)
    return 'whole: the checksums in it are right'
  return (
    f'not checked for damage: {path.name} has no checksums in it, and no {sha256_path(path).name}'
    ' beside it'
  )


def _check_sha256(path: pathlib.Path, listed: pathlib.Path) -> None:
  with path.open('rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  if digest not in re.findall('[0-9a-f]{64}', listed.read_bytes().decode('latin1').lower()):
    raise UserError(
      f'{path} is not what {listed} was made of; get the file again, or remove that sum if the file'
      ' was changed on purpose.'
    )


def _has_checksums(path: pathlib.Path) -> bool:
  """PyTorch can be told to compute none (`torch.serialization.set_crc32_options`): all are 0."""
  try:
    with zipfile.ZipFile(path) as archive:
      return any(record.CRC for record in archive.infolist())
  except zipfile.BadZipFile as error:
    raise UserError(f'{path} is cut short or damaged ({error}); get it again.') from error


def _check_records(path: pathlib.Path) -> None:
  # All that a damaged directory of the archive can bring up.
  errors = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)
  try:
    with zipfile.ZipFile(path) as archive:
      damaged = archive.testzip()
  except errors as error:
    damaged = str(error)
  if damaged:
    raise UserError(f'{path} is damaged (in {damaged}); get it again.')
