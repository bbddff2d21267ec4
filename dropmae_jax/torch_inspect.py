"""Looks into files of weights and checkpoints: which tensors they hold, how two of them differ."""

import pathlib
from collections.abc import Iterator

import numpy as np

from dropmae_jax import checkpoint, torch_export, torch_files
from dropmae_jax.command_line import BadInput


def tensors_of(path: pathlib.Path, *, step: int | None = None) -> torch_files.WeightFile:
  """Reads a file of weights, or one of our checkpoints as if it were one."""
  if not path.is_dir():
    if step is not None:
      raise BadInput(f'--step={step} goes with a checkpoint, and {path} is a file; leave it out.')
    return torch_files.read(path)
  weights = checkpoint.load_weights(path, step=step)
  tensors = torch_export.to_torch(weights.params, weights.architecture)
  return torch_files.WeightFile('', tensors, {'step': weights.step, **weights.description})


def table(path: pathlib.Path, *, step: int | None = None) -> Iterator[str]:
  """Lists the tensors of a file or checkpoint: name, shape, dtype, Euclidean norm."""
  key, tensors, entries = tensors_of(path, step=step)
  width = max(map(len, tensors))
  yield f'{"name":{width}}  {"shape":>18}  {"dtype":>8}  {"norm":>12}'
  for name, array in tensors.items():
    shape = ' '.join(map(str, array.shape))
    norm = float(np.linalg.norm(array.astype(np.float64)))
    yield f'{name:{width}}  {shape:>18}  {array.dtype!s:>8}  {norm:12.6g}'
  values = sum(array.size for array in tensors.values())
  under = f' under {key!r}' if key else ''
  num_bytes = sum(array.nbytes for array in tensors.values())
  yield f'{len(tensors)} tensors{under}, {values} values, {num_bytes} bytes'
  if entries:
    yield f'beside them: {", ".join(map(str, entries))}'


def comparison(first: pathlib.Path, second: pathlib.Path) -> tuple[list[str], bool]:
  """Compares two files or checkpoints tensor by tensor.

  Returns:
    Lines: per tensor the largest difference over the largest value of the first, largest first,
    and what only one of them has; and whether the two are the same.
  """
  one, other = tensors_of(first).tensors, tensors_of(second).tensors
  lines, differences = [], {}
  for name in sorted(one.keys() & other.keys()):
    a, b = one[name], other[name]
    if a.shape != b.shape:
      lines.append(f'{name}: {a.shape} in {first}, {b.shape} in {second}')
    else:
      differences[name] = _relative_difference(a.astype(np.float64), b.astype(np.float64))
  for names, path in ((one.keys() - other.keys(), first), (other.keys() - one.keys(), second)):
    lines += [f'{name}: only in {path}' for name in sorted(names)]
  unequal = {name: value for name, value in differences.items() if value != 0}
  ranked = sorted(unequal, key=lambda name: (-np.nan_to_num(unequal[name], nan=np.inf), name))
  lines += [f'{name}: {unequal[name]:.3g}' for name in ranked]
  unmatched = len(lines) - len(unequal)
  lines.append(
    f'{len(differences) - len(unequal)} tensors are equal, {len(unequal)} differ, {unmatched} have'
    ' no counterpart of their shape'
  )
  return lines, len(lines) == 1


def _relative_difference(a: np.ndarray, b: np.ndarray) -> float:
  difference, largest = np.max(np.abs(a - b), initial=0), np.max(np.abs(a), initial=0)
  return float(difference / largest) if largest else float(difference and np.inf)
