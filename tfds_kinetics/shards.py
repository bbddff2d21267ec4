"""Divides videos into shards and writes a shard of frame records; each is independent and atomic.

A shard depends on its job only, so any process of any machine may write it: a local one, a task of
an array job, a Beam worker.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from tfds_kinetics.files import file_digest, index_digest, sync, write_text
from tfds_kinetics.tree import Video, printable
from tfds_kinetics.video import FrameOptions, UnusableVideo, read_jpegs

# Of the format and of every dataset; the major number rises when older readers cannot read it.
VERSION = '2.0.0'
VIDEOS_PER_SHARD = 24
# Small collections get smaller shards, so that all processes have work.
LEAST_SHARDS = 16
# The time to read a record is linear in the records of its file.
RECORDS_PER_FILE = 8192


class SourceChanged(OSError):
  """A video was moved or changed after the build was planned."""


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
    """A hash of the options and the videos' names and sizes; independent of the root's place."""
    videos = [
      [video.path, video.label, video.size, video.youtube_id]
      + [[copy.path, copy.size] for copy in video.copies]
      for video in self.videos
    ]
    content = [VERSION, self.split, self.number, dataclasses.asdict(self.options), videos]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

  @property
  def name(self) -> str:
    """The prefix of all files of the shard."""
    return f'{self.split}-{self.number:05d}'


def shard_jobs(
  root: pathlib.Path, split: str, videos: list[Video], options: FrameOptions
) -> list[ShardJob]:
  """Divides the videos of a split into shards, in a fixed random order that mixes classes."""
  order = random.Random(0).sample(videos, len(videos))
  count = max(-(-len(order) // VIDEOS_PER_SHARD), min(len(order), LEAST_SHARDS))
  return [
    ShardJob(split, number, str(root), tuple(order[number::count]), options)
    for number in range(count)
  ]


def frame_features() -> tfds.features.FeaturesDict:
  """Returns the TFDS features of a record: a frame, and facts about its video."""
  return tfds.features.FeaturesDict(
    {
      'jpeg': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
      'class_name': tfds.features.Text(),
      'youtube_id': tfds.features.Text(),
      'video': tfds.features.Text(),
      'frame': tfds.features.Scalar(np.int32),
    }
  )


def frame_record(jpeg: bytes, video: Video, number: int) -> bytes:
  """Returns a record of `frame_features`, encoded as by TFDS, with the same bytes in every process.

  TFDS's own serializer orders the features differently in each process.

  Args:
    jpeg: the encoded frame.
    video: that it is from.
    number: of the frame among the stored ones of its video.
  """
  example = tf_example_pb2.Example()
  feature = example.features.feature
  feature['jpeg'].bytes_list.value.append(jpeg)
  texts = {'class_name': video.label, 'youtube_id': video.youtube_id, 'video': video.path}
  for name, text in texts.items():
    feature[name].bytes_list.value.append(text.encode())
  feature['frame'].int64_list.value.append(number)
  return example.SerializeToString(deterministic=True)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
  """Turns the RuntimeError of array_record on a full or failing disk into an OSError."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(str(error)) from error


class FrameFiles:
  """Writes records to files of limited length, which have temporary names until `close`."""

  def __init__(self, folder: pathlib.Path, name: str) -> None:
    self.folder, self._name = folder, name
    self._temporary: list[pathlib.Path] = []
    self._records: list[int] = []
    self._writer = None

  def write(self, jpeg: bytes, video: Video, number: int) -> None:
    """Appends one frame.

    Raises:
      OSError: the disk is full or fails.
    """
    if self._writer is None or self._records[-1] == RECORDS_PER_FILE:
      self._finish_file()
      path = self.folder / f'{self._name}-{len(self._records)}.{secrets.token_hex(8)}.partial'
      with _writing():
        self._writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
      self._temporary.append(path)
      self._records.append(0)
    record = frame_record(jpeg, video, number)
    with _writing():
      self._writer.write(record)
    self._records[-1] += 1

  def _finish_file(self) -> None:
    if self._writer is not None:
      with _writing():
        self._writer.close()
      self._writer = None

  def close(self) -> list[dict[str, Any]]:
    """Gives the files their final names; returns what `file_row` has of each."""
    self._finish_file()
    rows = []
    for number, (path, records) in enumerate(zip(self._temporary, self._records, strict=True)):
      final = self.folder / f'{self._name}-{number}.array_record'
      sync(path)
      os.replace(path, final)
      rows.append(file_row(final, records))
    return rows

  def discard(self) -> None:
    """Removes what was written; works on a full disk too."""
    with contextlib.suppress(OSError):
      self._finish_file()
    for path in self._temporary:
      path.unlink(missing_ok=True)


def file_row(path: pathlib.Path, num_records: int) -> dict[str, Any]:
  """Returns `name`, `records`, `bytes`, `sha256` and `index_sha256` of a file; reads it."""
  return {
    'name': path.name,
    'records': num_records,
    'bytes': path.stat().st_size,
    'sha256': file_digest(path),
    'index_sha256': index_digest(path),
  }


def write_shard(
  job: ShardJob,
  folder: pathlib.Path,
  *,
  verdicts: Mapping[str, str],
  before_video: Callable[[Video], None],
) -> dict[str, Any]:
  """Writes a shard and its table, unless they exist; returns the table.

  The table is {'fingerprint', 'files' (see `FrameFiles.close`), 'videos': [row], 'skipped': [row]}.
  A row has `path`, `label`, `youtube_id` and `seconds`; of a kept video also `frames`, `bytes` and
  `sha256` of its JPEGs; of a skipped one also the `reason`, and `unread`: whether the machine could
  not read its bytes. The records of each video are contiguous, in the order of 'videos'.

  Args:
    job: the shard to write.
    folder: to write it to.
    verdicts: reasons to skip videos without reading them, by path.
    before_video: called with each video before it is read; if it raises, nothing is written.
  """
  table = finished_table(job, folder)
  if table is not None:
    return table
  files = FrameFiles(folder, job.name)
  rows = []
  try:
    for video in job.videos:
      verdict = None
      for copy in (video, *video.copies):
        before_video(copy)
        rows.append(_attempt(job, copy, files, verdict or verdicts.get(copy.path)))
        if 'reason' not in rows[-1]:
          verdict = f'the same clip as {copy.path}'
    written = files.close()
  except BaseException:
    files.discard()
    raise
  table = {
    'fingerprint': job.fingerprint,
    'files': written,
    'videos': [row for row in rows if 'reason' not in row],
    'skipped': [row for row in rows if 'reason' in row],
  }
  write_text(folder / f'{job.name}.json', json.dumps(table, indent=1))
  return table


def _attempt(job: ShardJob, video: Video, files: FrameFiles, verdict: str | None) -> dict[str, Any]:
  """Writes the frames of a video, unless a verdict says why it is skipped; returns its row."""
  row = {'path': video.path, 'label': video.label, 'youtube_id': video.youtube_id}
  row = {key: printable(value) for key, value in row.items()}
  started = time.monotonic()
  if row['path'] != video.path:
    verdict = 'its name is not valid UTF-8; rename it'
  try:
    if verdict:
      raise UnusableVideo(verdict)
    row |= _write_video(job, video, files)
  except UnusableVideo as reason:
    row['reason'] = str(reason)
    if not verdict:
      row['unread'] = _is_unreadable(os.path.join(job.root, video.path))
  row['seconds'] = round(time.monotonic() - started, 3)
  return row


def _is_unreadable(path: str) -> bool:
  """Whether the bytes of a file cannot be read; what they contain does not matter here."""
  try:
    if stat.S_ISREG(os.stat(path).st_mode):
      with open(path, 'rb', buffering=0) as file:
        while file.read(1 << 20):
          pass
  except OSError:
    return True
  return False


def _write_video(job: ShardJob, video: Video, files: FrameFiles) -> dict[str, Any]:
  """Writes the frames of a video; returns their number, their bytes and their sha256.

  All frames go to an unnamed temporary file first, because what is written to a shard cannot be
  removed from it.

  Raises:
    UnusableVideo: the video has to be skipped; none of its frames was written.
    SourceChanged: the video was moved or replaced meanwhile, so nothing is known about it.
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
  """Returns the table of a shard that was finished from the same videos and options, or None.

  None too if a video that could not be read then can be read now: the shard is written again.
  """
  try:
    table = json.loads((folder / f'{job.name}.json').read_text('utf-8'))
    whole = all((folder / row['name']).stat().st_size == row['bytes'] for row in table['files'])
    unread = [row['path'] for row in table['skipped'] if row.get('unread')]
    if whole and not all('sha256' in row for row in table['files']):  # Of an older version.
      table['files'] = [file_row(folder / row['name'], row['records']) for row in table['files']]
  except (OSError, ValueError, KeyError, TypeError):
    return None
  if not whole or table['fingerprint'] != job.fingerprint:
    return None
  still = all(_is_unreadable(os.path.join(job.root, path)) for path in unread)
  return table if still else None


def remove_leftovers(jobs: list[ShardJob], folder: pathlib.Path) -> None:
  """Removes what killed processes left of these shards; other builders may be at the others."""
  names = {job.name for job in jobs}
  for entry in os.scandir(folder):
    match = re.fullmatch(r'([a-z]+-\d+)\b.*\.(partial|current)', entry.name)
    if match and match[1] in names:
      os.unlink(entry)
