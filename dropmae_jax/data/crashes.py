"""Leaves out the videos at which earlier starts of a run crashed.

Native code that meets a broken record can end the process (SIGSEGV). `faulthandler` then writes the
stacks of all threads to a file in the workdir, the crashed thread's identifier among them; another
file has, for every thread, the video that it read last. From both the next start knows the video. A
process that was killed from outside wrote no stacks, and no video is blamed.
"""

import contextlib
import faulthandler
import itertools
import json
import logging
import pathlib
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from dropmae_jax.data.mixture import Mixture
from dropmae_jax.data.video_source import DamagedRecord, VideoSource
from dropmae_jax.runtime import multihost
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.runtime.mirror import LEFT_OUT, OF_PROCESS, Mirror
from dropmae_jax.runtime.watchdog import Watchdog

# What each thread reads: its identifier, and numbers of a dataset and of a video in it.
READING = np.dtype([('thread', '<u8'), ('dataset', '<i8'), ('video', '<i8')])
MAX_THREADS = 1024
# As faulthandler writes them.
FATAL = re.compile(r'Fatal Python error: (.+)')
CRASHED_THREAD = re.compile(r'^Current thread 0x([0-9a-f]+)', re.MULTILINE)

_log = logging.getLogger('dropmae_jax')


class _ObservedVideos:
  """A dataset that says which video it reads, and leaves out some."""

  def __init__(
    self, videos: VideoSource, number: int, left_out: dict[int, str], readings: '_Readings'
  ) -> None:
    self._videos, self._number = videos, number
    self._left_out, self._readings = left_out, readings

  def __len__(self) -> int:
    return len(self._videos)

  def __getattr__(self, name: str) -> Any:
    """Optional members, such as `fingerprint`."""
    return getattr(self._videos, name)

  def num_frames(self, video: int) -> int:
    """Frames of a video."""
    return self._videos.num_frames(video)

  def frame(self, video: int, number: int) -> UInt8[np.ndarray, 'h w c']:
    """Raises DamagedRecord if the video is left out."""
    if video in self._left_out:
      raise DamagedRecord(self._left_out[video])
    self._readings.note(self._number, video)
    return self._videos.frame(video, number)


class _Readings:
  """A file in which every thread notes what it reads; the system keeps it if the process ends."""

  def __init__(self, path: pathlib.Path) -> None:
    try:
      path.write_bytes(bytes(MAX_THREADS * READING.itemsize))  # Whole, where a disk is nearly full.
      self._rows = np.memmap(path, READING, 'r+')
    except OSError as error:  # Not every network file system can.
      _log.warning(f'{path} cannot be mapped ({error}); a video that crashes a start is not known.')
      self._rows = np.zeros(MAX_THREADS, READING)
    self._next_row = itertools.count()
    self._local = threading.local()

  def note(self, dataset: int, video: int) -> None:
    """Notes what this thread begins to read."""
    if not hasattr(self._local, 'row'):
      self._local.row = next(self._next_row) % MAX_THREADS
    self._rows[self._local.row] = threading.get_ident(), dataset, video


@contextlib.contextmanager
def left_out(dataset: Mixture, mirror: Mirror, watchdog: Watchdog) -> Iterator[Mixture]:
  """Yields the dataset without the videos that crashed earlier starts; notes crashes of this one.

  Such a video counts as a damaged record. All processes of a run call this together.

  Args:
    dataset: of the run.
    mirror: of the run's workdir.
    watchdog: shows the stacks of a crash.
  """
  excluded = _blame(dataset, mirror) if jax.process_index() == 0 else []
  excluded = json.loads(multihost.text_of_first(json.dumps(excluded)))
  without = _messages(excluded, dataset, mirror)
  stacks_path, readings_path = _files(mirror.folder, str(jax.process_index()))
  # For appending, as the watchdog writes too.
  with stacks_path.open('a') as stacks:
    readings = _Readings(readings_path)
    faulthandler.enable(stacks)
    watchdog.write_crashes_to(stacks_path)
    try:
      watched = [
        _ObservedVideos(videos, number, without[number], readings)
        for number, videos in enumerate(dataset.datasets)
      ]
      yield Mixture(tuple(watched), dataset.weights)
    finally:
      faulthandler.enable(sys.__stderr__)
      watchdog.write_crashes_to('')
      for path in (stacks_path, readings_path):
        path.unlink(missing_ok=True)


def _files(folder: pathlib.Path, process: str) -> tuple[pathlib.Path, ...]:
  """Returns the files of a process: for the stacks of a crash, and for what its threads read."""
  return tuple(folder / each.format(process) for each in OF_PROCESS)


def _blame(dataset: Mixture, mirror: Mirror) -> list[list[Any]]:
  """Reports the crashes of the last start, and adds their videos to left_out.json.

  Returns:
    [dataset, video, reason] of every video that is left out.
  """
  folder = mirror.folder
  left_out = _read(dataset, mirror)
  for stacks_path in sorted(folder.glob(OF_PROCESS[0].format('*'))):
    stacks = stacks_path.read_text(errors='replace')
    process = stacks_path.stem.partition('-')[2]
    if stacks:
      title = f'process {process} of the last start ended by a signal:'
      for line in [title, *stacks.splitlines()]:
        _log.warning(line)
    # What the watchdog ended begins with its message.
    fatal = FATAL.match(stacks)
    reading = fatal and _crashed_reading(stacks, _files(folder, process)[1])
    if reading:
      left_out.append([*reading, fatal[1]])
      _write(dataset, folder, left_out)
      mirror.push()
    for path in _files(folder, process):
      path.unlink(missing_ok=True)
  return left_out


def _crashed_reading(stacks: str, path: pathlib.Path) -> tuple[int, int] | None:
  """Returns the dataset and the video that the crashed thread read last; None if it read none."""
  thread = CRASHED_THREAD.search(stacks)
  if thread is None or not path.exists():
    return None
  rows = np.fromfile(path, READING)
  reads = rows[rows['thread'] == int(thread[1], 16)]
  return (int(reads['dataset'][0]), int(reads['video'][0])) if len(reads) else None


def _read(dataset: Mixture, mirror: Mirror) -> list[list[Any]]:
  """Returns [dataset, video, reason] of every video that is left out."""
  path = mirror.folder / LEFT_OUT
  if not path.exists():
    return []
  try:
    content = json.loads(path.read_text())
    return content['videos'] if content['data_fingerprint'] == dataset.fingerprint else []
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(
      f'{mirror.workdir / LEFT_OUT} cannot be read ({error}); remove it to read all videos.'
    ) from error


def _write(dataset: Mixture, folder: pathlib.Path, videos: list[list[Any]]) -> None:
  path = folder / LEFT_OUT
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps({'data_fingerprint': dataset.fingerprint, 'videos': videos}))
  partial.replace(path)


def _messages(left_out: list[list[Any]], dataset: Mixture, mirror: Mirror) -> list[dict[int, str]]:
  """Returns for each dataset why videos are left out, by their numbers."""
  messages: list[dict[int, str]] = [{} for _ in dataset.datasets]
  for number, video, reason in left_out:
    videos = dataset.datasets[number]
    path = videos.paths()[video] if hasattr(videos, 'paths') else f'dataset {number}'
    messages[number][video] = (
      f'video {video} ({path}) is left out, as reading it has ended an earlier start ({reason});'
      f' remove {mirror.workdir / LEFT_OUT} to read it again.'
    )
  return messages
