"""Exports checkpoints as PyTorch weight files and imports them, verified by running both models."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from dropmae_jax import optimizer
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.checkpoints.saved_weights import Weights
from dropmae_jax.config import Architecture, Objective, OptimizerOptions
from dropmae_jax.pytorch import (
  adamw_state,
  file_metadata,
  import_model,
  layouts,
  trackers,
  weight_files,
)
from dropmae_jax.pytorch.adamw_state import TorchAdamW
from dropmae_jax.runtime import atomic_file
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.runtime.paths import Path

# No published program has models of other patch sizes, so those keep the tables they have.
PUBLISHED_PATCH_SIZES = (14, 16)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """How a checkpoint is written.

  Attributes:
    layout: one of `layouts.LAYOUTS`.
    file_format: one of `weight_files.FORMATS`; None takes it from the file's ending.
    with_optimizer: write AdamW's moments too; only in the full layout and a .pth.
    verify: run the written network in PyTorch and compare; None does so if PyTorch is installed.
    image_size: in pixels; resample the position tables to this resolution. None keeps them for a
      model of 224 pixels and writes those for 224 pixels for any other.
    fold_identities: sizes in pixels of the template and search images of a tracker, to write what
      `trackers.fold_identities` returns; only in the encoder layout and a .pth.
  """

  layout: str = 'full'
  file_format: str | None = None
  with_optimizer: bool = False
  verify: bool | None = None
  image_size: int | None = None
  fold_identities: tuple[int, int] | None = None


def export(
  folder: Path, path: Path, options: ExportOptions, *, step: int | None = None
) -> Iterator[str]:
  """Writes a checkpoint as a file of weights, with its .sha256 and .json; yields progress lines.

  Args:
    folder: the workdir of a run.
    path: the file to write.
    options: how it is written.
    step: which checkpoint; the newest by default.

  Raises:
    UserError: there is no such checkpoint, the options contradict each other, the file cannot be
      written, or it does not reproduce the checkpoint; then nothing is written.
  """
  file_format = _checked_format(path, options)
  atomic_file.check_file(path)
  weights = saved_weights.load_weights(folder, step=step, with_moments=options.with_optimizer)
  state = layouts.to_torch(weights.params, weights.architecture)
  state, architecture = _at_resolution(state, weights.architecture, options.image_size)
  if architecture.image_size != weights.architecture.image_size:
    yield (
      f'position tables: for {architecture.image_size} pixels'
      f' (trained at {weights.architecture.image_size})'
    )
  tensors = unfolded = layouts.in_layout(state, options.layout)
  shapes = layouts.tensor_shapes(architecture, options.layout)
  key = '' if options.layout == 'timm' else 'model'
  card = _card(weights, architecture, options.layout, file_format)
  if options.fold_identities:
    tensors, key = trackers.fold_identities(unfolded, options.fold_identities), 'net'
    shapes = {name: array.shape for name, array in tensors.items()}
    card['fold_identities'] = options.fold_identities
  entries = {}
  if file_format == 'safetensors':
    entries = {name: card[name] for name in ('layout', 'epoch', 'args', 'versions')}
  elif options.layout == 'full':
    entries = {name: card[name] for name in ('epoch', 'args') if card[name] is not None}
    if options.with_optimizer:
      entries['optimizer'] = _optimizer_state(weights)
  num_bytes = sum(array.nbytes for array in tensors.values()) * (3 if options.with_optimizer else 1)
  with atomic_file.staged(path, num_bytes=num_bytes) as partial:
    weight_files.write(partial, tensors, file_format=file_format, key=key, entries=entries)
    written = weight_files.read(partial).tensors
    layouts.check_shapes(written, shapes, architecture)
    changed = [name for name in tensors if not np.array_equal(written[name], tensors[name])]
    if changed:
      raise UserError(
        f'--output={path} does not read back as written, first in {changed[0]}; try again.'
      )
    params = weights.params | {name: state[name] for name in layouts.POSITION_TABLES}
    network = unfolded if options.fold_identities else written  # No network of ours is folded.
    difference = yield from _verified(network, params, architecture, options.layout, options.verify)
    atomic_file.write_card(partial, card | {'largest_relative_difference': difference})
  yield f'{path}: {len(tensors)} tensors of step {weights.step}, layout {options.layout}'
  yield from _notes(weights, unfolded, entries, options)
  yield from trackers.name_warnings(path, is_folded=bool(options.fold_identities))


def _notes(
  weights: Weights,
  tensors: dict[str, np.ndarray],
  entries: dict[str, Any],
  options: ExportOptions,
) -> Iterator[str]:
  """Yields what to know of a file that was written."""
  fresh = [
    name for name in weights.description.get('source', {}).get('fresh', []) if name in tensors
  ]
  if fresh:
    yield (
      f'Note: {len(fresh)} of them were newly initialised, because the imported file did not have'
      f' them ({fresh[0]}, ...)'
    )
  if options.with_optimizer and 'epoch' not in entries:
    yield 'Note: its epoch is unknown; the published code then resumes from the weights alone'
  yield (
    'See docs/convert.md for the missing and unexpected keys that each program prints for this'
    ' layout; they are expected.'
  )


def import_(
  path: Path,
  folder: Path,
  *,
  size: str | None = None,
  with_optimizer: bool = False,
  verify: bool | None = None,
  image_size: int | None = None,
) -> Iterator[str]:
  """Makes a checkpoint from any weight file that `import_model` reads; yields progress lines.

  Args:
    path: the weight file.
    folder: the workdir to write to.
    size: a row of `vit.SIZES`; needed only if the shapes do not tell it.
    with_optimizer: take AdamW's moments too.
    verify: as in `ExportOptions`.
    image_size: in pixels; resample the position tables to this resolution.

  Raises:
    UserError: the file cannot be read or fits no model; then nothing is written.
  """
  atomic_file.check_folder(folder)
  file = weight_files.read(path)
  yield file.integrity
  model = import_model.read_model(file, size=size)
  state, architecture = model.state, model.architecture
  yield from [*model.report, *model.changes]
  import_model.check_finite(state, str(path))
  if image_size not in (None, architecture.image_size):
    yield f'position tables: resampled from {architecture.image_size} to {image_size} pixels'
    state, architecture = _at_resolution(state, architecture, image_size)
  metadata = file_metadata.read(file.entries)
  step, described, adamw = metadata.step, dict(metadata.description), None
  if with_optimizer:
    if 'optimizer' not in file.entries:
      raise UserError(f'{path} holds no optimizer state; leave --with_optimizer out.')
    adamw = adamw_state.from_torch(file.entries['optimizer'], architecture)
    step = adamw.moments.count
    described['optimizer_groups'] = adamw.groups
  if model.fresh or not metadata.is_ours:
    fresh = [*described.get('source', {}).get('fresh', []), *model.fresh]
    described['source'] = {'file': path.name, 'fresh': list(dict.fromkeys(fresh))}
  description = saved_weights.describe(architecture, Objective(), **described)
  description['objective'] = metadata.objective
  params = layouts.from_torch(state, architecture)
  yield from _verified(state, params, architecture, 'full', verify)
  moments = adamw.moments if adamw is not None else None
  saved_weights.save_weights(folder, params, step, description, moments=moments)
  yield f'{folder}: a checkpoint of step {step}' + (' with optimizer state' if adamw else '')


def _checked_format(path: Path, options: ExportOptions) -> str:
  file_format = options.file_format or weight_files.format_of(path)
  if file_format != weight_files.ENDINGS.get(path.suffix, file_format):
    raise UserError(
      f'--output={path} and --format={file_format} do not go together, because loaders tell the'
      ' format by the ending; use .safetensors for that format only.'
    )
  if options.with_optimizer and (options.layout, file_format) != ('full', 'pth'):
    raise UserError(
      f'--with_optimizer goes with --layout=full and --format=pth, not with'
      f' {options.layout} and {file_format}; leave it out.'
    )
  if options.fold_identities and (options.layout, file_format) != ('encoder', 'pth'):
    raise UserError(
      f'--fold_identities goes with --layout=encoder and --format=pth, not with'
      f' {options.layout} and {file_format}; leave it out.'
    )
  if file_format == 'pth':
    weight_files.import_torch()
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
  """Returns AdamW's state with the options of the imported file, or else of the run's config."""
  groups = weights.description.get('optimizer_groups')
  if groups is None:
    config = weights.description['config']
    options = OptimizerOptions(**config['optimizer'])
    rate = float(optimizer.schedule_of(config)(weights.step))
    groups = adamw_state.group_options(rate, options)
  return adamw_state.to_torch(TorchAdamW(weights.moments, groups), weights.architecture)


def _card(
  weights: Weights, architecture: Architecture, layout: str, file_format: str
) -> dict[str, Any]:
  """Returns what the .json beside a file says about its weights."""
  description = weights.description
  epochs = saved_weights.epochs(description, weights.step)
  # As in the published code: the last finished epoch, counted from 0. Rounded, as 1/3 + 2/3 is 1.
  epoch = None if epochs is None else math.floor(round(epochs, 6)) - 1
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
) -> Generator[str, None, float | None]:
  """Compares the outputs of the PyTorch and the JAX network; returns their largest difference.

  Returns None if it does not run them.
  """
  if verify is False:
    yield 'not verified: --no-verify'
    return None
  fault = weight_files.torch_fault()
  # A layout that was added to the table may have names of its own.
  missing = layouts.tensor_shapes(architecture, 'timm').keys() - tensors.keys()
  if missing and not fault:
    fault = f'layout {layout} has no {min(missing)}'
  if fault and verify:
    raise UserError(f'{fault}, so --verify cannot run the network; leave --verify out.')
  if fault:
    yield f'not verified: {fault}'
    return None
  from dropmae_jax.pytorch import reference

  difference = reference.largest_difference(tensors, params, architecture)
  yield reference.check_difference(difference, lambda: reference.rounding(tensors, architecture))
  return difference
