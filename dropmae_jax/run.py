"""Everything that a training run needs, opened: data, devices, checkpoints, report and loader."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dropmae_jax import data, hosts, mae, sharding, warm_start
from dropmae_jax.checkpoint import describe
from dropmae_jax.command_line import BadInput
from dropmae_jax.damaged_records import DamagedRecords
from dropmae_jax.feed import Feed, LoaderStalled
from dropmae_jax.mixture import Mixture, open_mixture
from dropmae_jax.program import Program, build_program, keep_compiled
from dropmae_jax.recipe import Recipe, may_change
from dropmae_jax.report import Report
from dropmae_jax.run_checkpoints import Checkpoints
from dropmae_jax.stalls import Watchdog
from dropmae_jax.train_step import SEED_VERSION, TrainState, derive_seeds


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


def open_run(
  recipe: Recipe,
  workdir: pathlib.Path,
  stack: contextlib.ExitStack,
  watchdog: Watchdog,
  interruption: hosts.Interruption,
  *,
  allow_changes: bool,
) -> Run:
  """Opens data, checkpoints, report and loader of a run; the stack closes them again."""
  watchdog.watch('opening the dataset', is_slow=True)
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
  keep_compiled(workdir)
  description = describe(
    recipe.model,
    recipe.objective,
    frame_gap=recipe.data.frame_gap,
    steps_per_epoch=steps_per_epoch,
    data_fingerprint=dataset.fingerprint,
    seed_version=SEED_VERSION,
    config=dataclasses.asdict(recipe),
  )
  checkpoints = Checkpoints(workdir, recipe.checkpoint, description)
  stack.callback(checkpoints.close)
  hosts.agree({'newest checkpoint in --workdir': str(checkpoints.latest_step)})
  watchdog.watch('restoring the state', is_slow=True)
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
  watchdog.say = report.warn
  batches = _feed(
    recipe,
    dataset,
    mesh,
    seed=seeds.data,
    first_step=first_step,
    say=report.warn,
    is_interrupted=interruption.is_asked,
  )

  def close_batches(_: Any, error: BaseException | None, __: Any) -> None:
    try:
      batches.close()
    except LoaderStalled:
      if error is None:  # Else that is what the user has to know.
        raise

  stack.push(close_batches)
  step_key = sharding.put_everywhere(seeds.steps, mesh)
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
  is_interrupted: Callable[[], bool],
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
    is_interrupted=is_interrupted,
  )
