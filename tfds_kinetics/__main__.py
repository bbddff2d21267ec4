"""Builds a dataset: dropmae-build --config=NAME --videos=ROOT --data_dir=OUT; see docs/data.md."""

import argparse
import dataclasses
import logging
import os
import pathlib
import re
import resource
import signal
import sys
import urllib.parse
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from tfds_kinetics import build, publish, report
from tfds_kinetics.configs import COLLECTIONS, DATASET
from tfds_kinetics.messages import BadInput, Stopped, log, one_line, print_stack
from tfds_kinetics.shards import VERSION
from tfds_kinetics.tree import printable
from tfds_kinetics.video import FrameOptions
from tfds_kinetics.workers import STOP_SIGNALS, write_shards

STOPPED = os.EX_TEMPFAIL

# Range and help of the flags that are named like the fields of FrameOptions.
OPTION_HELP = {
  'short_side': (16, 4096, 'pixels of the shorter side; larger frames are scaled down'),
  'jpeg_quality': (1, 100, 'JPEG quality of the stored frames'),
  'frame_stride': (1, 1000, 'store every n-th frame'),
  'max_frames': (0, 10**9, 'frames stored of a video, from its start; 0 stores all'),
  'max_damage': (0, 1, "share of a video's packets that may fail to decode"),
  'time_limit': (0.001, 10**6, 'seconds of processor time that a video may take'),
}


class _Parser(argparse.ArgumentParser):
  """An argument parser whose errors are one sentence, without the usage before it."""

  def error(self, message: str) -> NoReturn:
    """Ends the process."""
    self.exit(2, one_line(f'error: {message}; --help lists what there is.') + '\n')


def _name(text: str) -> str:
  """Refuses the empty text that an unset shell variable leaves."""
  if not text:
    raise argparse.ArgumentTypeError('it is empty')
  return text


def _path(text: str) -> pathlib.Path:
  if file := re.fullmatch('file://(?:localhost)?(/.*)', text, re.DOTALL):
    return pathlib.Path(urllib.parse.unquote(file[1]))
  if re.match(r'[A-Za-z][\w.+-]*:/', text):
    raise argparse.ArgumentTypeError(
      f'{printable(text)} is an address, not a path of this machine; mount that storage as a folder'
      ' (buckets: gcsfuse, mountpoint-s3), and give the path of the folder'
    )
  try:
    return pathlib.Path(_name(text)).expanduser()
  except RuntimeError as error:  # There is no such user.
    raise argparse.ArgumentTypeError(
      f'{printable(text)} has no home folder; give the whole path'
    ) from error


def _text_path(text: str) -> pathlib.Path:
  """Refuses a path that TFDS metadata cannot hold."""
  if printable(text) != text:
    raise argparse.ArgumentTypeError(f'{printable(text)} is not valid UTF-8; rename that folder')
  return _path(text)


def _arguments() -> argparse.Namespace:
  parser = _Parser(
    prog='dropmae-build',
    description='Builds a TFDS dataset of JPEG frames from a folder tree of videos.',
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--config', required=True, choices=list(COLLECTIONS))
  add('--videos', type=_path, help='root of the video tree')
  add('--data_dir', required=True, type=_text_path, help='TFDS data directory to write to')
  add('--annotations', type=_path, help="folder of Kinetics' csv files (default: in VIDEOS)")
  cores = len(os.sched_getaffinity(0))
  add('--workers', type=int, help=f'processes (default: all cores, {cores})')
  for field in dataclasses.fields(FrameOptions):
    help_text = f'{OPTION_HELP[field.name][2]} (default: %(default)s)'
    add(f'--{field.name}', type=field.type, default=field.default, help=help_text)
  ways = parser.add_argument_group('instead of a whole build').add_mutually_exclusive_group()
  ways.add_argument('--shard_range', metavar='I/N', help='write only range I of N (0 <= I < N)')
  ways.add_argument('--finalise', action='store_true', help='once all ranges are written')
  ways.add_argument(
    '--beam_runner', metavar='NAME', type=_name, help='write the shards by Apache Beam'
  )
  ways.add_argument('--verify', action='store_true', help='read a dataset, compare its digests')
  add('--beam_options', metavar='FLAGS', help="the Beam runner's flags, in quotes")
  arguments = parser.parse_args()
  if arguments.videos is None and not arguments.verify:
    parser.error('the following arguments are required: --videos')
  if arguments.beam_runner is None and arguments.beam_options is not None:
    parser.exit(2, 'error: --beam_options has no meaning without --beam_runner; give that too.\n')
  if arguments.beam_runner is not None and arguments.workers is not None:
    parser.exit(2, 'error: --workers is not for --beam_runner; set it in --beam_options.\n')
  if arguments.workers is None:
    arguments.workers = cores
  limits = {'workers': (1, 4096)} | {name: row[:2] for name, row in OPTION_HELP.items()}
  for name, (low, high) in limits.items():
    value = getattr(arguments, name)
    if not low <= value <= high:
      remedy = 'give a number from there'
      parser.exit(2, f'error: --{name}={value} is not in {low}..{high}; {remedy}.\n')
  return arguments


def _range(text: str) -> tuple[int, int]:
  match = re.fullmatch(r'(\d+)/(\d+)', text)
  if not match or not int(match[1]) < int(match[2]):
    raise BadInput(f'--shard_range={text} is not I/N with I in 0..N-1; give for example 0/16.')
  return int(match[1]), int(match[2])


def _way(arguments: argparse.Namespace) -> Callable[[build.Plan], str]:
  """Returns the function that carries out the plan and returns the closing lines."""
  if arguments.shard_range is not None:
    number, count = _range(arguments.shard_range)
    return lambda planned: build.build_range(planned, number, count, arguments.workers)
  if arguments.finalise:
    return lambda planned: report.summary(build.finalise(planned))
  write = partial(write_shards, workers=arguments.workers)
  if arguments.beam_runner is not None:
    from tfds_kinetics import beam  # An extra, and slow to import.

    options = beam.runner_options(arguments.beam_runner, arguments.beam_options or '')
    write = partial(beam.write_shards, options=options)
  return lambda planned: report.summary(build.build(planned, write))


def _run(arguments: argparse.Namespace) -> str:
  """Plans and carries out the build; returns the closing lines."""
  if arguments.verify:
    folder = arguments.data_dir / DATASET / arguments.config / VERSION
    return publish.verify(folder, arguments.workers)
  way = _way(arguments)  # Checks flags: first, because listing the videos may take long.
  fields = (field.name for field in dataclasses.fields(FrameOptions))
  planned = build.plan(
    COLLECTIONS[arguments.config],
    arguments.videos,
    arguments.data_dir,
    FrameOptions(**{name: getattr(arguments, name) for name in fields}),
    arguments.annotations,
  )
  return way(planned)


def _interrupt(*_: object) -> None:
  """Stops once; a second Ctrl-C must not interrupt the cleanup after the first."""
  for each in STOP_SIGNALS:
    signal.signal(each, signal.SIG_IGN)
  raise KeyboardInterrupt


def main() -> int:
  """Runs the command and returns its exit status."""
  arguments = _arguments()
  log.setLevel(logging.INFO)
  log.propagate = False  # Beam would show every line a second time.
  if not sys.stderr.isatty():
    log.addHandler(logging.StreamHandler())
  for each in STOP_SIGNALS:
    # In the background of a script Ctrl-C is ignored, and must stay so.
    if each == signal.SIGTERM or signal.getsignal(each) is not signal.SIG_IGN:
      signal.signal(each, _interrupt)
  # Each decoding process needs some open files in this one.
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
  # Names of videos may have characters that the terminal cannot show.
  sys.stdout.reconfigure(errors='backslashreplace')
  try:
    for line in _run(arguments).split('\n'):
      print(one_line(line))
  except BadInput as error:
    print(one_line(f'error: {error}'), file=sys.stderr)
    return 2
  except OSError as error:
    print(one_line(f'error: {error}; fix that and give the command again.'), file=sys.stderr)
    return 2
  except (Stopped, KeyboardInterrupt) as stopped:
    print(one_line(str(stopped) or 'stopped'), file=sys.stderr)
    return STOPPED
  return 0


def command() -> None:
  """The entry point dropmae-build."""
  sys.excepthook = print_stack
  # Names of videos are UTF-8, which Python does not assume in some locales.
  if sys.getfilesystemencoding() != 'utf-8' and os.environ.get('PYTHONUTF8') != '1':
    os.environ['PYTHONUTF8'] = '1'
    os.execv(sys.executable, sys.orig_argv)
  sys.exit(main())


if __name__ == '__main__':
  command()
