"""Second stop: groups of videos to shards of frame records, each independent and atomic."""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer

from tfds_kinetics.configs import SPLITS, VIDEO_SUFFIXES
from tfds_kinetics.video import FrameOptions, UnusableVideo, read_jpegs

VIDEOS_PER_SHARD = 24
# One record per frame, and the time to read one is linear in the records of its file.
RECORDS_PER_FILE = 8192
# Small collections are split further, so that all processes have work.
LEAST_SHARDS = 16


class SourceChanged(OSError):
  """A video is no longer what it was when the build was planned."""


@dataclasses.dataclass(frozen=True)
class Video:
  """A video of the collection: its path below the root, its class and its size in bytes.

  The size is -1 where there is none to be had: a link that leads nowhere.
  """

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
    """Changes with the options and the videos' names and sizes, not with where the root is."""
    content = dataclasses.asdict(self) | {'root': None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

  @property
  def name(self) -> str:
    """What all files of the shard begin with."""
    return f'{self.split}-{self.number:05d}'


def frame_features() -> tfds.features.FeaturesDict:
  """One record is one frame."""
  image = tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg')
  return tfds.features.FeaturesDict({'jpeg': image})


def frame_serializer() -> Callable[[bytes], bytes]:
  """Returns the function from a JPEG to a record."""
  features = frame_features()
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  return lambda jpeg: serializer.serialize_example(features.encode_example({'jpeg': jpeg}))


def find_videos(root: pathlib.Path) -> tuple[dict[str, list[Video]], int]:
  """Lists the videos of every split, sorted by path, and counts those that are in none.

  Folders named as splits directly below `root` are splits; without a `train` among them all
  videos are training data. The first folder below that is a video's class. Links are followed.
  """
  folders: dict[str, list[pathlib.Path]] = {}
  for child in sorted(root.iterdir()):
    if child.name in SPLITS and child.is_dir():
      folders.setdefault(SPLITS[child.name], []).append(child)
  if 'train' not in folders:
    folders = {'train': [root]}
  videos = {
    split: sorted(
      (video for folder in places for video in _videos_below(root, folder)),
      key=lambda video: video.path,
    )
    for split, places in sorted(folders.items())
  }
  if folders['train'] == [root]:
    return videos, 0
  others = [child for child in root.iterdir() if child.name not in SPLITS]
  outside = sum(1 for child in others if child.is_dir() for _ in _videos_below(root, child))
  return videos, outside + sum(_is_video(child.name) for child in others if child.is_file())


def _is_video(name: str) -> bool:
  return pathlib.PurePath(name).suffix.lower() in VIDEO_SUFFIXES


def _videos_below(root: pathlib.Path, folder: pathlib.Path) -> Iterator[Video]:
  visited = set()
  for place, folders, names in os.walk(folder, followlinks=True):
    real = os.path.realpath(place)
    if real in visited:  # A link that leads back up.
      folders.clear()
      continue
    visited.add(real)
    for name in names:
      if _is_video(name):
        path = pathlib.Path(place, name)
        classes = path.relative_to(folder).parts[:-1]
        size = path.stat().st_size if path.exists() else -1
        yield Video(path.relative_to(root).as_posix(), classes[0] if classes else '', size)


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


class FrameFiles:
  """Writes records to files of a limited length, under temporary names until `close`."""

  def __init__(self, folder: pathlib.Path, name: str) -> None:
    self._folder, self._name = folder, name
    self._serialize = frame_serializer()
    self._temporary: list[pathlib.Path] = []
    self._records: list[int] = []
    self._writer = None

  def write(self, jpeg: bytes) -> None:
    """Appends one frame."""
    if self._writer is None or self._records[-1] == RECORDS_PER_FILE:
      self._finish_file()
      path = self._folder / f'{self._name}-{len(self._records)}.{os.getpid()}.partial'
      self._writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
      self._temporary.append(path)
      self._records.append(0)
    self._writer.write(self._serialize(jpeg))
    self._records[-1] += 1

  def _finish_file(self) -> None:
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def close(self) -> list[dict[str, Any]]:
    """Gives the files their names; returns `name`, `records` and `bytes` of each."""
    self._finish_file()
    rows = []
    for number, (path, records) in enumerate(zip(self._temporary, self._records, strict=True)):
      final = self._folder / f'{self._name}-{number}.array_record'
      os.replace(path, final)
      rows.append({'name': final.name, 'records': records, 'bytes': final.stat().st_size})
    return rows

  def discard(self) -> None:
    """Removes what was written."""
    self._finish_file()
    for path in self._temporary:
      path.unlink()


def write_shard(
  job: ShardJob, folder: pathlib.Path, stopped: Callable[[], bool], crashed: frozenset[str]
) -> dict[str, Any] | None:
  """Writes a shard and its table, unless they are there; returns the table.

  The table: {'fingerprint', 'files': see `FrameFiles.close`, 'videos': [{'path', 'label',
  'frames'}], 'skipped': [{'path', 'reason'}]}. The records of a video follow one another in the
  order of 'videos'. While a video is read its path stands in `<name>.current`, so that the
  builder can tell which one killed a process.

  Args:
    job: what to write.
    folder: where to.
    stopped: asked before every video; once it is true the shard is given up and None returned.
    crashed: paths of videos that are known to kill the process that reads them.
  """
  table = finished_table(job, folder)
  if table is not None:
    return table
  files = FrameFiles(folder, job.name)
  current = folder / f'{job.name}.current'
  videos, skipped = [], []
  for video in job.videos:
    if stopped():
      files.discard()
      return None
    try:
      _check_name(video.path)
      current.write_text(video.path)
      if video.path in crashed:
        raise UnusableVideo('the process that read it was killed')
      jpegs = _read(job, video)
    except SourceChanged:
      files.discard()
      raise
    except UnusableVideo as reason:
      skipped.append({'path': _printable(video.path), 'reason': str(reason)})
      continue
    except Exception as error:  # No video may stop a build.
      skipped.append({'path': _printable(video.path), 'reason': f'{type(error).__name__}: {error}'})
      continue
    for jpeg in jpegs:
      files.write(jpeg)
    videos.append({'path': video.path, 'label': video.label, 'frames': len(jpegs)})
  table = {
    'fingerprint': job.fingerprint,
    'files': files.close(),
    'videos': videos,
    'skipped': skipped,
  }
  write_json(folder / f'{job.name}.json', table)
  current.unlink(missing_ok=True)
  return table


def _printable(path: str) -> str:
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def _check_name(path: str) -> None:
  if _printable(path) != path:
    raise UnusableVideo('its name is not valid UTF-8; rename it')


def _read(job: ShardJob, video: Video) -> list[bytes]:
  """Reads a video; one that was moved or replaced meanwhile is no verdict on it, but an error."""
  path = os.path.join(job.root, video.path)
  try:
    size = os.stat(path).st_size
  except OSError:
    size = -1
  if size != video.size:
    raise SourceChanged(
      f'{path} was {video.size} bytes when the build began and is '
      + (f'{size} bytes now' if size >= 0 else 'gone now')
    )
  return read_jpegs(path, job.options)


def finished_table(job: ShardJob, folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the table of a shard that an earlier run finished from the same videos."""
  try:
    table = json.loads((folder / f'{job.name}.json').read_text())
    whole = all((folder / row['name']).stat().st_size == row['bytes'] for row in table['files'])
  except (OSError, ValueError, KeyError):
    return None
  return table if whole and table['fingerprint'] == job.fingerprint else None


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a json file whole or not at all."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.partial')
  temporary.write_text(json.dumps(content, indent=1))
  os.replace(temporary, path)
