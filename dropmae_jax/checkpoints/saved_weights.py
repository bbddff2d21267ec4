"""Reads the weights of a checkpoint, `<workdir>/checkpoints/<step>/`, and writes imported weights.

A checkpoint has the items `params`, `opt_state` (not if the weights were imported without it) and
`description`, a json dict: `architecture`, `objective`, `frame_gap`, `steps_per_epoch`, the whole
`config`, and the `checksums` of the arrays. Orbax writes to a temporary name and then renames, so
every listed checkpoint was complete when it was written; in a bucket it writes COMMIT_FILE last.
Training writes them in `manager`.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dropmae_jax import optimizer
from dropmae_jax.config import Architecture, Objective
from dropmae_jax.model import mae
from dropmae_jax.optimizer import Moments
from dropmae_jax.runtime import atomic_file
from dropmae_jax.runtime.errors import (
  PROGRAM_ERRORS,
  RunFailed,
  UserError,
  first_line,
  lacks_memory,
  os_errors_as_user_errors,
  remedy_of,
)
from dropmae_jax.runtime.paths import (
  Path,
  absolute,
  check_room,
  client_errors_as_os_errors,
  is_remote,
  upload_folder,
)

FOLDER = 'checkpoints'
# In the description of a checkpoint, but not of its weights.
OF_STATE = 'checksums', 'losses', 'micro_batches'
# Orbax writes it last to a bucket, where nothing is renamed.
COMMIT_FILE = 'commit_success.txt'
# Arrays of zeros are stored in a thousandth of their bytes, trained weights in nine tenths.
MOST_COMPRESSED, SMALL_MODEL = 100, 1 << 30


@dataclasses.dataclass(frozen=True)
class Weights:
  """A trained model; all arrays are numpy arrays."""

  params: dict
  step: int
  architecture: Architecture
  objective: Objective
  description: dict[str, Any]
  moments: Moments | None = None


def describe(architecture: Architecture, objective: Objective, **other: Any) -> dict[str, Any]:
  """Returns the json description of a checkpoint."""
  return {
    'architecture': dataclasses.asdict(architecture),
    'objective': dataclasses.asdict(objective),
    **other,
  }


def epochs(description: dict[str, Any], step: int) -> float | None:
  """Returns how many epochs a checkpoint was trained for; None if that is not known.

  Steps before the batch or the dataset of a run was changed count with what they had.

  Args:
    description: of the checkpoint. `epochs_before` is the step of the last change, and the epochs
      before it; `epoch` is the last finished one, from 0, of imported weights.
    step: of the checkpoint.
  """
  if description.get('epoch') is not None:
    return description['epoch'] + 1
  if 'steps_per_epoch' not in description:
    return None
  start, before = description.get('epochs_before', (0, 0))
  return before + (step - start) / description['steps_per_epoch']


def checksums(tree: Any) -> list[int]:
  """Returns a checksum per array of a tree: the sum of its bits as 32-bit words, modulo 2**32.

  The checksum is the same on any mesh, because the order of such a sum does not matter. Orbax
  stores no checksums of the arrays, so it would not notice bits that storage has flipped.

  Args:
    tree: arrays of 32-bit numbers, on devices or in numpy.
  """
  return [int(number) for number, _ in jax.device_get(_checksums_and_finite(jax.tree.leaves(tree)))]


@jax.jit
def _checksums_and_finite(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  """Returns the checksum of each array, and whether all its numbers are finite."""
  words = [jax.lax.bitcast_convert_type(leaf, jnp.uint32) for leaf in leaves]
  return [
    (each.sum(dtype=jnp.uint32), jnp.isfinite(leaf).all())
    for each, leaf in zip(words, leaves, strict=True)
  ]


def add_digest(description: dict[str, Any]) -> dict[str, Any]:
  """Returns a description with its `sha256`, which `verify_digest` checks."""
  return {**description, 'sha256': _sha256(description)}


def verify_digest(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns a stored description without its `sha256`; the oldest ones have none.

  Raises:
    ValueError: it is not what was saved.
  """
  if not isinstance(stored, dict):
    raise ValueError('the description is not what was saved')
  description = {name: value for name, value in stored.items() if name != 'sha256'}
  is_old = 'sha256' not in stored and 'checksums' not in stored
  if not is_old and stored.get('sha256') != _sha256(description):
    raise ValueError('the description is not what was saved')
  return description


def _sha256(description: dict[str, Any]) -> str:
  # Tuples become lists, as they do when the description is read.
  plain = json.loads(json.dumps(description))
  return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def check(name: str, tree: Any, description: dict[str, Any]) -> None:
  """Checks that arrays are those that were saved, and finite.

  Args:
    name: of the item, 'params' or 'opt_state'.
    tree: the item as it was read.
    description: of the checkpoint. The oldest ones have no checksums.

  Raises:
    ValueError: names the item and the first array.
  """
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
  read = jax.device_get(_checksums_and_finite(jax.tree.leaves(tree)))
  expected = description.get('checksums', {}).get(name, [number for number, _ in read])
  for path, (number, is_finite), saved in zip(paths, read, expected, strict=True):
    if number != saved:
      raise ValueError(f'{name}{path} is not what was saved')
    if not is_finite:
      raise ValueError(f'{name}{path} has values that are not finite')


def load_weights(folder: Path, *, step: int | None = None, with_moments: bool = False) -> Weights:
  """Reads the parameters of a run, which may be training meanwhile.

  Args:
    folder: a run's workdir, its checkpoints folder, or the folder of one step.
    step: which checkpoint; the newest by default.
    with_moments: read the optimizer's moments too.

  Raises:
    UserError: there is no checkpoint, not this step, it has no moments, or it cannot be read.
  """
  chosen = None
  while True:
    before = chosen
    root, chosen, others = _choose(folder, step, with_moments)
    try:
      with _readable(root, chosen, with_moments) as readable, _open(readable) as manager:
        return _restore_weights(manager, chosen, with_moments)
    except Exception as error:  # A damaged checkpoint makes orbax raise errors of many types.
      failure = error
    # A run that goes on deletes checkpoints, also one that is being read.
    if (root / str(chosen)).is_dir() or chosen == before:
      break
  reason, remedy = first_line(failure), 'it is the only one; give another run'
  if others:
    remedy = f'give another step: {", ".join(map(str, others))}'
  if lacks_memory(failure):
    raise RunFailed(f'there is too little memory to read step {chosen} of {folder} ({reason}).')
  # Errors such as TypeError are usually bugs, but damaged json makes orbax raise them too. A bug
  # fails for every checkpoint; damage does not.
  steps = [chosen, *others]
  if isinstance(failure, PROGRAM_ERRORS) and not _can_read_any(root, steps, with_moments):
    failure.add_note(f'If step {chosen} of {folder} is damaged, {remedy}.')
    raise failure
  remedy = remedy_of(failure, remedy)
  raise UserError(f'step {chosen} of {folder} cannot be read ({reason}); {remedy}.') from failure


def _choose(folder: Path, step: int | None, with_moments: bool) -> tuple[Path, int, list[int]]:
  """Returns the folder of a run's checkpoints, the step to read, and the others that there are."""
  with (
    os_errors_as_user_errors(f'{folder} cannot be read', 'give another folder.'),
    client_errors_as_os_errors(folder),
  ):
    root, steps = _stored_steps(absolute(folder))
  if not steps:
    raise UserError(
      f'{folder} holds no checkpoint; give the --workdir of a training run that has saved one.'
    )
  chosen = max(steps) if step is None else step
  others = sorted(each for each in steps if each != chosen)
  if chosen not in steps:
    raise UserError(f'{folder} has no step {chosen}; it has {", ".join(map(str, others))}.')
  stored = root / str(chosen)
  if with_moments and stored.is_dir() and not (stored / 'opt_state').is_dir():
    raise UserError(
      f'step {chosen} of {folder} holds weights without optimizer state; leave --with_optimizer'
      ' out.'
    )
  return root, chosen, others


def _open(root: pathlib.Path) -> ocp.CheckpointManager:
  """Opens checkpoints for this process alone, so that a failure leaves no other one waiting."""
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=f'process_{own}'
  )
  options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
  return ocp.CheckpointManager(root, options=options)


def _can_read_any(root: Path, steps: list[int], with_moments: bool) -> bool:
  for step in steps:
    with (
      contextlib.suppress(Exception),
      _readable(root, step, with_moments) as readable,
      _open(readable) as manager,
    ):
      _restore_weights(manager, step, with_moments)
      return True
  return False


def _stored_steps(folder: Path) -> tuple[Path, list[int]]:
  """Returns the folder of a run's checkpoints and its steps; one step if `folder` is that step."""
  root = folder / FOLDER if (folder / FOLDER).is_dir() else folder
  names = [each.name for each in root.iterdir()] if root.is_dir() else []
  if root.name.isdecimal() and 'params' in names:
    root, names = root.parent, [root.name]
  return root, [step for step in _steps(root, names) if (root / str(step) / 'params').is_dir()]


def steps_in(root: Path) -> list[int]:
  """Returns the steps that a folder of checkpoints has whole folders of, in order."""
  return _steps(root, [each.name for each in root.iterdir()])


def _steps(root: Path, names: list[str]) -> list[int]:
  return sorted(
    int(name)
    for name in names
    if name.isdecimal()
    and name == str(int(name))
    and (not is_remote(root) or (root / name / COMMIT_FILE).exists())
  )


@contextlib.contextmanager
def _readable(root: Path, step: int, with_moments: bool) -> Iterator[pathlib.Path]:
  """Yields a folder of this machine that has a step; it is copied if `root` is in a bucket."""
  if not is_remote(root):
    yield root
    return
  with tempfile.TemporaryDirectory(prefix='dropmae_jax') as temporary:
    target = pathlib.Path(temporary)
    with client_errors_as_os_errors(root):
      client, stored = fsspec.core.url_to_fs(f'{root}/{step}')
      items = {item.rpartition('/')[2]: item for item in client.ls(stored, detail=False)}
      if not with_moments:
        items.pop('opt_state', None)
      num_bytes = sum(map(client.du, items.values()))
      what = f'a copy of {root}/{step}'
      check_room(target, num_bytes, what, remedy='set TMPDIR to another folder')
      for name, item in items.items():
        client.get(item, str(target / str(step) / name), recursive=True)
    yield target


def _check_known(options: type, stored: dict[str, Any]) -> None:
  """Raises a ValueError if a description has options that this version of the code lacks."""
  unknown = stored.keys() - {field.name for field in dataclasses.fields(options)}
  if unknown:
    raise ValueError(f'it has {", ".join(sorted(unknown))}, which this version does not know')


def _check_size(folder: pathlib.Path, num_bytes: int) -> None:
  """Raises a ValueError if a folder cannot hold arrays of so many bytes; they would take memory."""
  stored = sum(path.stat().st_size for path in folder.rglob('*'))
  if num_bytes > SMALL_MODEL + MOST_COMPRESSED * stored:
    raise ValueError(f'its description is of {num_bytes} bytes, and {stored} are stored')


def _restore_weights(manager: ocp.CheckpointManager, step: int, with_moments: bool) -> Weights:
  stored = manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore()))
  description = verify_digest(stored.description)
  _check_known(Architecture, description['architecture'])
  _check_known(Objective, description['objective'])
  architecture = Architecture(**description['architecture'])
  # Values are None where an imported file did not tell them.
  objective = description['objective']
  _, abstract = mae.abstract_model(architecture)
  _check_size(
    pathlib.Path(manager.directory, str(step), 'params'), 4 * mae.num_parameters(abstract)
  )
  items = {'params': abstract}
  if with_moments:
    items['opt_state'] = optimizer.abstract_state(abstract)
  # Those who read weights run on one device, whatever mesh has written them.
  place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  items = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), items)
  restored = manager.restore(
    step,
    args=ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in items.items()}),
  )
  arrays = jax.tree.map(np.asarray, {name: restored[name] for name in items})
  for name, tree in arrays.items():
    check(name, tree, description)
  return Weights(
    params=arrays['params'],
    step=step,
    architecture=architecture,
    objective=Objective(**{k: v for k, v in objective.items() if v is not None}),
    description={key: value for key, value in description.items() if key not in OF_STATE},
    moments=optimizer.moments_of(arrays['opt_state']) if with_moments else None,
  )


def save_weights(
  folder: Path,
  params: dict,
  step: int,
  description: dict[str, Any],
  *,
  moments: Moments | None = None,
) -> None:
  """Writes a checkpoint for `load_weights`; with moments, training can resume from it.

  It is written under a temporary name first, so a failure leaves nothing behind. In a bucket
  COMMIT_FILE comes last, as orbax does it.

  Args:
    folder: the new workdir.
    params: the pure parameter dict.
    step: number of updates.
    description: see `describe`.
    moments: of the optimizer.

  Raises:
    UserError: the folder is not empty, or cannot be written.
  """
  atomic_file.check_folder(folder)
  arrays = {'params': params}
  if moments is not None:
    arrays['opt_state'] = optimizer.state_of(moments)
  sums = {name: checksums(tree) for name, tree in arrays.items()}
  items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
  items['description'] = ocp.args.JsonSave(add_digest({**description, 'checksums': sums}))
  try:
    beside = None if is_remote(folder) else folder.absolute().parent
    if beside:
      beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix=atomic_file.PREFIX, dir=beside, ignore_cleanup_errors=True
    ) as temporary:
      staged = pathlib.Path(temporary).absolute() / FOLDER
      with ocp.CheckpointManager(staged) as manager:
        manager.save(step, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
      if is_remote(folder):
        marker = staged / str(step) / COMMIT_FILE
        marker.write_text('')
        upload_folder(staged, folder / FOLDER, last=marker)
        return
      atomic_file.sync(staged)
      folder.mkdir(exist_ok=True)
      staged.replace(folder / FOLDER)
  except (OSError, ValueError) as error:
    # Orbax reports an I/O error as a ValueError of many lines.
    reason = getattr(error, 'strerror', None) or str(error).strip().splitlines()[0]
    remedy = remedy_of(error, 'give another folder')
    raise UserError(f'--output={folder} cannot be written ({reason}); {remedy}.') from error
