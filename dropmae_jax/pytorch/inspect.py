"""Lists the tensors of weight files and checkpoints, and compares two of them."""

from collections.abc import Iterator

import numpy as np

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.pytorch import layouts, weight_files
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.runtime.paths import Path, is_folder


def tensors_of(path: Path, *, step: int | None = None) -> weight_files.WeightFile:
  """Returns the content of a weight file, or of a checkpoint in the same form.

  Args:
    path: a file, or the workdir of a run.
    step: which checkpoint of a run; the newest by default.

  Raises:
    UserError: it cannot be read.
  """
  if not is_folder(path):
    if step is not None:
      raise UserError(f'--step={step} is for checkpoints, and {path} is a file; leave it out.')
    return weight_files.read(path)
  weights = saved_weights.load_weights(path, step=step)
  tensors = layouts.to_torch(weights.params, weights.architecture)
  return weight_files.WeightFile('', tensors, {'step': weights.step, **weights.description})


def table(path: Path, *, step: int | None = None) -> Iterator[str]:
  """Yields one line per tensor of a file or checkpoint: name, shape, dtype, Euclidean norm."""
  file = tensors_of(path, step=step)
  width = max(map(len, file.tensors))
  yield f'{"name":{width}}  {"shape":>18}  {"dtype":>8}  {"norm":>12}'
  for name, array in file.tensors.items():
    shape = ' '.join(map(str, array.shape))
    norm = float(np.linalg.norm(np.abs(array).astype(np.float64)))
    yield f'{name:{width}}  {shape:>18}  {array.dtype!s:>8}  {norm:12.6g}'
  values = sum(array.size for array in file.tensors.values())
  under = f' under {file.key!r}' if file.key else ''
  num_bytes = sum(array.nbytes for array in file.tensors.values())
  yield f'{len(file.tensors)} tensors{under}, {values} values, {num_bytes} bytes'
  if file.entries:
    yield f'other entries: {", ".join(map(str, file.entries))}'
  if file.objects:
    yield f'Python objects, which are not read or run: {", ".join(map(repr, file.objects))}'


def comparison(first: Path, second: Path) -> tuple[list[str], bool]:
  """Compares two files or checkpoints tensor by tensor; NaNs in the same places are equal.

  Returns:
    Lines to print, and whether the two are the same. The lines name tensors that the other does
    not have in the same shape, then differences in dtype, then the largest difference per tensor
    (divided by the largest value of the first file), in descending order.
  """
  one, other = tensors_of(first).tensors, tensors_of(second).tensors
  both = sorted(one.keys() & other.keys())
  reshaped = [name for name in both if one[name].shape != other[name].shape]
  unmatched = [f'{n}: {one[n].shape} in {first}, {other[n].shape} in {second}' for n in reshaped]
  for names, path in ((one.keys() - other.keys(), first), (other.keys() - one.keys(), second)):
    unmatched += [f'{name}: only in {path}' for name in sorted(names)]
  paired = [name for name in both if name not in reshaped]
  retyped = [name for name in paired if one[name].dtype != other[name].dtype]
  types = [f'{n}: {one[n].dtype} in {first}, {other[n].dtype} in {second}' for n in retyped]
  differences = {name: _relative_difference(one[name], other[name]) for name in paired}
  unequal = {name: value for name, value in differences.items() if value != 0}
  ranked = sorted(unequal, key=lambda name: (-np.nan_to_num(unequal[name], nan=np.inf), name))
  num_different = len({*unequal, *retyped})
  total = (
    f'{len(paired) - num_different} tensors are equal, {num_different} differ, {len(unmatched)}'
    ' have no counterpart of the same shape'
  )
  lines = [*unmatched, *types, *(f'{name}: {unequal[name]:.3g}' for name in ranked), total]
  return lines, len(lines) == 1


def _relative_difference(a: np.ndarray, b: np.ndarray) -> float:
  if a.dtype == b.dtype and a.tobytes() == b.tobytes():
    return 0.0
  wide = np.result_type(a.dtype, b.dtype, np.float64)
  a, b = a.astype(wide), b.astype(wide)
  differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
  if not differ.any():
    return 0.0
  difference = np.max(np.abs(a[differ] - b[differ]))
  largest = np.max(np.abs(a[np.isfinite(a)]), initial=0)
  return float(difference / largest) if largest else float('inf')
