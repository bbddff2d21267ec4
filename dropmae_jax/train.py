"""Pre-training from a recipe: builds every part, then holds the loop."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dropmae_jax import bad_batch, data, hosts, mae, optimizer, sharding, warm_start
from dropmae_jax.checkpoint import describe
from dropmae_jax.command_line import BadInput
from dropmae_jax.feed import DamagedRecords, Feed
from dropmae_jax.mixture import Mixture, open_mixture
from dropmae_jax.recipe import Recipe, may_change
from dropmae_jax.report import NonFiniteLoss, Report
from dropmae_jax.run_checkpoints import Checkpoints
from dropmae_jax.stalls import Watchdog
from dropmae_jax.train_step import Metrics, TrainState, derive_seeds, init_state, train_step


class Program(NamedTuple):
  """What runs on the devices: fresh states, updates of them, and a state's shapes and places."""

  init: Callable[[jax.Array], TrainState]
  step: Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
  abstract_state: TrainState


def build_program(recipe: Recipe, mesh: Mesh) -> Program:
  """Puts model, objective and optimizer of a recipe together, jitted for a mesh.

  The old state is donated to the step. Nothing is compiled before the first call.

  Raises:
    BadInput: the devices do not divide the batch.
  """
  try:
    sharding.check_batch(recipe.batch_size, recipe.accumulation_steps, mesh)
  except ValueError as error:
    raise BadInput(f'config: {error}') from error
  graphdef, _ = mae.abstract_model(recipe.model, dtype=jnp.dtype(recipe.dtype), remat=recipe.remat)
  schedule = optimizer.learning_rate(
    peak=recipe.peak_learning_rate,
    floor=recipe.optimizer.min_learning_rate,
    warmup_steps=recipe.optimizer.warmup_steps,
    num_steps=recipe.num_steps,
  )
  tx = optimizer.adamw(schedule, recipe.optimizer)
  step = partial(
    train_step,
    graphdef=graphdef,
    tx=tx,
    schedule=schedule,
    objective=recipe.objective,
    shared_flip=recipe.data.shared_augmentation,
    accumulation_steps=recipe.accumulation_steps,
  )
  init = partial(init_state, architecture=recipe.model, tx=tx)
  # A state is born in its place, and never whole on one device.
  state = sharding.abstract_on(mesh, jax.eval_shape(init, jax.random.key(0)))
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  everywhere = sharding.replicated(mesh)
  return Program(
    init=jax.jit(init, out_shardings=places),
    step=jax.jit(
      step,
      donate_argnames='state',
      in_shardings=(places, sharding.batch_sharding(mesh), everywhere),
      out_shardings=(places, everywhere),
    ),
    abstract_state=state,
  )


class Run(NamedTuple):
  """Everything that the loop needs, opened."""

  program: Program
  state: TrainState
  step_key: jax.Array
  first_step: int
  batches: Feed
  checkpoints: Checkpoints
  report: Report
  watchdog: Watchdog
  dataset: Mixture


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
  with interruption.watched(), contextlib.ExitStack() as stack:
    run = _open(recipe, workdir, stack, allow_changes=allow_changes)
    try:
      with jax.transfer_guard('disallow'):
        return _loop(recipe, run, interruption)
    except NonFiniteLoss as error:
      run.watchdog.pause()
      found = bad_batch.write(workdir, recipe, run.dataset, error.step)
      raise NonFiniteLoss(f'{error} {found}', error.step) from error


def _loop(recipe: Recipe, run: Run, interruption: hosts.Interruption) -> bool:
  """Takes the steps that are left; returns whether the last one was reached."""
  state, previous = run.state, None
  for step in range(run.first_step + 1, recipe.num_steps + 1):
    asked = time.perf_counter()
    run.watchdog.pause()  # The loader has one of its own.
    frames = next(run.batches)
    run.watchdog.watch(f'step {step}', is_slow=previous is None)
    run.report.batch_arrived(asked)
    state, metrics = run.program.step(state, frames, run.step_key)
    # At most two steps are under way, so that memory and signals are not held up.
    jax.block_until_ready(previous or metrics)
    run.report.after_step(step, metrics)
    if previous is None:
      run.report.compiled(step)
    previous = metrics
    stopped, ended = interruption.is_due(step), step == recipe.num_steps
    if run.checkpoints.is_due(step) or stopped or ended:
      losses = run.report.take_losses()
      run.watchdog.watch(f'the checkpoint of step {step}', is_slow=True)
      write = run.checkpoints.finish if stopped or ended else run.checkpoints.save
      write(step, state, losses=losses, say=run.report.warn)
    if stopped and not ended:
      run.report.say(
        f'{interruption.signal_name}: saved at step {step} of {recipe.num_steps};'
        ' the same command goes on from there'
      )
      return False
  return True


def _open(
  recipe: Recipe, workdir: pathlib.Path, stack: contextlib.ExitStack, *, allow_changes: bool
) -> Run:
  """Opens data, checkpoints, report and loader of a run; the stack closes them again."""
  dataset = _open_dataset(recipe, workdir, allow_changes=allow_changes)
  try:
    mesh = sharding.make_mesh(options=recipe.mesh)
  except ValueError as error:
    raise BadInput(f'config: {error}') from error
  program = build_program(recipe, mesh)
  steps_per_epoch = max(len(dataset) // recipe.batch_size, 1)
  seeds = derive_seeds(recipe.seed)

  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise BadInput(f'--workdir={workdir} cannot be made: {error.strerror}.') from error
  description = describe(
    recipe.model,
    recipe.objective,
    frame_gap=recipe.data.frame_gap,
    steps_per_epoch=steps_per_epoch,
    data_fingerprint=dataset.fingerprint,
    config=dataclasses.asdict(recipe),
  )
  checkpoints = Checkpoints(workdir, recipe.checkpoint, description)
  stack.callback(checkpoints.close)
  hosts.agree({'newest checkpoint in --workdir': str(checkpoints.latest_step)})
  state, notes = _begin(
    recipe, workdir, program, checkpoints, key=seeds.init, allow_changes=allow_changes
  )
  first_step = checkpoints.latest_step or 0

  report = Report(
    workdir,
    first_step=first_step,
    num_steps=recipe.num_steps,
    batch_size=recipe.batch_size,
    log_every=recipe.log_every,
  )
  stack.callback(report.close)
  report.say(
    f'{mae.num_parameters(state.params) / 1e6:.1f} M parameters, {len(dataset)} videos,'
    f' {steps_per_epoch} steps per epoch, {mesh.size} x {jax.devices()[0].device_kind}'
  )
  for note in notes:
    report.say(note)
  batches = _feed(recipe, dataset, mesh, seed=seeds.data, first_step=first_step, say=report.warn)
  stack.callback(batches.close)
  step_key = sharding.put_everywhere(seeds.steps, mesh)
  watchdog = Watchdog(recipe.step_stall_seconds, say=report.warn)
  stack.callback(watchdog.close)
  return Run(program, state, step_key, first_step, batches, checkpoints, report, watchdog, dataset)


def _begin(
  recipe: Recipe,
  workdir: pathlib.Path,
  program: Program,
  checkpoints: Checkpoints,
  *,
  key: jax.Array,
  allow_changes: bool,
) -> tuple[TrainState, list[str]]:
  """Returns the state to go on from, and lines that say where it comes from."""
  if checkpoints.latest_step is None:
    state = program.init(key)
    if not recipe.init_from:
      return state, []
    start = warm_start.read(pathlib.Path(recipe.init_from), recipe.model)
    return state.replace(params=warm_start.put(start.taken, state.params)), start.report
  state, notes = checkpoints.restore(program.abstract_state)
  changes = checkpoints.changes()
  if not allow_changes:
    _refuse_another_run(changes, workdir)
  notes.append(f'going on after step {checkpoints.latest_step} of {recipe.num_steps}')
  notes += [f'changed since that checkpoint: {name}: {text}' for name, text in changes.items()]
  return state, notes


def _open_dataset(recipe: Recipe, workdir: pathlib.Path, *, allow_changes: bool) -> Mixture:
  """Opens the dataset, once all processes are there and mean the same run."""
  facts = {
    'code version': hosts.code_version(),
    'config': repr(dataclasses.replace(recipe, data_dir='')),
    '--workdir': str(workdir.absolute()),
    '--allow_changes': str(allow_changes),
  }
  try:
    dataset = open_mixture(recipe.data_dir, recipe.dataset, recipe.split)
  except BadInput:
    # The others must hear of it, or they would wait for this process.
    with contextlib.suppress(BadInput):
      hosts.agree({**facts, 'dataset': 'cannot be opened'})
    raise
  hosts.agree({**facts, 'dataset': dataset.fingerprint})
  return dataset


def _refuse_another_run(changes: dict[str, str], workdir: pathlib.Path) -> None:
  """Refuses changes after which a checkpoint would not go on with the run that it is of."""
  found = [f'{name}: {change}' for name, change in changes.items() if not may_change(name)]
  if found:
    raise BadInput(
      f'--workdir={workdir} holds another run ({", ".join(found)}); give its dataset and config'
      ' again, or another --workdir, or --allow_changes to go on from it all the same.'
    )


def _feed(
  recipe: Recipe,
  dataset: Mixture,
  mesh: Mesh,
  *,
  seed: int,
  first_step: int,
  say: Callable[[str], None],
) -> Feed:
  """Starts the loader of this process's share of every batch."""
  damaged = DamagedRecords(recipe.data.max_damaged_records, say)

  def make_batches(step: int) -> Iterator[dict[str, np.ndarray]]:
    return data.pair_batches(
      dataset,
      recipe.data,
      image_size=recipe.model.image_size,
      batch_size=recipe.batch_size,
      seed=seed,
      first_step=step,
      host=jax.process_index(),
      num_hosts=jax.process_count(),
      tell_damaged=damaged.tell,
    )

  return Feed(
    make_batches,
    first_step=first_step,
    to_device=lambda batch: sharding.to_devices(batch['frames'], mesh),
    stall_seconds=recipe.data.stall_seconds,
    say=say,
  )
