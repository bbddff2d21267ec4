"""Builds a dataset: python -m tfds_kinetics --config=NAME --videos=ROOT --data_dir=OUT."""

import argparse
import dataclasses
import logging
import os
import pathlib
import signal
import sys

from tfds_kinetics import build
from tfds_kinetics.configs import COLLECTIONS
from tfds_kinetics.messages import BadInput, Stopped, log
from tfds_kinetics.video import FrameOptions

STOPPED = os.EX_TEMPFAIL


def _arguments() -> argparse.Namespace:
  defaults = FrameOptions()
  parser = argparse.ArgumentParser(
    prog='python -m tfds_kinetics',
    description='Builds a TFDS dataset of JPEG frames from a folder tree of videos.',
  )
  parser.add_argument('--config', required=True, choices=list(COLLECTIONS))
  parser.add_argument('--videos', required=True, type=pathlib.Path, help='root of the video tree')
  parser.add_argument(
    '--data_dir', required=True, type=pathlib.Path, help='TFDS data directory to write to'
  )
  parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes (all cores)')
  parser.add_argument(
    '--short_side', type=int, default=defaults.short_side, help='pixels (%(default)s)'
  )
  parser.add_argument(
    '--jpeg_quality', type=int, default=defaults.jpeg_quality, help='(%(default)s)'
  )
  parser.add_argument(
    '--frame_stride', type=int, default=defaults.frame_stride, help='store every n-th (%(default)s)'
  )
  parser.add_argument(
    '--max_damage',
    type=float,
    default=defaults.max_damage,
    help='share of undecodable packets that a video may have (%(default)s)',
  )
  arguments = parser.parse_args()
  for name, low, high in (
    ('workers', 1, 4096),
    ('short_side', 16, 4096),
    ('jpeg_quality', 1, 100),
    ('frame_stride', 1, 1000),
    ('max_damage', 0, 1),
  ):
    if not low <= getattr(arguments, name) <= high:
      parser.exit(2, f'error: --{name}={getattr(arguments, name)} is not in {low}..{high}.\n')
  return arguments


def _interrupt(*_: object) -> None:
  raise KeyboardInterrupt


def main() -> int:
  """Runs the command and returns its exit status."""
  arguments = _arguments()
  log.setLevel(logging.INFO)
  if not sys.stderr.isatty():
    log.addHandler(logging.StreamHandler())
  signal.signal(signal.SIGTERM, _interrupt)
  fields = (field.name for field in dataclasses.fields(FrameOptions))
  options = FrameOptions(**{name: getattr(arguments, name) for name in fields})
  try:
    target = build.build(
      COLLECTIONS[arguments.config],
      arguments.videos,
      arguments.data_dir,
      options=options,
      workers=arguments.workers,
    )
  except BadInput as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except OSError as error:
    print(f'error: {error}; mend that and give the command again.', file=sys.stderr)
    return 2
  except (Stopped, KeyboardInterrupt) as stopped:
    print(str(stopped) or 'stopped', file=sys.stderr)
    return STOPPED
  print(build.summary(target))
  return 0


if __name__ == '__main__':
  sys.exit(main())
