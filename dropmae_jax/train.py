"""Pre-training, from top to bottom: config, data, devices, model, state, loader, loop, end.

`train` is where a reader starts. What is random in a run is derived from its seed
(`train_step.derive_seeds`); everything else here is the order in which a run is put together.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dropmae_jax import memory, optimizer, sharding
from dropmae_jax.checkpoints.manager import Checkpoints
from dropmae_jax.checkpoints.saved_weights import FOLDER, Weights, describe
from dropmae_jax.config import Config, Objective, may_change
from dropmae_jax.data import crashes, frame_pairs, non_finite_batch
from dropmae_jax.data.loader import Interrupted, Loader, LoaderStalled
from dropmae_jax.data.mixture import Mixture, open_mixture
from dropmae_jax.evaluation import scores
from dropmae_jax.model import mae
from dropmae_jax.pytorch import init_from
from dropmae_jax.runtime import multihost, workdir_lock
from dropmae_jax.runtime.errors import (
  UserError,
  memory_errors_as_failures,
  os_errors_as_user_errors,
)
from dropmae_jax.runtime.mirror import Mirror, check_bucket
from dropmae_jax.runtime.paths import (
  BUCKET_REMEDY,
  Path,
  absolute,
  client_errors_as_os_errors,
  is_remote,
  user_path,
)
from dropmae_jax.runtime.profile import Profile
from dropmae_jax.runtime.report import TENSORBOARD, NonFiniteLoss, Report
from dropmae_jax.runtime.watchdog import Watchdog
from dropmae_jax.train_step import (
  SEED_VERSION,
  Metrics,
  Model,
  Seeds,
  TrainState,
  build,
  derive_seeds,
)

# How long the loader may take to end by its own limit.
LOADER_SECONDS = 60.0
# In the description of a checkpoint: what accumulation_steps=auto was, and on which devices.
MICRO_BATCHES = 'micro_batches'
# In which the mean loss of the published runs stayed for hundreds of steps.
PLATEAU = 0.57, 0.66

_log = logging.getLogger('dropmae_jax')


def train(
  config: Config,
  workdir: Path,
  *,
  allow_changes: bool = False,
  profile_steps: tuple[int, int] | None = None,
) -> bool:
  """Trains to the last step; resumes from the newest checkpoint of `workdir`, if there is one.

  A step that hangs ends the process by SIGABRT (`errors.ExitStatus.ABORTED`).

  Args:
    config: of the run.
    workdir: where checkpoints and reports are written; made if it is not there.
    allow_changes: resume even if the config or the data make it another run.
    profile_steps: the first and the last step of a trace by jax.profiler; None: there is none.

  Returns:
    Whether the last step was reached; if not, a signal stopped the run after a checkpoint.

  Raises:
    UserError: the data are not there or cannot be read, the batch does not fit the devices, or the
      workdir holds another model or run or is in use.
    NonFiniteLoss: training diverged; the pairs of the batch are listed in the workdir.
    LoaderStalled: the loader hangs; end the process by os._exit.
    NotSaved: the last state could not be written.
  """
  interruption = multihost.Interruption()
  watchdog = Watchdog(config.step_stall_seconds)
  with interruption.watched(), contextlib.ExitStack() as stack:
    stack.callback(watchdog.close)
    watchdog.watch('opening the dataset', is_slow=True)
    with multihost.ending_together() as failures, memory_errors_as_failures():
      dataset = open_dataset(config, workdir, allow_changes=allow_changes)
      given, config = config, optimizer.resolve_schedule(config, len(dataset))
      seeds = derive_seeds(config.seed)
      mesh = make_mesh(config)
      # With automatic micro-batches, all else is checked with one.
      number = config.accumulation_steps or 1
      model = build(dataclasses.replace(config, accumulation_steps=number), mesh)
      watchdog.watch('reading config.init_from', is_slow=True)
      initial = read_initial_params(config, workdir)
      with _workdir_errors_as_user_errors(workdir):
        mirror = Mirror(workdir)
        mirror.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(workdir_lock.held(workdir, folder=mirror.folder))
        failures.share(workdir)
        failures.before_end = mirror.push
        stack.enter_context(mirror.opened())
        enable_compilation_cache(workdir)
        checkpoints = open_checkpoints(config, workdir, dataset)
        stack.callback(checkpoints.close)
        watchdog.watch('restoring the state', is_slow=True)
        state, notes = first_state(
          config,
          workdir,
          model,
          checkpoints,
          key=seeds.init,
          allow_changes=allow_changes,
          initial=initial,
        )
        del initial  # Frees its arrays.
        first_step = checkpoints.latest_step or 0
        report = open_report(config, mirror.folder, first_step, checkpoints)
        stack.callback(report.close)
        if first_step < config.num_steps:
          write_config(given, mirror.folder)
        dataset = stack.enter_context(crashes.left_out(dataset, mirror, watchdog))
      for line in (*description_of(config, dataset, mesh, state), *mirror.notes(), *notes):
        _log.info(line)
      if first_step >= config.num_steps:
        tell_end(first_step, workdir)
        return True
      watchdog.watch('compiling the training step', is_slow=True)
      fit = compiled_step(config, mesh, checkpoints)
      is_interrupted = interruption.is_requested
      batches = start_loader(
        config, dataset, mesh, seed=seeds.data, first_step=first_step, is_interrupted=is_interrupted
      )
      stack.push(functools.partial(_close_loader, batches, interruption))
      step_key = sharding.put_everywhere(seeds.steps, mesh)
      profile = Profile(mirror.folder / TENSORBOARD, profile_steps)
      stack.callback(profile.close)
      run = Run(
        fit.step,
        step_key,
        batches,
        checkpoints,
        report,
        mirror,
        profile,
        watchdog,
        interruption,
      )
      with (
        memory.exhaustion_as_failure(fit, mesh.size),
        _listing_non_finite_batch(config, mirror, dataset, seeds, watchdog),
        jax.transfer_guard('disallow'),
      ):
        finished = loop(config, run, state, first_step)
      if finished:
        tell_end(config.num_steps, workdir)
      return finished


def _workdir_errors_as_user_errors(
  workdir: Path,
) -> contextlib.AbstractContextManager[None]:
  return os_errors_as_user_errors(
    f'--workdir={workdir} cannot be written',
    f'{BUCKET_REMEDY if is_remote(workdir) else "make room there"}, or give another one.',
  )


@contextlib.contextmanager
def _listing_non_finite_batch(
  config: Config, mirror: Mirror, dataset: Mixture, seeds: Seeds, watchdog: Watchdog
) -> Iterator[None]:
  """Lists the batch of a loss that is not finite; after any end, watches the closing of the run."""
  try:
    yield
  except NonFiniteLoss as error:
    _log.warning(str(error))
    watchdog.watch('listing the pairs of the batch', is_slow=True)
    listed = non_finite_batch.write(
      mirror, config, dataset, error.step, data_seed=seeds.data, step_key=seeds.steps
    )
    raise NonFiniteLoss(f'{error} {listed}', error.step) from error
  finally:
    watchdog.watch('closing the run', is_slow=True)


class Run(NamedTuple):
  """What the loop works with."""

  step: Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
  step_key: jax.Array
  batches: Loader
  checkpoints: Checkpoints
  report: Report
  mirror: Mirror
  profile: Profile
  watchdog: Watchdog
  interruption: multihost.Interruption


def loop(config: Config, run: Run, state: TrainState, first_step: int) -> bool:
  """Takes the steps after `first_step`; returns whether the last one was reached."""
  previous = None
  for step in range(first_step + 1, config.num_steps + 1):
    asked = time.perf_counter()
    # The loader has a limit of its own, which only native code that holds the GIL can pass.
    run.watchdog.watch('loading a batch', least=config.data.stall_seconds + LOADER_SECONDS)
    try:
      frames = next(run.batches)
    except Interrupted:
      return _stop(config, run, step - 1, state, first_step)
    run.watchdog.watch(f'step {step}', is_slow=previous is None)
    run.report.batch_arrived(asked)
    run.profile.before(step, previous)
    state, metrics = run.step(state, frames, run.step_key)
    # At most two steps are queued, so that memory and signals are not held up.
    jax.block_until_ready(previous or metrics)
    run.profile.after(step, metrics)
    run.report.after_step(step, metrics)
    if previous is None:
      run.report.compiled(step)
    previous = metrics
    # Before the checkpoint, so that a run which resumes after it lacks no score.
    if config.score_every and (step % config.score_every == 0 or step == config.num_steps):
      _score(config, run, step, state)
    if step == config.num_steps:
      _save_last(run, step, state)
    elif run.interruption.is_due(step):
      return _stop(config, run, step, state, first_step)
    elif run.checkpoints.is_due(step):
      run.report.check_finite()
      run.watchdog.watch(f'the checkpoint of step {step}', is_slow=True)
      run.mirror.push()  # The lines up to a step are there before its checkpoint.
      run.checkpoints.save(step, state, run.report.losses)
  return True


def _stop(config: Config, run: Run, step: int, state: TrainState, first_step: int) -> bool:
  """Saves the state when a signal came; returns that the last step was not reached."""
  name = run.interruption.signal_name
  if step > first_step:
    _save_last(run, step, state)
  _log.info(
    f'{name}: saved at step {step} of {config.num_steps}; the same command resumes from there'
    if step
    else f'{name}: no step was made; the same command starts again'
  )
  return False


def _score(config: Config, run: Run, step: int, state: TrainState) -> None:
  run.watchdog.watch(f'the scores of step {step}', is_slow=True)
  params = sharding.gather(state.params)
  if jax.process_index() == 0:
    weights = Weights(params, step, config.model, config.objective, run.checkpoints.description)
    with run.report.paused(), jax.transfer_guard('allow'):
      run.report.write_scores(step, scores.take(scores.parse_names(config.scores), weights))
  with jax.transfer_guard('allow'):
    multihost.wait_for_all('scores')


def _save_last(run: Run, step: int, state: TrainState) -> None:
  run.report.check_finite()
  run.watchdog.watch(f'the checkpoint of step {step}', is_slow=True)
  run.mirror.push()
  run.checkpoints.finish(step, state, run.report.losses)


def open_dataset(config: Config, workdir: Path, *, allow_changes: bool) -> Mixture:
  """Opens the dataset, once all processes are there and agree on the run."""
  facts = {
    'code version': multihost.code_version(),
    'config': repr(dataclasses.replace(config, data_dir='')),
    '--workdir': str(absolute(workdir)),
    '--allow_changes': str(allow_changes),
  }
  with multihost.failing_together():
    scores.parse_names(config.scores)
    dataset = open_mixture(config.data_dir, config.dataset, config.split)
    with _workdir_errors_as_user_errors(workdir):
      check_bucket(workdir)
  multihost.agree({**facts, 'dataset': dataset.fingerprint})
  return dataset


def read_initial_params(config: Config, workdir: Path) -> init_from.InitialParams | None:
  """Reads `config.init_from`, if the workdir has no checkpoint to resume from."""
  with multihost.failing_together():
    with _workdir_errors_as_user_errors(workdir), client_errors_as_os_errors(workdir):
      stored = (workdir / FOLDER).glob('*')
      resumes = any(each.name.isdecimal() for each in stored)
    return None if resumes or not config.init_from else _read_init_from(config)


def _read_init_from(config: Config) -> init_from.InitialParams:
  path = user_path(config.init_from)
  what = f'config.init_from={path}'
  try:
    with os_errors_as_user_errors(f'{what} cannot be read', 'give another one.'):
      return init_from.read(path, config.model)
  except UserError as error:
    message = str(error)
    raise UserError(message if message.startswith(what) else f'{what}: {message}') from error


def make_mesh(config: Config) -> Mesh:
  """Arranges all devices; raises UserError if the config does not fit them."""
  try:
    return sharding.make_mesh(options=config.mesh)
  except ValueError as error:
    raise UserError(f'config: {error}') from error


def enable_compilation_cache(workdir: Path) -> None:
  """Keeps compiled programs in the folder `compiled` of a run, which may be resumed.

  Compiling takes minutes on GPUs and TPUs. And the compiler of GPUs chooses among kernels by timing
  them, so that a second compilation may round otherwise. Programs of CPUs are not kept, as the
  next CPU may have other instructions; nor any where JAX has been told of another place, as by
  JAX_COMPILATION_CACHE_DIR.
  """
  if jax.default_backend() != 'cpu' and jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(workdir / 'compiled'))


def open_checkpoints(config: Config, workdir: Path, dataset: Mixture) -> Checkpoints:
  """Opens the checkpoints of a run; all processes agree on which is the newest."""
  description = describe(
    config.model,
    config.objective,
    frame_gap=config.data.frame_gap,
    steps_per_epoch=optimizer.steps_per_epoch(config, len(dataset)),
    data_fingerprint=dataset.fingerprint,
    seed_version=SEED_VERSION,
    config=dataclasses.asdict(config),
  )
  checkpoints = Checkpoints(workdir, config.checkpoint, description)
  multihost.agree({'newest checkpoint in --workdir': str(checkpoints.latest_step)})
  return checkpoints


def first_state(
  config: Config,
  workdir: Path,
  model: Model,
  checkpoints: Checkpoints,
  *,
  key: jax.Array,
  allow_changes: bool,
  initial: init_from.InitialParams | None,
) -> tuple[TrainState, list[str]]:
  """Returns the state to start or resume from, and lines that say where it comes from.

  Raises:
    UserError: the checkpoint is of another run, and changes are not allowed.
  """
  if checkpoints.latest_step is None:
    notes = optimizer.warnings_of_schedule(config, {}, 0)
    if not config.init_from:
      return model.init(key), notes
    # It was not read where a folder looks like a checkpoint and is none.
    initial = initial or _read_init_from(config)
    # Of a run that is training, processes could find different checkpoints.
    multihost.agree(
      {f'the weights of config.init_from={config.init_from}': initial.digest()},
      'give one step of that run (DIR/checkpoints/STEP), and the same file on each machine',
    )
    state = model.init(key)
    params = init_from.replace(state.params, initial.params)
    return state.replace(params=params), initial.report + notes
  state, notes = checkpoints.restore(model.abstract_state)
  changes = checkpoints.changes()
  refused = [f'{name}: {change}' for name, change in changes.items() if not may_change(name)]
  if refused and not allow_changes:
    raise UserError(
      f'--workdir={workdir} holds another run ({", ".join(refused)}); give its dataset and config'
      ' again, or another --workdir, or --allow_changes to resume from it all the same.'
    )
  step = checkpoints.latest_step
  notes.append(
    f'resuming after step {step} of {config.num_steps}'
    if step < config.num_steps
    else f'step {step} is done, so nothing is left to do for config.num_steps={config.num_steps};'
    ' give more steps to train on'
  )
  notes += [f'changed since that checkpoint: {name}: {text}' for name, text in changes.items()]
  if 'init_from' in changes:
    notes.append(f'config.init_from is not read, because {workdir} has a checkpoint of its own')
  if step < config.num_steps:
    stored = checkpoints.stored_description().get('config', {})
    notes += optimizer.warnings_of_schedule(config, stored, step)
  return state, notes


def compiled_step(config: Config, mesh: Mesh, checkpoints: Checkpoints) -> memory.Fit:
  """Compiles the step, and holds what it needs against the memory of the devices.

  Raises:
    UserError: it does not fit; names what does.
  """
  _log.info('compiling the training step')
  limit = memory.device_limit(jax.local_devices()[0])
  limit = json.loads(multihost.text_of_first(json.dumps(limit)))
  devices = list(mesh.devices.flat)
  here = f'{mesh.size} x {devices[0].device_kind}'
  stored = checkpoints.stored_description().get(MICRO_BATCHES) if checkpoints.latest_step else None
  same = stored if stored and stored['devices'] == here else None
  if same and config.batch_size % (mesh.size * same['number']):  # The batch was changed.
    same = None
  fit = memory.fitting_step(config, devices, limit, stored=same and same['number'])
  if limit is not None:
    _log.info(f'it needs {fit.needed / 1e9:.2f} GB of each device; {limit / 1e9:.2f} GB are there')
  if not config.accumulation_steps:
    chosen = {'number': fit.config.accumulation_steps, 'devices': here}
    checkpoints.description = {**checkpoints.description, MICRO_BATCHES: chosen}
    why = ', as they do not tell how much memory they have' if limit is None else ''
    before = f' (before: {stored["number"]} on {stored["devices"]})' if stored and not same else ''
    _log.info(f'accumulation_steps=auto is {chosen["number"]} on {here}{why}{before}')
  return fit


def write_config(config: Config, folder: pathlib.Path) -> None:
  """Writes config.json, which may be given as --config, as the user gave this one."""
  if jax.process_index() == 0:
    path = folder / 'config.json'
    partial = path.with_suffix('.partial')
    partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + '\n')
    partial.replace(path)


def tell_end(step: int, workdir: Path) -> None:
  """Logs where the results of a finished run are, and what may be done with them."""
  run = shlex.quote(str(workdir))
  for line in (
    f'done: {step} steps',
    f'  {workdir}/{FOLDER}/{step}: weights and optimizer state',
    f'  {workdir}/metrics.jsonl, {TENSORBOARD}/, log.txt: losses, rates and scores',
    'next:',
    f'  dropmae-figures --checkpoint={run} --video=CLIP.mp4 --output=figure.png',
    f'  dropmae-convert --checkpoint={run} --output=dropmae.pth',
    f'  dropmae-evaluate davis --checkpoint={run} --root=DAVIS --output=scores',
  ):
    _log.info(line)


def open_report(
  config: Config, folder: pathlib.Path, first_step: int, checkpoints: Checkpoints
) -> Report:
  """Opens log.txt, metrics.jsonl and the like."""
  return Report(
    folder,
    first_step=first_step,
    num_steps=config.num_steps,
    batch_size=config.batch_size,
    log_every=config.log_every,
    losses=checkpoints.stored_description().get('losses', ()) if first_step else (),
    plateau=PLATEAU if config.objective == Objective() else None,
  )


def description_of(config: Config, dataset: Mixture, mesh: Mesh, state: TrainState) -> list[str]:
  """Returns the first lines of the log: sizes of model, data and machine, and the schedule."""
  lines = [
    f'{mae.num_parameters(state.params) / 1e6:.1f} M parameters, {len(dataset)} videos,'
    f' {optimizer.steps_per_epoch(config, len(dataset))} steps per epoch,'
    f' {mesh.size} x {jax.devices()[0].device_kind}',
    optimizer.describe_schedule(config, len(dataset)),
  ]
  if len(dataset) < config.batch_size:
    lines.append(
      f'a batch of {config.batch_size} pairs takes more than all {len(dataset)} videos, so every'
      ' step counts as one epoch'
    )
  return lines


def start_loader(
  config: Config,
  dataset: Mixture,
  mesh: Mesh,
  *,
  seed: int,
  first_step: int,
  is_interrupted: Callable[[], bool],
) -> Loader:
  """Starts the loader of this process's share of every batch."""
  damaged = frame_pairs.DamagedRecords(config.data.max_damaged_records)

  return frame_pairs.pair_batches(
    dataset,
    config.data,
    image_size=config.model.image_size,
    batch_size=config.batch_size,
    seed=seed,
    first_step=first_step,
    host=jax.process_index(),
    num_hosts=jax.process_count(),
    report_damaged=damaged.add,
    move=lambda batch: sharding.to_devices(batch.frames, mesh),
    is_interrupted=is_interrupted,
  )


def _close_loader(
  batches: Loader,
  interruption: multihost.Interruption,
  _: Any,
  error: BaseException | None,
  __: Any,
) -> None:
  try:
    batches.close()
  except LoaderStalled as stalled:
    # Otherwise the error, or that a signal stopped the run, is what the user has to know.
    if error is None and not interruption.is_requested():
      raise
    _log.warning(str(stalled))
