"""The checkpoints of a run in training: written in the background, and read by whoever goes on.

No fault of a disk ends a run: what cannot be written is told, and what cannot be read any more
is set aside for the checkpoint before it.
"""

import contextlib
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as checkpoint_managers
from flax import traverse_util

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import CheckpointOptions
from dropmae_jax.runtime import multihost
from dropmae_jax.runtime.errors import PROGRAM_ERRORS, RunFailed, UserError
from dropmae_jax.train_step import TrainState

_log = logging.getLogger('dropmae_jax')


class NotSaved(RunFailed):
  """The last state of a run could not be written."""


class Checkpoints:
  """Writes and restores the training state of one run.

  `description` is stored with every checkpoint; its architecture must be that of what is there.
  """

  def __init__(
    self, workdir: pathlib.Path, options: CheckpointOptions, description: dict[str, Any]
  ) -> None:
    self._description = description
    kept: list[Any] = [checkpoint_managers.LatestN(options.keep_last)]
    if options.keep_every:
      kept.append(checkpoint_managers.EveryNSteps(options.keep_every))
    self._options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,  # Of saves that a kill broke off.
    )
    self._folder = (workdir / saved_weights.FOLDER).absolute()
    self._manager = ocp.CheckpointManager(self._folder, options=self._options)
    self._every_steps = options.every_steps
    self._pending: int | None = None
    self._has_saved = False
    self._given_up: set[int] = set()

  @property
  def latest_step(self) -> int | None:
    """The newest step that is stored whole."""
    return self._manager.latest_step()

  def is_due(self, step: int) -> bool:
    """Whether a checkpoint belongs at this step."""
    return step % self._every_steps == 0

  def save(self, step: int, state: TrainState) -> None:
    """Copies the state off the devices and writes it in the background; once per step.

    Args:
      step: number of the state.
      state: on the devices.
    """
    self._settle()
    self._remove_given_up()
    if step == self.latest_step:
      return
    # The training loop forbids implicit transfers, which orbax's copies off the devices are.
    with jax.transfer_guard('allow'):
      arrays = {'params': state.params, 'opt_state': state.opt_state}
      sums = {name: saved_weights.checksums(tree) for name, tree in arrays.items()}
      items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
      description = {**self._description, 'checksums': sums}
      items['description'] = ocp.args.JsonSave(saved_weights.seal(description))
      self._pending = step
      try:
        self._manager.save(step, args=ocp.args.Composite(**items))
      except Exception as error:  # Orbax answers a full disk with whatever its parts have.
        self._give_up(error)

  def _settle(self) -> None:
    """Waits for what is being written."""
    try:
      self._manager.wait_until_finished()
      self._has_saved |= self._pending is not None
      self._pending = None
    except Exception as error:  # As in `save`.
      self._give_up(error)

  def _give_up(self, error: Exception) -> None:
    """Frees the room of a checkpoint that could not be written; those before it are kept.

    A mistake in a program, by which this process has saved nothing yet, is raised.
    """
    step, self._pending = self._pending, None
    if step is None:
      return  # It was told already.
    if isinstance(error, PROGRAM_ERRORS) and not self._has_saved:
      raise error
    self._given_up.add(step)
    self._remove_given_up()
    self._manager.reload()
    reason, newest = saved_weights.first_line(error), self.latest_step or 0
    _log.warning(
      f'the checkpoint of step {step} could not be written ({reason}); the newest one is of step'
      f' {newest}, and training goes on. Make room before the next one.'
    )

  def _remove_given_up(self) -> None:
    """Removes what is left of those; threads of orbax may write a while after one has failed."""
    if jax.process_index() == 0:
      for step in self._given_up:
        for left in self._folder.glob(f'{step}.*-tmp*'):
          shutil.rmtree(left, ignore_errors=True)

  def finish(self, step: int, state: TrainState) -> None:
    """Saves the last state, and waits until it is on the disk.

    Raises:
      NotSaved: it could not be written; says from where the next start goes on.
    """
    self.save(step, state)
    self._settle()
    if self.latest_step != step:
      before = self.latest_step or 0
      raise NotSaved(
        f'step {step} could not be saved in {self._folder}; make room and give the same command,'
        f' which goes on from step {before}.'
      )

  def restore(self, abstract: TrainState) -> tuple[TrainState, list[str]]:
    """Reads the newest state that is whole, onto the shapes and places of `abstract`.

    Damaged ones are set aside under another name. Damage of its json makes orbax raise what a
    mistake in a program does, but such a mistake meets all of them.

    Returns:
      The state, and a sentence on each that was damaged.

    Raises:
      UserError: it is of another architecture, holds weights alone, or none is whole.
      TypeError and the like: none can be read, by a mistake in a program.
    """
    damaged: dict[int, Exception] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      state, error = self._restore_step(step, abstract)
      if not error:
        return state, [self._set_aside(each, why) for each, why in damaged.items()]
      damaged[step] = error
    found = '; '.join(f'step {k}: {saved_weights.first_line(v)}' for k, v in damaged.items())
    if all(isinstance(each, PROGRAM_ERRORS) for each in damaged.values()):
      error = next(iter(damaged.values()))
      error.add_note(f'No checkpoint in {self._folder} could be read ({found}).')
      raise error
    raise UserError(
      f'no checkpoint in {self._folder} can be read ({found}); see to its storage, or give another'
      ' --workdir to begin anew.'
    )

  def _set_aside(self, step: int, error: Exception) -> str:
    """Renames a damaged checkpoint, so that it is neither read nor in the way of a new one."""
    name, reason = f'{step}.damaged', saved_weights.first_line(error)
    if jax.process_index() == 0:
      shutil.rmtree(self._folder / name, ignore_errors=True)
      (self._folder / str(step)).rename(self._folder / name)
    multihost.any_of(False)  # All wait for the first.
    self._manager.reload()
    return f'the checkpoint of step {step} is damaged ({reason}); it is set aside as {name}'

  def _restore_step(
    self, step: int, abstract: TrainState
  ) -> tuple[TrainState | None, Exception | None]:
    """Returns the state of a step, or None and what is wrong with it.

    All processes come to the same end: in each stage, what one finds, all hear of before the next.
    """
    arrays = {'params': abstract.params, 'opt_state': abstract.opt_state}

    def describe() -> dict[str, Any]:
      stored = self._stored_description(step)
      self._refuse_another_model(step, stored)
      return stored

    def read() -> Any:
      items = {name: ocp.args.StandardRestore(tree) for name, tree in arrays.items()}
      return self._manager.restore(step, args=ocp.args.Composite(**items))

    def examine() -> None:
      for name in arrays:
        saved_weights.check(name, restored[name], stored)

    stored, error = _together(describe)
    if not error:
      restored, error = _together(read)
    if not error:
      _, error = _together(examine)
    if error:
      return None, error
    count = jax.device_put(np.int32(step), abstract.step.sharding)
    return TrainState(step=count, params=restored.params, opt_state=restored.opt_state), None

  def _refuse_another_model(self, step: int, stored: dict[str, Any]) -> None:
    mine, its = self._description['architecture'], stored['architecture']
    changed = [
      f'{k} is {its.get(k)} there and {mine[k]} here' for k in mine if mine[k] != its.get(k)
    ]
    if changed:
      raise UserError(
        f'{self._folder} holds another model ({", ".join(changed)});'
        ' give another --workdir, or the config it was trained with.'
      )
    if not (self._folder / str(step) / 'opt_state').exists():
      raise UserError(
        f'{self._folder} holds weights without optimizer state, so training cannot go on from it;'
        ' give another --workdir, and this one as --config.init_from.'
      )

  def _stored_description(self, step: int) -> dict[str, Any]:
    items = ocp.args.Composite(description=ocp.args.JsonRestore())
    return saved_weights.unseal(self._manager.restore(step, args=items).description)

  def changes(self) -> dict[str, str]:
    """Returns the config fields that differ from those of the newest checkpoint, 'old -> new'.

    `data_fingerprint` is among them, if the dataset is another one, and `seed_version`, if the code
    draws other numbers from a seed.
    """
    stored = self._stored_description(self.latest_step)
    old, new = (
      traverse_util.flatten_dict(description.get('config', {}), sep='.')
      | ({'seed_version': description.get('seed_version', 1)} if 'config' in description else {})
      | {key: description[key] for key in ('data_fingerprint',) if description.get(key)}
      for description in (stored, self._description)
    )
    return {
      name: f'{old[name]} -> {new[name]}' for name in new if old.get(name, new[name]) != new[name]
    }

  def close(self) -> None:
    """Ends the writing in the background; `finish` has told how that of the last state went."""
    with contextlib.suppress(Exception):
      self._manager.wait_until_finished()
    self._manager.close()
    self._remove_given_up()


def _together(stage: Callable[[], Any]) -> tuple[Any, Exception | None]:
  """Runs a stage on all processes; returns its result, or why it failed on this one or another.

  Raises:
    UserError: of the stage, once the others have heard that it failed here.
  """
  result = failure = None
  try:
    result = stage()
  except Exception as error:  # Orbax answers damage with whatever its parts have.
    failure = error
  failed_somewhere = multihost.any_of(failure is not None)
  if isinstance(failure, UserError):
    raise failure
  if failed_somewhere and not failure:
    failure = OSError('another process cannot read it')
  return result, failure
