"""Reads pickles of numpy arrays, dicts, lists and plain values; nothing of them is run."""

import pathlib
import pickle
import pickletools
import re
from typing import Any, BinaryIO

import numpy as np

from dropmae_jax.runtime.errors import UserError, first_line, os_errors_as_user_errors


def load(path: pathlib.Path) -> Any:
  """Returns the content of a pickle with an `Array` for each array.

  Raises:
    UserError: it is damaged, or names anything but numpy's arrays.
  """
  try:
    with (
      os_errors_as_user_errors(f'{path} cannot be read', 'give a readable file.'),
      path.open('rb') as file,
    ):
      _check_memo(file)
      file.seek(0)
      return _ArrayUnpickler(file).load()
  except UserError:
    raise
  except (
    pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError,
    OverflowError, RecursionError, MemoryError,
  ) as error:  # fmt: skip
    raise UserError(
      f'{path} cannot be read as a file of TAP-Vid ({first_line(error)}); give a complete one.'
    ) from error


def _check_memo(file: BinaryIO) -> None:
  """Checks that no place of the memo lies beyond the number of operations.

  Python would take memory for all places before it. That no array is larger than the file needs no
  check: they are views of the bytes that were read.
  """
  for number, (code, argument, _) in enumerate(pickletools.genops(file)):
    if code.name in ('PUT', 'BINPUT', 'LONG_BINPUT') and argument > number:
      raise ValueError(f'it has no {argument} objects')


class _ArrayUnpickler(pickle.Unpickler):
  """Knows numpy's arrays by name and nothing else, and makes stand-ins of them.

  Numpy's own functions would be no better than foreign ones: they take the layout of an array from
  the file on trust.
  """

  def find_class(self, module: str, name: str) -> Any:
    """Returns the stand-in for a name in the file."""
    # It is numpy.core in files that numpy 1 wrote.
    known = _STAND_INS.get(f'{module}.{name}'.replace('numpy._core.', 'numpy.core.'))
    if known is None:
      raise pickle.UnpicklingError(f'it names {module}.{name}, which is not run')
    return known


class _StandIn:
  """What a file can name; as it has this method, a file cannot change the class itself."""

  def __setstate__(self, state: Any) -> None:
    raise ValueError('it sets the state of what has none')


class Array(_StandIn):
  """Stands for an array, and for a type or a single number, which have no `values`."""

  def __init__(self, *_: Any) -> None:
    self.values: np.ndarray | None = None

  def __setstate__(self, state: Any) -> None:
    _, shape, dtype, is_fortran, content = state
    self.values = dtype.view(content, shape, 'F' if is_fortran else 'C')


class _ArrayOfBuffer(Array):
  """Stands for an array in a pickle of protocol 5."""

  def __init__(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
    self.values = dtype.view(content, shape, order)


class _Dtype(_StandIn):
  """Stands for a type of numbers."""

  def __init__(self, name: Any, *_: Any) -> None:
    if not re.fullmatch('b1|[iuf][1248]', name):
      raise ValueError(f'it has an array of {name}')
    self._name, self._order = name, '='

  def __setstate__(self, state: Any) -> None:
    if state[1] not in ('<', '>', '|', '='):
      raise ValueError(f'it has an array in the byte order {state[1]!r}')
    self._order = state[1]

  def view(self, content: Any, shape: Any, order: str) -> np.ndarray:
    """Returns the array in bytes that were read."""
    return np.frombuffer(content, np.dtype(self._order + self._name)).reshape(shape, order=order)


class _Bytes(_StandIn):
  """Makes bytes of text, as protocols before 3 need it."""

  def __new__(cls, text: Any, encoding: Any) -> Any:
    if encoding != 'latin1':
      raise ValueError(f'it has text in {encoding!r}')
    return str.encode(text, 'latin1')


_STAND_INS = {
  'numpy.ndarray': Array,
  'numpy.dtype': _Dtype,
  'numpy.core.multiarray._reconstruct': Array,
  'numpy.core.multiarray.scalar': Array,
  'numpy.core.numeric._frombuffer': _ArrayOfBuffer,
  '_codecs.encode': _Bytes,
}
