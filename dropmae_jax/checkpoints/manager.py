"""Writes the checkpoints of a run in the background, and restores the newest when it resumes.

Disk faults do not end a run. A checkpoint that cannot be written is reported and skipped. One that
cannot be read is renamed, and the run resumes from the one before it. An older one is deleted only
when all files of a newer one are on the disk; orbax would delete it before.
"""

import contextlib
import itertools
import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.checkpoints.saved_weights import COMMIT_FILE
from dropmae_jax.config import CheckpointOptions
from dropmae_jax.optimizer import TrainState
from dropmae_jax.runtime import atomic_file, multihost
from dropmae_jax.runtime.errors import (
  PROGRAM_ERRORS,
  RunFailed,
  UserError,
  first_line,
  lacks_memory,
  remedy_of,
)
from dropmae_jax.runtime.paths import (
  BUCKET_REMEDY,
  Path,
  absolute,
  client_errors_as_os_errors,
  is_out_of_reach,
  is_remote,
)

# In the names of folders that orbax removes when it starts.
TEMPORARY = '.orbax-checkpoint-tmp'
# The folder of damaged checkpoints, where the workdir is in a bucket.
DAMAGED = 'damaged'

_log = logging.getLogger('dropmae_jax')


class NotSaved(RunFailed):
  """The last state of a run could not be written."""


class Checkpoints:
  """Writes and restores the training state of one run.

  `description` is stored with every checkpoint; `restore` checks that the architecture is the same.
  """

  def __init__(
    self, workdir: Path, options: CheckpointOptions, description: dict[str, Any]
  ) -> None:
    self.description = description
    self._options = options
    self._folder = absolute(workdir / saved_weights.FOLDER)
    with client_errors_as_os_errors(self._folder):
      self._manager = ocp.CheckpointManager(
        self._folder,
        # Left by a process that was killed while it saved or deleted.
        options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True),
      )
    self._pending: int | None = None
    self._has_saved = False
    self._given_up: set[int] = set()
    self._room = BUCKET_REMEDY if is_remote(self._folder) else 'make room there'
    self._remedy = self._room  # Of the last save that failed.

  @property
  def latest_step(self) -> int | None:
    """The newest step that is completely stored."""
    return max(set(self._manager.all_steps()) - self._given_up, default=None)

  def is_due(self, step: int) -> bool:
    """Returns whether a checkpoint is to be saved at this step."""
    return step % self._options.every_steps == 0

  def save(self, step: int, state: TrainState, losses: Sequence[float] = ()) -> None:
    """Copies the state off the devices and writes it in the background; once per step.

    Args:
      step: of the state.
      state: of the run.
      losses: since the last line of metrics.jsonl, for the mean of the next one.
    """
    self._settle()
    self._remove_given_up()
    if self._given_up:
      self._reload()
    if step == self.latest_step:
      return
    self._given_up.discard(step)
    # The training loop forbids implicit transfers, but orbax copies from the devices by them.
    with jax.transfer_guard('allow'):
      arrays = {'params': state.params, 'opt_state': state.opt_state}
      sums = {name: saved_weights.checksums(tree) for name, tree in arrays.items()}
      items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
      description = {**self.description, 'checksums': sums, 'losses': list(losses)}
      items['description'] = ocp.args.JsonSave(saved_weights.add_digest(description))
      self._pending = step
      try:
        self._manager.save(step, args=ocp.args.Composite(**items))
      except Exception as error:  # Orbax answers a full disk with whatever its parts have.
        self._give_up(error)

  def _settle(self) -> None:
    """Waits until what is being written is on the disk, and then deletes what is too old.

    After a power cut, a file is whole only if it was synced before. Orbax syncs the arrays of each
    process, but no json and no folder, which the first process has written.
    """
    failure = None
    try:
      self._manager.wait_until_finished()
      if self._pending is not None and jax.process_index() == 0 and not is_remote(self._folder):
        atomic_file.sync(self._folder / str(self._pending))
    except Exception as error:  # As in `save`.
      failure = error
    with jax.transfer_guard('allow'):
      failed_somewhere = multihost.any_of(failure is not None)
    if failed_somewhere:
      self._give_up(failure or OSError('another process could not write it'))
    elif self._pending is not None:
      self._has_saved, self._pending = True, None
      self._delete_old()

  def _delete_old(self) -> None:
    """Deletes what the options do not keep; each at once for those who look into the folder."""
    if jax.process_index():
      return
    keep_last, keep_every = self._options.keep_last, self._options.keep_every
    try:
      with client_errors_as_os_errors(self._folder):
        for step in saved_weights.steps_in(self._folder)[:-keep_last]:
          if not keep_every or step % keep_every:
            _delete(self._folder / str(step))
    except OSError as error:
      _log.warning(
        f'an old checkpoint in {self._folder} cannot be deleted ({error.strerror}); training goes'
        ' on.'
      )

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
    self._reload()
    reason, newest = first_line(error), self.latest_step or 0
    self._remedy = remedy_of(error, self._room)
    _log.warning(
      f'the checkpoint of step {step} could not be written ({reason}); the newest one is of step'
      f' {newest}, and training goes on. {self._remedy[0].upper()}{self._remedy[1:]} before'
      ' the next one.'
    )

  def _remove_given_up(self) -> None:
    """Removes the files of all failed saves; threads of orbax may still write after a failure.

    Not those in a bucket, which may be out of reach: each request would wait for a minute. They
    lack COMMIT_FILE, and orbax removes them when it starts.
    """
    if jax.process_index() == 0 and not is_remote(self._folder):
      for step in self._given_up:
        for remains in (self._folder / str(step), *self._folder.glob(f'{step}.*-tmp*')):
          shutil.rmtree(remains, ignore_errors=True)

  def _reload(self) -> None:
    """Looks which steps are stored; not in a bucket, as `_remove_given_up`."""
    if not is_remote(self._folder):
      self._manager.reload()

  def finish(self, step: int, state: TrainState, losses: Sequence[float] = ()) -> None:
    """Saves the last state, and waits until it is on the disk.

    Raises:
      NotSaved: it could not be written; says from where the next start resumes.
    """
    self.save(step, state, losses)
    self._settle()
    if self.latest_step != step:
      before = self.latest_step or 0
      raise NotSaved(
        f'step {step} could not be saved in {self._folder}; {self._remedy} and give the same'
        f' command, which resumes from step {before}.'
      )

  def restore(self, abstract: TrainState) -> tuple[TrainState, list[str]]:
    """Reads the newest state that is not damaged, with the shapes and shardings of `abstract`.

    Damaged checkpoints are renamed. A bug would make every checkpoint fail with an error such as
    TypeError; damaged json makes orbax raise such errors for one.

    Returns:
      The state, and a sentence on each damaged checkpoint.

    Raises:
      UserError: it has another architecture or no optimizer state, or all are damaged.
      TypeError and the like: all fail with such errors, so it is probably a bug.
    """
    damaged: dict[int, Exception] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      state, error = self._restore_step(step, abstract)
      if not error:
        return state, [self._set_aside(each, why) for each, why in damaged.items()]
      damaged[step] = error
    reasons = '; '.join(f'step {k}: {first_line(v)}' for k, v in damaged.items())
    if all(isinstance(each, PROGRAM_ERRORS) for each in damaged.values()):
      error = next(iter(damaged.values()))
      error.add_note(f'No checkpoint in {self._folder} could be read ({reasons}).')
      raise error
    raise UserError(
      f'no checkpoint in {self._folder} can be read ({reasons}); check its storage, or give another'
      ' --workdir to start again.'
    )

  def _set_aside(self, step: int, error: Exception) -> str:
    """Renames a damaged checkpoint, so that it is not read again and its step can be saved."""
    name, reason = f'{step}.damaged', first_line(error)
    if jax.process_index() == 0:
      with client_errors_as_os_errors(self._folder):
        if is_remote(self._folder):
          name = _move_aside(self._folder / str(step), reason)
        else:
          shutil.rmtree(self._folder / name, ignore_errors=True)
          (self._folder / str(step)).rename(self._folder / name)
    multihost.wait_for_all('a damaged checkpoint is set aside')
    self._manager.reload()
    return f'the checkpoint of step {step} is damaged ({reason}); it is set aside as {name}'

  def _restore_step(
    self, step: int, abstract: TrainState
  ) -> tuple[TrainState | None, Exception | None]:
    """Returns the state of a step and None, or None and the error.

    After each stage the processes tell each other whether it failed, so all return the same.
    """
    arrays = {'params': abstract.params, 'opt_state': abstract.opt_state}

    def read_description() -> dict[str, Any]:
      stored = self._stored_description(step)
      self._check_same_model(step, stored)
      return stored

    def read_arrays() -> Any:
      items = {name: ocp.args.StandardRestore(tree) for name, tree in arrays.items()}
      return self._manager.restore(step, args=ocp.args.Composite(**items))

    def check_arrays() -> None:
      for name in arrays:
        saved_weights.check(name, restored[name], stored)

    of_bucket = is_remote(self._folder)
    stored, error = _on_all_processes(read_description, of_bucket=of_bucket)
    if not error:
      restored, error = _on_all_processes(read_arrays, of_bucket=of_bucket)
    if not error:
      _, error = _on_all_processes(check_arrays, of_bucket=of_bucket)
    if error:
      return None, error
    self._continue_epochs(step, stored)
    count = jax.device_put(np.int32(step), abstract.step.sharding)
    return TrainState(step=count, params=restored.params, opt_state=restored.opt_state), None

  def _continue_epochs(self, step: int, stored: dict[str, Any]) -> None:
    before = stored.get('epochs_before')
    if stored.get('steps_per_epoch') != self.description.get('steps_per_epoch'):
      before = [step, saved_weights.epochs(stored, step)]
    if before and before[1] is not None:
      self.description = {**self.description, 'epochs_before': before}

  def _check_same_model(self, step: int, stored: dict[str, Any]) -> None:
    here, there = self.description['architecture'], stored['architecture']
    changed = [
      f'{k} is {there.get(k)} there and {here.get(k)} here'
      for k in {**here, **there}
      if here.get(k) != there.get(k)
    ]
    if changed:
      raise UserError(
        f'{self._folder} holds another model ({", ".join(changed)});'
        ' give another --workdir, or the config it was trained with.'
      )
    if not self._has_optimizer_state(step):
      if any(map(self._has_optimizer_state, self._manager.all_steps())):
        raise ValueError('opt_state is missing')
      raise UserError(
        f'{self._folder} holds weights without optimizer state, so training cannot resume from it;'
        ' give another --workdir, and this one as --config.init_from.'
      )

  def _has_optimizer_state(self, step: int) -> bool:
    return (self._folder / str(step) / 'opt_state').exists()

  def _stored_description(self, step: int) -> dict[str, Any]:
    items = ocp.args.Composite(description=ocp.args.JsonRestore())
    return saved_weights.verify_digest(self._manager.restore(step, args=items).description)

  def stored_description(self) -> dict[str, Any]:
    """Returns the description of the newest checkpoint."""
    return self._stored_description(self.latest_step)

  def changes(self) -> dict[str, str]:
    """Returns the config fields that differ from the newest checkpoint's: name to 'old -> new'.

    Also `data_fingerprint` if the dataset has changed, and `seed_version` if this version of the
    code draws other random numbers from the same seed.
    """
    old, new = (
      traverse_util.flatten_dict(description.get('config', {}), sep='.')
      | ({'seed_version': description.get('seed_version', 1)} if 'config' in description else {})
      | {key: description[key] for key in ('data_fingerprint',) if description.get(key)}
      for description in (self.stored_description(), self.description)
    )
    return {
      name: f'{old[name]} -> {new[name]}' for name in new if old.get(name, new[name]) != new[name]
    }

  def close(self) -> None:
    """Stops writing in the background; `finish` has reported whether the last state was saved."""
    with contextlib.suppress(Exception):
      self._manager.wait_until_finished()
    self._manager.close()
    self._remove_given_up()


def _move_aside(step_folder: Path, reason: str) -> str:
  """Moves a checkpoint of a bucket out of its folder, and returns where to.

  Objects are moved one by one. Where that ends half way, the next start goes on in another folder;
  and orbax would delete a folder that lacks COMMIT_FILE, if it were beside the checkpoints.
  """
  folder = step_folder.parent.with_name(DAMAGED)
  names = (f'{step_folder.name}-{number}' for number in itertools.count(1))
  target = next(folder / name for name in names if not (folder / name).exists())
  (target / 'reason.txt').write_text(reason)
  for each in sorted(step_folder.iterdir(), key=lambda each: each.name == COMMIT_FILE):
    each.rename(target / each.name)
  return str(target)


def _delete(step_folder: Path) -> None:
  """Deletes a checkpoint; where that ends half way, it is not taken for a whole one."""
  if is_remote(step_folder):
    (step_folder / COMMIT_FILE).unlink()
    step_folder.rmtree()
  else:
    shutil.rmtree(step_folder.rename(f'{step_folder}{TEMPORARY}'))


def _on_all_processes(stage: Callable[[], Any], *, of_bucket: bool) -> tuple[Any, Exception | None]:
  """Runs a stage on all processes; returns its result, or why it failed on this or another one.

  Raises:
    UserError: raised by the stage; the other processes are told first that it failed here.
    RunFailed: a process is short of memory, open files or the like; so is MemoryError.
  """
  result = failure = None
  try:
    result = stage()
  except Exception as error:  # A damaged checkpoint makes orbax raise errors of many types.
    failure = error
  failed_somewhere = multihost.any_of(failure is not None)
  # What a machine is short of is no damage.
  is_away = of_bucket and failure is not None and is_out_of_reach(failure)
  remedy = failure and remedy_of(failure, BUCKET_REMEDY if is_away else '')
  is_short = lacks_memory(failure) or bool(remedy)
  is_short_somewhere = multihost.any_of(is_short)
  if isinstance(failure, UserError) or lacks_memory(failure):
    raise failure
  if is_short:
    raise RunFailed(
      f'the checkpoint cannot be read now ({first_line(failure)}); {remedy}, and'
      ' give the same command again.'
    ) from failure
  if is_short_somewhere:
    raise RunFailed('another process of this run cannot read the checkpoint; see its message.')
  if failed_somewhere and not failure:
    failure = OSError('another process cannot read it')
  return result, failure
