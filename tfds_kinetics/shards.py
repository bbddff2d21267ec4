"""Second stop: groups of videos to shards of frame records, each independent and atomic."""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
from collections.abc import Callable
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer

from tfds_kinetics.configs import SPLITS, VIDEO_SUFFIXES
from tfds_kinetics.video import FrameOptions, UnusableVideo, read_jpegs

# One record per frame: reading is linear in a shard's records, so about 7,000 are right.
VIDEOS_PER_SHARD = 24
# Small collections are split further, so that all processes have work.
LEAST_SHARDS = 16


@dataclasses.dataclass(frozen=True)
class Video:
  """A video of the collection: its path below the root, its class and its size in bytes."""

  path: str
  label: str
  size: int


@dataclasses.dataclass(frozen=True)
class ShardJob:
  """Everything that determines a shard's content."""

  split: str
  number: int
  root: str
  videos: tuple[Video, ...]
  options: FrameOptions

  @property
  def fingerprint(self) -> str:
    """Changes when the videos or the options do; the place of the root does not matter."""
    content = dataclasses.asdict(self) | {'root': None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

  def paths(self, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Where the records and their table are written."""
    stem = f'{self.split}-{self.number:05d}'
    return folder / f'{stem}.array_record', folder / f'{stem}.json'


def frame_features() -> tfds.features.FeaturesDict:
  """One record is one frame."""
  image = tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg')
  return tfds.features.FeaturesDict({'jpeg': image})


def frame_serializer() -> Callable[[bytes], bytes]:
  """Returns the function from a JPEG to a record."""
  features = frame_features()
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  return lambda jpeg: serializer.serialize_example(features.encode_example({'jpeg': jpeg}))


def find_videos(root: pathlib.Path) -> dict[str, list[Video]]:
  """Lists the videos of every split, sorted by path.

  Folders named as splits directly below `root` are splits; without a `train` among them all
  videos are training data. The first folder below that is a video's class.
  """
  folders = {SPLITS[child.name]: child for child in root.iterdir() if child.name in SPLITS}
  if 'train' not in folders:
    folders = {'train': root}
  return {split: _videos_below(root, folder) for split, folder in sorted(folders.items())}


def _videos_below(root: pathlib.Path, folder: pathlib.Path) -> list[Video]:
  videos = []
  for place, _, names in os.walk(folder):
    for name in names:
      if pathlib.PurePath(name).suffix.lower() in VIDEO_SUFFIXES:
        path = pathlib.Path(place, name)
        classes = path.relative_to(folder).parts[:-1]
        size = path.stat().st_size if path.exists() else 0
        videos.append(Video(path.relative_to(root).as_posix(), classes[0] if classes else '', size))
  return sorted(videos, key=lambda video: video.path)


def shard_jobs(
  root: pathlib.Path, split: str, videos: list[Video], options: FrameOptions
) -> list[ShardJob]:
  """Deals the videos of a split out to shards, in a fixed random order that mixes the classes."""
  order = random.Random(0).sample(videos, len(videos))
  count = max(-(-len(order) // VIDEOS_PER_SHARD), min(len(order), LEAST_SHARDS))
  return [
    ShardJob(split, number, str(root), tuple(order[number::count]), options)
    for number in range(count)
  ]


def write_shard(
  job: ShardJob, folder: pathlib.Path, stopped: Callable[[], bool]
) -> dict[str, Any] | None:
  """Writes a shard and its table, unless they are there; returns the table.

  The table: {'fingerprint', 'bytes', 'videos': [{'path', 'label', 'frames'}], 'skipped':
  [{'path', 'reason'}]}. The records of a video follow one another in the order of 'videos'.

  Args:
    job: what to write.
    folder: where to.
    stopped: asked before every video; once it is true the shard is given up and None returned.
  """
  records, table_path = job.paths(folder)
  table = finished_table(job, folder)
  if table is not None:
    return table
  temporary = records.with_suffix(f'.{os.getpid()}.partial')
  writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1')
  serialize = frame_serializer()
  videos, skipped = [], []
  for video in job.videos:
    if stopped():
      writer.close()
      temporary.unlink()
      return None
    try:
      jpegs = read_jpegs(os.path.join(job.root, video.path), job.options)
    except UnusableVideo as reason:
      skipped.append({'path': video.path, 'reason': str(reason)})
    except Exception as error:  # No video may stop a build.
      skipped.append({'path': video.path, 'reason': f'{type(error).__name__}: {error}'})
    else:
      for jpeg in jpegs:
        writer.write(serialize(jpeg))
      videos.append({'path': video.path, 'label': video.label, 'frames': len(jpegs)})
  writer.close()
  os.replace(temporary, records)
  table = {
    'fingerprint': job.fingerprint,
    'bytes': records.stat().st_size,
    'videos': videos,
    'skipped': skipped,
  }
  write_json(table_path, table)
  return table


def finished_table(job: ShardJob, folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the table of a shard that an earlier run finished from the same videos."""
  records, table_path = job.paths(folder)
  try:
    table = json.loads(table_path.read_text())
    whole = records.stat().st_size == table['bytes']
  except (OSError, ValueError, KeyError):
    return None
  return table if whole and table['fingerprint'] == job.fingerprint else None


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a json file whole or not at all."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.partial')
  temporary.write_text(json.dumps(content, indent=1))
  os.replace(temporary, path)
