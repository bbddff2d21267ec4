"""Checkpoints of a run: `<workdir>/checkpoints/<step>/`, the only place that knows orbax.

A checkpoint has the items `params`, `opt_state` (absent where the weights came from elsewhere)
and `description`, a json dict: `architecture`, `objective`, `frame_gap`, `steps_per_epoch` and
the whole `config`. Orbax writes to a temporary name and renames, so what is listed is whole.
"""

import dataclasses
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from dropmae_jax import destination, mae, optimizer
from dropmae_jax.command_line import BadInput, refusing
from dropmae_jax.mae import Architecture, Objective
from dropmae_jax.optimizer import Moments
from dropmae_jax.train_step import TrainState

FOLDER = 'checkpoints'


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
  """When checkpoints are written and which are kept.

  Attributes:
    every_steps: updates between two of them; one is always written at the end.
    keep_last: how many of the newest to keep.
    keep_every: those at multiples of this many steps are kept for good; 0 keeps none of them.
  """

  every_steps: int = 1000
  keep_last: int = 3
  keep_every: int = 0

  def __post_init__(self) -> None:
    for name in ('every_steps', 'keep_last'):
      if getattr(self, name) < 1:
        raise ValueError(f'checkpoint.{name}={getattr(self, name)} is not positive; use 1 or more.')


@dataclasses.dataclass(frozen=True)
class Weights:
  """A trained model, as its consumers need it; all arrays are numpy's."""

  params: dict
  step: int
  architecture: Architecture
  objective: Objective
  description: dict[str, Any]
  moments: Moments | None = None


class Checkpoints:
  """Writes and restores the training state of one run.

  `description` is stored with every checkpoint; its architecture must be that of what is there.
  """

  def __init__(
    self, workdir: pathlib.Path, options: CheckpointOptions, description: dict[str, Any]
  ) -> None:
    self._description = description
    self._manager = ocp.CheckpointManager(
      (workdir / FOLDER).absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=options.keep_last,
        keep_period=options.keep_every or None,
        enable_async_checkpointing=True,
      ),
    )
    self._every_steps = options.every_steps

  @property
  def latest_step(self) -> int | None:
    """The newest step that is stored whole."""
    return self._manager.latest_step()

  def is_due(self, step: int) -> bool:
    """Whether a checkpoint belongs at this step."""
    return step % self._every_steps == 0

  def save(self, step: int, state: TrainState) -> None:
    """Copies the state off the devices and writes it in the background; once per step."""
    if step == self.latest_step:
      return
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      opt_state=ocp.args.StandardSave(state.opt_state),
      description=ocp.args.JsonSave(self._description),
    )
    # The training loop forbids implicit transfers, which orbax's copies off the devices are.
    with jax.transfer_guard('allow'):
      self._manager.save(step, args=items)

  def restore(self, abstract: TrainState) -> TrainState:
    """Reads the newest state, onto the shapes and places of `abstract`.

    Raises:
      BadInput: it is of another architecture, or holds weights alone.
    """
    step = self.latest_step
    stored = self._manager.restore(
      step, args=ocp.args.Composite(description=ocp.args.JsonRestore())
    )
    mine, its = self._description['architecture'], stored.description['architecture']
    changed = [
      f'{k} is {its.get(k)} there and {mine[k]} here' for k in mine if mine[k] != its.get(k)
    ]
    if changed:
      raise BadInput(
        f'{self._manager.directory} holds another model ({", ".join(changed)});'
        ' give another --workdir, or the config it was trained with.'
      )
    if not (self._manager.directory / str(step) / 'opt_state').exists():
      raise BadInput(
        f'{self._manager.directory} holds weights without optimizer state, so training cannot go'
        ' on from it; give another --workdir.'
      )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        opt_state=ocp.args.StandardRestore(abstract.opt_state),
      ),
    )
    count = jax.device_put(np.int32(step), abstract.step.sharding)
    return TrainState(step=count, params=restored.params, opt_state=restored.opt_state)

  def changes(self) -> dict[str, str]:
    """Returns the config fields that differ from those of the newest checkpoint, 'old -> new'.

    `data_fingerprint` is among them, if the dataset is another one.
    """
    items = ocp.args.Composite(description=ocp.args.JsonRestore())
    stored = self._manager.restore(self.latest_step, args=items).description
    old, new = (
      traverse_util.flatten_dict(description.get('config', {}), sep='.')
      | {key: description[key] for key in ('data_fingerprint',) if description.get(key)}
      for description in (stored, self._description)
    )
    return {
      name: f'{old[name]} -> {new[name]}' for name in new if old.get(name, new[name]) != new[name]
    }

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def describe(architecture: Architecture, objective: Objective, **other: Any) -> dict[str, Any]:
  """Returns the json description of a checkpoint."""
  return {
    'architecture': dataclasses.asdict(architecture),
    'objective': dataclasses.asdict(objective),
    **other,
  }


def load_weights(
  folder: pathlib.Path, *, step: int | None = None, with_moments: bool = False
) -> Weights:
  """Reads the parameters of a run.

  Args:
    folder: a run's workdir, its checkpoints folder, or the folder of one step.
    step: which checkpoint; the newest by default.
    with_moments: read the optimizer's moments too.

  Raises:
    BadInput: there is no checkpoint, not this one, none with moments, or it cannot be read.
  """
  with refusing(f'{folder} cannot be read', 'give a folder that may be.'):
    root, steps = _stored_steps(folder.absolute())
  if not steps:
    raise BadInput(
      f'{folder} holds no checkpoint; give the --workdir of a training run that has saved one.'
    )
  step = max(steps) if step is None else step
  others = ', '.join(str(each) for each in sorted(steps) if each != step)
  if step not in steps:
    raise BadInput(f'{folder} has no step {step}; it has {others}.')
  if with_moments and not (root / str(step) / 'opt_state').is_dir():
    raise BadInput(
      f'step {step} of {folder} holds weights without optimizer state; leave --with_optimizer out.'
    )
  try:
    with ocp.CheckpointManager(root) as manager:
      return _restore_weights(manager, step, with_moments)
  except (OSError, ValueError, KeyError, TypeError) as error:
    reason = next(iter(str(error).splitlines()), '') or type(error).__name__
    remedy = f'give another step: {others}' if others else 'it is the only one; give another run'
    raise BadInput(f'step {step} of {folder} cannot be read ({reason}); {remedy}.') from error


def _stored_steps(folder: pathlib.Path) -> tuple[pathlib.Path, list[int]]:
  """Returns the folder that holds a run's checkpoints, and the steps in it: one, if it is one's."""
  root = folder / FOLDER if (folder / FOLDER).is_dir() else folder
  names = os.listdir(root) if root.is_dir() else []
  if root.name.isdecimal() and 'params' in names:
    root, names = root.parent, [root.name]
  return root, [int(x) for x in names if x.isdecimal() and (root / x / 'params').is_dir()]


def _restore_weights(manager: ocp.CheckpointManager, step: int, with_moments: bool) -> Weights:
  stored = manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore()))
  architecture = Architecture(**stored.description['architecture'])
  # None is what a file that was read in did not tell.
  objective = stored.description['objective']
  _, abstract = mae.abstract_model(architecture)
  items = {'params': abstract}
  if with_moments:
    items['opt_state'] = optimizer.abstract_state(abstract)
  # Consumers run on one device, whatever the mesh that wrote the file.
  place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  items = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), items)
  restored = manager.restore(
    step,
    args=ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in items.items()}),
  )
  arrays = jax.tree.map(np.asarray, {name: restored[name] for name in items})
  return Weights(
    params=arrays['params'],
    step=step,
    architecture=architecture,
    objective=Objective(**{k: v for k, v in objective.items() if v is not None}),
    description=stored.description,
    moments=optimizer.moments_of(arrays['opt_state']) if with_moments else None,
  )


def save_weights(
  folder: pathlib.Path,
  params: dict,
  step: int,
  description: dict[str, Any],
  *,
  moments: Moments | None = None,
) -> None:
  """Writes a checkpoint that `load_weights` reads and, if it has moments, training goes on from.

  Written under a temporary name first: on failure nothing is there.

  Raises:
    BadInput: the folder holds something already, or cannot be written.
  """
  destination.check_folder(folder)
  items = {'params': ocp.args.StandardSave(params), 'description': ocp.args.JsonSave(description)}
  if moments is not None:
    items['opt_state'] = ocp.args.StandardSave(optimizer.state_of(moments))
  try:
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix=destination.PREFIX, dir=folder.absolute().parent, ignore_cleanup_errors=True
    ) as temporary:
      staged = pathlib.Path(temporary).absolute() / FOLDER
      with ocp.CheckpointManager(staged) as manager:
        manager.save(step, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
      folder.mkdir(exist_ok=True)
      staged.replace(folder / FOLDER)
  except (OSError, ValueError) as error:
    # Orbax reports what the system refuses as a ValueError of many lines.
    reason = getattr(error, 'strerror', None) or str(error).strip().splitlines()[0]
    raise BadInput(
      f'--output={folder} cannot be written ({reason}); give another folder.'
    ) from error
