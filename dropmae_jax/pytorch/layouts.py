"""Parameters as state dicts of the field's PyTorch files, and back: plain dicts of numpy arrays.

The full layout is that of DropMAE's own files, which DropTrack, OSTrack and DropSeg load: names
equal our attribute paths, linear weights are (out, in), the patch projection is a convolution.
The other layouts are made from it. Files are the business of `torch_files`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from dropmae_jax.config import Architecture
from dropmae_jax.model import mae, position_embedding
from dropmae_jax.runtime.errors import UserError

PUBLISHED_IMAGE_SIZE = 224
POSITION_TABLES = ('pos_embed', 'decoder_pos_embed')
FRAME_IDENTITIES = ('temporal_pos_embed_x', 'temporal_pos_embed_z')
CLASS_TOKEN = 'cls_token'
FLOATS = ('float16', 'bfloat16', 'float32', 'float64')
LAYOUTS = ('full', 'encoder', 'mae', 'timm')
_TOP_LEVEL = (
  'pos_embed',
  'temporal_pos_embed_x',
  'temporal_pos_embed_z',
  'mask_token',
  'decoder_pos_embed',
  'decoder_temporal_pos_embed_x',
  'decoder_temporal_pos_embed_z',
)
_BLOCK_LAYERS = ('norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2')
_PATCHES = 'patch_embed.proj.weight'


class Tensor(NamedTuple):
  """One tensor of the full layout, and the parameter that it is.

  Attributes:
    name: in a state dict.
    shape: in a state dict.
    path: of the parameter, in the pure parameter dict.
    is_kernel: a matrix, (in, out) there and (out, in) in the file.
  """

  name: str
  shape: tuple[int, ...]
  path: tuple[str | int, ...]
  is_kernel: bool


def is_of_decoder(name: str) -> bool:
  """Tells the tensors of the decoder from those of the encoder."""
  return 'decoder' in name or name == 'mask_token'


def tensor_names(architecture: Architecture) -> Iterator[str]:
  """Yields the names of the full layout in the order of the published state dict."""
  yield from _TOP_LEVEL
  layers = ['patch_embed.proj']
  layers += [f'blocks.{i}.{x}' for i in range(architecture.depth) for x in _BLOCK_LAYERS]
  layers += ['norm', 'decoder_embed']
  layers += [
    f'decoder_blocks.{i}.{x}' for i in range(architecture.decoder_depth) for x in _BLOCK_LAYERS
  ]
  layers += ['decoder_norm', 'decoder_pred']
  yield from (f'{layer}.{leaf}' for layer in layers for leaf in ('weight', 'bias'))


@functools.lru_cache(maxsize=8)
def tensors(architecture: Architecture) -> tuple[Tensor, ...]:
  """Lists the tensors of the full layout in the published order."""
  _, abstract = mae.abstract_model(architecture)
  by_name = {}
  for path, leaf in traverse_util.flatten_dict(abstract).items():
    is_kernel = path[-1] == 'kernel'
    leaf_name = 'weight' if path[-1] in ('kernel', 'scale') else path[-1]
    name = '.'.join(map(str, (*path[:-1], leaf_name)))
    shape = leaf.shape[::-1] if is_kernel else leaf.shape
    if name == _PATCHES:
      shape = (architecture.width, 3, architecture.patch_size, architecture.patch_size)
    by_name[name] = Tensor(name, shape, path, is_kernel)
  return tuple(by_name[name] for name in tensor_names(architecture))


def tensor_shapes(architecture: Architecture, layout: str = 'full') -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a layout's tensors by name, in order."""
  zero = np.zeros((), np.float32)
  state = {t.name: np.broadcast_to(zero, t.shape) for t in tensors(architecture)}
  return {name: array.shape for name, array in in_layout(state, layout).items()}


def to_torch(params: dict, architecture: Architecture) -> dict[str, np.ndarray]:
  """Returns the float32 state dict in the full layout, every array in memory of its own.

  Args:
    params: the model's pure parameter dict, or anything shaped like it, such as a moment.
    architecture: what it belongs to.
  """
  leaves = traverse_util.flatten_dict(params)
  return {
    t.name: np.array(_tensor_of(np.asarray(leaves[t.path]), t), dtype=np.float32, order='C')
    for t in tensors(architecture)
  }


def from_torch(state: Mapping[str, np.ndarray], architecture: Architecture) -> dict:
  """Returns the pure parameter dict of a state dict in the full layout; undoes `to_torch`.

  Raises:
    UserError: tensors are missing, left over or of another shape; names the first three.
  """
  expected = tensors(architecture)
  check_shapes(state, {t.name: t.shape for t in expected}, architecture)
  return traverse_util.unflatten_dict(
    {t.path: leaf_of(np.asarray(state[t.name]), t) for t in expected}
  )


def check_shapes(
  state: Mapping[str, np.ndarray],
  expected: Mapping[str, tuple[int, ...]],
  architecture: Architecture,
) -> None:
  """Refuses a state dict that has not exactly the expected tensors.

  Raises:
    UserError: tensors are missing, left over or of another shape; names the first three.
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
  """Returns weights as float32; what is too large for it becomes infinite.

  Raises:
    UserError: tensors are no weights but integers, truth values or complex numbers; names the
      first three.
  """
  odd = [f'{n} is {a.dtype}' for n, a in tensors.items() if str(a.dtype) not in FLOATS]
  if odd:
    raise UserError(
      f'weights are {", ".join(FLOATS)}, and {"; ".join(odd[:3])} ({len(odd)} such in all); give'
      ' the file before it was quantised or converted.'
    )
  with np.errstate(over='ignore'):
    return {name: np.asarray(array, np.float32) for name, array in tensors.items()}


def in_layout(state: Mapping[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
  """Returns the tensors that a layout has, from a state dict in the full one.

  full: as it is. encoder: without the decoder. mae: the encoder, and a zero class token, which
  MAE's own loader asks for. timm: the encoder without frame identities, and a position table
  without the slot of the class token.
  """
  if layout == 'full':
    return dict(state)
  encoder = {name: array for name, array in state.items() if not is_of_decoder(name)}
  if layout == 'encoder':
    return encoder
  if layout == 'mae':
    width = encoder['norm.bias'].shape[0]
    return {CLASS_TOKEN: np.zeros((1, 1, width), np.float32), **encoder}
  if layout == 'timm':
    without_slot = np.array(encoder['pos_embed'][:, 1:], order='C')
    kept = {name: array for name, array in encoder.items() if name not in FRAME_IDENTITIES}
    return kept | {'pos_embed': without_slot}
  raise ValueError(f'{layout=} is unknown; choose one of {", ".join(LAYOUTS)}.')


def at_resolution(
  state: dict[str, np.ndarray], architecture: Architecture, image_size: int
) -> tuple[dict[str, np.ndarray], Architecture]:
  """Resamples the position tables to another resolution; nothing else depends on it.

  Args:
    state: in the full layout.
    architecture: what it belongs to.
    image_size: pixels; a multiple of the patch size.

  Returns:
    The state with other tables, and its architecture.
  """
  other = dataclasses.replace(architecture, image_size=image_size)
  tables = {
    name: position_embedding.resample_table(state[name], other.grid) for name in POSITION_TABLES
  }
  return state | tables, other


def at_published_resolution(
  state: dict[str, np.ndarray], architecture: Architecture
) -> tuple[dict[str, np.ndarray], Architecture]:
  """Gives a model of another resolution the position tables of 224 pixels.

  Every file in the field holds those, and clients resample them to their own resolution; a table
  of another grid would make their loaders fail. Sine-cosine tables are computed anew.

  Raises:
    UserError: the tables are not of the sine-cosine law, so that resampling them is a choice.
  """
  published = dataclasses.replace(architecture, image_size=PUBLISHED_IMAGE_SIZE)
  tables = {}
  for name in POSITION_TABLES:
    width = state[name].shape[-1]
    if not np.array_equal(state[name], position_embedding.sincos_table(architecture.grid, width)):
      raise UserError(
        f'{name} is a table of {architecture.image_size} pixels that is not of the sine-cosine'
        f' law, and files in the field hold those of {PUBLISHED_IMAGE_SIZE}; add'
        f' --image_size={PUBLISHED_IMAGE_SIZE} to have it resampled (bicubic).'
      )
    tables[name] = position_embedding.sincos_table(published.grid, width)
  return state | tables, published


def _tensor_of(leaf: np.ndarray, tensor: Tensor) -> np.ndarray:
  """(in, out) to (out, in); the patch projection's input is unfolded to colour, row, column."""
  if tensor.name == _PATCHES:
    width, colours, side, _ = tensor.shape
    return leaf.reshape(side, side, colours, width).transpose(3, 2, 0, 1)
  return leaf.T if tensor.is_kernel else leaf


def leaf_of(array: np.ndarray, tensor: Tensor) -> np.ndarray:
  """Undoes `_tensor_of`."""
  array = array.astype(np.float32, copy=False)
  if tensor.name == _PATCHES:
    return array.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
  return array.T if tensor.is_kernel else array
