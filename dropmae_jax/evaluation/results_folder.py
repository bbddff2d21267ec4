"""The folder that an evaluation writes: whose results are in it, and whether they can be used.

`settings.json` says what all results depend on, and `clips/NAME.json` to which frames and labels
those of a clip belong. `results/NAME/` gets that name when it is complete.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dropmae_jax.evaluation.datasets.benchmark import Benchmark, Clip
from dropmae_jax.evaluation.protocols import Geometry, Protocol
from dropmae_jax.runtime import atomic_file, cli, workdir_lock
from dropmae_jax.runtime.errors import UserError, first_line, os_errors_as_user_errors
from tfds_kinetics.messages import one_line

SETTINGS = 'settings.json'
# Distributions that results may depend on.
PACKAGES = 'dropmae_jax', 'jax', 'jaxlib', 'numpy', 'scipy', 'opencv-python-headless', 'pillow'


def make(output: pathlib.Path) -> None:
  """Makes the folder, unless it is there.

  Raises:
    UserError: it cannot be made, or holds something else.
  """
  with os_errors_as_user_errors(f'--output={output} cannot be written', 'give another folder.'):
    output.mkdir(parents=True, exist_ok=True)
    names = {each.name for each in output.iterdir()}
    # A run that was killed at once leaves no more than the lock and a half-written file.
    partial = {name for name in names if name.startswith(atomic_file.PREFIX)}
    if SETTINGS not in names and names - partial - {workdir_lock.FILE}:
      raise UserError(f'--output={output} is not empty; give a new folder.')


def claim(output: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Checks that a folder is new, or of an earlier run with the same settings.

  Raises:
    UserError: the settings are others; names the first that differs.
  """
  path = output / SETTINGS
  with os_errors_as_user_errors(f'--output={output} cannot be written', 'give another folder.'):
    if not path.exists():
      write_json(path, settings)
      return
    try:
      earlier = traverse_util.flatten_dict(json.loads(path.read_text()), sep='.')
    except (ValueError, AttributeError, AssertionError) as error:
      raise UserError(f'{path} is damaged; give a new --output.') from error
  given = traverse_util.flatten_dict(json.loads(json.dumps(settings)), sep='.')
  for name in {**given, **earlier}:
    if given.get(name) != earlier.get(name):
      raise UserError(
        f'--output={output} holds results with {name} = {json.dumps(earlier.get(name))}, not'
        f' {json.dumps(given.get(name))}; give a new --output.'
      )


def remove_partial(output: pathlib.Path) -> None:
  """Removes what a killed run was writing; the caller holds the lock and has claimed the folder."""
  with os_errors_as_user_errors(f'--output={output} cannot be written', 'give another folder.'):
    folders = output.glob('*/') if (output / SETTINGS).exists() else ()
    mine = [each for each in folders if each.name in ('results', 'clips', 'overlays')]
    partial = [each for folder in mine for each in folder.rglob(f'{atomic_file.PREFIX}*')]
    for each in [*partial, *output.glob(f'{atomic_file.PREFIX}*')]:
      shutil.rmtree(each)


def make_record(
  benchmark: Benchmark, clip: Clip, geometry: Geometry, protocol: Protocol
) -> dict[str, Any]:
  """Returns what the results of a clip were computed from, as values for JSON.

  The digest is of the labels, of what they stand for, and of three frames.
  """
  labels = benchmark.labels(clip, geometry, protocol)
  digest = hashlib.sha256(f'{clip.num_frames} {clip.size}'.encode())
  for array in (labels, benchmark.read_out(clip, 0, labels, geometry, protocol)):
    digest.update(np.ascontiguousarray(array))
  for number in sorted({0, clip.num_frames // 2, clip.num_frames - 1}):
    digest.update(np.ascontiguousarray(clip.frame(number)))
  return {'data': digest.hexdigest(), 'input_size': list(geometry.pixels)}


def read_record(
  path: pathlib.Path, record: Mapping[str, Any], folder: pathlib.Path
) -> dict[str, Any]:
  """Reads the record of finished results, and checks that they are of the same data.

  Raises:
    UserError: they are not, or it cannot be read.
  """
  try:
    earlier = json.loads(path.read_text())
    is_same = {name: earlier[name] for name in record} == record
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise UserError(f'{path} cannot be read ({first_line(error)}); remove {folder}.') from error
  if not is_same:
    raise UserError(f'{folder} holds results of other frames or labels; give a new --output.')
  return earlier


def write_results(
  benchmark: Benchmark, clip: Clip, results: list[np.ndarray], folder: pathlib.Path
) -> None:
  """Writes the results of a clip to a temporary folder, and renames that."""
  with os_errors_as_user_errors(f'{folder} cannot be written', 'give another --output.'):
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=atomic_file.PREFIX, dir=folder.parent) as temporary:
      partial = pathlib.Path(temporary) / folder.name
      partial.mkdir()
      benchmark.write(clip, results, partial)
      atomic_file.sync(partial)
      partial.replace(folder)


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a file of JSON, atomically."""
  with os_errors_as_user_errors(f'{path} cannot be written', 'give another --output.'):
    path.parent.mkdir(parents=True, exist_ok=True)
  with atomic_file.staged(path, num_bytes=0, has_card=False) as partial:
    partial.write_text(json.dumps(content, indent=2) + '\n')


def digest(weights: Any) -> str:
  """Returns the sha256 of a tree of arrays, which may have None in it."""
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(weights):
    total.update(np.ascontiguousarray(leaf))
  return total.hexdigest()


def log_line(output: pathlib.Path, line: str) -> None:
  """Prints a line, and writes it to the log file."""
  cli.print_line(line)
  with (
    os_errors_as_user_errors(f'{output}/log.txt cannot be written', 'give another --output.'),
    (output / 'log.txt').open('a') as file,
  ):
    file.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {one_line(line)}\n')


def versions() -> dict[str, str]:
  """Returns the versions of what results may depend on."""
  installed = {}
  for name in PACKAGES:
    # Another distribution may provide it, or it runs from a checkout that is not installed.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      installed[name] = importlib.metadata.version(name)
  return installed
