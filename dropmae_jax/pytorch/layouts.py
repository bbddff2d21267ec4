"""Converts parameters to PyTorch state dicts and back; both are plain dicts of numpy arrays.

The `full` layout is that of the published DropMAE files, which DropTrack, OSTrack and DropSeg load:
names equal our attribute paths, linear weights are (out, in), the patch projection is a
convolution. `LAYOUTS` derives the other layouts from it. `weight_files` reads and writes files.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from dropmae_jax.config import Architecture, Options
from dropmae_jax.model import mae, position_embedding
from dropmae_jax.runtime.errors import UserError, check_name

PUBLISHED_IMAGE_SIZE = 224
POSITION_TABLES = ('pos_embed', 'decoder_pos_embed')
FRAME_IDENTITIES = ('temporal_pos_embed_x', 'temporal_pos_embed_z')
CLASS_TOKEN = 'cls_token'
FLOATS = ('float16', 'bfloat16', 'float32', 'float64')
_TOP_LEVEL = (
  'pos_embed',
  'temporal_pos_embed_x',
  'temporal_pos_embed_z',
  'mask_token',
  'decoder_pos_embed',
  'decoder_temporal_pos_embed_x',
  'decoder_temporal_pos_embed_z',
)
BLOCK_LAYERS = ('norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2')
_PATCHES = 'patch_embed.proj.weight'


class Tensor(NamedTuple):
  """One tensor of the full layout, and where its parameter is in the model.

  Attributes:
    name: its name in the state dict.
    shape: its shape in the state dict.
    path: of the parameter in the pure parameter dict.
    is_kernel: whether it is a matrix or a convolution: (*sides, in, out) in the model, and
      (out, in, *sides) in the state dict.
  """

  name: str
  shape: tuple[int, ...]
  path: tuple[str | int, ...]
  is_kernel: bool


def is_of_decoder(name: str) -> bool:
  """Returns whether a tensor belongs to the decoder; all others belong to the encoder."""
  return 'decoder' in name or name == 'mask_token'


def tensor_names(architecture: Architecture) -> Iterator[str]:
  """Yields the names of the full layout in the order of the published state dict."""
  yield from _TOP_LEVEL
  layers = ['patch_embed.proj']
  layers += [f'blocks.{i}.{x}' for i in range(architecture.depth) for x in BLOCK_LAYERS]
  layers += ['norm', 'decoder_embed']
  layers += [
    f'decoder_blocks.{i}.{x}' for i in range(architecture.decoder_depth) for x in BLOCK_LAYERS
  ]
  layers += ['decoder_norm', 'decoder_pred']
  yield from (f'{layer}.{leaf}' for layer in layers for leaf in ('weight', 'bias'))


@functools.lru_cache(maxsize=8)
def tensors(architecture: Architecture) -> tuple[Tensor, ...]:
  """Returns the tensors of the full layout in the published order."""
  _, abstract = mae.abstract_model(architecture)
  by_name = {}
  for path, leaf in traverse_util.flatten_dict(abstract).items():
    tensor = tensor_at(path, leaf.shape, architecture.patch_size)
    by_name[tensor.name] = tensor
  return tuple(by_name[name] for name in tensor_names(architecture))


def tensor_at(path: tuple[str | int, ...], shape: tuple[int, ...], patch_size: int) -> Tensor:
  """Returns the tensor of a parameter.

  Args:
    path: of the parameter in its pure parameter dict.
    shape: of the parameter.
    patch_size: of the model, in pixels.
  """
  is_kernel = path[-1] == 'kernel'
  leaf_name = 'weight' if path[-1] in ('kernel', 'scale') else path[-1]
  name = '.'.join(map(str, (*path[:-1], leaf_name)))
  if name.endswith(_PATCHES):
    shape = (shape[-1], 3, patch_size, patch_size)
  elif is_kernel:
    shape = (shape[-1], shape[-2], *shape[:-2])
  return Tensor(name, shape, path, is_kernel)


def tensor_shapes(architecture: Architecture, layout: str = 'full') -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a layout's tensors by name, in order."""
  zero = np.zeros((), np.float32)
  state = {t.name: np.broadcast_to(zero, t.shape) for t in tensors(architecture)}
  return {name: array.shape for name, array in in_layout(state, layout).items()}


def to_torch(params: dict, architecture: Architecture) -> dict[str, np.ndarray]:
  """Returns the float32 state dict in the full layout; no two arrays share memory.

  Args:
    params: the model's pure parameter dict, or a tree of the same shapes, such as a moment.
    architecture: of the model.
  """
  leaves = traverse_util.flatten_dict(params)
  return {
    t.name: np.array(tensor_of(np.asarray(leaves[t.path]), t), dtype=np.float32, order='C')
    for t in tensors(architecture)
  }


def from_torch(state: Mapping[str, np.ndarray], architecture: Architecture) -> dict:
  """Returns the pure parameter dict of a state dict in the full layout; inverse of `to_torch`.

  Raises:
    UserError: tensors are missing, unexpected or of another shape; names the first three.
  """
  expected = tensors(architecture)
  check_shapes(state, {t.name: t.shape for t in expected}, architecture)
  return traverse_util.unflatten_dict(
    {t.path: leaf_of(np.asarray(state[t.name]), t) for t in expected}
  )


def check_shapes(
  state: Mapping[str, np.ndarray],
  expected: Mapping[str, tuple[int, ...]],
  architecture: Options,
) -> None:
  """Checks that a state dict has exactly the expected tensors.

  Raises:
    UserError: tensors are missing, unexpected or of another shape; names the first three.
  """
  problems = []
  for name, shape in expected.items():
    if name not in state:
      problems.append(f'{name} is missing')
    elif np.shape(state[name]) != shape:
      problems.append(f'{name} is {np.shape(state[name])} and not {shape}')
  problems += [f'{name} is not part of this model' for name in state if name not in expected]
  if problems:
    raise UserError(
      f'the state dict does not fit {architecture}: {"; ".join(problems[:3])}'
      f' ({len(problems)} mismatches in all); give the file of such a model.'
    )


def as_float32(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns weights as float32; values too large for float32 become infinite.

  Raises:
    UserError: some tensors hold integers, booleans or complex numbers; names the first three.
  """
  odd = [f'{n} is {a.dtype}' for n, a in tensors.items() if str(a.dtype) not in FLOATS]
  if odd:
    raise UserError(
      f'weights must be {", ".join(FLOATS)}, but {"; ".join(odd[:3])} ({len(odd)} such tensors in'
      ' all); give the file from before it was quantised or converted.'
    )
  with np.errstate(over='ignore'):
    return {name: np.asarray(array, np.float32) for name, array in tensors.items()}


def _encoder(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Leaves the decoder out."""
  return {name: array for name, array in state.items() if not is_of_decoder(name)}


def _mae(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The encoder and a zero class token, which MAE's own loader requires."""
  width = state['norm.bias'].shape[0]
  return {CLASS_TOKEN: np.zeros((1, 1, width), np.float32), **_encoder(state)}


def _timm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The encoder without frame identities; its position table has no slot for a class token."""
  encoder = {n: array for n, array in _encoder(state).items() if n not in FRAME_IDENTITIES}
  return encoder | {'pos_embed': np.array(state['pos_embed'][:, 1:], order='C')}


# What --layout offers: name to a function from a state dict in the full layout to that layout. It
# must not depend on values: `tensor_shapes` calls it with zeros. Add an entry for a new layout.
LAYOUTS: dict[str, Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]] = {
  'full': dict,
  'encoder': _encoder,
  'mae': _mae,
  'timm': _timm,
}


def in_layout(state: Mapping[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
  """Returns the tensors of one of `LAYOUTS`, from a state dict in the full layout.

  Raises:
    UserError: there is no such layout.
  """
  check_name('layout', layout, LAYOUTS)
  return LAYOUTS[layout](state)


def at_resolution(
  state: dict[str, np.ndarray], architecture: Architecture, image_size: int
) -> tuple[dict[str, np.ndarray], Architecture]:
  """Resamples the position tables to another resolution; no other tensor depends on it.

  Args:
    state: in the full layout.
    architecture: of the state.
    image_size: in pixels; a multiple of the patch size.

  Returns:
    The state with the new tables, and its architecture.

  Raises:
    ValueError: the image size is not a multiple of the patch size.
  """
  other = dataclasses.replace(architecture, image_size=image_size)
  tables = {
    name: position_embedding.resample_table(state[name], other.grid) for name in POSITION_TABLES
  }
  return state | tables, other


def at_published_resolution(
  state: dict[str, np.ndarray], architecture: Architecture
) -> tuple[dict[str, np.ndarray], Architecture]:
  """Replaces the position tables of another resolution by those for 224 pixels.

  All published files hold tables for 224 pixels. Programs that load them resample the tables to
  their own resolution, and fail on a table of another size. Sine-cosine tables are recomputed.

  Raises:
    UserError: the tables are not the sine-cosine tables, so the user must ask for resampling.
  """
  published = dataclasses.replace(architecture, image_size=PUBLISHED_IMAGE_SIZE)
  tables = {}
  for name in POSITION_TABLES:
    width = state[name].shape[-1]
    if not np.array_equal(state[name], position_embedding.sincos_table(architecture.grid, width)):
      raise UserError(
        f'{name} is a table for {architecture.image_size} pixels and not the sine-cosine table,'
        f' but the programs that load such files expect {PUBLISHED_IMAGE_SIZE} pixels; add'
        f' --image_size={PUBLISHED_IMAGE_SIZE} to resample it (bicubic).'
      )
    tables[name] = position_embedding.sincos_table(published.grid, width)
  return state | tables, published


def tensor_of(leaf: np.ndarray, tensor: Tensor) -> np.ndarray:
  """Returns a parameter as the tensor of a state dict, which has outputs and inputs first.

  The patch projection is unfolded to (out, colour, row, column).
  """
  if tensor.name.endswith(_PATCHES):
    width, colours, side, _ = tensor.shape
    return leaf.reshape(side, side, colours, width).transpose(3, 2, 0, 1)
  return np.moveaxis(leaf, (-1, -2), (0, 1)) if tensor.is_kernel else leaf


def leaf_of(array: np.ndarray, tensor: Tensor) -> np.ndarray:
  """Returns a tensor of a state dict as the float32 parameter at `tensor.path`."""
  array = array.astype(np.float32, copy=False)
  if tensor.name.endswith(_PATCHES):
    return array.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
  return np.moveaxis(array, (0, 1), (-1, -2)) if tensor.is_kernel else array
