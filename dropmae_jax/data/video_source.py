"""Datasets opened for reading single frames: those of tfds_kinetics, and classes of the user's own.

Opening a dataset checks names, sizes, numbers and the index of every shard. Other damage is found
when a frame is read. Both are reported in one sentence that says what to do.
"""

import hashlib
import importlib
import inspect
import logging
import os
import pathlib
import re
import sys
import time
from typing import Protocol, runtime_checkable

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from tensorflow_datasets.proto import tf_example_pb2

from dropmae_jax.data.shards import ChangedDataset, Shards
from dropmae_jax.runtime.errors import NO_DAMAGE, UserError, remedy_of
from tfds_kinetics.files import read_arrays

# Major versions of the dataset that can be read; other parts of the version do not matter here.
SUPPORTED_VERSIONS = frozenset({2})
# Pauses before a record that could not be read is read again.
RETRY_SECONDS = (0.05, 0.5)
# Every 8 x 8 pixels of a baseline JPEG, as the builder writes them, take 2 bits or more.
MOST_PIXELS_PER_BYTE = 256
# How array_record reports a system call that failed.
SYSTEM_CALL_FAILED = re.compile(r'\b(pread|read|open|fstat|lseek)\(\) failed')
# The array of an index file with the digest of every shard; datasets of older builders have none.
DIGESTS = 'shard_index_sha256'

_log = logging.getLogger('dropmae_jax')


class DamagedRecord(UserError):
  """One record of a dataset cannot be read; the message names video, record and file."""


@runtime_checkable
class VideoSource(Protocol):
  """A dataset as the pipeline reads it: videos by number, frames by number.

  Several threads read from it at a time. Two members are optional: an attribute `fingerprint`, a
  string that differs if the frames differ (see `fingerprint` below), and a method `paths`, which
  returns a name for every video.
  """

  def __len__(self) -> int:
    """Number of videos."""
    ...

  def num_frames(self, video: int) -> int:
    """Frames of a video; at least 1."""
    ...

  def frame(self, video: int, number: int) -> UInt8[np.ndarray, 'h w c']:
    """One decoded frame; raises DamagedRecord if it cannot be read."""
    ...


class TfdsVideos:
  """A dataset built by tfds_kinetics, with random access to its frames.

  Attributes:
    folder: of the version that was opened.
    fingerprint: a hash of the stored frames of all splits, and of their videos.
  """

  def __init__(self, folder: pathlib.Path, split: str, *, num_datasets: int = 1) -> None:
    """Opens a split.

    Args:
      folder: of one version.
      split: of the dataset.
      num_datasets: that this process reads together.

    Raises:
      UserError: there is no such split, or its files are missing, cut short or damaged.
    """
    self.folder, self._split = folder, split
    try:
      # TFDS's builder would read features.json too, and import every class that it names.
      metadata = tfds.core.dataset_info.read_proto_from_builder_dir(folder)
      template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=metadata.name, filetype_suffix=metadata.file_format
      )
      splits = tfds.core.SplitDict.from_proto(metadata.splits, template)
      version = tfds.core.Version(metadata.version)
      info = splits.get(split)
      names = sorted(os.path.basename(path) for path in info.filenames) if info else []
    except NO_DAMAGE:
      raise
    except Exception as error:  # On damaged metadata TFDS raises whatever its parsers raise.
      _raise_if_short(folder, error)
      raise _damaged(folder, f'dataset_info.json: {error}') from error
    if version.major not in SUPPORTED_VERSIONS:
      raise _other_version(folder, str(version))
    if info is None:
      raise UserError(
        f'{folder} has no split {split!r} that tfds_kinetics wrote; there are: {", ".join(splits)}.'
      )
    self._check_shards(names, int(info.num_bytes))
    index = self.read_index()
    self.fingerprint = str(index['fingerprint'])
    digests = index[DIGESTS].tolist() if DIGESTS in index else None
    if digests is None:
      _log.warning(
        f'{folder} was built before datasets had digests, so that its shards are not compared with'
        ' those that were built; a dataset that is built again has them.'
      )
    try:
      self._records = Shards(info.file_instructions, digests, num_datasets=num_datasets)
    except ValueError as error:  # ChangedDataset, or there are more or fewer digests than shards.
      raise _damaged(folder, str(error)) from error
    self._first, self._frames = self._checked(index['first'], index['frames'])

  def _check_shards(self, names: list[str], num_bytes: int) -> None:
    """Compares the shard files with the names and sizes in the metadata, without reading them."""
    with os.scandir(self.folder) as entries:
      sizes = {entry.name: entry.stat().st_size for entry in entries}
    missing = [name for name in names if not sizes.get(name)]
    if missing:
      raise _damaged(
        self.folder, f'{len(missing)} of {len(names)} shards missing or empty: {missing[0]}'
      )
    stored = sum(sizes[name] for name in names)
    if stored != num_bytes:
      raise _damaged(
        self.folder,
        f'the shards of {self._split} hold {stored} bytes, not the {num_bytes} that were written',
      )

  def read_index(self, *more: str) -> dict[str, np.ndarray]:
    """Returns the arrays of the index file that every reader needs, and further ones.

    Raises:
      UserError: it is damaged, or lacks one of them.
    """
    name = f'index-{self._split}.npz'
    names = ('first', 'frames', 'fingerprint', *more)
    try:
      index = read_arrays(self.folder / name, {*names, DIGESTS})
      return {key: index[key] for key in (*names, *index.keys() & {DIGESTS})}
    except NO_DAMAGE:
      raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own types.
      _raise_if_short(self.folder, error)
      raise _damaged(self.folder, f'{name}: {_reason(error)}') from error

  def _checked(self, first: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each video's first record and number of frames, if they fit the shards."""
    name = f'index-{self._split}.npz'
    consistent = first.dtype.kind == frames.dtype.kind == 'i' and first.shape == frames.shape
    if not (consistent and first.ndim == 1 and len(first)):
      raise _damaged(self.folder, f'{name} does not list videos: {first.shape}, {frames.shape}')
    if first.min() < 0 or frames.min() < 1 or (first + frames).max() > len(self._records):
      raise _damaged(
        self.folder, f'{name} points outside of the {len(self._records)} records of the split'
      )
    return first, frames

  def __len__(self) -> int:
    return len(self._frames)

  def num_frames(self, video: int) -> int:
    """Frames of a video; at least 1."""
    return int(self._frames[video])

  def paths(self) -> np.ndarray:
    """The path of every video, relative to the root of the videos; reads the index file again."""
    index = self.read_index('path')
    if str(index['fingerprint']) != self.fingerprint:
      raise ChangedDataset(
        f'{self.folder} was replaced by another dataset while it was in use; put it back and give'
        ' the same command again.'
      )
    return index['path']

  def frame(self, video: int, number: int) -> UInt8[np.ndarray, 'h w c']:
    """Reads one record and decodes its JPEG to RGB.

    Raises:
      DamagedRecord: the record does not hold a JPEG.
      UserError: an I/O error, or the record's file was replaced.
    """
    record = int(self._first[video]) + number
    for pause in (*RETRY_SECONDS, None):
      try:
        features = tf_example_pb2.Example.FromString(self._records[record]).features.feature
        return _decode(features['jpeg'].bytes_list.value[0])
      except (*NO_DAMAGE, ChangedDataset):
        raise
      except Exception as error:  # Of array_record, protobuf or simplejpeg.
        if pause is None:
          raise self._unreadable(video, record, error) from error
        time.sleep(pause)  # The storage may recover.
    raise AssertionError('unreachable')

  def _unreadable(self, video: int, record: int, error: Exception) -> UserError:
    _raise_if_short(self.folder, error)
    if isinstance(error, OSError) or SYSTEM_CALL_FAILED.search(str(error)):
      return UserError(
        f'{self.folder} cannot be read ({error}); check its storage, and give the same command'
        ' again.'
      )
    try:
      self._records.check(record)
    except OSError as failure:
      return self._unreadable(video, record, failure)
    try:
      path = str(self.paths()[video])
    except Exception:  # The user has to see the error of the record.
      path = 'unknown path'
    return DamagedRecord(
      f'video {video} ({path}) cannot be read: record {record} of split {self._split}, in'
      f' {self._records.file_of(record)},'
      f' is damaged ({_reason(error)}); {_remedy(self.folder)}.'
    )


def _decode(jpeg: bytes) -> UInt8[np.ndarray, 'h w 3']:
  """Decodes a JPEG to RGB; a damaged header must not ask for more memory than a frame needs."""
  height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
  if height * width > MOST_PIXELS_PER_BYTE * len(jpeg):
    raise ValueError(f'{len(jpeg)} bytes cannot hold the {width} x {height} pixels of its header')
  return simplejpeg.decode_jpeg(jpeg, 'RGB')


def _reason(error: Exception) -> str:
  """Returns type and message of an error on one line; the message alone may say nothing."""
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text}' if text else type(error).__name__


def _raise_if_short(folder: pathlib.Path, error: Exception) -> None:
  """Raises a UserError if the machine is short of something, which is no damage."""
  remedy = remedy_of(error, '')
  if remedy:
    raise UserError(
      f'{folder} cannot be read ({_reason(error)}); {remedy}, and give the same command again.'
    ) from error


def _remedy(folder: pathlib.Path) -> str:
  return f'copy {folder} again, or remove it and build it again with python -m tfds_kinetics'


def _damaged(folder: pathlib.Path, what: str) -> UserError:
  return UserError(f'{folder} is damaged: {" ".join(what.split())}; {_remedy(folder)}.')


def _other_version(folder: pathlib.Path, version: str) -> UserError:
  supported = ' or '.join(f'{major}.x.y' for major in sorted(SUPPORTED_VERSIONS))
  return UserError(
    f'{folder} is of format version {version}, and this code reads {supported}; build it again with'
    ' python -m tfds_kinetics of this code, or use the code that wrote it.'
  )


def open_dataset(
  data_dir: str, dataset: str, split: str = 'train', *, num_datasets: int = 1
) -> VideoSource:
  """Opens a dataset of tfds_kinetics, or one of a class of the user's own.

  Args:
    data_dir: what was given to the builder as --data_dir, or the version's folder itself.
    dataset: TFDS name and config, such as 'kinetics_frames/folder'; or 'MODULE:CLASS', where
      CLASS(data_dir, split) returns a `VideoSource`.
    split: of the dataset.
    num_datasets: that this process reads together.

  Raises:
    UserError: there is no such dataset, and the message names the command that builds it; or it
      cannot be read.
  """
  try:
    if ':' in dataset:
      return _open_class(data_dir, dataset, split)
    return _open_tfds(data_dir, dataset, split, num_datasets)
  except OSError as error:  # Names the file, which may be a link in data_dir.
    remedy = remedy_of(error, 'give another data_dir, or fix its permissions and links')
    raise UserError(
      f'{error.filename or data_dir} cannot be opened ({error.strerror or error}); {remedy}.'
    ) from error


def _open_class(data_dir: str, dataset: str, split: str) -> VideoSource:
  module, _, name = dataset.partition(':')
  if os.getcwd() not in sys.path:  # `python -m` searches the working directory, dropmae-train not.
    sys.path.append(os.getcwd())
  try:
    cls = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:  # ValueError: no module is named.
    raise UserError(
      f'dataset={dataset!r} cannot be imported ({error}); give MODULE:CLASS, of a module in the'
      ' working directory or on PYTHONPATH.'
    ) from error
  try:
    inspect.signature(cls).bind(data_dir, split)
  except TypeError as error:
    raise UserError(
      f'dataset={dataset!r} is not made by {name}(data_dir, split): {error}.'
    ) from error
  videos = cls(data_dir, split)
  for method in ('__len__', 'num_frames', 'frame'):
    if not hasattr(videos, method):
      raise UserError(f'dataset={dataset!r} has no method {method}; add it.')
  if not len(videos):
    raise UserError(f'dataset={dataset!r} has no videos in data_dir={data_dir!r}; give another.')
  return videos


def fingerprint(videos: VideoSource) -> str:
  """Returns the fingerprint of a dataset: its own, or a hash of its videos' numbers of frames."""
  if hasattr(videos, 'fingerprint'):
    return videos.fingerprint
  digest = hashlib.sha256(f'{type(videos).__module__}:{type(videos).__qualname__}'.encode())
  digest.update(np.array([videos.num_frames(each) for each in range(len(videos))]).tobytes())
  return digest.hexdigest()


def _open_tfds(data_dir: str, dataset: str, split: str, num_datasets: int) -> TfdsVideos:
  """Opens the newest version of a dataset of tfds_kinetics."""
  root = pathlib.Path(data_dir)
  if is_version_folder(root):
    return TfdsVideos(root, split, num_datasets=num_datasets)
  versions = sorted(
    (
      info.parent
      for info in (root / dataset).glob('*/dataset_info.json')
      if re.fullmatch(r'\d+\.\d+\.\d+', info.parent.name)
    ),
    key=lambda folder: [int(part) for part in folder.name.split('.')],
  )
  if not versions:
    config = dataset.rpartition('/')[2]
    raise UserError(
      f'there is no dataset {dataset} in data_dir={data_dir!r}; build it with:'
      f' python -m tfds_kinetics --config={config} --videos=VIDEOS --data_dir={data_dir or "DIR"}'
    )
  newest = versions[-1]
  # Checked before TFDS parses the metadata, which may fail on another format.
  if int(newest.name.partition('.')[0]) not in SUPPORTED_VERSIONS:
    raise _other_version(newest, newest.name)
  return TfdsVideos(newest, split, num_datasets=num_datasets)


def is_version_folder(folder: pathlib.Path) -> bool:
  """Whether a folder is one version of a dataset, rather than a data directory.

  Raises:
    OSError: the path cannot be checked, for example because it is too long.
  """
  return (folder / 'dataset_info.json').exists()
