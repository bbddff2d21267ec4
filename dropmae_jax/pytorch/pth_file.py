"""Reads .pth files without PyTorch, and without importing or calling anything that they name.

A .pth is a pickle, which is a program for a small stack machine, and the bytes of its tensors. The
machine here knows containers, plain values, dense tensors and argparse.Namespace. For whatever else
a pickle names, calls or builds there is a `StandIn` in the result. Tensors are views of the mapped
file, and sizes are checked before a caller can take memory for them.
"""

import dataclasses
import io
import math
import mmap
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dropmae_jax.runtime.errors import UserError, first_line

# Far beyond those of a checkpoint: a ViT-B with its optimizer has 20,000 operations, 5 levels.
MOST_OPERATIONS = 1_000_000
MOST_VALUES = 1_000_000
MOST_LEVELS = 100
# Tensors may share numbers of the file, such as tied weights, so they can be larger than it.
MOST_SHARING = 4
SMALL_FILE = 1 << 20  # Bytes.

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # Of files from before PyTorch 1.6.
_DTYPES = {
  'DoubleStorage': 'f8', 'FloatStorage': 'f4', 'HalfStorage': 'f2', 'BFloat16Storage': jnp.bfloat16,
  'LongStorage': 'i8', 'IntStorage': 'i4', 'ShortStorage': 'i2', 'CharStorage': 'i1',
  'ByteStorage': 'u1', 'BoolStorage': '?', 'ComplexFloatStorage': 'c8',
  'ComplexDoubleStorage': 'c16', 'uint16': 'u2', 'uint32': 'u4', 'uint64': 'u8',
}  # fmt: skip
_UNTYPED = ('UntypedStorage', '_UntypedStorage')


@dataclasses.dataclass(frozen=True)
class StandIn:
  """Stands for an object of a file, such as a tracker's settings; it has a name and nothing else.

  Attributes:
    name: of the type or function that the file names, with its module.
  """

  name: str


class Content(NamedTuple):
  """What a .pth holds: dicts, lists, tuples, plain values, numpy arrays and `StandIn`s.

  Attributes:
    value: usually a dict.
    objects: names of the stand-ins, each once.
  """

  value: Any
  objects: tuple[str, ...]


class _Namespace(dict):
  """The attributes of an argparse.Namespace, as the published files have one."""


class _Storage(NamedTuple):
  """The bytes of tensors, not yet read, and how a file names their type."""

  buffer: memoryview
  kind: str


def read(path: pathlib.Path) -> Content:
  """Reads a file that `torch.save` wrote; runs nothing.

  Args:
    path: of a file that is not empty, and no zip of compressed records.

  Raises:
    OSError: the system refuses to read it.
    UserError: it is no such file, is damaged, or says sizes that it does not have.
  """
  with path.open('rb') as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
  try:
    value = _read_zip(mapped, path) if mapped[:2] == b'PK' else _read_legacy(mapped)
    return Content(value, _check_sizes(value, len(mapped)))
  except (
    LookupError, ValueError, TypeError, OverflowError, RecursionError, EOFError, struct.error,
    zipfile.BadZipFile, NotImplementedError,
  ) as error:  # fmt: skip
    raise UserError(
      f'{path} cannot be read as a PyTorch checkpoint ({first_line(error)}); give a complete file'
      ' that torch.save wrote.'
    ) from error


def _read_zip(mapped: mmap.mmap, path: pathlib.Path) -> Any:
  """Reads the format since PyTorch 1.6: a zip of the pickle and a record per storage."""
  with zipfile.ZipFile(path) as archive:
    records = {record.filename: record for record in archive.infolist()}
  folder = next((n.partition('/')[0] for n in records if n.partition('/')[2] == 'data.pkl'), None)
  if f'{folder}/constants.pkl' in records:
    raise ValueError('it is a TorchScript archive')
  if folder is None:
    raise ValueError('it is a zip file without data.pkl')

  def bytes_of(name: str) -> memoryview:
    record = records[f'{folder}/{name}']
    # The header of a record, of 30 bytes, says how long its name and its extra field are.
    start = record.header_offset
    start += 30 + sum(struct.unpack_from('<HH', mapped, start + 26))
    return memoryview(mapped)[start : start + record.file_size]

  if f'{folder}/byteorder' in records and bytes_of('byteorder') != b'little':
    raise ValueError('it is from a big-endian machine')
  return _unpickle(
    io.BytesIO(bytes_of('data.pkl')), lambda kind, key: _Storage(bytes_of(f'data/{key}'), kind)
  )


def _read_legacy(mapped: mmap.mmap) -> Any:
  """Reads the older format: five pickles, the fourth one the content, then the storages."""
  kinds: dict[str, str] = {}

  def note(kind: str, key: str) -> StandIn:
    kinds[key] = kind
    return StandIn(kind)

  if _unpickle(mapped, note) != _LEGACY_MAGIC:
    raise ValueError('it is a pickle that PyTorch did not write')
  _, system = _unpickle(mapped, note), _unpickle(mapped, note)
  if not system['little_endian']:
    raise ValueError('it is from a big-endian machine')
  start = mapped.tell()
  _unpickle(mapped, note)
  storages = {}
  keys, position = _unpickle(mapped, note), mapped.tell()
  for key in keys:
    (length,) = struct.unpack_from('<q', mapped, position)
    dtype = _dtype(kinds[key])
    if length < 0 or dtype is None:
      raise ValueError(f'it has a {kinds[key]} of {length} numbers')
    end = position + 8 + length * dtype.itemsize
    storages[key] = _Storage(memoryview(mapped)[position + 8 : end], kinds[key])
    position = end
  mapped.seek(start)
  return _unpickle(mapped, lambda _, key: storages[key])


def _unpickle(file: io.BytesIO | mmap.mmap, storage_of: Callable[[str, str], Any]) -> Any:
  """Returns the value of the pickle at the file's position; leaves the file after it.

  Args:
    file: is read piece by piece.
    storage_of: returns what stands for a storage, given its type and key.

  Raises:
    ValueError, LookupError, TypeError: it is damaged.
  """
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}

  def pop_to(start: int) -> list[Any]:
    items = stack[start:]
    del stack[start:]
    return items

  for number, (code, argument, _) in enumerate(pickletools.genops(file)):
    if number > MOST_OPERATIONS:
      raise ValueError(f'it has more than {MOST_OPERATIONS} operations')
    match code.name:
      case 'PROTO' | 'FRAME':
        pass
      case 'STOP':
        return stack.pop()
      case 'MARK':
        marks.append(len(stack))
      case 'POP':
        stack.pop()
      case 'POP_MARK':
        pop_to(marks.pop())
      case 'DUP':
        stack.append(stack[-1])
      case 'PUT' | 'BINPUT' | 'LONG_BINPUT':
        memo[argument] = stack[-1]
      case 'MEMOIZE':
        memo[len(memo)] = stack[-1]
      case 'GET' | 'BINGET' | 'LONG_BINGET':
        stack.append(memo[argument])
      case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
        stack.append({'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}[code.name])
      case 'EMPTY_TUPLE' | 'EMPTY_LIST' | 'EMPTY_DICT':
        stack.append({'EMPTY_TUPLE': tuple, 'EMPTY_LIST': list, 'EMPTY_DICT': dict}[code.name]())
      case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        stack.append(tuple(pop_to(len(stack) - int(code.name[-1]))))
      case 'TUPLE':
        stack.append(tuple(pop_to(marks.pop())))
      case 'LIST':
        stack.append(pop_to(marks.pop()))
      case 'DICT':
        stack.append(_updated({}, pop_to(marks.pop())))
      case 'EMPTY_SET':
        stack.append(StandIn('builtins.set'))
      case 'FROZENSET':
        pop_to(marks.pop())
        stack.append(StandIn('builtins.frozenset'))
      case 'APPEND' | 'APPENDS' | 'ADDITEMS':
        items = pop_to(len(stack) - 1 if code.name == 'APPEND' else marks.pop())
        if isinstance(stack[-1], list):
          stack[-1] += items
      case 'SETITEM' | 'SETITEMS':
        items = pop_to(len(stack) - 2 if code.name == 'SETITEM' else marks.pop())
        if isinstance(stack[-1], dict):
          _updated(stack[-1], items)
      case 'GLOBAL' | 'INST':
        made = StandIn(argument.replace(' ', '.', 1))
        stack.append(made if code.name == 'GLOBAL' else _made(made, tuple(pop_to(marks.pop()))))
      case 'STACK_GLOBAL':
        module, name = pop_to(len(stack) - 2)
        if not isinstance(module, str) or not isinstance(name, str):
          raise ValueError('it names an object by something other than text')
        stack.append(StandIn(f'{module}.{name}'))
      case 'REDUCE' | 'NEWOBJ':
        function, arguments = pop_to(len(stack) - 2)
        stack.append(_made(function, arguments))
      case 'NEWOBJ_EX':
        function, arguments, _ = pop_to(len(stack) - 3)
        stack.append(_made(function, arguments))
      case 'OBJ':
        function, *arguments = pop_to(marks.pop())
        stack.append(_made(function, tuple(arguments)))
      case 'BUILD':
        state = stack.pop()
        if isinstance(stack[-1], _Namespace) and isinstance(state, dict):
          stack[-1].update(state)
      case 'BINPERSID':
        what, kind, key, *_ = stack.pop()
        is_storage = what == 'storage' and isinstance(kind, StandIn) and isinstance(key, str)
        stack.append(storage_of(kind.name, key) if is_storage else StandIn('torch.nn.Module'))
      case 'EXT1' | 'EXT2' | 'EXT4':
        stack.append(StandIn('copyreg.extension'))
      case _ if isinstance(argument, int | float | str | bytes | bytearray):
        stack.append(argument)
      case _:
        raise ValueError(f'it has the operation {code.name}')
  raise EOFError('it ends too soon')


def _updated(target: dict, items: list[Any]) -> dict:
  """Sets keys and values in turn; stand-ins replace keys that are containers, as those nest."""
  for key, value in zip(items[::2], items[1::2], strict=True):
    is_container = isinstance(key, tuple | list | dict)
    target[StandIn(f'builtins.{type(key).__name__}') if is_container else key] = value
  return target


def _made(function: Any, arguments: Any) -> Any:
  """Returns what a call in a pickle stands for; nothing is called."""
  name = function.name if isinstance(function, StandIn) else 'builtins.object'
  match name.removeprefix('torch._utils.'):
    case 'collections.OrderedDict':
      return {}
    case 'argparse.Namespace':
      return _Namespace()
    case '_rebuild_tensor' | '_rebuild_tensor_v2':
      return _tensor(*arguments[:4])
    case '_rebuild_tensor_v3':
      return _tensor(*arguments[:4], arguments[6])
    case '_rebuild_parameter' | '_rebuild_parameter_with_state' | 'torch.Size':
      return arguments[0]
    case '_codecs.encode':  # Bytes.
      return str.encode(arguments[0], 'latin1')
    case 'torch._tensor._rebuild_from_type_v2':
      return _made(arguments[0], arguments[2])
  return StandIn(name)


def _dtype(kind: str) -> np.dtype | None:
  """Returns the dtype of a storage or of a name such as torch.uint16; None if numpy has none."""
  module, _, name = kind.rpartition('.')
  if module.partition('.')[0] == 'torch' and name in _UNTYPED:
    return np.dtype('u1')
  return np.dtype(_DTYPES[name]) if module == 'torch' and name in _DTYPES else None


def _tensor(
  storage: Any, offset: Any, size: Any, stride: Any, dtype: StandIn | None = None
) -> np.ndarray | StandIn:
  """Returns a view of a storage; a stand-in if numpy does not have the type.

  Raises:
    ValueError: numbers lie outside of the storage.
  """
  if isinstance(storage, StandIn):
    return storage
  if not isinstance(storage, _Storage) or not isinstance(dtype, StandIn | None):
    raise ValueError('a tensor has no numbers, or no type')
  kind = storage.kind if dtype is None else dtype.name
  element_type = _dtype(kind)
  if element_type is None:
    return StandIn(kind)
  if not all(type(each) is int and each >= 0 for each in (offset, *size, *stride)):
    raise ValueError('a tensor has a shape that is not one')
  if math.prod(size) == 0:
    return np.empty(size, element_type)
  strides = [each * element_type.itemsize for each in stride]
  return np.ndarray(size, element_type, storage.buffer, offset * element_type.itemsize, strides)


def _check_sizes(value: Any, file_size: int) -> tuple[str, ...]:
  """Checks that a value can be walked through and its tensors read; returns names of stand-ins.

  Containers may hold one another, or one of them many times, so that copies would have no end.

  Raises:
    ValueError: it is too large or too deep.
  """
  most_bytes = SMALL_FILE + MOST_SHARING * file_size
  names: dict[str, None] = {}
  num_values, num_bytes, remaining = 0, 0, [(value, 0)]
  while remaining:
    each, level = remaining.pop()
    num_values += 1
    if isinstance(each, np.ndarray):
      num_bytes += each.nbytes
    elif isinstance(each, StandIn):
      names[each.name] = None
    elif isinstance(each, dict | list | tuple):
      parts = each.values() if isinstance(each, dict) else each
      remaining += [(part, level + 1) for part in parts]
    if num_bytes > most_bytes:
      raise ValueError(f'its tensors are of more than {num_bytes} bytes, and it has {file_size}')
    if level > MOST_LEVELS or num_values + len(remaining) > MOST_VALUES:
      raise ValueError(f'it holds more than {MOST_VALUES} values, or {MOST_LEVELS} in each other')
  return tuple(names)
