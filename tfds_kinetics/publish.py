"""Makes finished shards, an index and TFDS metadata one dataset, by a single rename."""

import os
import pathlib
import shutil
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tfds_kinetics import disk, records, shards
from tfds_kinetics import report as reports
from tfds_kinetics.configs import DATASET, VideoCollection
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
    kept = [table for job, table in tables.items() if job.split == split and table['videos']]
    if not kept:
      continue
    files = [row for table in kept for row in table['files']]
    for number, row in enumerate(files):
      _link(folder / row['name'], shard_path(staging, split, number, len(files)))
    rows = [video for table in kept for video in table['videos']]
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
    features=records.frame_features(),
    split_infos=splits,
    version=shards.VERSION,
    check_data=False,  # The check reads with TensorFlow.
    description=collection.description,
    homepage=collection.homepage,
    citation=collection.citation,
  )
  for path in (*staging.iterdir(), staging):
    disk.sync(path)
  os.rename(staging, target)
  disk.sync(target.parent)


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
  position in `classes`. Per shard file: `shard_sha256` and `shard_index_sha256` (see `digests`).
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
