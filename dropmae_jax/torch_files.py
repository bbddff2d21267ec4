"""Files of weights: .pth and .safetensors, read without running code and written atomically.

Beside each written file lie `<file>.sha256`, for `sha256sum -c`, and `<file>.json`, a card that
says what it holds. Only .pth needs PyTorch.
"""

import argparse
import contextlib
import hashlib
import json
import pathlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dropmae_jax.command_line import BadInput

FORMATS = ('pth', 'safetensors')
_BESIDE = ('.sha256', '.json')
# Where files of the field keep their tensors: DropMAE and MAE, trained trackers, timm.
TENSOR_KEYS = ('model', 'net', 'state_dict')


class WeightFile(NamedTuple):
  """What a file holds.

  Attributes:
    key: the entry that its tensors lie under; '' where they are the whole file.
    tensors: as in the file, numpy, in the file's dtypes.
    entries: all else at the top level, such as 'args' and 'epoch'; tensors in it as numpy.
  """

  key: str
  tensors: dict[str, np.ndarray]
  entries: dict[str, Any]


def format_of(path: pathlib.Path) -> str:
  """Tells the format by the file's ending; whatever is not .safetensors is PyTorch's own."""
  return 'safetensors' if path.suffix == '.safetensors' else 'pth'


def torch_or_refuse() -> ModuleType:
  """Imports PyTorch.

  Raises:
    BadInput: it is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise BadInput(
      'PyTorch is not installed, and .pth files need it; run: pip install'
      " 'dropmae_jax[torch]', or use .safetensors."
    ) from error
  return torch


def read(path: pathlib.Path) -> WeightFile:
  """Reads any file of weights; no pickled code runs.

  Raises:
    BadInput: the file is not there, damaged, holds no tensors, or holds objects other than
      tensors, plain values and the argparse.Namespace of the published files (names it).
  """
  if not path.is_file():
    raise BadInput(f'{path} is not a file; give a .pth or .safetensors.')
  return _read_safetensors(path) if format_of(path) == 'safetensors' else _read_pth(path)


def _read_safetensors(path: pathlib.Path) -> WeightFile:
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      tensors = {name: file.get_tensor(name) for name in list(file.keys())}
      metadata = file.metadata() or {}
  except (safetensors.SafetensorError, OSError, AttributeError, TypeError) as error:
    raise BadInput(f'{path} cannot be read as safetensors ({error}); give a whole file.') from error
  if not tensors:
    raise BadInput(f'{path} holds no tensors; give a file of weights.')
  entries = {}
  for name, text in metadata.items():
    try:
      entries[name] = json.loads(text)
    except ValueError:
      entries[name] = text
  return WeightFile('', tensors, entries)


def _read_pth(path: pathlib.Path) -> WeightFile:
  torch = torch_or_refuse()
  try:
    with torch.serialization.safe_globals([argparse.Namespace]):
      content = torch.load(
        path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path) or None
      )
  except Exception as error:  # A damaged file fails in as many ways as there are bytes.
    if code := re.search(r'(?:GLOBAL|unrecognized function) (\S+)', str(error)):
      raise BadInput(
        f'{path} holds the Python object {code[1]}, which is code and is not run; where you trust'
        f' the file, save its tensors alone: torch.save({{key: torch.load({path.name!r},'
        ' weights_only=False)[key]}, NEW_FILE) with key "model" or "net".'
      ) from error
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise BadInput(
      f'{path} cannot be read as a PyTorch checkpoint ({reason}); give a whole file that holds'
      ' only tensors and plain values.'
    ) from error

  def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
      if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(jnp.bfloat16)
      return value.detach().numpy()
    if isinstance(value, argparse.Namespace):
      return plain(vars(value))
    if isinstance(value, Mapping):
      return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
      return type(value)(plain(each) for each in value)
    return value

  try:
    content = plain(content)
  except (RuntimeError, TypeError) as error:
    raise BadInput(
      f'{path} holds a tensor that numpy has no form for ({str(error).splitlines()[0]}); save it as'
      ' a dense one of float32.'
    ) from error
  if not isinstance(content, dict):
    raise BadInput(f'{path} holds a {type(content).__name__}, and not a dict of tensors.')
  key = next((key for key in TENSOR_KEYS if isinstance(content.get(key), dict)), '')
  found = content[key] if key else content
  odd = [
    str(name)
    for name, value in found.items()
    if not isinstance(value, np.ndarray) or not isinstance(name, str)
  ]
  if odd or not found:
    where = f'under {key!r}' if key else 'and none of the entries ' + ', '.join(TENSOR_KEYS)
    raise BadInput(
      f'{path} has {where} what is no named tensor: {", ".join(odd[:3]) or "nothing"}; give a'
      ' file of weights.'
    )
  return WeightFile(key, found, {k: v for k, v in content.items() if k != key} if key else {})


@contextlib.contextmanager
def staged(path: pathlib.Path, *, num_bytes: int) -> Iterator[pathlib.Path]:
  """Yields another path to write to; at the end that file and its card take their places.

  Until then what is at `path` stays, and on any failure it stays for good.

  Args:
    path: the file in the end; its folder must exist.
    num_bytes: that will be written, at least.

  Raises:
    BadInput: the folder is not there, `path` is a folder, or writing fails, as on a full disk.
  """
  folder = path.absolute().parent
  if not folder.is_dir():
    raise BadInput(f'the folder of --output={path} does not exist; make it first.')
  for each in (path, *(path.with_name(f'{path.name}{ending}') for ending in _BESIDE)):
    if each.is_dir():
      raise BadInput(f'--output={path}: {each} is a folder; give the name of a file.')
  free = shutil.disk_usage(folder).free
  if free < num_bytes:
    raise BadInput(
      f'--output={path} needs {num_bytes / 1e6:.0f} MB and {free / 1e6:.0f} MB are free there;'
      ' make room, or give another folder.'
    )
  try:
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=folder) as temporary:
      partial = pathlib.Path(temporary) / path.name
      yield partial
      for written in [partial, *sorted(set(partial.parent.iterdir()) - {partial})]:
        written.replace(folder / written.name)
  except (OSError, safetensors.SafetensorError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    raise BadInput(
      f'--output={path} cannot be written ({reason}); what was there before is untouched.'
    ) from error


def write(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  *,
  file_format: str,
  key: str = 'model',
  entries: Mapping[str, Any] | None = None,
) -> None:
  """Writes tensors, each with storage of its own, so that every PyTorch since 1.9 reads them.

  Args:
    path: to be written, not atomically: see `staged`.
    tensors: named arrays.
    file_format: one of `FORMATS`.
    key: the entry of a .pth that they lie under; '' makes them the whole file.
    entries: more at the top level; dicts, lists, plain values and numpy arrays. Safetensors keep
      them as json, under the header's metadata.
  """
  entries = entries or {}
  if file_format == 'safetensors':
    metadata = {'format': 'pt'} | {name: json.dumps(value) for name, value in entries.items()}
    safetensors.numpy.save_file(dict(tensors), path, metadata=metadata)
    return
  torch = torch_or_refuse()

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
      # PyTorch's writer hides the system's refusal behind an error of its own.
      raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def write_card(path: pathlib.Path, card: Mapping[str, Any]) -> None:
  """Writes the sha256 and the json card of a file beside it; the card gets the sha256 too."""
  with path.open('rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  path.with_name(f'{path.name}.sha256').write_text(f'{digest}  {path.name}\n')
  text = json.dumps({'file': path.name, 'sha256': digest, **card}, indent=2)
  path.with_name(f'{path.name}.json').write_text(text + '\n')
