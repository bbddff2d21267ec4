"""Last stop: shards, an index and TFDS metadata, put in place as one dataset at the end.

What is finished lies in `<version>.partial` until then, so a build that was stopped goes on.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tfds_kinetics import shards
from tfds_kinetics.configs import VideoCollection
from tfds_kinetics.messages import BadInput, log, say
from tfds_kinetics.shards import ShardJob
from tfds_kinetics.video import FrameOptions
from tfds_kinetics.workers import write_shards

DATASET = 'kinetics_frames'
VERSION = '1.0.0'
REPORT = 'build_report.json'


def plan(collection: VideoCollection, root: pathlib.Path, options: FrameOptions) -> list[ShardJob]:
  """Lists the shards to write.

  Raises:
    BadInput: there is no folder, no video, or not the layout that the collection has.
  """
  if not root.is_dir():
    raise BadInput(f'--videos={root} is not a folder; give the root of the video tree.')
  if collection.num_classes and not (root / 'train').is_dir():
    raise BadInput(
      f'--videos={root} has no train folder, which --config={collection.name} needs'
      ' (train/<class>/<video>); for any other layout use --config=folder.'
    )
  videos, outside = shards.find_videos(root)
  if outside:
    say(f'note: {outside} videos outside of the folders {", ".join(videos)} are left out')
  if not any(videos.values()):
    raise BadInput(
      f'--videos={root} holds no video; files that end in .mp4, .mkv, .avi, .webm and the like'
      ' are looked for in it and its subfolders.'
    )
  return [
    job for split, found in videos.items() for job in shards.shard_jobs(root, split, found, options)
  ]


def build(
  collection: VideoCollection,
  root: pathlib.Path,
  data_dir: pathlib.Path,
  *,
  options: FrameOptions,
  workers: int,
) -> pathlib.Path:
  """Builds the dataset `kinetics_frames/<collection>` below `data_dir` and returns its folder.

  Args:
    collection: which config.
    root: of the video tree.
    data_dir: the TFDS data directory.
    options: how frames are stored.
    workers: processes to decode with; the result does not depend on it.

  Raises:
    BadInput: nothing to build from, no readable video, or another dataset is in the way.
    Stopped: Ctrl-C or SIGTERM.
  """
  jobs = plan(collection, root, options)
  target = data_dir / DATASET / collection.name / VERSION
  fingerprint = hashlib.sha256(''.join(job.fingerprint for job in jobs).encode()).hexdigest()
  folder = target.with_name(f'{VERSION}.partial')
  folder.parent.mkdir(parents=True, exist_ok=True)
  with _only_builder(target):
    if target.exists():
      return _reuse(target, fingerprint)
    folder.mkdir(exist_ok=True)
    log_to(folder / 'build.log')
    tables = write_shards(jobs, folder, workers)
    report = _report(collection, jobs, tables, options, fingerprint)
    shards.write_json(folder / REPORT, report)
    for row in report['skipped']:
      log.info('skipped %s: %s', row['path'], row['reason'])
    if not report['totals']['videos']:
      raise BadInput(
        f'none of the {report["totals"]["skipped"]} videos in --videos={root} could be read;'
        f' the reasons are in {folder / REPORT}.'
      )
    _put_in_place(collection, jobs, tables, folder, target)
  return target


@contextlib.contextmanager
def _only_builder(target: pathlib.Path) -> Iterator[None]:
  """Holds a lock on a dataset while it is built; it goes with the process, however that ends."""
  with target.with_name(f'{VERSION}.lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise BadInput(f'another build is writing {target}; wait for it, or stop it.') from error
    yield


def log_to(path: pathlib.Path) -> None:
  """Adds plain, dated lines in a file to what the log shows."""
  handler = logging.FileHandler(path)
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
  log.addHandler(handler)


def _reuse(target: pathlib.Path, fingerprint: str) -> pathlib.Path:
  """Keeps a dataset that is there; refuses if it was built from something else."""
  try:
    same = json.loads((target / REPORT).read_text())['fingerprint'] == fingerprint
  except (OSError, ValueError, KeyError):
    same = False
  if not same:
    raise BadInput(
      f'{target} holds a dataset of other videos or options; remove that folder to build it anew,'
      ' or give another --data_dir.'
    )
  for left_over in ('partial', 'staging'):
    shutil.rmtree(target.with_name(f'{VERSION}.{left_over}'), ignore_errors=True)
  say(f'{target} is built already from these videos; nothing to do')
  return target


def _report(
  collection: VideoCollection,
  jobs: list[ShardJob],
  tables: list[dict[str, Any]],
  options: FrameOptions,
  fingerprint: str,
) -> dict[str, Any]:
  videos = [video for table in tables for video in table['videos']]
  skipped = [row for table in tables for row in table['skipped']]
  return {
    'dataset': f'{DATASET}/{collection.name}/{VERSION}',
    'fingerprint': fingerprint,
    'options': dataclasses.asdict(options),
    'totals': {
      'videos': len(videos),
      'skipped': len(skipped),
      'frames': sum(video['frames'] for video in videos),
      'bytes': sum(row['bytes'] for table in tables for row in table['files']),
      'classes': len({video['label'] for video in videos} - {''}),
      'classes_expected': collection.num_classes,
    },
    'skipped': sorted(skipped, key=lambda row: row['path']),
  }


def _put_in_place(
  collection: VideoCollection,
  jobs: list[ShardJob],
  tables: list[dict[str, Any]],
  folder: pathlib.Path,
  target: pathlib.Path,
) -> None:
  """Gathers shards, index and metadata in a fresh folder and gives it the dataset's name."""
  staging = target.with_name(f'{VERSION}.staging')
  shutil.rmtree(staging, ignore_errors=True)
  staging.mkdir()
  splits = []
  for split in sorted({job.split for job in jobs}):
    kept = [(j, t) for j, t in zip(jobs, tables, strict=True) if j.split == split and t['videos']]
    if not kept:
      continue
    template = tfds.core.ShardedFileTemplate(
      data_dir=staging, dataset_name=DATASET, split=split, filetype_suffix='array_record'
    )
    files = [row for _, table in kept for row in table['files']]
    for number, row in enumerate(files):
      name = template.sharded_filepath(shard_index=number, num_shards=len(files))
      _link(folder / row['name'], pathlib.Path(name))
    rows = [video for _, table in kept for video in table['videos']]
    _write_index(staging / f'index-{split}.npz', rows)
    splits.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[row['records'] for row in files],
        num_bytes=sum(row['bytes'] for row in files),
        filename_template=template,
      )
    )
  shutil.copy(folder / REPORT, staging / REPORT)
  shutil.copy(folder / 'build.log', staging / 'build.log')
  tfds.folder_dataset.write_metadata(
    data_dir=staging,
    features=shards.frame_features(),
    split_infos=splits,
    version=VERSION,
    check_data=False,  # The check reads with TensorFlow.
    description=collection.description,
    homepage=collection.homepage,
    citation=collection.citation,
  )
  os.rename(staging, target)
  shutil.rmtree(folder)


def _link(source: pathlib.Path, destination: pathlib.Path) -> None:
  """Links, so that a build killed right here has lost nothing; copies where links cannot be."""
  try:
    os.link(source, destination)
  except OSError:
    shutil.copy(source, destination)


def _write_index(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """Writes where each video's frames lie in the split: `first` record, number of `frames`."""
  frames = np.array([row['frames'] for row in rows], np.int32)
  classes = sorted({row['label'] for row in rows})
  label = {name: number for number, name in enumerate(classes)}
  np.savez_compressed(
    path,
    first=np.cumsum(frames, dtype=np.int64) - frames,
    frames=frames,
    label=np.array([label[row['label']] for row in rows], np.int32),
    path=np.array([row['path'] for row in rows], np.str_),
    classes=np.array(classes, np.str_),
  )


def summary(target: pathlib.Path) -> str:
  """Returns the closing lines of a build: totals, what was skipped and why."""
  report = json.loads((target / REPORT).read_text())
  totals = report['totals']
  lines = [
    f'{target}: {totals["videos"]} videos, {totals["frames"]} frames,'
    f' {totals["bytes"] / 1e6:.1f} MB, {totals["classes"]} classes; {totals["skipped"]} skipped'
  ]
  if totals['classes_expected'] not in (None, totals['classes']):
    lines.append(f'note: a complete copy has {totals["classes_expected"]} classes')
  lines += [f'  skipped {row["path"]}: {row["reason"]}' for row in report['skipped'][:10]]
  if len(report['skipped']) > 10:
    lines.append(f'  and {len(report["skipped"]) - 10} more')
  lines.append(f'  report: {target / REPORT}')
  return '\n'.join(lines)
