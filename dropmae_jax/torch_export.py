"""Parameters to the PyTorch checkpoint layout of the published code, and back.

Works on plain dicts of numpy arrays; only the functions that read or write a .pth import torch.
The layout is that of DropMAE's own files, which DropTrack, OSTrack and DropSeg load: names equal
our attribute paths, linear weights are (out, in), the patch projection is a convolution.
"""

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from types import ModuleType

import numpy as np
from flax import traverse_util

from dropmae_jax import mae, position, vit
from dropmae_jax.command_line import BadInput
from dropmae_jax.mae import Architecture

PUBLISHED_IMAGE_SIZE = 224
POSITION_TABLES = ('pos_embed', 'decoder_pos_embed')
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


def tensor_names(architecture: Architecture) -> list[str]:
  """Returns the PyTorch names of all tensors, in the order of the published state dict."""

  def layers() -> Iterator[str]:
    yield 'patch_embed.proj'
    yield from (f'blocks.{i}.{x}' for i in range(architecture.depth) for x in _BLOCK_LAYERS)
    yield from ('norm', 'decoder_embed')
    yield from (
      f'decoder_blocks.{i}.{x}' for i in range(architecture.decoder_depth) for x in _BLOCK_LAYERS
    )
    yield from ('decoder_norm', 'decoder_pred')

  return [*_TOP_LEVEL, *(f'{x}.{leaf}' for x in layers() for leaf in ('weight', 'bias'))]


def to_torch(params: dict, architecture: Architecture) -> dict[str, np.ndarray]:
  """Returns the float32 state dict in the published order, every array in memory of its own.

  Args:
    params: the model's pure parameter dict.
    architecture: what it belongs to.
  """
  leaves = {
    '.'.join(map(str, path)): leaf for path, leaf in traverse_util.flatten_dict(params).items()
  }
  state = {}
  for name in tensor_names(architecture):
    module, _, leaf = name.rpartition('.')
    if leaf != 'weight':
      array = leaves[name]
    elif f'{module}.scale' in leaves:
      array = leaves[f'{module}.scale']
    else:
      array = _weight_to_torch(module, np.asarray(leaves[f'{module}.kernel']), architecture)
    state[name] = np.array(array, dtype=np.float32, order='C')
  return state


def from_torch(state: Mapping[str, np.ndarray], architecture: Architecture) -> dict:
  """Returns the pure parameter dict of a state dict; the inverse of `to_torch`.

  Raises:
    BadInput: tensors are missing, left over or of another shape; names the first three.
  """
  _, abstract = mae.abstract_model(architecture)
  wanted = {
    '.'.join(map(str, path)): (path, leaf)
    for path, leaf in traverse_util.flatten_dict(abstract).items()
  }
  arrays, problems = {}, []
  for key, (path, leaf) in wanted.items():
    module, _, kind = key.rpartition('.')
    name = f'{module}.weight' if kind in ('kernel', 'scale') else key
    if name not in state:
      problems.append(f'{name} is missing')
      continue
    array = np.asarray(state[name], dtype=np.float32)
    if kind == 'kernel':
      array = _weight_from_torch(module, array)
    if array.shape != leaf.shape:
      problems.append(f'{name} is {np.shape(state[name])} and does not fit')
    arrays[path] = array
  left_over = [name for name in state if name not in set(tensor_names(architecture))]
  problems += [f'{name} is not part of this model' for name in left_over]
  if problems:
    raise BadInput(
      f'the state dict does not fit {architecture}: {"; ".join(problems[:3])}'
      f' ({len(problems)} mismatches in all); give the file of a DropMAE model with its decoder.'
    )
  return traverse_util.unflatten_dict(arrays)


def _weight_to_torch(module: str, kernel: np.ndarray, architecture: Architecture) -> np.ndarray:
  """(in, out) to (out, in); the patch projection's input is unfolded to colour, row, column."""
  if module != 'patch_embed.proj':
    return kernel.T
  side = architecture.patch_size
  return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _weight_from_torch(module: str, weight: np.ndarray) -> np.ndarray:
  if module == 'patch_embed.proj' and weight.ndim == 4:
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])
  return weight.T


def infer_architecture(state: Mapping[str, np.ndarray]) -> Architecture:
  """Reads the architecture off the shapes of a state dict.

  The head counts leave no trace in the shapes: they are those of the size table's row of that
  width, and 16 in the decoder, as published.

  Raises:
    BadInput: a tensor that says it is not there, or the width is in no row of the size table.
  """
  try:
    width, _, patch_size, _ = state['patch_embed.proj.weight'].shape
    decoder_width = state['decoder_embed.weight'].shape[0]
    grid = round((state['pos_embed'].shape[1] - 1) ** 0.5)
    hidden = state['blocks.0.mlp.fc1.weight'].shape[0]
  except (KeyError, ValueError, IndexError) as error:
    raise BadInput(
      f'the file holds no DropMAE model with its decoder ({error} is missing or misshapen);'
      ' files of the encoder alone cannot be read yet.'
    ) from error
  by_width = {size.width: size.num_heads for size in vit.SIZES.values()}
  if width not in by_width:
    raise BadInput(
      f'{width=} is not in the size table ({", ".join(map(str, by_width))}), so the number of'
      ' heads is unknown; the file must say it under args["architecture"].'
    )
  return Architecture(
    image_size=grid * patch_size,
    patch_size=patch_size,
    width=width,
    depth=_depth(state, 'blocks.'),
    num_heads=by_width[width],
    decoder_width=decoder_width,
    decoder_depth=_depth(state, 'decoder_blocks.'),
    decoder_num_heads=16,
    mlp_ratio=hidden / width,
  )


def at_published_resolution(params: dict, architecture: Architecture) -> tuple[dict, Architecture]:
  """Gives a model of another resolution the position tables of 224 pixels.

  Every file in the field holds those, and clients resample them to their own resolution; a table
  of another grid would make their loaders fail. Nothing else depends on the resolution.
  """
  published = dataclasses.replace(architecture, image_size=PUBLISHED_IMAGE_SIZE)
  tables = {
    'pos_embed': position.sincos_table(published.grid, published.width),
    'decoder_pos_embed': position.sincos_table(published.grid, published.decoder_width),
  }
  return params | tables, published


def readers(architecture: Architecture) -> str:
  """Says which programs of the field take a file of this architecture."""
  shape = (architecture.width, architecture.depth, architecture.patch_size)
  if architecture.image_size == PUBLISHED_IMAGE_SIZE and shape == (768, 12, 16):
    return 'DropTrack, OSTrack and DropSeg load it as a pre-trained ViT-B/16.'
  if architecture.image_size == PUBLISHED_IMAGE_SIZE and shape == (1024, 24, 16):
    return 'OSTrack loads it as a pre-trained ViT-L/16; DropTrack and DropSeg take ViT-B/16 only.'
  return 'It has the layout of the published files, but no tracker has a model of this size.'


def _depth(state: Mapping[str, np.ndarray], prefix: str) -> int:
  return len({name.split('.')[1] for name in state if name.startswith(prefix)})


def _torch() -> ModuleType:
  try:
    import torch
  except ImportError as error:
    raise BadInput(
      "PyTorch is not installed, and .pth files need it; run: pip install 'dropmae_jax[torch]'"
    ) from error
  return torch


def write_pth(path: str, state: Mapping[str, np.ndarray], *, epoch: int, args: dict) -> None:
  """Writes {'model', 'epoch', 'args'} that torch.load(weights_only=True) reads.

  The file is written under a temporary name and then renamed, so a good file is never lost.

  Args:
    path: the file to write; its folder must exist.
    state: named float32 arrays.
    epoch: for the `epoch` entry of the published layout.
    args: plain values only (str, int, float, bool, None, and dicts of them).
  """
  torch = _torch()
  folder = os.path.dirname(os.path.abspath(path))
  if not os.path.isdir(folder):
    raise BadInput(f'the folder of --output={path} does not exist; make it first.')
  if os.path.isdir(path):
    raise BadInput(f'--output={path} is a folder; give the name of a file.')
  tensors = {name: torch.from_numpy(array) for name, array in state.items()}
  handle, temporary = tempfile.mkstemp(dir=folder, suffix='.partial')
  os.close(handle)
  try:
    torch.save({'model': tensors, 'epoch': epoch, 'args': args}, temporary)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def read_pth(path: str) -> tuple[dict[str, np.ndarray], dict]:
  """Reads a published or own .pth; no pickled code runs.

  Returns:
    The state dict as arrays, and its `args` as a plain dict (empty where there are none).

  Raises:
    BadInput: the file is not there, not a checkpoint, or holds objects other than tensors, plain
      values and the argparse.Namespace of the published files.
  """
  torch = _torch()
  if not os.path.isfile(path):
    raise BadInput(f'--from_torch={path} is not a file; give the .pth to read.')
  try:
    with torch.serialization.safe_globals([argparse.Namespace]):
      content = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # A damaged file fails in as many ways as there are bytes.
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise BadInput(
      f'--from_torch={path} cannot be read as a PyTorch checkpoint ({reason}); give a whole file'
      ' that holds only tensors and plain values.'
    ) from error
  model = content.get('model') if isinstance(content, dict) else None
  if not isinstance(model, dict):
    raise BadInput(f"--from_torch={path} has no 'model' entry, so it is no DropMAE checkpoint.")
  odd = [str(name) for name, value in model.items() if not isinstance(value, torch.Tensor)]
  if odd:
    raise BadInput(f"--from_torch={path} has under 'model' what is no tensor: {odd[0]}.")
  args = content.get('args') or {}
  args = vars(args) if isinstance(args, argparse.Namespace) else dict(args)
  return {name: tensor.float().numpy() for name, tensor in model.items()}, args
