r"""What the tracker costs: parameters, products, memory of training, and seconds per frame.

    python -m benchmarks.tracker_cost --parts counts --json=FILE
    python -m benchmarks.tracker_cost --parts memory --target=a100 --search_sizes 256
    python -m benchmarks.tracker_cost --parts speed --rounds=5

Memory is what a compiler says of one training step on one device, which need not be here: see
`benchmarks.compiler`. Only seconds per frame are measured, with random weights on a generated clip.
Results: docs/tracker.md.
"""

import argparse
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from benchmarks import rounds
from benchmarks.rounds import Way
from dropmae_jax.data import synthetic_clips
from dropmae_jax.data.synthetic_clips import ClipOptions
from dropmae_jax.memory import memory_of
from dropmae_jax.model import flops, vit
from dropmae_jax.runtime import cli, targets
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.runtime.targets import TARGETS
from dropmae_jax.tracking import head, model, train_step
from dropmae_jax.tracking.crops import CROP_OPTIONS
from dropmae_jax.tracking.elimination import Kept
from dropmae_jax.tracking.follow import track
from dropmae_jax.tracking.follow.track import Source
from dropmae_jax.tracking.model import TrackerArchitecture
from dropmae_jax.tracking.train_step import Batch

PARTS = 'counts', 'memory', 'speed'
# Of the GPUs that trackers are trained on, in GB of 1e9 bytes.
CARDS = 24, 80
FORMS = 'masked', 'gathered'
DTYPES = 'float32', 'bfloat16'
REMATS = 'none', 'full'
# Memory is settled before LLVM makes code, so that code need not be good.
COMPILER_OPTIONS = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
# Of the generated clip in pixels.
FRAME_SIZE = 480, 640


def count_products(architecture: TrackerArchitecture, kept: Sequence[int]) -> int:
  """Returns the multiplications of a forward pass of one sample, by formula, matrix products only.

  Args:
    architecture: of the tracker.
    kept: search tokens that stay after each elimination, in the gathered form.
  """
  a = architecture
  template = a.template_grid**2
  tokens = template + a.search_grid**2
  total = tokens * 3 * a.patch_size**2 * a.width
  remaining = dict(zip(a.elimination_blocks, kept, strict=True))
  for index in range(a.depth):
    after = template + remaining.get(index, tokens - template)
    mlp = 2 * a.width * int(a.width * a.mlp_ratio)
    total += flops.block(tokens, a.width, a.mlp_ratio) // 2 - (tokens - after) * mlp
    tokens = after
  # Each convolution has half the channels of the one before it.
  channels = [a.width, *(a.head_channels >> each for each in range(head.NUM_NORMALISED))]
  convolutions = sum(9 * before * after for before, after in itertools.pairwise(channels))
  per_cell = len(head.BRANCHES) * convolutions + channels[-1] * sum(head.BRANCHES.values())
  return total + a.search_grid**2 * per_cell


def _images(architecture: TrackerArchitecture, batch_size: int) -> list[jax.ShapeDtypeStruct]:
  sizes = architecture.template_size, architecture.search_size
  return [jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32) for size in sizes]


def traced_products(architecture: TrackerArchitecture, kept: Kept) -> float:
  """Returns half the FLOPs that XLA counts in a forward pass of one sample, before it compiles."""
  graphdef, params = model.abstract_tracker(architecture)

  def forward(params: dict, statistics: dict, *images: jax.Array) -> head.Maps:
    return nnx.merge(graphdef, params)(*images, statistics, kept=kept)[0]

  statistics = jax.eval_shape(functools.partial(model.init_statistics, architecture))
  lowered = jax.jit(forward).lower(params, statistics, *_images(architecture, 1))
  return lowered.cost_analysis()['flops'] / 2


def count(architecture: TrackerArchitecture, keep_rate: float) -> dict[str, float]:
  """Returns parameters, tensors of a checkpoint, and products with and without elimination."""
  _, params = model.abstract_tracker(architecture)
  statistics = jax.eval_shape(functools.partial(model.init_statistics, architecture))
  leaves = jax.tree.leaves(params)
  is_trained = jax.tree.leaves(model.is_trained(params))
  row: dict[str, float] = {
    'trained': sum(leaf.size for leaf, is_in in zip(leaves, is_trained, strict=True) if is_in),
    'stored': sum(leaf.size for leaf in leaves),
    'tensors': len(leaves) + len(jax.tree.leaves(statistics)),
  }
  for name, rate in (('all', 1.0), ('kept', keep_rate)):
    kept = architecture.kept(rate)
    row[f'gmac_{name}'] = count_products(architecture, kept) / 1e9
    row[f'gmac_{name}_by_xla'] = traced_products(architecture, kept) / 1e9
  return row


def lower_step(
  architecture: TrackerArchitecture,
  device: jax.Device,
  *,
  batch_size: int,
  dtype: str,
  remat: str,
  form: str,
  keep_rate: float,
) -> jax.stages.Lowered:
  """Traces a training step for one device.

  Args:
    architecture: of the tracker.
    device: to compile for.
    batch_size: samples.
    dtype: of matrix products.
    remat: a name in `mae.REMATERIALISATIONS`.
    form: of elimination, one of FORMS.
    keep_rate: of the gathered form; the masked one takes it as an argument.
  """
  graphdef, params = model.abstract_tracker(architecture, dtype=jnp.dtype(dtype), remat=remat)
  # What the numbers are changes neither memory nor time.
  schedule = train_step.learning_rate(4e-4, steps_at_peak=1000)
  tx = train_step.adamw(schedule)
  state = jax.eval_shape(
    lambda params: train_step.init_state(params, model.init_statistics(architecture), tx), params
  )
  boxes = jax.ShapeDtypeStruct((batch_size, 4), jnp.float32)
  batch = Batch(*_images(architecture, batch_size), boxes)
  counts = architecture.kept(keep_rate)
  step = functools.partial(train_step.train_step, graphdef=graphdef, tx=tx, schedule=schedule)
  arguments = [state, batch, jax.eval_shape(lambda: jax.random.key(0))]
  if form == 'masked':
    arguments.append(jax.ShapeDtypeStruct((len(counts),), jnp.int32))
  else:
    step = functools.partial(step, kept=counts)
  sharding = jax.sharding.SingleDeviceSharding(device)
  placed = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
  )
  return jax.jit(step, donate_argnums=0).lower(*placed)


def memories(
  architecture: TrackerArchitecture, given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
  """Yields the memory of a step in every form."""
  (device,) = targets.devices(given.target)
  options = COMPILER_OPTIONS | (targets.GPU_OPTIONS if TARGETS[given.target].gpu else {})
  for dtype, remat, form in itertools.product(given.dtypes, given.remats, given.forms):
    row = {'search_size': architecture.search_size, 'dtype': dtype, 'remat': remat, 'form': form}
    try:
      step = lower_step(
        architecture, device, batch_size=given.batch_size, dtype=dtype, remat=remat, form=form,
        keep_rate=given.keep_rate,
      ).compile(options)  # fmt: skip
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      yield row | {'refused': str(error).splitlines()[0]}
      continue
    memory = memory_of(step)
    fits = {f'fits_{size}_gb': memory['total'] <= size * 1e9 for size in CARDS}
    yield row | {'bytes': memory} | fits


def clip(
  num_frames: int,
) -> tuple[UInt8[np.ndarray, 't h w c'], Float[np.ndarray, '4']]:
  """Returns a generated clip, and the box (x, y, w, h) of the foremost object in frame 0."""
  height, width = FRAME_SIZE
  options = ClipOptions(frames=num_frames, height=height, width=width)
  frames, labels = synthetic_clips.make_clip(np.random.default_rng(0), 'orbiting', options)
  rows, columns = np.nonzero(labels[0] == options.objects)
  corner = np.array([columns.min(), rows.min()])
  size = np.array([columns.max(), rows.max()]) + 1 - corner
  return frames, np.concatenate([corner, size]).astype(float)


def time_tracking(
  architecture: TrackerArchitecture, given: argparse.Namespace
) -> dict[str, dict[str, Any]]:
  """Measures seconds per frame and sequence, cutting of crops included, frames in memory."""
  crops = CROP_OPTIONS[256]._replace(
    template_size=architecture.template_size, search_size=architecture.search_size
  )
  params = model.init_params(jax.random.key(0), architecture)
  statistics = model.init_statistics(architecture)
  frames, box = clip(given.frames + 1)

  def way(batch_size: int, keep_rate: float) -> Way:
    locate = track.make_locate(architecture, params, statistics, keep_rate=keep_rate)

    def follow() -> list:
      sources = [Source(str(each), box, iter(frames)) for each in range(batch_size)]
      return list(track.follow(sources, locate, crops, batch_size=batch_size))

    return Way(follow, wait=lambda _: None)

  cases = {(size, given.keep_rate) for size in given.batch_sizes} | {(min(given.batch_sizes), 1.0)}
  ways = {f'batch {size}, r = {rate:g}': way(size, rate) for size, rate in sorted(cases)}
  seconds, _ = rounds.interleave(ways, rounds=given.rounds, least_seconds=0)
  result = {}
  for name, (size, _) in zip(ways, sorted(cases), strict=True):
    per_frame = [each / (given.frames * size) for each in seconds[name]]
    result[name] = {'seconds_per_frame': rounds.spread(per_frame), 'rounds': per_frame}
  return result


def _row(*cells: object) -> str:
  return '| ' + ' | '.join(map(str, cells)) + ' |'


def _show_counts(size: int, row: Mapping[str, float]) -> str:
  products = (
    f'{row[f"gmac_{name}"]:.1f} ({row[f"gmac_{name}_by_xla"]:.1f})' for name in ('all', 'kept')
  )
  return _row(size, f'{row["trained"]:,}', f'{row["stored"]:,}', row['tensors'], *products)


def _show_memory(row: Mapping[str, Any]) -> str:
  settings = [row[name] for name in ('search_size', 'dtype', 'remat', 'form')]
  if 'refused' in row:
    return _row(*settings, 'does not fit', row['refused'])
  memory = row['bytes']
  fits = ('yes' if row[f'fits_{size}_gb'] else 'no' for size in CARDS)
  sizes = (f'{memory[name] / 1e9:.1f}' for name in ('total', 'argument', 'temp'))
  return _row(*settings, *sizes, *fits)


def _show_speed(name: str, row: Mapping[str, Any]) -> str:
  return _row(name, rounds.show_range(row['seconds_per_frame'], digits=3))


def _heading(*cells: object) -> str:
  return f'\n{_row(*cells)}\n|{"---|" * len(cells)}'


def parse() -> argparse.Namespace:
  """Reads and checks the command line."""
  parser = cli.Parser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--parts', nargs='+', choices=PARTS, default=PARTS, help='default: all')
  add('--model', choices=vit.SIZES, default='B', help='(%(default)s)')
  add(
    '--search_sizes', nargs='+', type=int, default=[256, 384], metavar='PIXELS',
    help='with templates of half the size; speed: the first only; default: 256 384',
  )  # fmt: skip
  add('--keep_rate', type=float, default=0.7, metavar='R', help='(%(default)s)')
  add(
    '--target', choices=sorted(TARGETS), default='cpu',
    help='memory: whose compiler is asked; default: the one of this machine',
  )  # fmt: skip
  add('--batch_size', type=int, default=32, help='memory: samples (%(default)s)')
  for name, values in (('dtypes', DTYPES), ('remats', REMATS), ('forms', FORMS)):
    add(f'--{name}', nargs='+', choices=values, default=values, help='memory; default: both')
  add('--batch_sizes', nargs='+', type=int, default=[1, 4], help='speed: sequences; default: 1 4')
  add('--frames', type=int, default=4, help='speed: of a sequence (%(default)s)')
  add('--rounds', type=int, default=5, help='speed: measurements of each kind (%(default)s)')
  add('--json', type=pathlib.Path, help='file to write the numbers to')
  given = parser.parse_args()
  for name in ('batch_size', 'frames', 'rounds'):
    if getattr(given, name) < 1:
      raise UserError(f'--{name}={getattr(given, name)} is too small; give at least 1.')
  if min(given.batch_sizes) < 1:
    raise UserError(f'--batch_sizes={min(given.batch_sizes)} is too small; give at least 1.')
  if not 0 < given.keep_rate <= 1:
    raise UserError(f'--keep_rate={given.keep_rate:g} is out of range; use above 0, at most 1.')
  rounds.check_output(given.json)
  return given


def main() -> None:
  """The command line."""
  given = parse()
  if 'speed' not in given.parts:
    # Devices of this machine are neither used nor waited for.
    jax.config.update('jax_platforms', 'cpu')
  try:
    architectures = [
      model.tracker_of_size(given.model, template_size=size // 2, search_size=size)
      for size in given.search_sizes
    ]
  except ValueError as error:
    raise UserError(f'--search_sizes: {error}') from error
  content = rounds.about(given)
  print(f'ViT-{given.model}, r = {given.keep_rate:g}')
  if 'counts' in given.parts:
    print(_heading('pixels', 'trained', 'stored', 'tensors', 'GMAC (by XLA)', 'r (by XLA)'))
    content['counts'] = {}
    for each in architectures:
      row = content['counts'][each.search_size] = count(each, given.keep_rate)
      print(_show_counts(each.search_size, row), flush=True)
  if 'memory' in given.parts:
    print(f'\nGB of a training step, {given.batch_size} samples, {given.target}:', end='')
    fits = (f'fits {size}' for size in CARDS)
    print(_heading('pixels', 'dtype', 'remat', 'elimination', 'total', 'arguments', 'temp', *fits))
    content['memory'] = []
    for row in itertools.chain(*(memories(each, given) for each in architectures)):
      content['memory'].append(row)
      print(_show_memory(row), flush=True)
  if 'speed' in given.parts:
    machine = content['machine']
    content['speed'] = time_tracking(architectures[0], given)
    print(_heading(f'{machine["device"]}, {machine["cores"]} cores', 's per frame'))
    for name, row in content['speed'].items():
      print(_show_speed(name, row))
  if given.json:
    given.json.write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
  cli.run(main)
