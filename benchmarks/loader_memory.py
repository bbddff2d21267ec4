"""Measures the memory of the loader with a dataset as large as Kinetics-400.

    python -m benchmarks.loader_memory

The index has 240,000 videos of 300 frames in 9,000 shards, as the real dataset. All shards are
links to one file of 8,000 small records, so they need no disk. Frames have 340x256 pixels, crops
224. Every open shard keeps its index in memory, so memory grows until as many are open as may be.
"""

import concurrent.futures
import multiprocessing
import os
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
import simplejpeg

from dropmae_jax.config import DataOptions
from dropmae_jax.data import frame_pairs, video_source
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError
from tfds_kinetics import publish, report, shards
from tfds_kinetics.configs import COLLECTIONS
from tfds_kinetics.tree import Video
from tfds_kinetics.video import FrameOptions

DATASET = 'kinetics_frames/folder'
RECORDS = 8000
FRAME = (256, 340)
IMAGE_SIZE = 224
BATCH = 32


def write_dataset(data_dir: pathlib.Path, *, num_videos: int, num_frames: int) -> None:
  """Writes a dataset of videos of `num_frames` each: one shard, and links to it."""
  target = data_dir / DATASET / shards.VERSION
  target.parent.mkdir(parents=True)
  # A smooth picture makes a small JPEG.
  picture = np.tile(np.linspace(0, 255, FRAME[1]).astype(np.uint8)[None, :, None], (FRAME[0], 1, 3))
  jpeg = simplejpeg.encode_jpeg(picture, colorspace='RGB')
  files = shards.FrameFiles(data_dir, 'shard')
  for _ in range(RECORDS):
    files.write(jpeg, Video('train/class/video.mp4', 'class', 0), 0)
  videos = [
    {'path': f'train/class/video_{number:07d}.mp4', 'label': 'class', 'youtube_id': ''}
    | {'frames': num_frames}
    for number in range(num_videos)
  ]
  table = {'files': files.close() * -(-num_videos * num_frames // RECORDS), 'videos': videos}
  for name in (report.NAME, report.TABLE):
    (data_dir / name).touch()
  job = shards.ShardJob('train', 0, '', (), FrameOptions())
  publish.put_in_place(
    COLLECTIONS['folder'], {job: table}, {'fingerprint': 'synthetic'}, data_dir, target
  )


def memory() -> dict[str, float]:
  """Returns `rss_mb`, `threads` and `open_files` of this process."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  fields = dict(line.split(':', 1) for line in lines)
  return {
    'rss_mb': int(fields['VmRSS'].split()[0]) / 1024,
    'threads': int(fields['Threads']),
    'open_files': len(os.listdir('/proc/self/fd')),
  }


def measure(data_dir: pathlib.Path, *, num_batches: int) -> dict[str, Any]:
  """Reads batches; returns times, and memory before, after the first, the last and closing."""
  rows = {'before': memory()}
  began = time.perf_counter()
  dataset = video_source.open_dataset(str(data_dir), DATASET)
  opened = time.perf_counter()
  stream = frame_pairs.pair_batches(
    dataset, DataOptions(), image_size=IMAGE_SIZE, batch_size=BATCH, seed=0
  )
  next(stream)
  first = time.perf_counter()
  rows['first batch'] = memory()
  for _ in range(num_batches):
    next(stream)
  took = time.perf_counter() - first
  rows[f'{num_batches} batches'] = memory()
  stream.close()
  rows['closed'] = memory()
  return {
    'videos': len(dataset),
    'seconds_to_open': opened - began,
    'seconds_to_first_batch': first - began,
    'pairs_per_second': num_batches * BATCH / took,
    'memory': rows,
  }


def main() -> None:
  """Builds the dataset in a temporary folder, measures, and prints."""
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--batches', type=int, default=10_000, help='to read (%(default)s)')
  batches = parser.parse_args().batches
  if batches < 1:
    raise UserError(f'--batches={batches} is too small; give at least 1.')
  with tempfile.TemporaryDirectory() as folder:
    # In another process, whose memory does not count.
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as writer:
      sizes = {'num_videos': 240_000, 'num_frames': 300}
      writer.submit(write_dataset, pathlib.Path(folder), **sizes).result()
    result = measure(pathlib.Path(folder), num_batches=batches)
  print(
    f'{result["videos"]} videos: opened in {result["seconds_to_open"]:.1f} s, first batch after'
    f' {result["seconds_to_first_batch"]:.1f} s, {result["pairs_per_second"]:.0f} pairs/s'
  )
  print(f'{"after":>15} {"RSS MB":>8} {"threads":>8} {"open files":>10}')
  for name, row in result['memory'].items():
    print(f'{name:>15} {row["rss_mb"]:>8.0f} {row["threads"]:>8} {row["open_files"]:>10}')


if __name__ == '__main__':
  cli.run(main)
