"""Third stop: all processes write shards, and none of them can stop the build."""

import concurrent.futures
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tqdm

from tfds_kinetics import shards
from tfds_kinetics.messages import BadInput, Stopped, log, say
from tfds_kinetics.shards import ShardJob

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_stop_event: Any = None


def write_shards(jobs: list[ShardJob], folder: pathlib.Path, workers: int) -> list[dict[str, Any]]:
  """Writes the shards that are not there yet, whatever happens to the processes that do it.

  Args:
    jobs: all shards of the dataset.
    folder: where they are, and are to be.
    workers: number of processes.

  Returns:
    The table of every shard; see `shards.write_shard`.

  Raises:
    Stopped: Ctrl-C.
    BadInput: the folder cannot be written, or processes are killed for no video's sake.
  """
  for stale in [*folder.glob('*.partial'), *folder.glob('*.current')]:
    stale.unlink()
  tables = {job: table for job in jobs if (table := shards.finished_table(job, folder))}
  if tables:
    say(f'going on: {len(tables)} of {len(jobs)} shards are there')
  bar = tqdm.tqdm(
    total=sum(len(job.videos) for job in jobs),
    initial=sum(len(job.videos) for job in tables),
    unit='video',
    disable=None,
  )
  crashed: frozenset[str] = frozenset()
  unexplained = 0
  with bar:
    while left := [job for job in jobs if job not in tables]:
      try:
        for job, table in _completed(left, folder, workers, crashed):
          tables[job] = table
          bar.update(len(job.videos))
          log.info(
            f'shard {len(tables)} of {len(jobs)}: {job.name}, {len(table["videos"])} videos,'
            f' {len(table["skipped"])} skipped'
          )
      except KeyboardInterrupt:
        raise Stopped(
          f'stopped; {len(tables)} of {len(jobs)} shards are kept, and the same command goes on'
          ' from there'
        ) from None
      except BrokenProcessPool:
        culprits = _culprits(left, folder) - crashed
        say(f'a process was killed; videos to blame: {", ".join(culprits) or "none by itself"}')
        crashed |= culprits
        unexplained += not culprits
        if unexplained > 2:
          raise BadInput(
            'the processes of this build are killed again and again, by no single video; free'
            f' memory or use fewer than --workers={workers}. What is finished is kept.'
          ) from None
      except shards.SourceChanged as error:
        raise BadInput(
          f'{error}; leave the videos alone while they are read, and give the command again.'
        ) from error
      except (OSError, RuntimeError) as error:
        raise BadInput(
          f'{folder} cannot be written: {error}; what is finished is kept, and the same command'
          ' goes on from there.'
        ) from error
  return [tables[job] for job in jobs]


def _pool(workers: int, event: Any) -> concurrent.futures.ProcessPoolExecutor:
  return concurrent.futures.ProcessPoolExecutor(
    workers,
    multiprocessing.get_context('spawn'),
    initializer=_start_worker,
    initargs=(event, os.getpid()),
  )


def _completed(
  jobs: list[ShardJob], folder: pathlib.Path, workers: int, crashed: frozenset[str]
) -> Iterator[tuple[ShardJob, dict[str, Any]]]:
  """Yields shards as processes finish them; whatever goes wrong, no further one is begun."""
  stop = multiprocessing.get_context('spawn').Event()
  with _pool(max(1, min(workers, len(jobs))), stop) as pool:
    try:
      # Processes start at the first submit and inherit the mask: they cannot be interrupted
      # before they have said that they will not be.
      signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
      try:
        running = {pool.submit(_work, job, folder, crashed): job for job in jobs}
      finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
      for future in concurrent.futures.as_completed(running):
        yield running[future], future.result()
    except BaseException:
      stop.set()
      pool.shutdown(cancel_futures=True)
      raise


def _culprits(jobs: list[ShardJob], folder: pathlib.Path) -> frozenset[str]:
  """Reads again, each in a process of its own, the videos that were open when one was killed."""
  suspects = set()
  for marker in folder.glob('*.current'):
    suspects.add(marker.read_text())
    marker.unlink()
  with _pool(1, None) as pool:
    if pool.submit(os.getpid).exception():
      return frozenset()  # No process lives at all, so it is no video's doing.
  killers = set()
  for job in jobs:
    for video in job.videos:
      if video.path in suspects:
        with _pool(1, None) as pool:
          path = os.path.join(job.root, video.path)
          error = pool.submit(shards.read_jpegs, path, job.options).exception()
        if isinstance(error, BrokenProcessPool):
          killers.add(video.path)
  return frozenset(killers)


def _start_worker(event: Any, builder: int) -> None:
  """Leaves Ctrl-C to the builder, which tells through `event`; ends when the builder does."""
  global _stop_event
  _stop_event = event
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
  threading.Thread(target=_end_without, args=(builder,), daemon=True).start()


def _end_without(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(1)
  os._exit(1)


def _work(job: ShardJob, folder: pathlib.Path, crashed: frozenset[str]) -> dict[str, Any] | None:
  return shards.write_shard(job, folder, _stop_event.is_set, crashed)
