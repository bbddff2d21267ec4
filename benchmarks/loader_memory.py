"""Measures the memory of a loader process with a dataset as large as Kinetics-400.

    python -m benchmarks.loader_memory --json=FILE

The index has 240,000 videos of 300 frames in 9,000 shards, as the real dataset. All shards are
links to one file of 8,000 small records, so they need no disk. Frames have 340x256 pixels, crops
224. Every open shard keeps its index in memory, so memory grows with the shards that are open.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from absl import flags
from array_record.python import array_record_module

from benchmarks import rounds
from dropmae_jax.config import DataOptions
from dropmae_jax.data import frame_pairs, video_source
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError
from tfds_kinetics import records
from tfds_kinetics.tree import Video

DATASET = 'kinetics_frames/synthetic'
RECORDS = 8000
FRAME = (256, 340)
IMAGE_SIZE = 224
# Of several chunks, as in training.
BATCH = 128


def write_dataset(data_dir: pathlib.Path, *, num_videos: int, num_frames: int) -> None:
  """Writes a dataset of one shard and of links to it.

  Args:
    data_dir: where the dataset is written.
    num_videos: of the index.
    num_frames: of every video.
  """
  folder = data_dir / DATASET / f'{max(video_source.SUPPORTED_VERSIONS)}.0.0'
  folder.mkdir(parents=True)
  real = data_dir / 'shard'
  writer = array_record_module.ArrayRecordWriter(str(real), 'group_size:1')
  # A smooth picture makes a small JPEG.
  picture = np.tile(np.linspace(0, 255, FRAME[1]).astype(np.uint8)[None, :, None], (FRAME[0], 1, 3))
  jpeg = simplejpeg.encode_jpeg(picture, colorspace='RGB')
  record = records.frame_record(jpeg, Video('train/class/video.mp4', 'class', 0), 0)
  for _ in range(RECORDS):
    writer.write(record)
  writer.close()
  num_shards = -(-num_videos * num_frames // RECORDS)
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name='kinetics_frames', split='train', filetype_suffix='array_record'
  )
  for number in range(num_shards):
    os.link(real, template.sharded_filepath(shard_index=number, num_shards=num_shards))
  frames = np.full(num_videos, num_frames, np.int32)
  paths = np.array([f'train/class/video_{number:07d}.mp4' for number in range(num_videos)])
  first = np.cumsum(frames, dtype=np.int64) - frames
  index = {'first': first, 'frames': frames, 'path': paths, 'fingerprint': 'synthetic'}
  np.savez(folder / 'index-train.npz', **index)
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=records.frame_features(),
    split_infos=[
      tfds.core.SplitInfo(
        name='train',
        shard_lengths=[RECORDS] * num_shards,
        num_bytes=real.stat().st_size * num_shards,
        filename_template=template,
      )
    ],
    version=folder.name,
    check_data=False,  # The check reads with TensorFlow.
  )


def memory_of(pid: int) -> dict[str, float]:
  """Returns `rss_mb`, `pss_mb` (shared pages counted by share) and `open_files` of a process."""
  lines = pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()[1:]
  sizes = {line.split(':')[0]: int(line.split()[1]) / 1024 for line in lines}
  files = len(os.listdir(f'/proc/{pid}/fd'))
  return {'rss_mb': sizes['Rss'], 'pss_mb': sizes['Pss'], 'open_files': files}


def measure(data_dir: pathlib.Path, *, num_pairs: int, num_workers: int) -> dict[str, Any]:
  """Reads pairs; returns times, and memory after the first batch and at the end.

  Args:
    data_dir: of `write_dataset`.
    num_pairs: to read after the first batch.
    num_workers: processes of the loader.
  """
  began = time.perf_counter()
  dataset = video_source.open_dataset(str(data_dir), DATASET)
  opened = time.perf_counter()
  options = DataOptions(num_workers=num_workers)
  stream = frame_pairs.pair_batches(
    dataset, options, image_size=IMAGE_SIZE, batch_size=BATCH, seed=0
  )
  next(stream)
  first = time.perf_counter()
  rows = []
  for count in sorted({0, num_pairs}):
    for _ in range(-(-count // BATCH)):
      next(stream)
    for process in multiprocessing.active_children():
      rows.append({'process': process.pid, 'pairs': count, **memory_of(process.pid)})
  took = time.perf_counter() - first
  stream.close()
  return {
    'videos': len(dataset),
    'seconds_to_open': opened - began,
    'seconds_to_first_batch': first - began,
    'pairs_per_second': num_pairs / took,
    'processes': rows,
  }


def parse() -> argparse.Namespace:
  """Reads the command line.

  Raises:
    UserError: a flag is wrong.
  """
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--num_videos', type=int, default=240_000, help='of the index (%(default)s)')
  parser.add_argument('--frames', type=int, default=300, help='of a video (%(default)s)')
  parser.add_argument('--pairs', type=int, default=8_000, help='to read then (%(default)s)')
  parser.add_argument('--workers', type=int, default=2, help='of the loader (%(default)s)')
  parser.add_argument('--json', type=pathlib.Path, help='file to write the numbers to')
  arguments = parser.parse_args()
  for name, least in (('num_videos', 1), ('frames', 1), ('pairs', 0), ('workers', 1)):
    if getattr(arguments, name) < least:
      raise UserError(f'--{name}={getattr(arguments, name)} is too small; give at least {least}.')
  rounds.check_output(arguments.json)
  return arguments


def main() -> None:
  """Builds the dataset in a temporary folder, measures, and prints."""
  arguments = parse()
  flags.FLAGS.mark_as_parsed()  # Grain's processes read absl flags.
  with tempfile.TemporaryDirectory() as folder:
    data_dir = pathlib.Path(folder)
    write_dataset(data_dir, num_videos=arguments.num_videos, num_frames=arguments.frames)
    found = measure(data_dir, num_pairs=arguments.pairs, num_workers=arguments.workers)
  print(
    f'{found["videos"]} videos: opened in {found["seconds_to_open"]:.1f} s, first batch after'
    f' {found["seconds_to_first_batch"]:.1f} s, {found["pairs_per_second"]:.0f} pairs/s'
  )
  print(f'{"process":>10} {"pairs read":>10} {"RSS MB":>8} {"PSS MB":>8} {"open files":>10}')
  for row in found['processes']:
    print(
      f'{row["process"]:>10} {row["pairs"]:>10} {row["rss_mb"]:>8.0f} {row["pss_mb"]:>8.0f}'
      f' {row["open_files"]:>10}'
    )
  if arguments.json:
    arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == '__main__':
  cli.run(main)
