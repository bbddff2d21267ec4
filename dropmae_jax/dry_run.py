"""What a run would need, before it starts: `dropmae-train --dry_run`. Nothing is written."""

import dataclasses
import json
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from dropmae_jax import memory, memory_estimate, optimizer, sharding
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Config
from dropmae_jax.data.mixture import open_mixture
from dropmae_jax.model import flops, mae
from dropmae_jax.runtime import targets
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.runtime.paths import Path, client_errors_as_os_errors, is_folder

# Of the published runs, by their logs; of the second one the fewest that it can have had.
PUBLISHED_VIDEOS = {
  'kinetics_frames/kinetics400': 241_553,
  'kinetics_frames/kinetics700': 526_336,
}


class Devices(NamedTuple):
  """Those that the run is meant for.

  Attributes:
    kind: their name.
    number: of them.
    memory: bytes of one that programs get; None if it does not tell.
    platform: 'gpu', 'tpu' or 'cpu'.
    target: as the user named them; empty for those of this machine.
  """

  kind: str
  number: int
  memory: float | None
  platform: str
  target: str


def lines(
  config: Config,
  *,
  workdir: Path | None = None,
  target: str = '',
  compiles: bool = False,
  num_videos: int | None = None,
  pairs_per_second: float | None = None,
) -> Iterator[str]:
  """Yields what a run needs, line by line.

  Args:
    config: of the run.
    workdir: of the run; its metrics.jsonl tells the speed, its checkpoints the steps that are done.
    target: devices that are not here, as `targets.parse` reads them.
    compiles: memory is read from the compiled step, rather than estimated.
    num_videos: of the dataset, if it is not here.
    pairs_per_second: of all devices together.

  Raises:
    UserError: the batch does not fit the number of devices, or their compiler is not installed.
  """
  devices = devices_of(target)
  if not config.accumulation_steps:
    config = _with_micro_batches(config, devices)
  check_batch(config, devices.number)
  _, params = mae.abstract_model(config.model)
  num_parameters = mae.num_parameters(params)
  of_decoder = mae.num_parameters({k: v for k, v in params.items() if is_of_decoder(k)})
  yield _line(
    'parameters',
    f'{num_parameters:,}: encoder {num_parameters - of_decoder:,}, decoder {of_decoder:,}',
  )
  per_pair = flops.step(config.model, config.objective.mask_ratio)
  yield _line('FLOPs', f'{per_pair / 1e9:.4g} GFLOP a pair, forward and backward, by formula')
  yield _line('devices', f'{devices.number} x {devices.kind}')
  micro_batch = config.batch_size // devices.number // config.accumulation_steps
  yield _line(
    'batch',
    f'{config.batch_size} pairs: {config.accumulation_steps} micro-batches of {micro_batch} on each'
    ' device',
  )
  yield _line('memory', _memory(config, devices, compiles))
  videos, found = _videos(config, num_videos)
  yield _line('dataset', f'{config.dataset}, {found}')
  if videos:
    config = optimizer.resolve_schedule(config, videos)
    yield _line('schedule', optimizer.describe_schedule(config, videos))
  elif config.num_epochs:
    yield _line('schedule', f'{config.num_epochs:g} epochs; give --num_videos=N to count the steps')
    return
  else:
    yield _line('schedule', f'{config.num_steps} steps')
  yield _line('checkpoints', _checkpoints(config, num_parameters))
  yield _line('time', _time(config, workdir, pairs_per_second, per_pair, devices))


def is_of_decoder(name: str) -> bool:
  """Returns whether an entry of the parameters belongs to the decoder."""
  return 'decoder' in name or name == 'mask_token'


def _line(name: str, text: str) -> str:
  return f'{name:<12} {text}'


def devices_of(target: str) -> Devices:
  """Returns the devices that a word names, or for an empty one those of this machine."""
  if target:
    kind, number = targets.parse(target)
    return Devices(
      f'device of --target={target}', number, kind.usable_memory, kind.platform, target
    )
  first = jax.devices()[0]
  limit = memory.device_limit(first)
  return Devices(first.device_kind, len(jax.devices()), limit, first.platform, '')


def check_batch(config: Config, number: int) -> None:
  """Raises a UserError if the batch or the mesh does not fit so many devices."""
  try:
    mesh = AbstractMesh(sharding.mesh_shape(number, config.mesh), sharding.AXES)
    sharding.check_batch(config.batch_size, config.accumulation_steps, mesh)
  except ValueError as error:
    raise UserError(f'config: {error}') from error


def _memory(config: Config, devices: Devices, compiles: bool) -> str:
  """Describes what the step takes on a device, with the batches that are prefetched."""
  if compiles:
    places = targets.devices(devices.target) if devices.target else jax.devices()
    options = targets.GPU_OPTIONS if devices.target and devices.platform == 'gpu' else None
    needed, how = memory.compile_step(config, places, options).needed, 'by the compiler'
    if needed == float('inf'):
      return 'DOES NOT FIT: the compiler refuses the step for lack of memory'
  else:
    needed, how = _estimate(config, devices), 'estimated'
    if needed is None:
      return 'not estimated, as it is for GPUs with remat=none or full; give --dry_run=compile'
    needed += memory.prefetched(config, devices.number)
  text = f'{needed / 1e9:.2f} GB on each device, {how}'
  if devices.memory is None:
    return text
  verdict = 'fits' if needed < devices.memory else 'DOES NOT FIT'
  return f'{text}; {verdict}: a program gets {devices.memory / 1e9:.1f} GB'


def _estimate(config: Config, devices: Devices) -> float | None:
  is_known = devices.platform == 'gpu'
  return memory_estimate.estimate(config, devices.number) if is_known else None


def _with_micro_batches(config: Config, devices: Devices) -> Config:
  """Chooses the fewest micro-batches that fit by the estimate; one if there is none."""
  one = dataclasses.replace(config, accumulation_steps=1)
  for number in (1, *memory.more_micro_batches(one, devices.number)):
    tried = dataclasses.replace(config, accumulation_steps=number)
    needed = _estimate(tried, devices)
    if needed is None or devices.memory is None:
      return one
    if needed + memory.prefetched(tried, devices.number) < devices.memory:
      return tried
  return one


def _videos(config: Config, num_videos: int | None) -> tuple[int | None, str]:
  """Returns the number of videos, None if unknown, and a text on it."""
  if num_videos:
    return num_videos, f'{num_videos:,} videos (--num_videos)'
  try:
    dataset = open_mixture(config.data_dir, config.dataset, config.split)
  except UserError as error:
    published = PUBLISHED_VIDEOS.get(config.dataset)
    if published and config.split == 'train':
      return published, f'not here; the published run had {published:,} videos'
    return None, f'not here: {error}'
  return len(dataset), f'{len(dataset):,} videos, fingerprint {dataset.fingerprint}'


def _checkpoints(config: Config, num_parameters: int) -> str:
  """Describes their size: float32 parameters and two moments."""
  size, options = 3 * 4 * num_parameters, config.checkpoint
  kept = options.keep_last
  if options.keep_every:
    kept += config.num_steps // options.keep_every
  kept = min(kept, -(-config.num_steps // options.every_steps))
  return f'{size / 1e9:.3g} GB each, at most {kept} are kept: {kept * size / 1e9:.3g} GB'


def _time(
  config: Config,
  workdir: Path | None,
  pairs_per_second: float | None,
  per_pair: float,
  devices: Devices,
) -> str:
  """Describes the hours that are left at a stated or measured speed."""
  done = 0
  if workdir and is_folder(workdir / saved_weights.FOLDER):
    names = [each.name for each in (workdir / saved_weights.FOLDER).iterdir()]
    done = max((int(name) for name in names if name.isdecimal()), default=0)
  pairs = max(config.num_steps - done, 0) * config.batch_size
  measured = _measured(workdir) if workdir and not pairs_per_second else None
  speed = pairs_per_second or measured
  if not speed:
    return (
      f'{pairs:,} pairs, {pairs * per_pair:.3g} FLOP; give --pairs_per_second=N for the hours, or a'
      ' --workdir that has measured it'
    )
  how = '--pairs_per_second' if pairs_per_second else f'the median in {workdir}'
  after = f' after step {done}' if done else ''
  return f'{pairs / speed / 3600:.4g} hours{after}, at {speed:,.4g} pairs/s ({how})'


def _measured(workdir: Path) -> float | None:
  """Returns the median speed of the lines of metrics.jsonl; None if there are none."""
  path = workdir / 'metrics.jsonl'
  try:
    with client_errors_as_os_errors(path):
      rows = [json.loads(line) for line in path.read_text().splitlines()]
    speeds = [row['pairs_per_second'] for row in rows if 'pairs_per_second' in row]
  except (OSError, ValueError):
    return None
  return statistics.median(speeds) if speeds else None
