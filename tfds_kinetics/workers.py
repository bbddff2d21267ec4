"""Writes shards on all cores. A video that crashes or occupies its process is skipped.

A process that is killed from outside, or gets no processor time, ends the build: that may be the
machine's fault, and the video would be missing for ever.
"""

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

from tfds_kinetics import shards, shortages
from tfds_kinetics.messages import BadInput, ProgramError, Stopped, log, say
from tfds_kinetics.shards import ShardJob
from tfds_kinetics.tree import Video, printable
from tfds_kinetics.video import MachineFault, machine_fault

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
# Exit codes of processes that were ended from outside; None is not known.
KILLS = {-signal.SIGKILL, -signal.SIGTERM, None}
# Decoding checks the time limit (processor time) at each frame. A process that hangs inside the
# decoder is ended after this many times the limit on the clock, plus these seconds.
GRACE = (3.0, 5.0)
TICK = 0.5
# How a video can hang: the decoder computes for longer than the time limit, or its process waits.
SPINNING, WAITING = 'spinning', 'waiting'
MOST_UNEXPLAINED = 3


class KilledAgain(RuntimeError):
  """Processes are killed again and again, and no single video is the cause."""


class ShardProcess:
  """Writes shards in a process of its own; if that is killed, one video is lost at most.

  A video that was being read when the process ended is read once more. The second time it is
  skipped, unless the machine may be the cause: the process was killed (too little memory, an
  administrator), had a limit of memory, or got too little processor time.

  Args:
    folder: of the shards.
    stop: an event of `multiprocessing`; once it is set, writing stops.
  """

  def __init__(self, folder: pathlib.Path, stop: Any) -> None:
    self._folder, self._stop = folder, stop
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None

  def write(self, job: ShardJob) -> dict[str, Any] | None:
    """Returns the table of the shard, or None if the stop event came first.

    Raises:
      KilledAgain: the process is killed before it reads any video, again and again.
      MachineFault: the machine cannot read a video now, or kills the process that reads it.
      ProgramError: a bug in a program; the shard can be written once that is fixed.
      OSError: the folder cannot be written, or a video changed meanwhile.
    """
    verdicts: dict[str, str] = {}
    kills: Counter[str | None] = Counter()
    process = None
    while not self._stop.is_set():
      self._pool = self._pool or concurrent.futures.ProcessPoolExecutor(
        1,
        multiprocessing.get_context('spawn'),
        initializer=_start,
        initargs=(self._stop, os.getpid()),
      )
      try:
        process = _process(self._pool.submit(os.getpid).result())
        return self._pool.submit(_write, job, self._folder, verdicts).result()
      except BrokenProcessPool:
        self.close()
      if self._stop.is_set():
        break
      path, stuck = _last_read(job, self._folder)
      kills[path] += 1
      if path is not None and kills[path] == 2:
        _raise_unless_its_own_fault(path, stuck, process and process.exitcode, job)
      if path is None and kills[path] == MOST_UNEXPLAINED:
        raise KilledAgain('its processes are killed again and again, by no single video')
      if path is not None and stuck == SPINNING:
        limit = job.options.time_limit
        verdicts[path] = f'it takes longer than --time_limit={limit:g} seconds, at one point of it'
      elif path is not None and kills[path] == 2:
        verdicts[path] = 'the process that read it crashed, twice'
      say(f'a process ended at {path or "no video"}; {job.name} is started again')
    return None

  def close(self) -> None:
    """Ends the process."""
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
      self._pool = None


def _process(pid: int) -> multiprocessing.process.BaseProcess | None:
  """Returns the child of that number; `concurrent.futures` does not say how one has ended."""
  return next((each for each in multiprocessing.active_children() if each.pid == pid), None)


def _raise_unless_its_own_fault(
  path: str, stuck: str, exit_code: int | None, job: ShardJob
) -> None:
  """Raises MachineFault where it may be the machine that keeps a video from being read."""
  path = printable(path)
  if stuck == WAITING:
    raise MachineFault(
      f'{path} was not read within {GRACE[0] * job.options.time_limit + GRACE[1]:g} s, as its'
      ' process got too little processor time, which may not be its fault; check the storage, use'
      ' fewer --workers, or move this video away'
    )
  if not stuck and (exit_code in KILLS or shortages.is_memory_limited()):
    raise MachineFault(
      f'the process that read {path} was ended twice ({_name_of(exit_code)}), as where memory is'
      ' short, which may not be its fault; free memory, raise its limit, use fewer --workers, or'
      ' move this video away'
    )


def _name_of(exit_code: int | None) -> str:
  return signal.Signals(-exit_code).name if exit_code and exit_code < 0 else f'status {exit_code}'


def write_shards(
  jobs: list[ShardJob], folder: pathlib.Path, workers: int
) -> dict[ShardJob, dict[str, Any]]:
  """Writes the shards that do not exist yet; processes that are killed are replaced.

  Args:
    jobs: all shards.
    folder: of the shards.
    workers: number of processes.

  Returns:
    The table of every shard; see `shards.write_shard`.

  Raises:
    Stopped: Ctrl-C or SIGTERM.
    BadInput: the folder cannot be written, or processes are killed and no video is the cause.
    ProgramError: a bug in a program; what is finished is kept.
  """
  shards.remove_leftovers(jobs, folder)
  tables = {job: table for job in jobs if (table := shards.finished_table(job, folder))}
  if tables:
    say(f'resuming: {len(tables)} of {len(jobs)} shards are there')
  left = [job for job in jobs if job not in tables]
  progress = Progress(jobs, done=tables)
  try:
    with contextlib.closing(_completed(left, folder, workers)) as completed:
      for job, table in completed:
        tables[job] = table
        progress.shard_is_done(job, table)
  except KeyboardInterrupt:
    raise Stopped(
      f'stopped; {len(tables)} of {len(jobs)} shards are kept, and the same command resumes'
      ' from there'
    ) from None
  except MachineFault as error:
    raise BadInput(f'{error}, and give the command again. What is finished is kept.') from error
  except KilledAgain:
    raise BadInput(
      'the processes of this build are killed again and again, by no single video; free'
      f' memory or use fewer than --workers={workers}. What is finished is kept.'
    ) from None
  except shards.SourceChanged as error:
    raise BadInput(
      f'{error}; leave the videos alone while they are read, and give the command again.'
    ) from error
  except (OSError, RuntimeError, MemoryError) as error:
    number = shortages.shortage(error)
    if number is not None:
      raise BadInput(
        f'the build cannot go on ({error}); {shortages.REMEDIES[number]}, or use fewer than'
        f' --workers={workers}, and give the command again. What is finished is kept.'
      ) from error
    raise BadInput(
      f'{folder} cannot be written: {error}; what is finished is kept, and the same command'
      ' resumes from there.'
    ) from error
  finally:
    progress.close()
  return tables


class Progress:
  """Shows count, rate and remaining time: a bar on a terminal, plain lines in the log."""

  def __init__(self, jobs: Iterable[ShardJob], done: Iterable[ShardJob]) -> None:
    self._jobs = list(jobs)
    self._shards = len(list(done))
    self._initial = self._videos = sum(len(job.videos) for job in done)
    self._total = sum(len(job.videos) for job in self._jobs)
    self._started = time.monotonic()
    self._bar = tqdm.tqdm(total=self._total, initial=self._initial, unit='video', disable=None)

  def shard_is_done(self, job: ShardJob, table: dict[str, Any]) -> None:
    """Counts a shard that has just been written."""
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
    """Closes the bar."""
    self._bar.close()


def _completed(
  jobs: list[ShardJob], folder: pathlib.Path, workers: int
) -> Iterator[tuple[ShardJob, dict[str, Any]]]:
  """Yields shards as processes finish them; after an error no further shard is started."""
  stop = multiprocessing.get_context('spawn').Event()
  mine, processes = threading.local(), []

  def begin() -> None:
    mine.process = ShardProcess(folder, stop)
    processes.append(mine.process)

  count = max(1, min(workers, len(jobs)))
  with concurrent.futures.ThreadPoolExecutor(count, initializer=begin) as threads:
    try:
      # Threads start when work is submitted, and they and their processes inherit the mask: no
      # signal can interrupt a process before `_start` has set how it treats signals.
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
  """Returns the file with the name of the video that is being read."""
  return folder / f'{job.name}.current'


def _last_read(job: ShardJob, folder: pathlib.Path) -> tuple[str | None, str]:
  """Returns the video that was being read when the process ended, and how it hung there, if so."""
  marker = _marker(job, folder)
  try:
    content = json.loads(marker.read_text())
  except (FileNotFoundError, ValueError):
    return None, ''
  marker.unlink()
  return content['path'], content['stuck']


# The code below runs in the process of a ShardProcess.


class _Watch:
  """Ends this process when the builder has ended or stops, or when a video takes far too long.

  The process may be ended at any point: unfinished files have temporary names.
  """

  def __init__(self, stop: Any, builder: int) -> None:
    self._stop, self._builder = stop, builder
    self._reading: tuple[pathlib.Path, str] | None = None
    self._left = self._limit = self._processor_time = 0.0

  def read(self, limit: float, marker: pathlib.Path, path: str) -> None:
    """Starts the clock of a video, of which `limit` is the time limit."""
    marker.write_text(json.dumps({'path': path, 'stuck': ''}))
    self._limit, self._processor_time = limit, time.process_time()
    self._left, self._reading = limit * GRACE[0] + GRACE[1], (marker, path)

  def stop_clock(self) -> None:
    """No video is being read any more."""
    self._reading = None

  def run(self) -> None:
    """Watches until the process ends."""
    while os.getppid() == self._builder and not self._stop.is_set():
      reading = self._reading
      if reading and self._left < 0:
        used = time.process_time() - self._processor_time
        stuck = SPINNING if used >= self._limit else WAITING
        with contextlib.suppress(OSError):
          reading[0].write_text(json.dumps({'path': reading[1], 'stuck': stuck}))
        break
      time.sleep(TICK)
      self._left -= TICK  # Counted, as a clock would go on while the process is suspended.
    os._exit(1)


_watch: _Watch | None = None


def _start(stop: Any, builder: int) -> None:
  """Ignores Ctrl-C, which the builder passes on through `stop`."""
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
    _watch.read(job.options.time_limit, marker, video.path)

  try:
    return shards.write_shard(job, folder, verdicts=verdicts, before_video=before_video)
  except (MachineFault, OSError):
    raise
  except MemoryError as error:
    raise machine_fault(printable(reading), error) from error
  except Exception as error:
    raise ProgramError(
      f'{type(error).__name__}: {error} (while reading {printable(reading)}; no video is skipped'
      ' for it, and what is finished is kept)'
    ) from error
  finally:
    _watch.stop_clock()
    marker.unlink(missing_ok=True)
