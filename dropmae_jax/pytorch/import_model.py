"""Completes the tensors of a weight file to a whole model.

It accepts the published DropMAE files, ours in every layout, MAE's with and without decoder,
timm's, and the encoders of trained OSTrack and DropTrack trackers. Tensors that the model does not
have are dropped; optional tensors that the file does not have are newly initialised.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from dropmae_jax.config import Architecture
from dropmae_jax.model import mae, vit
from dropmae_jax.pytorch import file_metadata, layouts
from dropmae_jax.pytorch.weight_files import TENSOR_KEYS, WeightFile
from dropmae_jax.runtime.errors import UserError

# What wraps a model puts these before the names of its tensors, in any order: trackers, PyTorch's
# DistributedDataParallel and compile, Lightning.
_WRAPPED = re.compile(r'((?:(?:backbone|module|_orig_mod|model)\.)+)patch_embed\.proj\.weight')
# Numbers that are drawn for tensors that a file does not have: 4 GiB. The published decoder has 26
# million; a file may say of itself that it has any other.
MOST_FRESH = 1 << 30
PUBLISHED_DECODER_HEADS = 16
# Tensors with these names change the features of another kind of vision transformer. A file with
# one that our model does not have is refused; without it the features would be wrong.
ENCODER_PREFIXES = ('blocks.', 'decoder_blocks.', 'norm_pre.', 'reg_token', 'patch_embed.')


class Model(NamedTuple):
  """The weights of a file, completed to the full layout.

  Attributes:
    state: a float32 state dict in the full layout.
    architecture: of the model.
    has_known_heads: whether the file tells the numbers of attention heads, which shapes do not.
    fresh: names of the tensors that the file does not have; initialised from seed 0.
    unused: the tensors of the file that the model does not have; names without a tracker's prefix.
    report: lines that say what was taken and converted.
    changes: lines that say what was dropped and initialised.
  """

  state: dict[str, np.ndarray]
  architecture: Architecture
  has_known_heads: bool
  fresh: list[str]
  unused: dict[str, np.ndarray]
  report: list[str]
  changes: list[str]


def read_model(file: WeightFile, *, size: str | None = None, needs_decoder: bool = True) -> Model:
  """Completes the tensors of a file to a whole model.

  Args:
    file: as `weight_files.read` returns it.
    size: a row of `vit.SIZES`; needed only if the tensors' shapes do not tell it.
    needs_decoder: a decoder of another method is an error; otherwise it is not used.

  Raises:
    UserError: the size is unknown; or tensors of the encoder, or some but not all of the decoder,
      are missing, of another shape or not floating-point; names the first three.
  """
  tensors, prefix, unused = _without_prefix(file.tensors)
  if 'pos_embed' in tensors:
    tensors['pos_embed'] = _with_class_slot(tensors['pos_embed'])
  architecture = file_metadata.read(file.entries).architecture
  has_known_heads = architecture is not None and size is None
  if not needs_decoder and not _has_our_decoder(tensors, architecture if has_known_heads else size):
    unused |= {name: array for name, array in tensors.items() if layouts.is_of_decoder(name)}
    tensors = {name: array for name, array in tensors.items() if name not in unused}
  if not has_known_heads:
    architecture = _architecture(tensors, size)
  shapes = layouts.tensor_shapes(architecture)
  optional = set(layouts.FRAME_IDENTITIES)
  decoder = {name for name in shapes if layouts.is_of_decoder(name)}
  decoder_identities = {f'decoder_{name}' for name in layouts.FRAME_IDENTITIES}
  # Trackers save the mask token but no other tensor of the decoder.
  if decoder & set(tensors) <= {'mask_token'} | decoder_identities:
    optional |= decoder
  else:
    optional |= decoder_identities
  fresh = [name for name in shapes if name in optional and name not in tensors]
  if 'decoder_pred.weight' in fresh:
    fresh = [name for name in shapes if name in decoder or name in fresh]

  taken = {name: array for name, array in tensors.items() if name in shapes and name not in fresh}
  remaining = {name: array for name, array in tensors.items() if name not in taken}
  unknown = {name: array for name, array in remaining.items() if name.startswith(ENCODER_PREFIXES)}
  expected = {name: shape for name, shape in shapes.items() if name not in fresh}
  layouts.check_shapes(taken | unknown, expected, architecture)
  unused |= remaining
  converted = layouts.as_float32(taken) | _fresh_tensors(architecture, fresh)
  state = {name: converted[name] for name in shapes}
  report = [*origin(file, prefix), f'taken: {len(taken)} tensors of {architecture}']
  if not has_known_heads:
    report.append(
      f'assumed, as the file does not tell: {architecture.num_heads} attention heads in the'
      f' encoder, {architecture.decoder_num_heads} in the decoder'
    )
  other = collections.Counter(str(a.dtype) for a in taken.values() if a.dtype != np.float32)
  report += [f'converted to float32: {count} of {dtype}' for dtype, count in other.items()]
  changes = []
  if unused:
    changes.append(f'dropped: {grouped(unused)}')
    if any(name.endswith(layouts.CLASS_TOKEN) for name in unused):
      changes.append('  (DropMAE has no class token)')
  if fresh:
    changes.append(f'initialised (seed 0), because the file does not have them: {grouped(fresh)}')
  return Model(state, architecture, has_known_heads, fresh, unused, report, changes)


def _has_our_decoder(tensors: Mapping[str, np.ndarray], known: Architecture | str | None) -> bool:
  """Whether a file has all tensors of our decoder but the frame identities, and no others.

  Args:
    tensors: of the file.
    known: the architecture or the size, if one is known.
  """
  if isinstance(known, Architecture):
    architecture = known
  else:
    try:
      architecture = _architecture(tensors, known)
    except UserError:  # Its depth or width may be none of ours.
      return False
  shapes = layouts.tensor_shapes(architecture)
  of_file = {name: x.shape for name, x in tensors.items() if layouts.is_of_decoder(name)}
  expected = {name: shape for name, shape in shapes.items() if layouts.is_of_decoder(name)}
  optional = {f'decoder_{name}' for name in layouts.FRAME_IDENTITIES}
  return of_file.items() <= expected.items() and expected.keys() - of_file.keys() <= optional


def _without_prefix(
  tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], str, dict[str, np.ndarray]]:
  """Takes the encoder out of what wraps it, such as a tracker.

  Returns:
    Its tensors under their own names; the prefix that they had; and what is left out: tensors
    without the prefix, or without numbers.
  """
  wrapped = [match[1] for match in map(_WRAPPED.fullmatch, tensors) if match]
  prefix = wrapped[0] if wrapped and 'patch_embed.proj.weight' not in tensors else ''
  taken = {
    name.removeprefix(prefix): array
    for name, array in tensors.items()
    if name.startswith(prefix) and array.size
  }
  left_out = {
    name: array for name, array in tensors.items() if name.removeprefix(prefix) not in taken
  }
  return taken, prefix, left_out


def origin(file: WeightFile, prefix: str) -> list[str]:
  """Returns lines that say where in a file the tensors were, and what else was there."""
  lines = []
  if file.key:
    lines.append(f'found under {file.key!r}')
    others = [repr(key) for key in TENSOR_KEYS if isinstance(file.entries.get(key), dict)]
    lines += [f'not taken, though it may hold weights too: {", ".join(others)}'] * bool(others)
  if prefix:
    lines.append(f'prefix {prefix!r}: removed from the names')
  if file.objects:
    names = ', '.join(map(repr, file.objects))
    lines.append(f'not read, and nothing of them is run: Python objects, {names}')
  return lines


def _with_class_slot(table: np.ndarray) -> np.ndarray:
  """Adds the zero slot of the class token to timm's position table, which has none."""
  if table.ndim != 3 or round(table.shape[1] ** 0.5) ** 2 != table.shape[1]:
    return table
  return np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)


def _architecture(tensors: Mapping[str, np.ndarray], size: str | None) -> Architecture:
  """Derives the architecture from the shapes of the tensors.

  Shapes do not tell the numbers of heads: the encoder's is that of its row in the size table, and
  so is the decoder's if it has the row's width; else it is 16, as published.
  """
  if size is not None and size not in vit.SIZES:
    known = ', '.join(vit.SIZES)
    raise UserError(f'--model={size} is not in the size table; choose one of {known}.')
  try:
    width, _, patch_size, _ = tensors['patch_embed.proj.weight'].shape
    hidden = tensors['blocks.0.mlp.fc1.weight'].shape[0]
    tokens = tensors['pos_embed'].shape[1] - 1
    decoder = {}
    if 'decoder_embed.weight' in tensors:
      decoder['decoder_width'] = tensors['decoder_embed.weight'].shape[0]
      decoder['decoder_depth'] = _depth(tensors, 'decoder_blocks.')
  except (KeyError, ValueError, IndexError) as error:
    raise UserError(
      f'the file does not hold a vision transformer ({error} is missing or has a wrong shape); it'
      f' holds {grouped(tensors)}.'
    ) from error
  if size is None:
    rows = [name for name, row in vit.SIZES.items() if row.width == width]
    if not rows:
      widths = ', '.join(f'{name}: {row.width}' for name, row in vit.SIZES.items())
      raise UserError(
        f'no row of the size table has width {width} (widths are {widths}), so the number of heads'
        ' is unknown; give --model if it is one of these with other shapes.'
      )
    row = vit.SIZES[rows[0]]._asdict() | {'depth': _depth(tensors, 'blocks.')}
    row |= {'width': width, 'patch_size': patch_size, 'mlp_ratio': hidden / width}
  else:
    row = vit.SIZES[size]._asdict()
  if decoder and decoder['decoder_width'] != row['decoder_width']:
    decoder['decoder_num_heads'] = PUBLISHED_DECODER_HEADS
  grid = round(tokens**0.5)
  try:
    return Architecture(**(row | decoder), image_size=grid * row['patch_size'])
  except ValueError as error:
    raise UserError(f'the tensors of the file fit no model: {error}') from error


def _depth(tensors: Iterable[str], prefix: str) -> int:
  return len({name.split('.')[1] for name in tensors if name.startswith(prefix)})


def _fresh_tensors(architecture: Architecture, names: list[str]) -> dict[str, np.ndarray]:
  """Initialises the named tensors as published; none of them is in a block of the encoder.

  Raises:
    UserError: there are too many numbers to draw.
  """
  if not names:
    return {}
  shapes = layouts.tensor_shapes(architecture)
  total = sum(math.prod(shapes[name]) for name in names)
  if total > MOST_FRESH:
    raise UserError(
      f'the file says that it is of {architecture}, and does not have {total} numbers of it, in'
      f' {grouped(names)}; correct its "args", or save it without them.'
    )
  shallow = dataclasses.replace(architecture, depth=1)
  params = mae.init_params(jax.random.key(0), shallow)
  state = layouts.to_torch(params, shallow)
  return {name: state[name] for name in names}


def check_finite(state: Mapping[str, np.ndarray], where: str) -> None:
  """Checks that all weights are finite.

  Raises:
    UserError: some are not; names the tensors, and `where` they are from.
  """
  bad = [name for name, array in state.items() if not np.isfinite(array).all()]
  if bad:
    raise UserError(
      f'{where} has values that are not finite, in {grouped(bad)}; give weights from before the'
      ' run diverged.'
    )


def grouped(names: Iterable[str]) -> str:
  """Returns the number and names of tensors as text; blocks and the like are counted."""
  names = list(names)
  groups = collections.Counter(name.split('.')[0] for name in names)
  return f'{len(names)} tensors: ' + ', '.join(
    next(name for name in names if name.split('.')[0] == group)
    if count == 1
    else f'{group}.* ({count})'
    for group, count in groups.items()
  )
