"""Builds a dataset from a folder of videos: in one command, or in the ranges of an array job.

Finished shards are kept in the folder `<version>.partial` until the dataset is complete. So a build
that was stopped resumes, and machines that share a file system can each write some of the shards.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tfds_kinetics import publish, report, shards
from tfds_kinetics.configs import DATASET, VideoCollection
from tfds_kinetics.files import write_text
from tfds_kinetics.messages import BadInput, log, one_line, say
from tfds_kinetics.shards import VERSION, ShardJob
from tfds_kinetics.tree import Listing, list_videos, split_folders
from tfds_kinetics.video import FrameOptions
from tfds_kinetics.workers import write_shards

PLAN = 'plan.txt'
# (jobs, folder of the shards) to the tables of the shards.
Writer = Callable[[list[ShardJob], pathlib.Path], dict[ShardJob, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A dataset to build.

  Attributes:
    collection: the builder config.
    root: of the video tree.
    target: the folder of the finished dataset.
    options: how frames are stored.
    listing: the videos that were found.
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
    """The folder of the shards."""
    return self.target.with_name(f'{VERSION}.partial')


def plan(
  collection: VideoCollection,
  root: pathlib.Path,
  data_dir: pathlib.Path,
  options: FrameOptions,
  annotations: pathlib.Path | None = None,
) -> Plan:
  """Lists the videos and the shards to write.

  Args:
    collection: the builder config.
    root: of the video tree.
    data_dir: the TFDS data directory; the dataset is `kinetics_frames/<collection>` in it.
    options: how frames are stored.
    annotations: folder of Kinetics' csv files, if it is not in `root`.

  Raises:
    BadInput: `root` is no folder, holds no video, or lacks the layout of the collection.
  """
  if not root.is_dir():
    raise BadInput(f'--videos={root} is not a folder; give the root of the video tree.')
  root = root.absolute()
  if collection.num_classes and split_folders(root) == {'train': [root]}:
    raise BadInput(
      f'--videos={root} has no train folder, which --config={collection.name} needs'
      ' (train/<class>/<video>, or train/<video> beside the annotations); for any other layout'
      ' use --config=folder.'
    )
  say(f'listing the videos in {root}')
  listing = list_videos(collection, root, annotations)
  if not any(listing.videos.values()):
    raise BadInput(
      f'--videos={root} holds no video; files that end in .mp4, .mkv, .avi, .webm and the like'
      ' are looked for in it and its subfolders.'
    )
  if collection.num_classes and not listing.videos['train']:
    raise BadInput(
      f'--videos={root} has no video in its train folder, which --config={collection.name} needs;'
      ' put the training videos there, or use --config=folder.'
    )
  if collection.num_classes and not all(v.label for vs in listing.videos.values() for v in vs):
    say('note: some videos have no class; --annotations=FOLDER of the csv files would give it')
  jobs = (
    job
    for split, videos in listing.videos.items()
    for job in shards.shard_jobs(root, split, videos, options)
  )
  target = data_dir / DATASET / collection.name / VERSION
  return Plan(collection, root, target, options, listing, tuple(jobs))


def build(planned: Plan, write: Writer) -> pathlib.Path:
  """Writes the shards that do not exist yet, and puts the dataset in place.

  Args:
    planned: the dataset to build.
    write: writes the shards; its choice does not change the result.

  Raises:
    BadInput: no video can be read, or the folder holds another dataset.
    Stopped: Ctrl-C or SIGTERM.
  """
  with _lock(planned):
    if not _is_built(planned):
      with _open_folder(planned, 'build.log'):
        _publish(planned, write(list(planned.jobs), planned.folder))
      _remove_leftovers(planned)
  return planned.target


def build_range(planned: Plan, number: int, count: int, workers: int) -> str:
  """Writes every `count`-th shard, from the `number`-th on; other processes write the others.

  Returns:
    A sentence that says what to do next.

  Raises:
    BadInput, Stopped: as `build` does.
  """
  jobs = list(planned.jobs[number::count])
  with _lock(planned, range(number, len(planned.jobs), count)):
    if _is_built(planned):
      return 'there is nothing left to do'
    with _open_folder(planned, f'build-{number}-of-{count}.log'):
      write_shards(jobs, planned.folder, workers)
  return (
    f'{len(jobs)} of {len(planned.jobs)} shards belong to range {number}/{count} and are there;'
    ' once those of all ranges are, give the same command with --finalise in place of'
    ' --shard_range'
  )


def finalise(planned: Plan) -> pathlib.Path:
  """Puts the dataset in place once all ranges are written.

  Raises:
    BadInput: shards are missing.
  """
  tables = {}
  if not planned.target.exists():
    tables = {job: shards.finished_table(job, planned.folder) for job in planned.jobs}
    lacking = [job.name for job, table in tables.items() if table is None]
    if lacking:
      raise BadInput(
        f'{len(lacking)} of {len(planned.jobs)} shards are not in {planned.folder}, the first of'
        f' them {lacking[0]}; run all ranges with the same videos and options first, or the'
        ' command without --finalise, which writes what is lacking.'
      )
  return build(planned, lambda *_: tables)


@contextlib.contextmanager
def _lock(planned: Plan, numbers: Iterable[int] | None = None) -> Iterator[None]:
  """Locks some shards, or all; the system releases the locks when the process ends.

  Each shard is one byte of the lock file. So builds of different shards do not block one another,
  and a build of the same shards is refused, whatever the number of ranges of each.
  """
  path = planned.target.with_name(f'{VERSION}.lock')
  path.parent.mkdir(parents=True, exist_ok=True)
  whole_file = [(0, 0)]
  with path.open('w') as lock:
    try:
      for start, length in whole_file if numbers is None else ((each, 1) for each in numbers):
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except (BlockingIOError, PermissionError) as error:
      raise BadInput(
        f'another build is writing {"" if numbers is None else "the same shards of "}'
        f'{planned.target}; wait for it, or stop it.'
      ) from error
    except OSError as error:
      say(f'note: {path} cannot be locked ({error.strerror}); start no second build of it')
    yield
    if planned.target.exists():
      path.unlink(missing_ok=True)  # A process that has it open finds the dataset in place.


@contextlib.contextmanager
def _open_folder(planned: Plan, log_name: str) -> Iterator[None]:
  """Makes the folder of the shards, or checks that it is of this plan; logs to a file in it.

  Raises:
    BadInput: the folder holds shards of another plan, which would be lost.
  """
  planned.folder.mkdir(exist_ok=True)
  path, mine = planned.folder / PLAN, report.plan_fingerprint(planned.jobs)
  try:
    there = path.read_text('utf-8')
  except FileNotFoundError:
    write_text(path, mine)
    there = mine
  if there != mine:
    raise BadInput(
      f'{planned.folder} holds an unfinished build of other videos or options; give those again to'
      ' go on, or remove that folder.'
    )
  handler = logging.FileHandler(
    planned.folder / log_name, encoding='utf-8', errors='backslashreplace'
  )
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
  log.addHandler(handler)
  try:
    yield
  finally:
    log.removeHandler(handler)
    handler.close()


def _is_built(planned: Plan) -> bool:
  """Whether this dataset is built already; refuses if the folder holds another one."""
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
  _remove_leftovers(planned)
  say(f'{planned.target} is built already from these videos; nothing to do')
  if skipped:
    say(f'{skipped} videos were skipped then; to try them again, remove that folder')
  return True


def _remove_leftovers(planned: Plan) -> None:
  """Removes the temporary folders beside a finished dataset, as far as possible."""
  for suffix in ('partial', 'staging'):
    shutil.rmtree(planned.target.with_name(f'{VERSION}.{suffix}'), ignore_errors=True)


def _publish(planned: Plan, tables: dict[ShardJob, dict[str, Any]]) -> None:
  tables = {job: tables[job] for job in planned.jobs}
  outcome = report.make_report(planned.collection, planned.listing, tables, planned.options)
  report.write_report(planned.folder, outcome)
  for row in outcome['videos']:
    if row['reason']:
      log.info(one_line(f'{row["outcome"]} {row["path"]}: {row["reason"]}'))
  if not outcome['totals']['videos']:
    raise BadInput(
      f'none of the {outcome["totals"]["skipped"]} videos in --videos={planned.root} could be'
      f' read; the reasons are in {planned.folder / report.TABLE}. Mend them, remove'
      f' {planned.folder} and give the command again.'
    )
  publish.put_in_place(planned.collection, tables, outcome, planned.folder, planned.target)
