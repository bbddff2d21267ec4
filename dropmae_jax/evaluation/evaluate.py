"""Scores a checkpoint or a file of weights, without training: labels are propagated through clips.

    dropmae-evaluate davis|vip|jhmdb|tapvid --checkpoint=PATH --root=ROOT --output=DIR

Each clip has the labels of its first frame; those of the others follow from the similarity of
tokens. DIR gets results.json, and results/ in the layout that the benchmark's own tools score. A
clip that is finished is not computed again after a stop. See docs/evaluate.md.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from dropmae_jax.evaluation import features, label_propagation, readouts, results_folder
from dropmae_jax.evaluation.datasets import overlays
from dropmae_jax.evaluation.datasets.benchmark import Benchmark, Clip
from dropmae_jax.evaluation.datasets.davis import Davis
from dropmae_jax.evaluation.datasets.jhmdb import Jhmdb
from dropmae_jax.evaluation.datasets.tapvid import TapVid
from dropmae_jax.evaluation.datasets.vip import Vip
from dropmae_jax.evaluation.label_propagation import Affinities, Propagation
from dropmae_jax.evaluation.protocols import PROTOCOLS, Geometry, Protocol
from dropmae_jax.evaluation.readouts import AttentionStatistics, Readout
from dropmae_jax.model import vit
from dropmae_jax.pytorch import import_model
from dropmae_jax.runtime import cli, workdir_lock
from dropmae_jax.runtime.errors import (
  RunFailed,
  UserError,
  first_line,
  lacks_memory,
  os_errors_as_user_errors,
)

# Each is a class with the members of `benchmark.Benchmark`.
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
  'davis': Davis,
  'vip': Vip,
  'jhmdb': Jhmdb,
  'tapvid': TapVid,
}
READ_AHEAD = 4
REPLACEABLE = 'num_previous', 'radius', 'top_k', 'temperature'  # Fields of Propagation.


@dataclasses.dataclass(frozen=True)
class Options:
  """What a score depends on, beside the weights and the data.

  Attributes:
    protocol: how frames are read, and labels made and read out.
    propagation: how labels are propagated.
    readout: how affinities are computed.
    input_size: (height, width) of the network's input in pixels; None: the protocol's.
  """

  protocol: Protocol
  propagation: Propagation
  readout: Readout
  input_size: tuple[int, int] | None = None


def make_propagation(protocol: Protocol, benchmark: str, **given: float | None) -> Propagation:
  """Returns the settings of a protocol for a benchmark (by name), with those that are given.

  Of these fields of `Propagation`, None keeps the protocol's, and a radius of 0 is no limit.
  """
  changes = {'top_k': protocol.top_k.get(benchmark, protocol.propagation.top_k)}
  changes |= {name: value for name, value in given.items() if value is not None}
  if 'radius' in changes:
    changes['radius'] = changes['radius'] or None
  return dataclasses.replace(protocol.propagation, **changes)


def make_geometry(benchmark: Benchmark, clip: Clip, options: Options, patch_size: int) -> Geometry:
  """Returns the size of the network's input for a clip.

  Sides that are no multiple of the patch size are rounded down or up, by the protocol.
  """
  wanted = options.input_size or benchmark.input_size(clip, options.protocol, patch_size)
  up = patch_size - 1 if options.protocol.rounds_up and not options.input_size else 0
  grid = tuple(max(1, (side + up) // patch_size) for side in wanted)
  return Geometry(tuple(side * patch_size for side in grid), grid)


# Makes the affinities of a clip from its frames, their number and their grid of tokens.
MakeAffinities = Callable[[readouts.Frames, int, tuple[int, int]], Affinities]


def evaluate_clip(
  benchmark: Benchmark,
  clip: Clip,
  options: Options,
  geometry: Geometry,
  make_affinities: MakeAffinities,
) -> Iterator[np.ndarray]:
  """Propagates the labels of a clip; yields the results of all frames, such as masks, in order."""

  def network_input(number: int) -> np.ndarray:
    return options.protocol.network_input(clip.frame(number), geometry.pixels)

  with _read_ahead(network_input, clip.num_frames) as frames:
    labels = label_propagation.propagate(
      make_affinities(frames, clip.num_frames, geometry.grid),
      clip.num_frames,
      benchmark.labels(clip, geometry, options.protocol),
      options.propagation,
    )
    for number, frame_labels in enumerate(labels):
      yield benchmark.read_out(clip, number, frame_labels, geometry, options.protocol)


@contextlib.contextmanager
def _read_ahead(
  read: Callable[[int], np.ndarray], count: int
) -> Iterator[Callable[[int], np.ndarray]]:
  """Yields a function like `read`, of the numbers below `count`, that reads the next ones ahead."""
  pending: dict[int, concurrent.futures.Future] = {}
  with concurrent.futures.ThreadPoolExecutor(READ_AHEAD) as pool:

    def read_ahead(number: int) -> np.ndarray:
      for each in range(number, min(number + READ_AHEAD, count)):
        if each not in pending:
          pending[each] = pool.submit(read, each)
      return pending.pop(number).result()

    try:
      yield read_ahead
    finally:
      pool.shutdown(cancel_futures=True)


def run(
  benchmark: Benchmark,
  encoder: features.Encoder,
  options: Options,
  output: pathlib.Path,
  *,
  settings: Mapping[str, Any],
  visualise: bool = False,
) -> dict[str, Any]:
  """Evaluates all clips and writes the output folder; goes on where an earlier run was stopped.

  Args:
    benchmark: the clips.
    encoder: the model.
    options: of the evaluation.
    output: the folder; new, or of an earlier run with the same settings.
    settings: what the numbers depend on, as values for JSON; written to results.json.
    visualise: write overlays too.

  Returns:
    The content of results.json.

  Raises:
    UserError: the data, or the output folder, cannot be used.
    WorkdirInUse: another evaluation writes to the folder.
  """
  results_folder.make(output)
  with workdir_lock.held(output, '--output'):
    results_folder.claim(output, settings)
    results_folder.remove_partial(output)
    scores, records, computed = {}, {}, 0
    started = time.perf_counter()
    for number, name in enumerate(benchmark.names, 1):
      which = f'{number}/{len(benchmark.names)} {name}'
      with os_errors_as_user_errors(f'clip {name!r} cannot be read', 'complete the data set.'):
        clip = benchmark.open(name)
      geometry = make_geometry(benchmark, clip, options, encoder.architecture.patch_size)
      record = results_folder.make_record(benchmark, clip, geometry, options.protocol)
      folder, path = output / 'results' / name, output / 'clips' / f'{name}.json'
      if folder.is_dir():
        records[name] = results_folder.read_record(path, record, folder)
        results = benchmark.read(clip, folder)
        results_folder.log_line(output, f'{which}: finished before')
      else:
        began = time.perf_counter()
        statistics: list[AttentionStatistics] = []
        make_affinities = functools.partial(
          readouts.model_affinities, encoder, options.readout, options.propagation, statistics
        )
        frames = evaluate_clip(benchmark, clip, options, geometry, make_affinities)
        shows = {'desc': name, 'unit': 'frame', 'leave': False, 'disable': None}
        results = list(tqdm.tqdm(frames, total=clip.num_frames, **shows))
        if statistics:
          means = np.mean(np.array(statistics), axis=0).tolist()
          record['attention'] = dict(zip(AttentionStatistics._fields, means, strict=True))
        records[name] = record
        results_folder.write_json(path, record)
        results_folder.write_results(benchmark, clip, results, folder)
        computed += 1
        now = time.perf_counter()
        left = (now - started) / computed * (len(benchmark.names) - number)
        rate = (now - began) / clip.num_frames
        results_folder.log_line(
          output, f'{which}: {clip.num_frames} frames, {rate:.2f} s each, left {left:.0f} s'
        )
      scores[name] = benchmark.score(clip, results)
      if visualise:
        overlays.write(benchmark, clip, results, output / 'overlays' / name)
    content = {
      'summary': benchmark.summarise(scores),
      'clips': benchmark.table(scores),
      'input_sizes': {name: record['input_size'] for name, record in records.items()},
      'settings': settings,
    }
    if options.readout.kind == 'attention':
      content['attention'] = {
        field: float(np.mean([record['attention'][field] for record in records.values()]))
        for field in AttentionStatistics._fields
      }
    results_folder.write_json(output / 'results.json', content)
  return content


def size_in_pixels(text: str) -> tuple[int, int]:
  """Parses HEIGHTxWIDTH."""
  match = re.fullmatch(r'([1-9]\d{1,4})x([1-9]\d{1,4})', text)
  if not match:
    raise argparse.ArgumentTypeError(f'{text!r} is not HEIGHTxWIDTH in pixels, such as 480x880')
  return int(match[1]), int(match[2])


def parse() -> argparse.Namespace:
  """Parses the command line."""
  parser = cli.Parser(
    prog='dropmae-evaluate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('benchmark', choices=BENCHMARKS)
  add(
    '--checkpoint', type=epath.Path, required=True, metavar='PATH',
    help='a training workdir, or a .pth or .safetensors',
  )  # fmt: skip
  add('--step', type=int, metavar='N', help='of a workdir; default: the newest')
  add('--model', metavar='SIZE', help=f'if a file does not tell: {", ".join(vit.SIZES)}')
  add('--root', type=pathlib.Path, required=True, help='of the data set, as it is distributed')
  add('--split', help="of the data set; default: the benchmark's")
  add('--output', type=pathlib.Path, required=True, metavar='DIR', help='new, or to go on with')
  add('--protocol', choices=PROTOCOLS, default='cropmae', help='(%(default)s)')
  add('--readout', choices=readouts.READOUTS, default='single', help='(%(default)s)')
  add('--centred', action='store_true', help='take away what all tokens have in common')
  add(
    '--identity', choices=readouts.IDENTITIES, default='none',
    help='frame identity that --readout=single adds (%(default)s)',
  )  # fmt: skip
  add('--block', type=int, metavar='N', help='the last block to run, from 1; default: the last')
  add(
    '--class_token', choices=features.CLASS_TOKENS, default='file',
    help='zero: as evaluators give files without one (%(default)s)',
  )  # fmt: skip
  add(
    '--scale', choices=('native', '480x880'),
    help='davis: the size that masks are scored at; default: native',
  )  # fmt: skip
  add(
    '--input_size', type=size_in_pixels, metavar='HxW',
    help="of the network; default: the protocol's",
  )  # fmt: skip
  add(
    '--num_previous', type=int, metavar='N', help='frames that a frame looks at, beside the first'
  )
  add('--radius', type=float, metavar='CELLS', help='0: no limit')
  add('--top_k', type=int, metavar='K')
  add('--temperature', type=float, metavar='T')
  add('--visualise', action='store_true', help='write overlays/CLIP.png and .mp4')
  return parser.parse_args()


def main() -> None:
  """Runs the command line."""
  given = parse()
  benchmark_class = BENCHMARKS[given.benchmark]
  chosen = {}
  for name, parameter in inspect.signature(benchmark_class).parameters.items():
    if name != 'root':
      chosen[name] = getattr(given, name, None) or parameter.default
  for name in ('split', 'scale'):
    if getattr(given, name) and name not in chosen:
      raise UserError(f'--{name} does not go with {given.benchmark}; leave it out.')
  with os_errors_as_user_errors(f'--root={given.root} cannot be read', 'give a readable folder.'):
    benchmark = benchmark_class(given.root, **chosen)
  protocol = PROTOCOLS[given.protocol]
  replaced = {name: getattr(given, name) for name in REPLACEABLE}
  propagation = make_propagation(protocol, given.benchmark, **replaced)
  readout = Readout(given.readout, given.centred, given.identity, given.block)
  if readout.kind == 'attention':
    if given.temperature is not None:
      raise UserError(
        '--temperature does not go with --readout=attention, whose weights are the attention;'
        ' leave it out.'
      )
    propagation = dataclasses.replace(propagation, temperature=None)
  options = Options(protocol, propagation, readout, given.input_size)
  encoder = features.load(
    given.checkpoint, step=given.step, size=given.model, class_token=given.class_token
  )
  readout.check(encoder)
  unused = [
    *(name for name in encoder.tensors if not readout.uses(name, encoder.architecture)),
    *encoder.unused,
  ]
  settings = {
    'benchmark': given.benchmark,
    'root': str(given.root.absolute()),
    **chosen,
    'protocol': given.protocol,
    'propagation': dataclasses.asdict(propagation),
    'readout': dataclasses.asdict(readout),
    'input_size': given.input_size and list(given.input_size),
    'class_token': given.class_token if encoder.class_token is not None else 'none',
    'weights': encoder.source,
    'unused_tensors': unused,
    'versions': results_folder.versions(),
    'device': jax.devices()[0].device_kind,
  }
  for line in encoder.source.get('import', []):
    cli.print_line(line)
  if unused:
    cli.print_line(f'not used (all names are in results.json): {import_model.grouped(unused)}')
  try:
    content = run(
      benchmark, encoder, options, given.output, settings=settings, visualise=given.visualise
    )
  except Exception as error:
    if not lacks_memory(error):
      raise
    raise RunFailed(
      f'there is too little memory ({first_line(error)}); lower --input_size.'
    ) from error
  for line in tables(content):
    cli.print_line(line)
  cli.print_line(f'{given.output}/results.json: {given.benchmark}, protocol {given.protocol}')


def tables(content: Mapping[str, Any]) -> Iterator[str]:
  """Yields the lines of a table with a row for each clip, and of one with the summary."""
  rows = content['clips']
  columns = {name: max(10, len(name)) for name in next(iter(rows.values()))}
  width = max(map(len, rows))
  yield ' '.join([' ' * width, *(f'{name:>{size}}' for name, size in columns.items())])
  for name, numbers in rows.items():
    shown = (f'{numbers[column]:>{size}.2f}' for column, size in columns.items())
    yield ' '.join([f'{name:<{width}}', *shown])
  width = max(map(len, content['summary']))
  for name, number in content['summary'].items():
    yield f'{name:<{width}} {number:>10.2f}'


def command() -> None:
  """The entry point dropmae-evaluate."""
  cli.run(main)


if __name__ == '__main__':
  command()
