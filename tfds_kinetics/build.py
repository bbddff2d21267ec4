"""The road from a folder of videos to a dataset: in one go, or in the ranges of an array job.

What is finished lies in `<version>.partial` until the dataset is whole, so a build that was
stopped goes on, and machines that share a file system can each write some of it.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from tfds_kinetics import publish, report, shards
from tfds_kinetics.configs import DATASET, SPLITS, VideoCollection
from tfds_kinetics.messages import BadInput, log, say
from tfds_kinetics.shards import VERSION, ShardJob
from tfds_kinetics.tree import Listing, list_videos
from tfds_kinetics.video import FrameOptions
from tfds_kinetics.workers import write_shards

PLAN = 'plan.txt'
# From jobs and the folder of their shards to the shards' tables.
Writer = Callable[[list[ShardJob], pathlib.Path], dict[ShardJob, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be built.

  Attributes:
    collection: which config.
    root: of the video tree.
    target: the folder that the dataset will have.
    options: how frames are stored.
    listing: what was found.
    jobs: all shards.
  """

  collection: VideoCollection
  root: pathlib.Path
  target: pathlib.Path
  options: FrameOptions
  listing: Listing
  jobs: tuple[ShardJob, ...]

  @property
  def folder(self) -> pathlib.Path:
    """Where shards are collected."""
    return self.target.with_name(f'{VERSION}.partial')


def plan(
  collection: VideoCollection,
  root: pathlib.Path,
  data_dir: pathlib.Path,
  options: FrameOptions,
  annotations: pathlib.Path | None = None,
) -> Plan:
  """Lists the shards to write.

  Args:
    collection: which config.
    root: of the video tree.
    data_dir: the TFDS data directory; the dataset is `kinetics_frames/<collection>` in it.
    options: how frames are stored.
    annotations: folder of the csv files of Kinetics, if not in `root`.

  Raises:
    BadInput: there is no folder, no video, or not the layout that the collection has.
  """
  if not root.is_dir():
    raise BadInput(f'--videos={root} is not a folder; give the root of the video tree.')
  root = root.absolute()
  say(f'listing the videos in {root}')
  listing = list_videos(collection, root, annotations)
  if collection.num_classes and not _has_training_folder(listing):
    raise BadInput(
      f'--videos={root} has no train folder, which --config={collection.name} needs'
      ' (train/<class>/<video>, or train/<video> beside the annotations); for any other layout'
      ' use --config=folder.'
    )
  if not any(listing.videos.values()):
    raise BadInput(
      f'--videos={root} holds no video; files that end in .mp4, .mkv, .avi, .webm and the like'
      ' are looked for in it and its subfolders.'
    )
  if collection.num_classes and not all(v.label for vs in listing.videos.values() for v in vs):
    say('note: some videos have no class; --annotations=FOLDER of the csv files would give it')
  jobs = (
    job
    for split, found in listing.videos.items()
    for job in shards.shard_jobs(root, split, found, options)
  )
  target = data_dir / DATASET / collection.name / VERSION
  return Plan(collection, root, target, options, listing, tuple(jobs))


def build(planned: Plan, write: Writer) -> pathlib.Path:
  """Writes what is not there yet, and puts the dataset in place.

  Args:
    planned: what to build.
    write: writes the shards; the result does not depend on how.

  Raises:
    BadInput: no readable video, or another dataset is in the way.
    Stopped: Ctrl-C or SIGTERM.
  """
  with _lock(planned, alone=True):
    if not _is_built(planned):
      _open_folder(planned, 'build.log')
      _publish(planned, write(list(planned.jobs), planned.folder))
  return planned.target


def build_range(planned: Plan, number: int, count: int, workers: int) -> str:
  """Writes each `count`-th shard, from the `number`-th on; other processes write the others.

  Returns:
    A sentence that says what is left to do.

  Raises:
    BadInput, Stopped: as `build` does.
  """
  name = f'range-{number}-of-{count}'
  with _lock(planned, alone=False), _lock(planned, alone=True, name=name):
    if _is_built(planned):
      return 'there is nothing left to do'
    _open_folder(planned, f'build-{number}-of-{count}.log')
    jobs = list(planned.jobs[number::count])
    write_shards(jobs, planned.folder, workers)
  return (
    f'{len(jobs)} of {len(planned.jobs)} shards belong to range {number}/{count} and are there;'
    ' once those of all ranges are, give the same command with --finalise in place of'
    ' --shard_range'
  )


def finalise(planned: Plan) -> pathlib.Path:
  """Puts the dataset in place once all ranges are written.

  Raises:
    BadInput: shards are not there yet.
  """
  with _lock(planned, alone=True):
    if not _is_built(planned):
      tables = {job: shards.finished_table(job, planned.folder) for job in planned.jobs}
      lacking = [job.name for job, table in tables.items() if table is None]
      if lacking:
        raise BadInput(
          f'{len(lacking)} of {len(planned.jobs)} shards are not in {planned.folder}, the first of'
          f' them {lacking[0]}; run all ranges with the same videos and options first, or the'
          ' command without --finalise, which writes what is lacking.'
        )
      _open_folder(planned, 'build.log')
      _publish(planned, tables)
  return planned.target


def _has_training_folder(listing: Listing) -> bool:
  paths = (video.path.split('/') for video in listing.videos.get('train', []))
  return any(SPLITS.get(folder) == 'train' and rest for folder, *rest in paths)


@contextlib.contextmanager
def _lock(planned: Plan, *, alone: bool, name: str = '') -> Iterator[None]:
  """Holds a lock on a dataset while it is built; it goes with the process, however that ends."""
  planned.target.parent.mkdir(parents=True, exist_ok=True)
  with planned.target.with_name('.'.join(filter(None, (VERSION, name, 'lock')))).open('w') as lock:
    try:
      fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise BadInput(
        f'another build is writing {name or "the dataset"} of {planned.target}; wait for it, or'
        ' stop it.'
      ) from error
    except OSError as error:
      say(f'note: {lock.name} cannot be locked ({error.strerror}); start no second build of it')
    yield


def _open_folder(planned: Plan, log_name: str) -> None:
  """Makes the folder of the shards, or checks that it is of this plan; opens a log in it.

  Raises:
    BadInput: what is finished there is of another plan, and would be lost.
  """
  planned.folder.mkdir(exist_ok=True)
  path, mine = planned.folder / PLAN, report.plan_fingerprint(planned.jobs)
  try:
    there = path.read_text('utf-8')
  except FileNotFoundError:
    shards.write_text(path, mine)
    there = mine
  if there != mine:
    raise BadInput(
      f'{planned.folder} holds an unfinished build of other videos or options; give those again to'
      ' go on, or remove that folder.'
    )
  log_to(planned.folder / log_name)


def log_to(path: pathlib.Path) -> None:
  """Adds plain, dated lines in a file to what the log shows."""
  handler = logging.FileHandler(path, encoding='utf-8')
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
  log.addHandler(handler)


def _is_built(planned: Plan) -> bool:
  """Whether this very dataset is there; refuses if it was built from something else."""
  if not planned.target.exists():
    return False
  try:
    stored = json.loads((planned.target / report.NAME).read_text('utf-8'))
    there, skipped = stored['plan'], stored['totals']['skipped']
  except (OSError, ValueError, KeyError, TypeError):
    there = None
  if there != report.plan_fingerprint(planned.jobs):
    raise BadInput(
      f'{planned.target} holds a dataset of other videos or options; remove that folder to build'
      ' it anew, or give another --data_dir.'
    )
  for left_over in ('partial', 'staging'):
    shutil.rmtree(planned.target.with_name(f'{VERSION}.{left_over}'), ignore_errors=True)
  say(f'{planned.target} is built already from these videos; nothing to do')
  if skipped:
    say(f'{skipped} videos were skipped then; to try them again, remove that folder')
  return True


def _publish(planned: Plan, tables: dict[ShardJob, dict[str, Any]]) -> None:
  tables = {job: tables[job] for job in planned.jobs}
  outcome = report.make_report(planned.collection, planned.listing, tables, planned.options)
  report.write_report(planned.folder, outcome)
  for row in outcome['videos']:
    if row['reason']:
      log.info('skipped %s: %s', row['path'], row['reason'])
  if not outcome['totals']['videos']:
    raise BadInput(
      f'none of the {outcome["totals"]["skipped"]} videos in --videos={planned.root} could be'
      f' read; the reasons are in {planned.folder / report.TABLE}.'
    )
  publish.put_in_place(planned.collection, tables, outcome, planned.folder, planned.target)
