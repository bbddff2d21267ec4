"""Makes finished shards, an index and TFDS metadata one dataset; `verify` reads it again."""

import concurrent.futures
import os
import pathlib
import shutil
import zipfile
import zlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from tfds_kinetics import report as reports
from tfds_kinetics import shards
from tfds_kinetics.configs import DATASET, VideoCollection
from tfds_kinetics.files import file_digest, read_arrays, sync
from tfds_kinetics.messages import BadInput
from tfds_kinetics.shards import ShardJob


def put_in_place(
  collection: VideoCollection,
  tables: dict[ShardJob, dict[str, Any]],
  report: dict[str, Any],
  folder: pathlib.Path,
  target: pathlib.Path,
) -> None:
  """Gathers all files in a new folder and renames it to the dataset's.

  Args:
    collection: described in the metadata.
    tables: of all shards.
    report: of the build; `folder` holds its files.
    folder: of the shards.
    target: folder of the dataset; it must not exist.
  """
  staging = target.with_name(f'{target.name}.staging')
  shutil.rmtree(staging, ignore_errors=True)
  staging.mkdir()
  splits = []
  for split in sorted({job.split for job in tables}):
    split_tables = [
      table for job, table in tables.items() if job.split == split and table['videos']
    ]
    if not split_tables:
      continue
    files = [row for table in split_tables for row in table['files']]
    for number, row in enumerate(files):
      _link(folder / row['name'], shard_path(staging, split, number, len(files)))
    rows = [video for table in split_tables for video in table['videos']]
    _write_index(staging / f'index-{split}.npz', rows, files, report)
    splits.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[row['records'] for row in files],
        num_bytes=sum(row['bytes'] for row in files),
        filename_template=_template(staging, split),
      )
    )
  for path in (folder / reports.NAME, folder / reports.TABLE, *folder.glob('build*.log')):
    shutil.copy(path, staging)
  tfds.folder_dataset.write_metadata(
    data_dir=staging,
    features=shards.frame_features(),
    split_infos=splits,
    version=shards.VERSION,
    check_data=False,  # The check reads with TensorFlow.
    description=collection.description,
    homepage=collection.homepage,
    citation=collection.citation,
  )
  for path in (*staging.iterdir(), staging):
    sync(path)
  os.rename(staging, target)
  sync(target.parent)


def _template(folder: pathlib.Path, split: str) -> tfds.core.ShardedFileTemplate:
  return tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name=DATASET, split=split, filetype_suffix='array_record'
  )


def shard_path(folder: pathlib.Path, split: str, number: int, count: int) -> pathlib.Path:
  """Returns where a dataset has a shard; there are `count` of the split."""
  path = _template(folder, split).sharded_filepath(shard_index=number, num_shards=count)
  return pathlib.Path(path)


def _link(source: pathlib.Path, destination: pathlib.Path) -> None:
  """Links, so that a build killed here loses nothing; copies where links are impossible."""
  try:
    os.link(source, destination)
  except OSError:
    shutil.copy(source, destination)


def _write_index(
  path: pathlib.Path,
  rows: list[dict[str, Any]],
  files: list[dict[str, Any]],
  report: dict[str, Any],
) -> None:
  """Writes the index of a split: where the frames of each video are, and facts about it.

  Arrays, per video: `first` record, number of `frames`, `path`, `youtube_id`, and `label`, a
  position in `classes`. Per shard file: `shard_sha256` and `shard_index_sha256` (see `files`).
  Besides: `classes`, and the `fingerprint` of the whole dataset.
  """
  frames = np.array([row['frames'] for row in rows], np.int32)
  classes = sorted({row['label'] for row in rows})
  label = {name: number for number, name in enumerate(classes)}
  np.savez_compressed(
    path,
    first=np.cumsum(frames, dtype=np.int64) - frames,
    frames=frames,
    label=np.array([label[row['label']] for row in rows], np.int32),
    path=np.array([row['path'] for row in rows], np.str_),
    youtube_id=np.array([row['youtube_id'] for row in rows], np.str_),
    shard_sha256=np.array([row['sha256'] for row in files], np.str_),
    shard_index_sha256=np.array([row['index_sha256'] for row in files], np.str_),
    classes=np.array(classes, np.str_),
    fingerprint=np.array(report['fingerprint'], np.str_),
  )


def verify(folder: pathlib.Path, workers: int) -> str:
  """Compares a whole dataset with its digests; returns a sentence on what was compared.

  Raises:
    BadInput: a file is missing or not the one that was written, or there are no digests.
  """
  expected: dict[pathlib.Path, str] = {}
  for index in sorted(folder.glob('index-*.npz')):
    digests = _stored_digests(index)
    split = index.stem.removeprefix('index-')
    for number, digest in enumerate(digests):
      expected[shard_path(folder, split, number, len(digests))] = digest
  if not expected:
    raise BadInput(f'there is no dataset in {folder}; give the --config and --data_dir of one.')
  with concurrent.futures.ThreadPoolExecutor(workers) as threads:
    digests = threads.map(_digest, expected)
    bar = tqdm.tqdm(digests, total=len(expected), unit='shard', disable=None)
    wrong = [path for path, digest in zip(expected, bar, strict=True) if digest != expected[path]]
  wrong += sorted(set(folder.glob('*.array_record-*')) - expected.keys())
  if wrong:
    raise _damaged(
      folder, f'{len(wrong)} shards are missing or not those that were written, as {wrong[0].name}'
    )
  size = sum(path.stat().st_size for path in expected)
  return f'{folder}: all {len(expected)} shards ({size / 1e6:.1f} MB) are as they were written'


def _stored_digests(index: pathlib.Path) -> list[str]:
  try:
    arrays = read_arrays(index, {'shard_sha256'})
    if arrays:
      return arrays['shard_sha256'].tolist()
  except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise _damaged(index.parent, f'{index.name}: {error}') from error
  raise BadInput(
    f'{index.parent} was built before datasets had digests, so there is nothing to compare with;'
    ' remove it and build it again to have them.'
  )


def _damaged(folder: pathlib.Path, what: str) -> BadInput:
  return BadInput(f'{folder} is damaged ({what}); copy it again, or remove it and build it again.')


def _digest(path: pathlib.Path) -> str | None:
  """Returns the digest of a file, or None if it is missing."""
  try:
    return file_digest(path)
  except FileNotFoundError:
    return None
