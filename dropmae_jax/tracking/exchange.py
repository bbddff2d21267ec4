"""Weights of trackers in and out: DropTrack's and OSTrack's files, and a start from pre-training.

Files have the tensors of the published trackers under 'net', those that the tracker does not use
included, since the published programs load them strictly. Beside them is 'tracker', the numbers of
`TrackerArchitecture` that shapes do not tell, such as those of heads.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Key

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.model import position_embedding, vit
from dropmae_jax.pytorch import import_model, layouts, weight_files
from dropmae_jax.pytorch.layouts import Tensor
from dropmae_jax.pytorch.weight_files import WeightFile
from dropmae_jax.runtime import atomic_file
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.runtime.paths import Path, is_folder
from dropmae_jax.tracking import model
from dropmae_jax.tracking.head import BRANCHES, NUM_NORMALISED, Maps
from dropmae_jax.tracking.model import TrackerArchitecture

KEY, ENTRY = 'net', 'tracker'
TOLD = ('num_heads', 'elimination_blocks')
ENCODER = 'backbone.'
# Template, then search image.
TABLES = ('backbone.pos_embed_z', 'backbone.pos_embed_x')
IDENTITIES = ('backbone.temporal_pos_embed_z', 'backbone.temporal_pos_embed_x')
_TOP_LEVEL = (
  'cls_token',
  'pos_embed',
  'temporal_pos_embed_x',
  'temporal_pos_embed_z',
  'pos_embed_z',
  'pos_embed_x',
)
# Of a layer, in the published order; a convolution has the first two.
_LEAVES = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_COUNT = 'num_batches_tracked'


class TrackerWeights(NamedTuple):
  """A tracker.

  Attributes:
    params: pure dict of numpy arrays, or of arrays on devices.
    statistics: running ones of the head, likewise.
    architecture: of the tracker.
    report: lines that say where it is from.
  """

  params: dict
  statistics: dict
  architecture: TrackerArchitecture
  report: list[str]


@functools.lru_cache(maxsize=8)
def tensors(architecture: TrackerArchitecture) -> tuple[Tensor, ...]:
  """Returns the tensors of a file, parameters and running statistics, in the published order."""
  _, params = model.abstract_tracker(architecture)
  statistics = jax.eval_shape(functools.partial(model.init_statistics, architecture))
  leaves = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(statistics)
  by_name = {}
  for path, leaf in leaves.items():
    tensor = layouts.tensor_at(path, leaf.shape, architecture.patch_size)
    by_name[tensor.name] = tensor
  names = (f'{layer}.{leaf}' for layer in _layers(architecture) for leaf in _LEAVES)
  names = [f'{ENCODER}{name}' for name in _TOP_LEVEL] + [name for name in names if name in by_name]
  return tuple(by_name[name] for name in names)


def _layers(architecture: TrackerArchitecture) -> Iterator[str]:
  yield f'{ENCODER}patch_embed.proj'
  for block in range(architecture.depth):
    yield from (f'{ENCODER}blocks.{block}.{layer}' for layer in layouts.BLOCK_LAYERS)
  yield f'{ENCODER}norm'
  for branch in BRANCHES:
    for layer in range(1, NUM_NORMALISED + 1):
      yield from (f'box_head.conv{layer}_{branch}.{part}' for part in range(2))
    yield f'box_head.conv{NUM_NORMALISED + 1}_{branch}'


def to_torch(
  params: dict, statistics: dict, architecture: TrackerArchitecture
) -> dict[str, np.ndarray]:
  """Returns the state dict of a tracker; no two arrays share memory.

  The published programs add the identity z to the template. So a tracker of another order is
  written with its identities exchanged, which gives the same outputs.
  """
  leaves = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(statistics)
  state = {}
  for tensor in tensors(architecture):
    dtype = np.int64 if tensor.name.endswith(_COUNT) else np.float32
    leaf = layouts.tensor_of(np.asarray(leaves[tensor.path]), tensor)
    state[tensor.name] = np.array(leaf, dtype, order='C')
  if architecture.identity_order != 'zx':
    first, second = IDENTITIES
    state[first], state[second] = state[second], state[first]
  return state


def from_torch(
  state: Mapping[str, np.ndarray], architecture: TrackerArchitecture
) -> tuple[dict, dict]:
  """Returns parameters and running statistics of a state dict; the inverse of `to_torch`.

  They share no memory with it.

  Raises:
    UserError: tensors are missing, unexpected, of another shape or type, or no weights of a
      tracker; names up to three.
  """
  expected = tensors(architecture)
  layouts.check_shapes(state, {each.name: each.shape for each in expected}, architecture)
  counts = {name: each for name, each in state.items() if name.endswith(_COUNT)}
  for name, count in counts.items():
    if count.dtype.kind not in 'iu' or not 0 <= count < 2**31:
      raise UserError(f'{name} is {count} ({count.dtype}) and no count; give another file.')
  floats = layouts.as_float32({name: each for name, each in state.items() if name not in counts})
  for name, each in floats.items():
    if name.endswith('running_var') and (each < 0).any():
      raise UserError(f'{name} has negative variances; give another file.')
  params, statistics = {}, {}
  for tensor in expected:
    if tensor.path[-1] == _COUNT:
      statistics[tensor.path] = counts[tensor.name].astype(np.int32)
    else:
      part = statistics if tensor.path[-1] in _LEAVES[2:] else params
      # A copy: what was read is a view of the file, which somebody may overwrite.
      part[tensor.path] = np.array(layouts.leaf_of(floats[tensor.name], tensor), order='C')
  if architecture.identity_order != 'zx':
    first, second = (('backbone', name.removeprefix(ENCODER)) for name in IDENTITIES)
    params[first], params[second] = params[second], params[first]
  return traverse_util.unflatten_dict(params), traverse_util.unflatten_dict(statistics)


def is_tracker(file: WeightFile) -> bool:
  """Whether a file has a tracker's head, rather than pre-trained weights alone."""
  return any('box_head.' in name for name in file.tensors)


def read(path: Path, *, file: WeightFile | None = None) -> TrackerWeights:
  """Reads a tracker: a file of DropTrack, of OSTrack or of ours. No pickled code runs.

  A file without frame identities, such as OSTrack's, gets identities of zeros.

  Args:
    path: of the file.
    file: its content, if it was read before.

  Raises:
    UserError: it cannot be read, or holds no tracker.
  """
  file = file or weight_files.read(path)
  state = dict(file.tensors)
  if all(name.startswith('module.') for name in state):  # Of PyTorch's DistributedDataParallel.
    state = {name.removeprefix('module.'): each for name, each in state.items()}
  try:
    architecture, assumed = _architecture(state, file)
    report = [file.integrity, *import_model.origin(file, '')]
    missing = [name for name in IDENTITIES if name not in state]
    if len(missing) == 2:
      report.append('frame identities: none in the file, so they are zero')
      state |= {name: np.zeros((1, 1, architecture.width), np.float32) for name in missing}
    params, statistics = from_torch(state, architecture)
  except UserError as error:
    raise UserError(f'{path} cannot be read as a tracker: {error}') from error
  import_model.check_finite(state, str(path))
  if isinstance(file.entries.get('epoch'), int):
    report.append(f'epoch {file.entries["epoch"]}')
  report += [f'taken: {len(file.tensors)} tensors of {architecture}', *assumed]
  other = collections.Counter(str(each.dtype) for each in state.values())
  report += [
    f'converted to float32: {count} of {dtype}'
    for dtype, count in other.items()
    if dtype in layouts.FLOATS and dtype != 'float32'
  ]
  return TrackerWeights(params, statistics, architecture, report)


def _architecture(
  state: Mapping[str, np.ndarray], file: WeightFile
) -> tuple[TrackerArchitecture, list[str]]:
  """Returns what the shapes and the file tell, and lines on what is assumed beside that."""
  try:
    width, _, patch_size, _ = state[f'{ENCODER}patch_embed.proj.weight'].shape
    shape = {
      'template_size': _grid(state, TABLES[0]) * patch_size,
      'search_size': _grid(state, TABLES[1]) * patch_size,
      'pretraining_size': _grid(state, f'{ENCODER}pos_embed', extra=1) * patch_size,
      'patch_size': patch_size,
      'width': width,
      'depth': len({name.split('.')[2] for name in state if name.startswith(f'{ENCODER}blocks.')}),
      'mlp_ratio': state[f'{ENCODER}blocks.0.mlp.fc1.weight'].shape[0] / max(width, 1),
      'head_channels': state['box_head.conv1_ctr.0.weight'].shape[0],
    }
  except (KeyError, ValueError, IndexError) as error:
    raise UserError(
      f'{error} is missing or has a wrong shape; give a file of a tracker with the centre head.'
    ) from error
  told = file.entries.get(ENTRY)
  try:
    if isinstance(told, dict):
      return TrackerArchitecture(**shape, **_told(told)), []
    row = next((row for row in vit.SIZES.values() if row.width == width), None)
    if row is None:
      widths = ', '.join(f'{name}: {each.width}' for name, each in vit.SIZES.items())
      raise ValueError(f'its width is {width}, and the size table has {widths}')
    blocks = model.elimination_blocks(shape['depth'])
    architecture = TrackerArchitecture(**shape, num_heads=row.num_heads, elimination_blocks=blocks)
  except (TypeError, ValueError) as error:
    reason = str(error).rstrip('.')
    raise UserError(f'its numbers fit no tracker ({reason}); give another file.') from error
  return architecture, [
    f'assumed, as the file does not tell: {row.num_heads} attention heads, candidate elimination in'
    f' the blocks {", ".join(map(str, blocks))}'
  ]


def _grid(state: Mapping[str, np.ndarray], name: str, *, extra: int = 0) -> int:
  """Returns the patches along a side of the frames that a position table is for.

  Args:
    state: of a tracker.
    name: of the table.
    extra: slots that it has beside those of the patches.
  """
  _, slots, _ = state[name].shape
  grid = math.isqrt(slots - extra)
  if grid**2 != slots - extra:
    raise ValueError(name)
  return grid


def _told(told: dict[str, Any]) -> dict[str, Any]:
  """Checks what a file of ours says beside its shapes; json has made a list of its tuple.

  Raises:
    TypeError: it is not that.
  """
  heads, blocks = (told.get(name) for name in TOLD)
  numbers = [heads, *blocks] if isinstance(blocks, list | tuple) else [None]
  if told.keys() != set(TOLD) or not all(type(each) is int for each in numbers):
    raise TypeError(f'it says {told!r}'[:200])
  return {'num_heads': heads, 'elimination_blocks': tuple(blocks)}


def start(
  key: Key[Array, ''],
  path: Path,
  *,
  file: WeightFile | None = None,
  size: str | None = None,
  search_size: int = 256,
  **other: int | float | str,
) -> TrackerWeights:
  """Starts a tracker from pre-trained weights; its head is newly initialised.

  Args:
    key: of what is initialised.
    path: a workdir, or any file that `import_model` reads, also that of another method.
    file: the content of the file, if it was read before.
    size: a row of `vit.SIZES`; needed only if the file does not tell it.
    search_size: side of the search image in pixels; that of the template is half of it.
    **other: further fields of `TrackerArchitecture`, such as `identity_order`.

  Raises:
    UserError: it cannot be read, holds no encoder, or does not fit `other`.
  """
  if file is None and is_folder(path):
    if size is not None:
      raise UserError(f'--model={size} goes with a file, and {path} is a workdir; leave it out.')
    weights = saved_weights.load_weights(path)
    encoder, source = layouts.to_torch(weights.params, weights.architecture), weights.architecture
    report, class_token = [f'encoder: step {weights.step} of {path}'], None
  else:
    file = file or weight_files.read(path)
    of_file = import_model.read_model(file, size=size, needs_decoder=False)
    encoder, source = of_file.state, of_file.architecture
    class_token = of_file.unused.get(layouts.CLASS_TOKEN)
    report = [f'encoder: {path}', file.integrity, *of_file.report]
    fresh = [name for name in of_file.fresh if not layouts.is_of_decoder(name)]
    if fresh:
      report.append(
        f'initialised (seed 0), because the file does not have them: {import_model.grouped(fresh)}'
      )
  patches = 2 * source.patch_size
  if search_size % patches:
    fitting = max(1, round(search_size / patches)) * patches
    raise UserError(
      f'--search_size={search_size} is not a multiple of {patches}, two patches; give for example'
      f' {fitting}.'
    )
  shape = {
    'template_size': search_size // 2,
    'search_size': search_size,
    'patch_size': source.patch_size,
    'width': source.width,
    'depth': source.depth,
    'num_heads': source.num_heads,
    'mlp_ratio': source.mlp_ratio,
    'pretraining_size': source.image_size,
    'elimination_blocks': model.elimination_blocks(source.depth),
  }
  try:
    architecture = TrackerArchitecture(**(shape | other))
  except ValueError as error:
    raise UserError(f'no tracker can start from {path}: {error}') from error
  # With this order, names of tensors are those of parameters.
  published = dataclasses.replace(architecture, identity_order='zx')
  state = to_torch(model.init_params(key, published), model.init_statistics(published), published)
  encoder = {f'{ENCODER}{name}': each for name, each in encoder.items()}
  state |= {name: each for name, each in encoder.items() if name in state}
  expected = state[f'{ENCODER}{layouts.CLASS_TOKEN}']
  if class_token is not None and class_token.shape == expected.shape:
    state[f'{ENCODER}{layouts.CLASS_TOKEN}'] = class_token
  for name, grid in zip(
    TABLES, (architecture.template_grid, architecture.search_grid), strict=True
  ):
    table = position_embedding.resample_table(state[f'{ENCODER}pos_embed'], grid)
    state[name] = np.array(table[:, 1:])
  import_model.check_finite(state, str(path))
  params, statistics = from_torch(state, published)
  report.append(
    f'position tables: resampled from {source.image_size} to {architecture.template_size} and'
    f' {architecture.search_size} pixels'
  )
  report.append('initialised: the head, at random, so that it does not track before it is trained')
  return TrackerWeights(params, statistics, architecture, report)


def fold_identities(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns a tracker for OSTrack, which has no frame identities and drops them without a word.

  They are added to the position tables, so that all tokens, and so all outputs, are the same.
  """
  tables = {name: state[name] + state[of] for name, of in zip(TABLES, IDENTITIES, strict=True)}
  return {name: tables.get(name, each) for name, each in state.items() if name not in IDENTITIES}


def write(
  path: Path,
  tracker: TrackerWeights,
  *,
  fold: bool = False,
  verify: bool | None = None,
) -> Iterator[str]:
  """Writes a tracker as a file, with its .sha256 and .json; yields progress lines.

  Args:
    path: the file: .pth.tar as the published ones, .pth, or .safetensors.
    tracker: what to write.
    fold: write what `fold_identities` returns.
    verify: run the written network in PyTorch and compare; None does so if PyTorch is installed.

  Raises:
    UserError: it cannot be written, or does not reproduce the tracker; then nothing is written.
  """
  file_format = weight_files.format_of(path)
  if file_format == 'pth':
    weight_files.import_torch()
  atomic_file.check_file(path)
  state = to_torch(tracker.params, tracker.statistics, tracker.architecture)
  state = fold_identities(state) if fold else state
  told = {name: getattr(tracker.architecture, name) for name in TOLD}
  with atomic_file.staged(path, num_bytes=sum(each.nbytes for each in state.values())) as partial:
    weight_files.write(partial, state, file_format=file_format, key=KEY, entries={ENTRY: told})
    written = weight_files.read(partial).tensors
    changed = [name for name in state if not np.array_equal(written.get(name), state[name])]
    if changed:
      raise UserError(
        f'--output={path} does not read back as written, first in {changed[0]}; try again.'
      )
    difference = yield from _verified(written, tracker, verify)
    shape = dataclasses.asdict(tracker.architecture) | {'identity_order': 'zx'}
    card = {'layout': ENTRY, 'format': file_format, ENTRY: shape, 'fold_identities': fold}
    atomic_file.write_card(partial, card | {'largest_relative_difference': difference})
  yield f'{path}: {len(state)} tensors of a tracker'


def _verified(
  written: Mapping[str, np.ndarray], tracker: TrackerWeights, verify: bool | None
) -> Generator[str, None, float | None]:
  """Compares the outputs of a written file in PyTorch with ours; returns their difference."""
  if verify is False:
    yield 'not verified: --no-verify'
    return None
  if fault := weight_files.torch_fault():
    if verify:
      raise UserError(f'{fault}, so --verify cannot run the network; leave --verify out.')
    yield f'not verified: {fault}'
    return None
  from dropmae_jax.pytorch import reference as of_encoder
  from dropmae_jax.tracking import reference

  a = tracker.architecture
  images = (
    of_encoder.fixed_images(a.template_size)[0],
    of_encoder.fixed_images(a.search_size)[1],
  )
  of_file = reference.maps(written, images, num_heads=a.num_heads)
  difference = of_encoder.relative(of_file, jax_maps(tracker, images))

  def rounding() -> float:
    double = {name: each.astype(np.float64) for name, each in written.items()}
    exact = tuple(image.astype(np.float64) for image in images)
    return of_encoder.relative(of_file, reference.maps(double, exact, num_heads=a.num_heads))

  yield of_encoder.check_difference(difference, rounding, what='maps')
  return difference


def jax_maps(tracker: TrackerWeights, images: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
  """Runs a tracker as `reference.maps` runs that of a file."""
  graphdef, _ = model.abstract_tracker(tracker.architecture)
  everything = tracker.architecture.kept(1.0)

  @jax.jit
  def run(params: dict, statistics: dict, template: Array, search: Array) -> Maps:
    network = nnx.merge(graphdef, params)
    return network(template[None], search[None], statistics, kept=everything)[0]

  with jax.default_matmul_precision('highest'):
    maps = jax.tree.map(np.asarray, run(tracker.params, tracker.statistics, *images))
  return [maps.score, *(np.moveaxis(each[0], -1, 0) for each in (maps.size, maps.offset))]
