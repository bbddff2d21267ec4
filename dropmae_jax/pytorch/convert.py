"""Checkpoints of ours to the field's files of weights and back, verified by running both."""

import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from dropmae_jax import optimizer
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.checkpoints.saved_weights import Weights
from dropmae_jax.config import Architecture, Objective, OptimizerOptions
from dropmae_jax.pytorch import (
  adamw_state,
  file_checks,
  file_metadata,
  import_model,
  layouts,
  torch_clients,
  weight_files,
)
from dropmae_jax.pytorch.adamw_state import TorchAdamW
from dropmae_jax.runtime import atomic_file
from dropmae_jax.runtime.errors import UserError

# Models of other patches fit no program of the field, so they keep the tables they have.
PUBLISHED_PATCH_SIZES = (14, 16)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """How a checkpoint is written.

  Attributes:
    layout: one of `torch_export.LAYOUTS`.
    file_format: one of `file_checks.FORMATS`; None takes it from the file's ending.
    with_optimizer: write AdamW's moments too; full layout in a .pth only.
    verify: compare the written file with the checkpoint; None does so where PyTorch is installed.
    image_size: resample the position tables to this resolution; None leaves them as they are,
      or gives those of 224 pixels to a model that was trained at another resolution.
  """

  layout: str = 'full'
  file_format: str | None = None
  with_optimizer: bool = False
  verify: bool | None = None
  image_size: int | None = None


def export(
  folder: pathlib.Path, path: pathlib.Path, options: ExportOptions, *, step: int | None = None
) -> Iterator[str]:
  """Writes a checkpoint as a file of weights, with its sha256 and card; yields lines of progress.

  Raises:
    UserError: there is no such checkpoint, the options do not fit one another, or the file cannot
      be written or is not what the checkpoint is; then nothing is written.
  """
  file_format = _checked_format(path, options)
  atomic_file.check_file(path)
  weights = saved_weights.load_weights(folder, step=step, with_moments=options.with_optimizer)
  state = layouts.to_torch(weights.params, weights.architecture)
  state, architecture = _at_resolution(state, weights.architecture, options.image_size)
  if architecture.image_size != weights.architecture.image_size:
    yield f'position tables: of {architecture.image_size} pixels' + (
      f' (trained at {weights.architecture.image_size})'
    )
  tensors = layouts.in_layout(state, options.layout)
  card = _card(weights, architecture, options.layout, file_format)
  entries = {}
  if file_format == 'safetensors':
    entries = {name: card[name] for name in ('layout', 'epoch', 'args', 'versions')}
  elif options.layout == 'full':
    entries = {name: card[name] for name in ('epoch', 'args') if card[name] is not None}
    if options.with_optimizer:
      entries['optimizer'] = _optimizer_state(weights)
  num_bytes = sum(array.nbytes for array in tensors.values()) * (3 if options.with_optimizer else 1)
  with atomic_file.staged(path, num_bytes=num_bytes) as partial:
    key = '' if options.layout == 'timm' else 'model'
    weight_files.write(partial, tensors, file_format=file_format, key=key, entries=entries)
    written = weight_files.read(partial).tensors
    layouts.check_shapes(written, layouts.tensor_shapes(architecture, options.layout), architecture)
    changed = [name for name in tensors if not np.array_equal(written[name], tensors[name])]
    if changed:
      raise UserError(f'--output={path} does not read back as written, in {changed[0]}; try again.')
    params = weights.params | {name: state[name] for name in layouts.POSITION_TABLES}
    difference = yield from _verified(written, params, architecture, options.layout, options.verify)
    atomic_file.write_card(partial, card | {'largest_relative_difference': difference})
  yield f'{path}: {len(tensors)} tensors of step {weights.step}, layout {options.layout}'
  fresh = [
    name for name in weights.description.get('source', {}).get('fresh', []) if name in tensors
  ]
  if fresh:
    yield f'Note: {len(fresh)} of them are fresh: what was read in had none ({fresh[0]}, ...)'
  if options.with_optimizer and 'epoch' not in entries:
    yield 'Note: its epoch is unknown, and without one the published code takes the weights alone'
  yield from torch_clients.closing_lines(
    path, architecture, layout=options.layout, file_format=file_format
  )


def import_(
  path: pathlib.Path,
  folder: pathlib.Path,
  *,
  size: str | None = None,
  with_optimizer: bool = False,
  verify: bool | None = None,
  image_size: int | None = None,
) -> Iterator[str]:
  """Makes a checkpoint of ours from any file of the field; yields lines of progress.

  Raises:
    UserError: the file cannot be read or fits no model of ours; then nothing is written.
  """
  atomic_file.check_folder(folder)
  file = weight_files.read(path)
  yield file.wholeness
  model = import_model.read_model(file, size=size)
  state, architecture = model.state, model.architecture
  yield from model.report
  import_model.check_finite(state, str(path))
  if image_size not in (None, architecture.image_size):
    yield f'position tables: resampled from {architecture.image_size} to {image_size} pixels'
    state, architecture = _at_resolution(state, architecture, image_size)
  arguments = file_metadata.read(file.entries)
  step, known, adamw = arguments.step, dict(arguments.kept), None
  if with_optimizer:
    if 'optimizer' not in file.entries:
      raise UserError(f'{path} holds no optimizer state; leave --with_optimizer out.')
    adamw = adamw_state.from_torch(file.entries['optimizer'], architecture)
    step = adamw.moments.count
    known['optimizer_groups'] = adamw.groups
  if model.fresh or not arguments.is_ours:
    fresh = [*known.get('source', {}).get('fresh', []), *model.fresh]
    known['source'] = {'file': path.name, 'fresh': list(dict.fromkeys(fresh))}
  description = saved_weights.describe(architecture, Objective(), **known)
  description['objective'] = arguments.objective
  params = layouts.from_torch(state, architecture)
  yield from _verified(state, params, architecture, 'full', verify)
  moments = adamw.moments if adamw is not None else None
  saved_weights.save_weights(folder, params, step, description, moments=moments)
  yield f'{folder}: a checkpoint of step {step}' + (' with optimizer state' if adamw else '')


def _checked_format(path: pathlib.Path, options: ExportOptions) -> str:
  file_format = options.file_format or file_checks.format_of(path)
  if file_format != file_checks.ENDINGS.get(path.suffix, file_format):
    raise UserError(
      f'--output={path} and --format={file_format} do not go together: loaders tell the format by'
      ' the ending; let .safetensors end files of that format, and no other.'
    )
  if options.with_optimizer and (options.layout, file_format) != ('full', 'pth'):
    raise UserError(
      f'--with_optimizer goes with --layout=full and --format=pth, not with'
      f' {options.layout} and {file_format}; leave it out.'
    )
  if file_format == 'pth':
    weight_files.torch_or_refuse()
  return file_format


def _at_resolution(
  state: dict[str, np.ndarray], architecture: Architecture, image_size: int | None
) -> tuple[dict[str, np.ndarray], Architecture]:
  if image_size is not None:
    try:
      return layouts.at_resolution(state, architecture, image_size)
    except ValueError as error:
      raise UserError(f'--image_size={image_size}: {error}') from error
  is_published = architecture.image_size == layouts.PUBLISHED_IMAGE_SIZE
  if is_published or architecture.patch_size not in PUBLISHED_PATCH_SIZES:
    return state, architecture
  return layouts.at_published_resolution(state, architecture)


def _optimizer_state(weights: Weights) -> dict[str, Any]:
  """Returns AdamW's state with the options it was read with, or those of the run's config."""
  groups = weights.description.get('optimizer_groups')
  if groups is None:
    config = weights.description['config']
    options = OptimizerOptions(**config['optimizer'])
    schedule = optimizer.learning_rate(
      peak=options.base_learning_rate * config['batch_size'] / 256,
      floor=options.min_learning_rate,
      warmup_steps=options.warmup_steps,
      num_steps=config['num_steps'],
    )
    groups = adamw_state.group_options(
      learning_rate=float(schedule(weights.step)),
      beta1=options.beta1,
      beta2=options.beta2,
      weight_decay=options.weight_decay,
    )
  return adamw_state.to_torch(TorchAdamW(weights.moments, groups), weights.architecture)


def _card(
  weights: Weights, architecture: Architecture, layout: str, file_format: str
) -> dict[str, Any]:
  """Returns what the json beside a file says of it, but for the file itself."""
  description = weights.description
  epoch = description.get('epoch')
  if epoch is None and 'steps_per_epoch' in description:
    # As published: the number, from 0, of the last epoch that is done.
    epoch = weights.step // description['steps_per_epoch'] - 1
  shape = dataclasses.asdict(architecture)
  return {
    'layout': layout,
    'format': file_format,
    'step': weights.step,
    'epoch': epoch,
    'normalised_targets': description['objective']['normalise_targets'],
    'data_fingerprint': description.get('data_fingerprint'),
    'args': {**description, 'architecture': shape, 'step': weights.step},
    'versions': _versions(),
  }


def _versions() -> dict[str, str]:
  names = ('dropmae_jax', 'jax', 'flax', 'numpy', 'safetensors', 'torch')
  installed = {each.metadata['Name'] for each in importlib.metadata.distributions()}
  return {name: importlib.metadata.version(name) for name in names if name in installed}


def _verified(
  tensors: dict[str, np.ndarray],
  params: dict,
  architecture: Architecture,
  layout: str,
  verify: bool | None,
) -> Iterator[str]:
  """Compares tensors with parameters through both networks; returns the difference, or None."""
  if verify is False:
    yield 'not verified: --no-verify'
    return None
  fault = weight_files.torch_fault()
  if fault and verify:
    raise UserError(f'{fault}, and --verify runs the network in it; leave --verify out.')
  if fault:
    yield f'not verified: {fault}'
    return None
  from dropmae_jax.pytorch import reference

  difference = reference.largest_difference(tensors, params, architecture, layout)
  tolerance, reason = reference.TOLERANCE, ''
  if difference > tolerance:
    rounding = reference.rounding(tensors, architecture)
    tolerance = reference.tolerance_of(rounding)
    reason = f'; rounding alone makes {rounding:.1e} of these weights'
  if not difference <= tolerance:
    raise UserError(
      f'the network gives features in PyTorch that differ by {difference:.2g} (relative; at most'
      f' {tolerance:.0e}) from those in JAX, so nothing is written; please report this, or give'
      ' --no-verify.'
    )
  yield f'verified: features in PyTorch and in JAX differ by {difference:.1e} (relative){reason}'
  return difference
