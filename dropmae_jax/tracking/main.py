"""The one-stream tracker: follows objects, scores results, converts weights; see docs/tracker.md.

dropmae-tracker run --checkpoint=FILE --dataset=got10k --root=ROOT --output=DIR [--batch=N]
dropmae-tracker video --checkpoint=FILE --video=FILE --box=X,Y,W,H --output=FILE.mp4
dropmae-tracker score --results=DIR --dataset=got10k --root=ROOT [--toolkit=NAME]
dropmae-tracker convert --checkpoint=FILE --output=FILE.pth.tar [--fold_identities]

Each has a --help of its own.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Sequence

import jax
from etils import epath

from dropmae_jax.evaluation import results_folder
from dropmae_jax.pytorch import weight_files
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import RunFailed, UserError, first_line, lacks_memory
from dropmae_jax.runtime.paths import absolute, is_folder
from dropmae_jax.tracking import crops, exchange
from dropmae_jax.tracking.crops import CropOptions
from dropmae_jax.tracking.exchange import TrackerWeights
from dropmae_jax.tracking.follow import run, track, video
from dropmae_jax.tracking.scoring import conventions, score
from dropmae_jax.tracking.sequences import benchmarks
from dropmae_jax.tracking.sequences.sequence import Sequence as TrackedSequence

TEMPLATE_FACTOR = 2.0
KEEP_RATE = 0.7


def _parser(job: str, description: str) -> cli.Parser:
  return cli.Parser(prog=f'dropmae-tracker {job}', description=description)


def _box(text: str) -> tuple[float, ...]:
  numbers = text.split(',')
  if len(numbers) != 4 or not all(re.fullmatch(r'-?\d{1,9}(\.\d*)?', each) for each in numbers):
    raise argparse.ArgumentTypeError(f'{text!r} is not X,Y,W,H in pixels, such as 40,30,64,48')
  return tuple(map(float, numbers))


def _positive(text: str) -> int:
  if not re.fullmatch(r'[1-9]\d{0,3}', text):
    raise argparse.ArgumentTypeError(f'{text!r} is not a number from 1 to 9999')
  return int(text)


def _seed(text: str) -> int:
  if not re.fullmatch(r'\d{1,9}', text):
    raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 to 999999999')
  return int(text)


def _add_weights(parser: cli.Parser) -> None:
  """Adds the options that say which tracker it is."""
  add = parser.add_argument
  add(
    '--checkpoint', type=epath.Path, required=True, metavar='PATH',
    help='a tracker (.pth.tar, .pth or .safetensors); or pre-trained weights, a file or a training'
    ' workdir, to which a head with random weights is added',
  )  # fmt: skip
  add('--model', metavar='SIZE', help='of pre-trained weights, if their file does not tell')
  add(
    '--search_size', type=_positive, metavar='PIXELS',
    help='of a tracker that starts from pre-trained weights, with a template of half the size;'
    ' default: 256',
  )  # fmt: skip
  add('--seed', type=_seed, metavar='N', help='of the random head; default: 0')


def _add_crops(parser: cli.Parser) -> None:
  """Adds the options of how it follows objects."""
  add = parser.add_argument
  add(
    '--search_factor', type=float, metavar='F',
    help='side of the search region over that of the box; default: as published, 4 at 256 pixels'
    ' and 5 at 384',
  )  # fmt: skip
  add(
    '--keep_rate', type=float, default=KEEP_RATE, metavar='R',
    help='share of the search tokens that stay at each elimination (%(default)s)',
  )  # fmt: skip


def _load(given: argparse.Namespace) -> TrackerWeights:
  """Reads a tracker, or starts one from pre-trained weights; says which."""
  path = given.checkpoint
  file = None if is_folder(path) else weight_files.read(path)
  if file is None or not exchange.is_tracker(file):
    weights = exchange.start(
      jax.random.key(given.seed or 0),
      path,
      file=file,
      size=given.model,
      search_size=given.search_size or 256,
    )
  else:
    for name in ('model', 'search_size', 'seed'):
      if getattr(given, name) is not None:
        raise UserError(f'--{name} does not go with {path}, which is a tracker; leave it out.')
    weights = exchange.read(path, file=file)
  for line in weights.report:
    cli.print_line(line)
  return weights


def _network(
  given: argparse.Namespace, weights: TrackerWeights
) -> tuple[track.Locate, CropOptions]:
  """Returns the network's step and the crops that it takes.

  Raises:
    UserError: an option is out of range, or must be given.
  """
  a = weights.architecture
  if not 0 < given.keep_rate <= 1:
    raise UserError(f'--keep_rate={given.keep_rate:g} is out of range; use above 0, at most 1.')
  factor = given.search_factor
  if factor is None:
    if a.search_size not in crops.CROP_OPTIONS:
      raise UserError(
        f'there is no published search factor for search_size={a.search_size}; give'
        ' --search_factor, such as 4.'
      )
    factor = crops.CROP_OPTIONS[a.search_size].search_factor
  if not 1 <= factor <= 100:
    raise UserError(f'--search_factor={factor:g} is out of range; use at least 1, at most 100.')
  locate = track.make_locate(a, weights.params, weights.statistics, keep_rate=given.keep_rate)
  return locate, CropOptions(a.template_size, a.search_size, TEMPLATE_FACTOR, factor)


def _digest(sequences: Sequence[TrackedSequence]) -> str:
  """Returns the sha256 of what boxes depend on: names, numbers of frames and first boxes."""
  rows = [(each.name, each.num_frames, each.first_box.tolist()) for each in sequences]
  return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _run(arguments: Sequence[str]) -> None:
  parser = _parser('run', 'Tracks all sequences of a data set.')
  _add_weights(parser)
  add = parser.add_argument
  add('--dataset', choices=benchmarks.BENCHMARKS, required=True)
  add('--root', type=pathlib.Path, required=True, help='of the data set, as it is distributed')
  add('--split', help='of the data set; default: its set for testing')
  add('--output', type=pathlib.Path, required=True, metavar='DIR', help='new, or to go on with')
  add(
    '--batch', type=_positive, default=1, metavar='N',
    help='sequences that are followed side by side (%(default)s)',
  )  # fmt: skip
  _add_crops(parser)
  given = parser.parse_args(arguments)
  sequences = benchmarks.open_sequences(given.dataset, given.root, given.split)
  weights = _load(given)
  locate, options = _network(given, weights)
  settings = {
    'dataset': given.dataset,
    'root': str(given.root.absolute()),
    'split': given.split,
    'sequences': _digest(sequences),
    'checkpoint': str(absolute(given.checkpoint)),
    'weights': results_folder.digest((weights.params, weights.statistics)),
    'tracker': dataclasses.asdict(weights.architecture),
    'crops': options._asdict(),
    'keep_rate': given.keep_rate,
    'versions': results_folder.versions(),
    'device': jax.devices()[0].device_kind,
  }
  folder = run.run(
    given.dataset, sequences, locate, options, given.output,
    settings=settings, batch_size=given.batch,
  )  # fmt: skip
  cli.print_line(f'{folder}: boxes of {len(sequences)} sequences; score them with')
  command = ['dropmae-tracker', 'score', f'--results={folder}']
  command += [f'--dataset={given.dataset}', f'--root={given.root}']
  command += [f'--split={given.split}'] if given.split else []
  cli.print_line(f'  {shlex.join(command)}')


def _video(arguments: Sequence[str]) -> None:
  parser = _parser('video', 'Follows one object through a video file.')
  _add_weights(parser)
  add = parser.add_argument
  add('--video', type=pathlib.Path, required=True, metavar='FILE')
  add(
    '--box', type=_box, required=True, metavar='X,Y,W,H',
    help='the object in the first frame: its upper left corner, width and height in pixels',
  )  # fmt: skip
  add('--output', type=epath.Path, required=True, metavar='FILE.mp4')
  _add_crops(parser)
  given = parser.parse_args(arguments)
  locate, options = _network(given, _load(given))
  result = video.follow(given.video, given.box, locate, options, given.output)
  rate = (len(result.boxes) - 1) / max(result.seconds.sum(), 1e-9)
  cli.print_line(f'{given.output}: {len(result.boxes)} frames, {rate:.1f} frames/s')


def _score(arguments: Sequence[str]) -> None:
  parser = _parser('score', 'Scores results by the rules of a toolkit.')
  add = parser.add_argument
  add('--results', type=pathlib.Path, required=True, metavar='DIR', help='of all sequences')
  add('--dataset', choices=benchmarks.BENCHMARKS, required=True)
  add('--root', type=pathlib.Path, required=True, help='of the data set, as it is distributed')
  add('--split', help='of the data set; default: its set for testing')
  add(
    '--toolkit', choices=conventions.CONVENTIONS, metavar='NAME',
    help=f'whose rules: {", ".join(conventions.CONVENTIONS)}; default: those that papers report',
  )  # fmt: skip
  add(
    '--others', type=pathlib.Path, nargs='+', default=[], metavar='DIR',
    help='results of other trackers, which are named after their folders',
  )  # fmt: skip
  add(
    '--output', type=pathlib.Path, metavar='DIR',
    help='gets scores.json and a plot (PNG) of each curve; default: only a table is printed',
  )  # fmt: skip
  given = parser.parse_args(arguments)
  content = score.score(
    given.results, given.dataset, given.root, given.toolkit,
    split=given.split, others=tuple(given.others), plot_folder=given.output,
  )  # fmt: skip
  if given.output:
    results_folder.write_json(given.output / 'scores.json', content)
  for line in score.table(content):
    cli.print_line(line)


def _convert(arguments: Sequence[str]) -> None:
  parser = _parser('convert', 'Writes a tracker for the published PyTorch programs.')
  _add_weights(parser)
  add = parser.add_argument
  add(
    '--output', type=epath.Path, required=True, metavar='FILE',
    help='.pth.tar as the published ones, .pth or .safetensors',
  )  # fmt: skip
  add(
    '--fold_identities', action='store_true',
    help='for plain OSTrack, which has no frame identities: put them into the position tables',
  )  # fmt: skip
  add(
    '--verify', action=argparse.BooleanOptionalAction,
    help='run both networks and compare them; done by default if PyTorch is installed',
  )  # fmt: skip
  given = parser.parse_args(arguments)
  weights = _load(given)
  lines = exchange.write(given.output, weights, fold=given.fold_identities, verify=given.verify)
  for line in lines:
    cli.print_line(line)


JOBS: dict[str, Callable[[Sequence[str]], None]] = {
  'run': _run,
  'video': _video,
  'score': _score,
  'convert': _convert,
}


def main() -> None:
  """Runs the command line."""
  parser = cli.Parser(
    prog='dropmae-tracker',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('job', choices=JOBS)
  given = parser.parse_args(sys.argv[1:2])
  try:
    JOBS[given.job](sys.argv[2:])
  except Exception as error:
    if not lacks_memory(error):
      raise
    raise RunFailed(f'there is too little memory ({first_line(error)}); lower --batch.') from error


def command() -> None:
  """The entry point dropmae-tracker."""
  cli.run(main)


if __name__ == '__main__':
  command()
