"""Reads and writes .pth and .safetensors files of weights. Only writing a .pth needs PyTorch.

No pickled code is run: see `pth_file`. Before a file is read, its format is told by its first
bytes, and it is checked for damage where a checksum exists.
"""

import hashlib
import importlib
import json
import pathlib
import re
import zipfile
import zlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from dropmae_jax.pytorch import pth_file
from dropmae_jax.pytorch.pth_file import StandIn
from dropmae_jax.runtime.atomic_file import sha256_path
from dropmae_jax.runtime.errors import UserError, first_line, os_errors_as_user_errors
from dropmae_jax.runtime.paths import Path, is_remote, local_copy

FORMATS = ('pth', 'safetensors')
ENDINGS = {'.safetensors': 'safetensors', '.pth': 'pth', '.pt': 'pth', '.tar': 'pth'}
# Where the tensors are stored: DropMAE and MAE, trained trackers, timm; then averages of weights.
TENSOR_KEYS = ('model', 'net', 'state_dict', 'model_ema', 'state_dict_ema')
# Files that are downloaded by mistake: how they begin, what they are, and what to do.
_NOT_WEIGHTS = (
  (rb'\Z', 'is empty', 'download it again'),
  (rb'\s*<', 'is a web page and not weights', 'download the file that the page links to'),
  (rb'version https://git-lfs', 'is a git-lfs pointer and not weights', 'run: git lfs pull'),
  (rb'\s*[{\[]', 'is json and not weights', 'give the weight file that it belongs to'),
  (rb'\x1f\x8b', 'is compressed', 'unpack it with gunzip'),
)


class WeightFile(NamedTuple):
  """The content of a file.

  Attributes:
    key: the entry that holds the tensors; '' where they are the whole file.
    tensors: numpy arrays in the file's dtypes.
    entries: all other top-level entries, such as 'args' and 'epoch'; tensors in them as numpy.
    integrity: one line that says how the file was checked for damage, or that it was not.
    objects: names of the Python objects in it, which are neither imported nor run; entries hold a
      `pth_file.StandIn` for each.
  """

  key: str
  tensors: dict[str, np.ndarray]
  entries: dict[str, Any]
  integrity: str = ''
  objects: tuple[str, ...] = ()


def torch_fault() -> str | None:
  """Returns why PyTorch cannot be used; None if it can."""
  try:
    importlib.import_module('torch')
  except Exception as error:  # A broken installation may raise anything.
    if isinstance(error, ModuleNotFoundError) and error.name == 'torch':
      return 'PyTorch is not installed'
    return f'PyTorch is installed but does not load ({first_line(error)})'
  return None


def import_torch() -> ModuleType:
  """Imports PyTorch.

  Raises:
    UserError: it is not installed, or does not load.
  """
  if fault := torch_fault():
    raise UserError(
      f"{fault}, and writing .pth files needs it; run: pip install 'dropmae_jax[torch]', or use"
      ' .safetensors.'
    )
  return importlib.import_module('torch')


def format_of(path: Path) -> str:
  """Returns the format that a file name's ending stands for; 'pth' for unknown endings."""
  return ENDINGS.get(path.suffix, 'pth')


def read(path: Path) -> WeightFile:
  """Reads a file of weights; no pickled code runs. One of a bucket is copied to this machine first.

  Raises:
    UserError: the file does not exist, is damaged, says sizes that it does not have, or holds no
      named dense tensors.
  """
  with (
    os_errors_as_user_errors(f'{path} cannot be read', 'give a .pth or .safetensors.'),
    local_copy(path, sha256_path(path)) as file,
  ):
    if not file.is_file():
      raise UserError(f'{path} is not a file; give a .pth or .safetensors.')

    def as_given(text: str) -> str:
      return text.replace(str(file.parent), str(path.parent)) if is_remote(path) else text

    try:
      read_format = _read_safetensors if _format_in(file) == 'safetensors' else _read_pth
      integrity = _check_integrity(file)
      return read_format(file)._replace(integrity=as_given(integrity))
    except UserError as error:
      raise UserError(as_given(str(error))) from error


def _format_in(path: pathlib.Path) -> str:
  """Returns the format by the file's first bytes, or by its ending if those do not tell.

  Raises:
    UserError: the file is something else, such as the web page of a failed download, or it is a
      .pth with the ending .safetensors, which PyTorch would reject.
  """
  with path.open('rb') as file:
    head = file.read(512)
  header_length = int.from_bytes(head[:8], 'little')
  if head[8:9] == b'{' and header_length <= path.stat().st_size - 8:
    return 'safetensors'
  if head.startswith((b'PK', b'\x80')):
    if format_of(path) != 'pth':
      raise UserError(f'{path} is a PyTorch file with another ending; rename it to .pth.')
    return 'pth'
  for start, what, remedy in _NOT_WEIGHTS:
    if re.match(start, head):
      raise UserError(f'{path} {what}; {remedy}.')
  return format_of(path)


def _check_integrity(path: pathlib.Path) -> str:
  """Compares a file with the .sha256 beside it, or else with the checksums of its zip records.

  Returns:
    One line that says what was checked, or that nothing could be.

  Raises:
    UserError: the file is damaged.
  """
  for listed in {sha256_path(path), sha256_path(path.resolve())}:
    if listed.is_file():
      with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
      if digest not in re.findall('[0-9a-f]{64}', listed.read_bytes().decode('latin1').lower()):
        raise UserError(
          f'{path} does not match {listed}; download the file again, or remove the .sha256 if the'
          ' file was changed on purpose.'
        )
      return f'intact: its sha256 matches {listed}'
  with path.open('rb') as file:
    is_zip = file.read(2) == b'PK'
  if is_zip and _has_checksums(path):
    _check_records(path)
    return 'intact: the checksums in it match'
  return (
    f'not checked for damage: {path.name} has no checksums in it, and there is no'
    f' {sha256_path(path).name} beside it'
  )


def _has_checksums(path: pathlib.Path) -> bool:
  """PyTorch can be set to compute none (`torch.serialization.set_crc32_options`): all are 0."""
  try:
    with zipfile.ZipFile(path) as archive:
      records = archive.infolist()
  except (zipfile.BadZipFile, NotImplementedError) as error:
    raise UserError(f'{path} is truncated or damaged ({error}); download it again.') from error
  # They may be of any size when they are unpacked.
  if any(record.compress_type != zipfile.ZIP_STORED for record in records):
    raise UserError(
      f'{path} has compressed records, as a TorchScript archive or a zip of a file has; give the'
      ' file that torch.save wrote.'
    )
  return any(record.CRC for record in records)


def _check_records(path: pathlib.Path) -> None:
  # Everything that zipfile may raise on a damaged directory of the archive.
  errors = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)
  try:
    with zipfile.ZipFile(path) as archive:
      damaged = archive.testzip()
  except errors as error:
    damaged = str(error)
  if damaged:
    raise UserError(f'{path} is damaged (in {damaged}); download it again.')


def _read_safetensors(path: pathlib.Path) -> WeightFile:
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      tensors = {name: file.get_tensor(name) for name in list(file.keys())}
      metadata = file.metadata() or {}
  # AttributeError and TypeError come from dtypes that numpy does not have.
  except (safetensors.SafetensorError, OSError, AttributeError, TypeError) as error:
    raise UserError(
      f'{path} cannot be read as safetensors ({error}); give a complete file.'
    ) from error
  if not tensors:
    raise UserError(f'{path} holds no tensors; give a file of weights.')
  entries = {}
  for name, text in metadata.items():
    try:
      entries[name] = json.loads(text)
    except (ValueError, RecursionError):
      entries[name] = text
  return WeightFile('', tensors, entries)


def _read_pth(path: pathlib.Path) -> WeightFile:
  content, objects = pth_file.read(path)
  if not isinstance(content, dict):
    what = content.name if isinstance(content, StandIn) else type(content).__name__
    raise UserError(
      f'{path} holds a {what} and not a dict of tensors; save its state_dict() with torch.save.'
    )
  key = next((key for key in TENSOR_KEYS if isinstance(content.get(key), dict)), '')
  state = content[key] if key else content
  odd = [
    f'{name} ({value.name})' if isinstance(value, StandIn) else str(name)
    for name, value in state.items()
    if not isinstance(value, np.ndarray) or not isinstance(name, str)
  ]
  if odd or not state:
    where = f'under {key!r}' if key else f'at its top level, and no {" or ".join(TENSOR_KEYS)}'
    what = f'entries that are not named tensors ({", ".join(odd[:3])})' if odd else 'nothing'
    raise UserError(f'{path} holds {what} {where}; give a file of weights.')
  # Numbers of older files may lie at any byte.
  tensors = {name: np.require(array, requirements='A') for name, array in state.items()}
  entries = {name: value for name, value in content.items() if name != key} if key else {}
  return WeightFile(key, tensors, entries, objects=objects)


def write(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  *,
  file_format: str,
  key: str = 'model',
  entries: Mapping[str, Any] | None = None,
) -> None:
  """Writes tensors, each with its own storage; every PyTorch since 1.9 can read the file.

  Args:
    path: to write to, not atomically: see `atomic_file.staged`.
    tensors: named arrays.
    file_format: one of `FORMATS`.
    key: the entry of a .pth that holds them; '' makes them the whole file.
    entries: further top-level entries: dicts, lists, plain values and numpy arrays. A
      .safetensors keeps them as json in the metadata of its header.

  Raises:
    OSError: the file system refuses it.
    UserError: the format is 'pth' and PyTorch is not installed.
  """
  entries = entries or {}
  if file_format == 'safetensors':
    metadata = {'format': 'pt'} | {name: json.dumps(value) for name, value in entries.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
      safetensors.numpy.save_file(dict(tensors), path, metadata=metadata)
    except safetensors.SafetensorError as error:
      raise OSError(str(error)) from error
    path.chmod(mode)  # Since 0.8 safetensors makes files that only their owner can read.
    return
  torch = import_torch()

  def with_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
      return torch.from_numpy(value)
    if isinstance(value, Mapping):
      return {name: with_tensors(each) for name, each in value.items()}
    return value

  content = {key: tensors, **entries} if key else tensors
  with path.open('wb') as file:
    try:
      torch.save(with_tensors(content), file)
    except RuntimeError as error:
      # PyTorch's writer replaces an OSError, or a signal's exception, by one of its own.
      raise error.__context__ or error from None
