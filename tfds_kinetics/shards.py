"""Third stop: groups of videos to shards of frame records, each independent and atomic.

A shard is a function of its job alone, so it does not matter which process of which machine
writes it: a local one, a task of an array job, a Beam worker.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.proto import tf_example_pb2

from tfds_kinetics.tree import Video, printable
from tfds_kinetics.video import FrameOptions, UnusableVideo, read_jpegs

# Major: what older readers cannot read. It is the version of the dataset too.
VERSION = '2.0.0'
VIDEOS_PER_SHARD = 24
# One record per frame, and the time to read one is linear in the records of its file.
RECORDS_PER_FILE = 8192
# Small collections are split further, so that all processes have work.
LEAST_SHARDS = 16


class SourceChanged(OSError):
  """A video is no longer what it was when the build was planned."""


@dataclasses.dataclass(frozen=True)
class ShardJob:
  """Everything that determines a shard's content."""

  split: str
  number: int
  root: str
  videos: tuple[Video, ...]
  options: FrameOptions

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the options and the videos' names and sizes, not with where the root is."""
    videos = [list(vars(video).values()) for video in self.videos]
    content = [VERSION, self.split, self.number, dataclasses.asdict(self.options), videos]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

  @property
  def name(self) -> str:
    """What all files of the shard begin with."""
    return f'{self.split}-{self.number:05d}'


def frame_features() -> tfds.features.FeaturesDict:
  """One record is one frame, with what is known of the video that it is of."""
  return tfds.features.FeaturesDict(
    {
      'jpeg': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
      'class_name': tfds.features.Text(),
      'youtube_id': tfds.features.Text(),
      'video': tfds.features.Text(),
      'frame': tfds.features.Scalar(np.int32),
    }
  )


def frame_serializer() -> Callable[[bytes, Video, int], bytes]:
  """Returns the function from a JPEG, its video and its number among the stored to a record."""
  features = frame_features()
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

  def serialize(jpeg: bytes, video: Video, number: int) -> bytes:
    record = serializer.serialize_example(
      features.encode_example(
        {
          'jpeg': jpeg,
          'class_name': video.label,
          'youtube_id': video.youtube_id,
          'video': video.path,
          'frame': number,
        }
      )
    )
    # As it comes, the order of the features is another in each process.
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)

  return serialize


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
    self.folder, self._name = folder, name
    self._serialize = frame_serializer()
    self._temporary: list[pathlib.Path] = []
    self._records: list[int] = []
    self._writer = None

  def write(self, jpeg: bytes, video: Video, number: int) -> None:
    """Appends one frame."""
    if self._writer is None or self._records[-1] == RECORDS_PER_FILE:
      self._finish_file()
      path = self.folder / f'{self._name}-{len(self._records)}.{secrets.token_hex(8)}.partial'
      self._writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
      self._temporary.append(path)
      self._records.append(0)
    self._writer.write(self._serialize(jpeg, video, number))
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
      final = self.folder / f'{self._name}-{number}.array_record'
      sync(path)
      os.replace(path, final)
      rows.append({'name': final.name, 'records': records, 'bytes': final.stat().st_size})
    return rows

  def discard(self) -> None:
    """Removes what was written, on a disk that is full too."""
    with contextlib.suppress(OSError, RuntimeError):
      self._finish_file()
    for path in self._temporary:
      path.unlink(missing_ok=True)


def write_shard(
  job: ShardJob,
  folder: pathlib.Path,
  *,
  verdicts: Mapping[str, str],
  before_video: Callable[[Video], None],
) -> dict[str, Any]:
  """Writes a shard and its table, unless they are there; returns the table.

  The table: {'fingerprint', 'files': see `FrameFiles.close`, 'videos': [row], 'skipped': [row]};
  a row has `path`, `label`, `youtube_id`, `seconds`, and for a kept video `frames`, `bytes` and
  `sha256` of its JPEGs, for a skipped one the `reason`. The records of a video follow one another
  in the order of 'videos'.

  Args:
    job: what to write.
    folder: where to.
    verdicts: why videos are to be skipped unread, by path.
    before_video: called with each video before it is read; if it raises, nothing is written.
  """
  table = finished_table(job, folder)
  if table is not None:
    return table
  files = FrameFiles(folder, job.name)
  videos, skipped = [], []
  try:
    for video in job.videos:
      before_video(video)
      row = {'path': video.path, 'label': video.label, 'youtube_id': video.youtube_id}
      row = {key: printable(value) for key, value in row.items()}
      started = time.monotonic()
      try:
        if row['path'] != video.path:
          raise UnusableVideo('its name is not valid UTF-8; rename it')
        if video.path in verdicts:
          raise UnusableVideo(verdicts[video.path])
        row |= _write_video(job, video, files)
        videos.append(row)
      except UnusableVideo as reason:
        row['reason'] = str(reason)
        skipped.append(row)
      row['seconds'] = round(time.monotonic() - started, 3)
    written = files.close()
  except BaseException:
    files.discard()
    raise
  table = {
    'fingerprint': job.fingerprint,
    'files': written,
    'videos': videos,
    'skipped': skipped,
  }
  write_json(folder / f'{job.name}.json', table)
  return table


def _write_video(job: ShardJob, video: Video, files: FrameFiles) -> dict[str, Any]:
  """Writes the frames of a video; returns how many they are, their bytes and their sha256.

  They are kept in a file that has no name until it is certain that all of them can be had: what
  is written to a shard stays there.

  Raises:
    UnusableVideo: nothing of it was written.
    SourceChanged: it was moved or replaced meanwhile, which is no verdict on it.
  """
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
  digest = hashlib.sha256()
  with tempfile.TemporaryFile(dir=files.folder) as spool:
    sizes = []
    for jpeg in read_jpegs(path, job.options):
      sizes.append(spool.write(jpeg))
      digest.update(jpeg)
    spool.seek(0)
    for number, length in enumerate(sizes):
      files.write(spool.read(length), video, number)
  return {'frames': len(sizes), 'bytes': sum(sizes), 'sha256': digest.hexdigest()}


def finished_table(job: ShardJob, folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the table of a shard that an earlier run finished from the same videos."""
  try:
    table = json.loads((folder / f'{job.name}.json').read_text('utf-8'))
    whole = all((folder / row['name']).stat().st_size == row['bytes'] for row in table['files'])
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return table if whole and table['fingerprint'] == job.fingerprint else None


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a json file whole or not at all."""
  write_text(path, json.dumps(content, indent=1))


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file whole or not at all, through a power cut too."""
  temporary = path.with_name(f'{path.name}.{secrets.token_hex(8)}.partial')
  temporary.write_text(text, 'utf-8')
  sync(temporary)
  os.replace(temporary, path)


def sync(path: pathlib.Path) -> None:
  """Waits until a file or folder is on the disk itself."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
