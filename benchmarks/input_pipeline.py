"""Measures how many frame pairs per second a core and a host load.

    python -m benchmarks.input_pipeline --generated=500 --scratch=DIR
    python -m benchmarks.input_pipeline --videos=FOLDER --rescale

The pairs are those of training. For comparison, the same pairs are also decoded from the video
files with PyAV. "python" reads records but decodes and resizes nothing: what is left holds Python's
lock (the GIL), so it bounds the pairs of a process. Every way is measured once in each repeat; the
table gives the median and the range over the repeats. "Per core" is per second of CPU time.
"""

import argparse
import contextlib
import json
import pathlib
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import baselines, clips, rounds
from benchmarks.clips import Clips
from benchmarks.rounds import spread
from dropmae_jax.config import DataOptions
from dropmae_jax.data import augment, frame_pairs
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError

LIBRARIES = (
  'jax grain array_record tensorflow-datasets numpy simplejpeg opencv-python-headless pillow av'
).split()
IMAGE_SIZE = 224
# So that a batch of a baseline takes about as long as one of the dataset.
BATCH = {'dataset': 32, 'python': 32, 'pyav': 4}
# Buffers are full before the clock starts; this many batches empty them.
WARM_UP_BATCHES = 6


class Way(NamedTuple):
  """One way to make pairs: a source of frames, a resize, and a number of threads."""

  source: str
  resize: str
  threads: int


class Rate(NamedTuple):
  """Pairs per second of wall time, and per second of CPU time."""

  host: float
  core: float


def measure(measured: Clips, way: Way, *, seed: int, pairs: int) -> Rate:
  """Times the training stream over `pairs` pairs, after a warm-up."""
  videos, batch_size, image_size = measured.videos, min(pairs, BATCH[way.source]), IMAGE_SIZE
  if way.source == 'python':
    videos = baselines.WithoutPixels(videos.folder, 'train')
    image_size = baselines.WithoutPixels.SIZE
  elif way.source != 'dataset':
    frames = [videos.num_frames(video) for video in range(len(videos))]
    videos = baselines.FileVideos(measured.paths, frames)
  options = DataOptions(resize=way.resize, num_threads=way.threads)
  stream = frame_pairs.pair_batches(
    videos, options, image_size=image_size, batch_size=batch_size, seed=seed, move=_leave
  )
  batches = -(-pairs // batch_size)
  with contextlib.closing(stream):
    for _ in range(WARM_UP_BATCHES):
      next(stream)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
      next(stream)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return Rate(batches * batch_size / wall, batches * batch_size / max(cpu, 1e-9))


def _leave(batch: frame_pairs.PairBatch) -> None:
  """Moves nothing: batches are in the host's memory."""


def run(measured: Clips, *, threads: Sequence[int], repeats: int, pairs: int) -> dict[str, Any]:
  """Measures every way once per repeat; returns the numbers of the table.

  A baseline makes only an eighth of the pairs.
  """
  ways = [Way('dataset', resize, number) for resize in augment.RESIZES for number in threads]
  few = sorted({min(threads), max(threads)})
  ways += [Way('python', 'fast', number) for number in few]
  # The fast resize for both, as the sources of frames are compared.
  ways += [Way('pyav', 'fast', number) for number in few]
  rates: dict[Way, list[Rate]] = {way: [] for way in ways}
  for repeat in range(repeats):
    for way in ways:
      count = max(1, pairs // 8) if way.source == 'pyav' else pairs
      rates[way].append(measure(measured, way, seed=repeat, pairs=count))
    print(f'repeat {repeat + 1} of {repeats} is done', flush=True)
  return {
    'rates': [
      way._asdict()
      | {'per_host': spread([r.host for r in rows]), 'per_core': spread([r.core for r in rows])}
      for way, rows in rates.items()
    ],
    'speedups': [
      {'resize': ours.resize, 'threads': ours.threads, 'over': way.source}
      | {
        f'per_{unit}': spread(
          [getattr(a, unit) / getattr(b, unit) for a, b in zip(rates[ours], rows, strict=True)]
        )
        for unit in ('core', 'host')
      }
      for way, rows in rates.items()
      if way.source == 'pyav'
      for ours in ways
      if ours.source == 'dataset' and ours.threads == way.threads
    ],
  }


def describe(measured: Clips) -> dict[str, Any]:
  """Describes the clips: their number, frames, sizes and bytes."""
  videos = measured.videos
  frames = [videos.num_frames(video) for video in range(len(videos))]
  shards = videos.folder.glob('*-train.array_record*')
  sizes = {videos.frame(video, 0).shape[1::-1] for video in range(min(100, len(frames)))}
  return {
    'clips': len(frames),
    'frames': sum(frames),
    'sizes': sorted(f'{width}x{height}' for width, height in sizes),
    'bytes_per_frame': sum(path.stat().st_size for path in shards) / sum(frames),
  }


def show(result: dict[str, Any]) -> str:
  """Returns the table as text."""
  about, host = result['clips'], result['machine']
  lines = [
    f'{host["cpu"]}, {host["cores"]} cores, device {host["device"]}, Python {host["python"]}',
    ', '.join(f'{name} {version}' for name, version in host['libraries'].items()),
    f'{about["clips"]} clips, {about["frames"]} frames of {", ".join(about["sizes"])},'
    f' {about["bytes_per_frame"] / 1e3:.1f} kB each; {result["repeats"]} repeats: median (range)',
    '',
    f'{"frames from":<12}{"resize":<8}{"threads":<9}{"pairs/s per core":<26}pairs/s per host',
  ]
  for row in result['rates']:
    core, whole = (rounds.show_range(row[each]) for each in ('per_core', 'per_host'))
    lines.append(f'{row["source"]:<12}{row["resize"]:<8}{row["threads"]:<9}{core:<26}{whole}')
  for row in result['speedups']:
    lines.append(
      f'dataset over {row["over"]}, resize {row["resize"]}, threads {row["threads"]}:'
      f' {rounds.show_range(row["per_core"])} times per core,'
      f' {rounds.show_range(row["per_host"])} per host'
    )
  return '\n'.join(lines)


def parse() -> argparse.Namespace:
  """Reads the command line.

  Raises:
    UserError: a flag is wrong, or some do not go together.
  """
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--videos', type=pathlib.Path, help='a tree of videos')
  parser.add_argument('--generated', type=int, help='make that many clips instead')
  parser.add_argument('--rescale', action='store_true', help='to h264 copies at short side 256')
  parser.add_argument('--scratch', type=pathlib.Path, help='keep what is made here, to use again')
  parser.add_argument('--repeats', type=int, default=5, help='(%(default)s)')
  parser.add_argument('--pairs', type=int, default=4096, help='per repeat (%(default)s)')
  parser.add_argument('--threads', default='1,2,4,8', help='of the loader (%(default)s)')
  parser.add_argument('--json', type=pathlib.Path, help='file to write the numbers to')
  arguments = parser.parse_args()
  for name, least in (('generated', 1), ('repeats', 1), ('pairs', 1)):
    value = getattr(arguments, name)
    if value is not None and value < least:
      raise UserError(f'--{name}={value} is too small; give at least {least}.')
  if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', arguments.threads):
    raise UserError(f'--threads={arguments.threads} is not a list of numbers such as 1,2,4,8.')
  if arguments.videos and arguments.generated:
    raise UserError('--videos and --generated are two sources of clips; give one of them.')
  if not (arguments.videos or arguments.generated):
    raise UserError('there are no clips; give --videos=FOLDER or --generated=500.')
  rounds.check_output(arguments.json)
  return arguments


def main() -> None:
  """The command line."""
  arguments = parse()
  with tempfile.TemporaryDirectory(prefix='dropmae_benchmark') as temporary:
    measured = clips.prepare(
      arguments.scratch or pathlib.Path(temporary),
      videos=arguments.videos,
      generated=arguments.generated,
      rescaled=arguments.rescale,
    )
    threads = sorted({int(number) for number in arguments.threads.split(',')})
    result = {
      'machine': rounds.machine(LIBRARIES),
      'clips': describe(measured),
      'repeats': arguments.repeats,
    } | run(measured, threads=threads, repeats=arguments.repeats, pairs=arguments.pairs)
  print(show(result))
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
  cli.run(main)
