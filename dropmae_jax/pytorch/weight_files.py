"""Files of weights: .pth and .safetensors, read without running code. Only .pth needs PyTorch."""

import argparse
import importlib
import json
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dropmae_jax.pytorch import file_checks
from dropmae_jax.runtime.errors import UserError, os_errors_as_user_errors

# Where files of the field keep their tensors: DropMAE and MAE, trained trackers, timm.
TENSOR_KEYS = ('model', 'net', 'state_dict')


class WeightFile(NamedTuple):
  """What a file holds.

  Attributes:
    key: the entry that its tensors lie under; '' where they are the whole file.
    tensors: as in the file, numpy, in the file's dtypes.
    entries: all else at the top level, such as 'args' and 'epoch'; tensors in it as numpy.
    wholeness: a line that says how it is known that the file is not damaged, or that it is not.
  """

  key: str
  tensors: dict[str, np.ndarray]
  entries: dict[str, Any]
  wholeness: str = ''


def torch_fault() -> str | None:
  """Says why PyTorch cannot be used; None where it can."""
  try:
    importlib.import_module('torch')
  except Exception as error:  # Libraries that miss parts of themselves raise whatever comes.
    if isinstance(error, ModuleNotFoundError) and error.name == 'torch':
      return 'PyTorch is not installed'
    return f'PyTorch is installed but does not load ({_first_line(error)})'
  return None


def torch_or_refuse() -> ModuleType:
  """Imports PyTorch.

  Raises:
    UserError: it is not installed, or does not load.
  """
  if fault := torch_fault():
    raise UserError(
      f"{fault}, and .pth files need it; run: pip install 'dropmae_jax[torch]', or use"
      ' .safetensors.'
    )
  return importlib.import_module('torch')


def read(path: pathlib.Path) -> WeightFile:
  """Reads any file of weights; no pickled code runs.

  Raises:
    UserError: the file is not there, damaged, holds no tensors, or holds objects other than
      tensors, plain values and the argparse.Namespace of the published files (names it).
  """
  with os_errors_as_user_errors(f'{path} cannot be read', 'give a .pth or .safetensors.'):
    if not path.is_file():
      raise UserError(f'{path} is not a file; give a .pth or .safetensors.')
    read_format = _read_safetensors if file_checks.format_in(path) == 'safetensors' else _read_pth
    wholeness = file_checks.check_whole(path)
    return read_format(path)._replace(wholeness=wholeness)


def _read_safetensors(path: pathlib.Path) -> WeightFile:
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      tensors = {name: file.get_tensor(name) for name in list(file.keys())}
      metadata = file.metadata() or {}
  # The last two are for types of numbers that numpy does not have.
  except (safetensors.SafetensorError, OSError, AttributeError, TypeError) as error:
    raise UserError(
      f'{path} cannot be read as safetensors ({error}); give a whole file.'
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
  torch = torch_or_refuse()
  try:
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
      # They are for the authors of programs, and tell to switch the safety off.
      warnings.simplefilter('ignore')
      content = torch.load(
        path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path) or None
      )
  except Exception as error:  # A damaged file fails in as many ways as there are bytes.
    if error.__traceback__.tb_next is None:
      raise  # It was met here, and not inside of PyTorch: the call is wrong, and not the file.
    if code := re.search(r'(?:GLOBAL|unrecognized function) (\S+)', str(error)):
      raise UserError(
        f'{path} holds the Python object {code[1]}, which is code and is not run; where you trust'
        f' the file, save its tensors alone: torch.save({{key: torch.load({path.name!r},'
        ' weights_only=False)[key]}, NEW_FILE) with key "model" or "net".'
      ) from error
    raise UserError(
      f'{path} cannot be read as a PyTorch checkpoint ({_reason(error)}); give a whole file that'
      ' holds only tensors and plain values.'
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
    raise UserError(
      f'{path} holds a tensor that numpy has no form for ({_first_line(error)}); save it as a dense'
      ' one of float32.'
    ) from error
  if not isinstance(content, dict):
    raise UserError(f'{path} holds a {type(content).__name__}, and not a dict of tensors.')
  key = next((key for key in TENSOR_KEYS if isinstance(content.get(key), dict)), '')
  found = content[key] if key else content
  odd = [
    str(name)
    for name, value in found.items()
    if not isinstance(value, np.ndarray) or not isinstance(name, str)
  ]
  if odd or not found:
    where = f'under {key!r}' if key else f'at its top, and no entry {" or ".join(TENSOR_KEYS)}'
    what = f'what is no named tensor ({", ".join(odd[:3])})' if odd else 'nothing'
    raise UserError(f'{path} holds {what} {where}; give a file of weights.')
  return WeightFile(key, found, {k: v for k, v in content.items() if k != key} if key else {})


def _first_line(error: Exception) -> str:
  return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _reason(error: Exception) -> str:
  """Returns why PyTorch could not read a file, without its advice to read it less safely."""
  text = str(error)
  if 'TorchScript' in text:
    return 'it is a TorchScript archive'
  if found := re.search('WeightsUnpickler error: (.+)', text):
    return found[1]
  return type(error).__name__ if 'weights_only' in text else _first_line(error)


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
    path: to be written, not atomically: see `destination.staged`.
    tensors: named arrays.
    file_format: one of `FORMATS`.
    key: the entry of a .pth that they lie under; '' makes them the whole file.
    entries: more at the top level; dicts, lists, plain values and numpy arrays. Safetensors keep
      them as json, under the header's metadata.

  Raises:
    OSError: the system refuses it.
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
    path.chmod(mode)  # From 0.8 on it is a file for its owner alone.
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
      # PyTorch's writer hides the system's refusal, or a signal, behind an error of its own.
      raise error.__context__ or error from None
