"""Pre-training from a recipe: the loop, and how it ends."""

import contextlib
import pathlib
import time

import jax

from dropmae_jax import bad_batch, hosts
from dropmae_jax.feed import Interrupted
from dropmae_jax.recipe import Recipe
from dropmae_jax.report import NonFiniteLoss
from dropmae_jax.run import Run, open_run
from dropmae_jax.stalls import Watchdog
from dropmae_jax.train_step import TrainState


def train(recipe: Recipe, workdir: pathlib.Path, *, allow_changes: bool = False) -> bool:
  """Trains to `recipe.num_steps`, going on from the newest checkpoint of `workdir` if there is one.

  A step that hangs ends the process, with the status `stalls.STALLED`.

  Args:
    recipe: what to do.
    workdir: where checkpoints and reports are written; made if it is not there.
    allow_changes: go on even if that makes it another run than the one that was begun.

  Returns:
    Whether the last step was reached; if not, a signal stopped the run after a checkpoint.

  Raises:
    BadInput: the data are not there or cannot be read, the batch does not fit the devices, or the
      workdir holds another model or run.
    NonFiniteLoss: training diverged; the pairs of the batch are listed in the workdir.
    LoaderFailed: the loader hangs or dies again and again; end the process by os._exit.
    NotSaved: the last state could not be written.
  """
  interruption = hosts.Interruption()
  watchdog = Watchdog(recipe.step_stall_seconds, say=print)
  with interruption.watched(), contextlib.ExitStack() as stack:
    stack.callback(watchdog.close)
    with hosts.ending_together():
      run = open_run(recipe, workdir, stack, watchdog, interruption, allow_changes=allow_changes)
      try:
        with jax.transfer_guard('disallow'):
          return _loop(recipe, run, interruption)
      except NonFiniteLoss as error:
        run.report.warn(str(error))
        watchdog.watch('listing the bad batch', is_slow=True)
        found = bad_batch.write(workdir, recipe, run.dataset, error.step)
        raise NonFiniteLoss(f'{error} {found}', error.step) from error
      finally:
        watchdog.watch('closing the run', is_slow=True)


def _loop(recipe: Recipe, run: Run, interruption: hosts.Interruption) -> bool:
  """Takes the steps that are left; returns whether the last one was reached."""
  state, previous = run.state, None
  for step in range(run.first_step + 1, recipe.num_steps + 1):
    asked = time.perf_counter()
    run.watchdog.pause()  # The loader has one of its own.
    try:
      frames = next(run.batches)
    except Interrupted:
      return _stop(recipe, run, interruption, step - 1, state)
    run.watchdog.watch(f'step {step}', is_slow=previous is None)
    run.report.batch_arrived(asked)
    state, metrics = run.program.step(state, frames, run.step_key)
    # At most two steps are under way, so that memory and signals are not held up.
    jax.block_until_ready(previous or metrics)
    run.report.after_step(step, metrics)
    if previous is None:
      run.report.compiled(step)
    previous = metrics
    if step == recipe.num_steps:
      _finish(run, step, state)
    elif interruption.is_due(step):
      return _stop(recipe, run, interruption, step, state)
    elif run.checkpoints.is_due(step):
      losses = run.report.take_losses()
      run.watchdog.watch(f'the checkpoint of step {step}', is_slow=True)
      run.checkpoints.save(step, state, losses=losses, say=run.report.warn)
  return True


def _stop(
  recipe: Recipe, run: Run, interruption: hosts.Interruption, step: int, state: TrainState
) -> bool:
  """Saves what there is when a signal came; returns that the last step was not reached."""
  if step > run.first_step:
    _finish(run, step, state)
  run.report.say(
    f'{interruption.signal_name}: saved at step {step} of {recipe.num_steps};'
    ' the same command goes on from there'
    if step
    else f'{interruption.signal_name}: no step was made; the same command begins anew'
  )
  return False


def _finish(run: Run, step: int, state: TrainState) -> None:
  losses = run.report.take_losses()
  run.watchdog.watch(f'the checkpoint of step {step}', is_slow=True)
  run.checkpoints.finish(step, state, losses=losses, say=run.report.warn)
