"""Fourth stop: all cores write shards, and no video that hangs or kills a process can stop them."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tqdm

from tfds_kinetics import shards
from tfds_kinetics.messages import BadInput, ProgramError, Stopped, log, say
from tfds_kinetics.shards import ShardJob
from tfds_kinetics.tree import Video, printable
from tfds_kinetics.video import MachineFault

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
# The decoder is asked to stop at the time limit, of its core. A process in which it does not listen
# is ended after this many times the limit on the clock, and these seconds.
GRACE = (3.0, 5.0)
TICK = 0.5
MOST_UNEXPLAINED = 3


class KilledAgain(RuntimeError):
  """Processes are killed again and again, by no video."""


class ShardProcess:
  """Writes shards in a process of its own; what kills that costs the build a video at most.

  A video that was being read when its process was killed is read once more, as it may have been
  another's doing (too little memory, an impatient administrator); the second time it is skipped.

  Args:
    folder: where the shards are to be.
    stop: an event of `multiprocessing`; once it is set, shards are given up.
  """

  def __init__(self, folder: pathlib.Path, stop: Any) -> None:
    self._folder, self._stop = folder, stop
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None

  def write(self, job: ShardJob) -> dict[str, Any] | None:
    """Returns the table of the shard, or None if the stop event came first.

    Raises:
      KilledAgain: the process does not live long enough to read a video.
      MachineFault: a video cannot be read now.
      ProgramError: see there; the shard can be written once that is mended.
      OSError: the folder cannot be written, or a video changed meanwhile.
    """
    verdicts: dict[str, str] = {}
    kills: Counter[str | None] = Counter()
    while not self._stop.is_set():
      self._pool = self._pool or concurrent.futures.ProcessPoolExecutor(
        1,
        multiprocessing.get_context('spawn'),
        initializer=_start,
        initargs=(self._stop, os.getpid()),
      )
      try:
        return self._pool.submit(_write, job, self._folder, verdicts).result()
      except BrokenProcessPool:
        self.close()
      if self._stop.is_set():
        break
      path, stuck = _last_read(job, self._folder)
      kills[path] += 1
      if path is None and kills[path] == MOST_UNEXPLAINED:
        raise KilledAgain('its processes are killed again and again, by no single video')
      if path is not None and stuck:
        limit = job.options.time_limit
        verdicts[path] = f'it takes longer than --time_limit={limit:g} seconds, at one point of it'
      elif path is not None and kills[path] == 2:
        verdicts[path] = 'the process that read it was killed, twice'
      say(f'a process was killed at {path or "no video"}; {job.name} is begun anew')
    return None

  def close(self) -> None:
    """Ends the process."""
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
      self._pool = None


def write_shards(
  jobs: list[ShardJob], folder: pathlib.Path, workers: int
) -> dict[ShardJob, dict[str, Any]]:
  """Writes the shards that are not there yet, whatever happens to the processes that do it.

  Args:
    jobs: the shards to write.
    folder: where they are, and are to be.
    workers: number of processes.

  Returns:
    The table of every shard; see `shards.write_shard`.

  Raises:
    Stopped: Ctrl-C.
    BadInput: the folder cannot be written, or processes are killed for no video's sake.
    ProgramError: see there; what is finished is kept.
  """
  shards.remove_leftovers(jobs, folder)
  tables = {job: table for job in jobs if (table := shards.finished_table(job, folder))}
  if tables:
    say(f'going on: {len(tables)} of {len(jobs)} shards are there')
  left = [job for job in jobs if job not in tables]
  progress = Progress(jobs, done=tables)
  try:
    with contextlib.closing(_completed(left, folder, workers)) as completed:
      for job, table in completed:
        tables[job] = table
        progress.shard_is_done(job, table)
  except KeyboardInterrupt:
    raise Stopped(
      f'stopped; {len(tables)} of {len(jobs)} shards are kept, and the same command goes on'
      ' from there'
    ) from None
  except MachineFault as error:
    raise BadInput(
      f'a video cannot be read now, which is not its own fault ({error}); mend that and give the'
      ' command again. What is finished is kept.'
    ) from error
  except KilledAgain:
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
  finally:
    progress.close()
  return tables


class Progress:
  """Shows count, rate and time left: a bar on a terminal, plain lines in the log."""

  def __init__(self, jobs: Iterable[ShardJob], done: Iterable[ShardJob]) -> None:
    self._jobs = list(jobs)
    self._shards = len(list(done))
    self._initial = self._videos = sum(len(job.videos) for job in done)
    self._total = sum(len(job.videos) for job in self._jobs)
    self._started = time.monotonic()
    self._bar = tqdm.tqdm(total=self._total, initial=self._initial, unit='video', disable=None)

  def shard_is_done(self, job: ShardJob, table: dict[str, Any]) -> None:
    """Counts a shard that was written now."""
    self._shards += 1
    self._videos += len(job.videos)
    self._bar.update(len(job.videos))
    rate = (self._videos - self._initial) / max(time.monotonic() - self._started, 1e-9)
    log.info(
      f'shard {self._shards} of {len(self._jobs)}: {job.name}, {len(table["videos"])} videos,'
      f' {len(table["skipped"])} skipped; {self._videos} of {self._total} videos,'
      f' {rate:.2f} videos/s, left {(self._total - self._videos) / rate:.0f} s'
    )

  def close(self) -> None:
    """Leaves the terminal in order."""
    self._bar.close()


def _completed(
  jobs: list[ShardJob], folder: pathlib.Path, workers: int
) -> Iterator[tuple[ShardJob, dict[str, Any]]]:
  """Yields shards as processes finish them; whatever goes wrong, no further one is begun."""
  stop = multiprocessing.get_context('spawn').Event()
  mine, processes = threading.local(), []

  def begin() -> None:
    mine.process = ShardProcess(folder, stop)
    processes.append(mine.process)

  count = max(1, min(workers, len(jobs)))
  with concurrent.futures.ThreadPoolExecutor(count, initializer=begin) as threads:
    try:
      # Threads start when work is submitted, and they and their processes inherit the mask: they
      # cannot be interrupted before they have said that they will not be.
      signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
      try:
        running = {threads.submit(lambda job: mine.process.write(job), job): job for job in jobs}
      finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
      for future in concurrent.futures.as_completed(running):
        yield running[future], future.result()
    finally:
      signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
      stop.set()
      threads.shutdown(cancel_futures=True)
      for process in processes:
        process.close()
      signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _marker(job: ShardJob, folder: pathlib.Path) -> pathlib.Path:
  """The file that holds the name of the video that is being read."""
  return folder / f'{job.name}.current'


def _last_read(job: ShardJob, folder: pathlib.Path) -> tuple[str | None, bool]:
  """Returns which video was being read when the process ended, and whether it was stuck in it."""
  marker = _marker(job, folder)
  try:
    content = json.loads(marker.read_text())
  except (FileNotFoundError, ValueError):
    return None, False
  marker.unlink()
  return content['path'], content['stuck']


# What follows runs in the process of a ShardProcess.


class _Watch:
  """Ends this process when its builder is gone or stops, or when a video takes far too long.

  It may end at any point: what it was writing has a temporary name.
  """

  def __init__(self, stop: Any, builder: int) -> None:
    self._stop, self._builder = stop, builder
    self._reading: tuple[pathlib.Path, str] | None = None
    self._left = 0.0

  def read(self, seconds: float, marker: pathlib.Path, path: str) -> None:
    """Notes which video is read now, and how long that may take."""
    marker.write_text(json.dumps({'path': path, 'stuck': False}))
    self._left, self._reading = seconds, (marker, path)

  def rest(self) -> None:
    """Notes that no video is read now."""
    self._reading = None

  def run(self) -> None:
    """Watches for ever."""
    while os.getppid() == self._builder and not self._stop.is_set():
      reading = self._reading
      if reading and self._left < 0:
        with contextlib.suppress(OSError):
          reading[0].write_text(json.dumps({'path': reading[1], 'stuck': True}))
        break
      time.sleep(TICK)
      self._left -= TICK  # Counted, not read off the clock, which runs on in a suspended process.
    os._exit(1)


_watch: _Watch | None = None


def _start(stop: Any, builder: int) -> None:
  """Leaves Ctrl-C to the builder, which tells through `stop`."""
  global _watch
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
  _watch = _Watch(stop, builder)
  threading.Thread(target=_watch.run, daemon=True).start()


def _write(job: ShardJob, folder: pathlib.Path, verdicts: dict[str, str]) -> dict[str, Any]:
  marker, reading = _marker(job, folder), ''

  def before_video(video: Video) -> None:
    nonlocal reading
    reading = video.path
    _watch.read(job.options.time_limit * GRACE[0] + GRACE[1], marker, video.path)

  try:
    return shards.write_shard(job, folder, verdicts=verdicts, before_video=before_video)
  except (MachineFault, OSError):
    raise
  except Exception as error:
    raise ProgramError(
      f'{type(error).__name__}: {error} (while reading {printable(reading)}; no video is skipped'
      ' for it, and what is finished is kept)'
    ) from error
  finally:
    _watch.rest()
    marker.unlink(missing_ok=True)
