"""Initialises a run from the weights of another run or of a weight file."""

import hashlib
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Architecture
from dropmae_jax.pytorch import import_model, layouts, weight_files
from dropmae_jax.runtime import paths
from dropmae_jax.runtime.errors import UserError


class InitialParams(NamedTuple):
  """Parameters that replace the newly initialised ones of a run.

  Attributes:
    params: numpy arrays by their path in the pure parameter dict.
    report: lines that say what was loaded, initialised and resampled.
  """

  params: dict[tuple[str | int, ...], np.ndarray]
  report: list[str]

  def digest(self) -> str:
    """Returns a hash of all values."""
    digest = hashlib.sha256()
    for array in self.params.values():
      digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def read(path: paths.Path, architecture: Architecture) -> InitialParams:
  """Reads the parameters that fit a model: the whole encoder, and the decoder if it fits.

  Position tables of another grid are resampled, as trackers do, because the encoder was trained
  with the positions of that grid.

  Args:
    path: a workdir, or a file that `import_model` reads.
    architecture: of the new run.

  Raises:
    UserError: it cannot be read, or its encoder has other shapes or heads; names up to three.
  """
  if paths.is_folder(path):
    weights = saved_weights.load_weights(path)
    state = layouts.to_torch(weights.params, weights.architecture)
    source, has_known_heads, fresh = weights.architecture, True, set()
    report = [f'init_from {path}: step {weights.step}']
  else:
    model = import_model.read_model(weight_files.read(path))
    state, source, fresh = model.state, model.architecture, set(model.fresh)
    has_known_heads = model.has_known_heads
    report = [f'init_from {path}: {line}' for line in [*model.report, *model.changes]]
  if source.image_size != architecture.image_size and source.patch_size == architecture.patch_size:
    state, _ = layouts.at_resolution(state, source, architecture.image_size)
    report.append(
      f'position tables: resampled from {source.image_size} to {architecture.image_size} pixels'
    )
  encoder = layouts.tensor_shapes(architecture, 'encoder')
  try:
    layouts.check_shapes(layouts.in_layout(state, 'encoder'), encoder, architecture)
  except UserError as error:
    raise UserError(f'config.init_from={path} has another encoder: {error}') from error
  if has_known_heads and source.num_heads != architecture.num_heads:
    raise UserError(
      f'config.init_from={path} has an encoder of {source.num_heads} attention heads, and'
      f' config.model.num_heads={architecture.num_heads}; give the same number.'
    )
  expected = layouts.tensors(architecture)
  # A decoder of another shape, or other heads, is left out as a whole.
  has_same_heads = not has_known_heads or source.decoder_num_heads == architecture.decoder_num_heads
  has_decoder = (
    has_same_heads
    and state.keys() == {t.name for t in expected}
    and all(np.shape(state[t.name]) == t.shape for t in expected if t.name not in fresh)
  )
  loaded = [t for t in expected if t.name not in fresh and (has_decoder or t.name in encoder)]
  initialised = [t.name for t in expected if t not in loaded]
  report.append(f'loaded: {len(loaded)} of {len(expected)} tensors')
  if initialised:
    report.append(f'initialised: {import_model.grouped(initialised)}')
  import_model.check_finite({t.name: state[t.name] for t in loaded}, f'config.init_from={path}')
  params = {t.path: layouts.leaf_of(state[t.name], t) for t in loaded}
  return InitialParams(params, report)


def replace(params: dict, loaded: dict[tuple[str | int, ...], np.ndarray]) -> dict:
  """Replaces parameters by those of `InitialParams`, with the shardings of the former."""
  leaves = traverse_util.flatten_dict(params)
  for path, array in loaded.items():
    leaves[path] = jax.make_array_from_callback(
      array.shape, leaves[path].sharding, lambda index, array=array: array[index]
    )
  return traverse_util.unflatten_dict(leaves)
