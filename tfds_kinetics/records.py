"""Writes frames as records, in files that get their final names when they are complete."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from tfds_kinetics.digests import file_digest, index_digest
from tfds_kinetics.disk import sync
from tfds_kinetics.tree import Video

# The time to read a record is linear in the records of its file.
RECORDS_PER_FILE = 8192


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


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file completely or not at all, even if the power fails."""
  temporary = path.with_name(f'{path.name}.{secrets.token_hex(8)}.partial')
  temporary.write_text(text, 'utf-8')
  sync(temporary)
  os.replace(temporary, path)
