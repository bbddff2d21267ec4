"""First parameters of a run that come from another one, or from a PyTorch file of the field."""

import pathlib
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Architecture
from dropmae_jax.pytorch import import_model, layouts, weight_files
from dropmae_jax.runtime.errors import UserError


class WarmStart(NamedTuple):
  """What a run begins with, instead of what it would draw.

  Attributes:
    taken: parameters by their path in the pure parameter dict; numpy arrays.
    report: lines that say what was taken, what is drawn afresh, and what was resampled.
  """

  taken: dict[tuple[str | int, ...], np.ndarray]
  report: list[str]


def read(path: pathlib.Path, architecture: Architecture) -> WarmStart:
  """Reads the parameters that fit a model: its whole encoder, and its decoder where it is there.

  Position tables of another grid are resampled, as trackers do: the encoder has learned those
  positions, and others would lie outside of them.

  Args:
    path: a workdir of ours, or a file that `torch_import` reads (.pth needs PyTorch).
    architecture: of the run that begins.

  Raises:
    UserError: it cannot be read, or its encoder is another; names the first three mismatches.
  """
  if path.is_dir():
    weights = saved_weights.load_weights(path)
    state = layouts.to_torch(weights.params, weights.architecture)
    theirs, fresh = weights.architecture, set()
    report = [f'init_from {path}: step {weights.step}']
  else:
    model = import_model.read_model(weight_files.read(path))
    state, theirs, fresh = model.state, model.architecture, set(model.fresh)
    report = [f'init_from {path}: {line}' for line in model.report]
  if theirs.image_size != architecture.image_size and theirs.patch_size == architecture.patch_size:
    state, _ = layouts.at_resolution(state, theirs, architecture.image_size)
    report.append(
      f'position tables: resampled from {theirs.image_size} to {architecture.image_size} pixels'
    )
  expected = layouts.tensors(architecture)
  encoder = {t.name: t.shape for t in expected if not layouts.is_of_decoder(t.name)}
  try:
    layouts.check_shapes(
      {name: array for name, array in state.items() if not layouts.is_of_decoder(name)},
      encoder,
      architecture,
    )
  except UserError as error:
    raise UserError(f'init_from={path} is of another encoder: {error}') from error
  # A decoder of another shape is left out whole: half of one is worth nothing.
  has_decoder = all(
    np.shape(state[t.name]) == t.shape
    for t in expected
    if t.name not in encoder and t.name in state and t.name not in fresh
  ) and {t.name for t in expected} == set(state)
  taken = [t for t in expected if t.name not in fresh and (has_decoder or t.name in encoder)]
  drawn = [t.name for t in expected if t not in taken]
  report.append(f'taken: {len(taken)} of {len(expected)} tensors')
  if drawn:
    report.append(f'drawn afresh: {import_model.grouped(drawn)}')
  import_model.check_finite({t.name: state[t.name] for t in taken}, f'init_from={path}')
  params = {t.path: layouts.leaf_of(state[t.name], t) for t in taken}
  return WarmStart(params, report)


def put(taken: dict[tuple[str | int, ...], np.ndarray], params: dict) -> dict:
  """Replaces what was drawn by what was taken, in the places where it lies.

  Args:
    taken: see `WarmStart`.
    params: of the fresh state, on the devices of all processes.
  """
  leaves = traverse_util.flatten_dict(params)
  for path, array in taken.items():
    leaves[path] = jax.make_array_from_callback(
      array.shape, leaves[path].sharding, lambda index, array=array: array[index]
    )
  return traverse_util.unflatten_dict(leaves)
