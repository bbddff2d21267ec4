"""Datasets for the loader's tests; loader processes import this file, so it imports little."""

import errno
import os
import signal
import threading
import time

import numpy as np

from dropmae_jax.data.video_source import DamagedRecord
from dropmae_jax.runtime.errors import UserError


class NumberedVideos:
  """Videos whose pixels identify the frame; records what is read."""

  def __init__(self, lengths):
    self.lengths, self.reads = lengths, []

  def __len__(self):
    return len(self.lengths)

  def num_frames(self, video):
    return self.lengths[video]

  def frame(self, video, number):
    self.reads.append((video, number))
    return np.full((20, 30, 3), (40 * video + number) % 256, np.uint8)


class PictureVideos(NumberedVideos):
  """All frames are the same picture, no two crops of which are equal."""

  def frame(self, video, number):
    rows, columns = np.mgrid[:20, :30].astype(np.uint8)
    return np.stack([12 * rows, 8 * columns, 5 * (rows + columns)], axis=-1)


class DamagedVideos(NumberedVideos):
  """Some (video, frame) cannot be read."""

  def __init__(self, lengths, damaged):
    super().__init__(lengths)
    self.damaged = damaged

  def frame(self, video, number):
    if (video, number) in self.damaged:
      raise DamagedRecord(f'video {video} frame {number} is damaged.')
    return super().frame(video, number)


class FaultyVideos(NumberedVideos):
  """Reading video 5 has a fault: once over all processes if there is a marker, or every time."""

  def __init__(self, fault, marker=None):
    super().__init__([10] * 24)
    self.fault, self.marker = fault, marker

  def frame(self, video, number):
    if video == 5:
      try:
        if self.marker:
          os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        self.fault()
      except FileExistsError:
        pass
    return super().frame(video, number)


class DyingVideos(NumberedVideos):
  """The process dies in its second batch, until `deaths` processes have."""

  def __init__(self, folder, deaths):
    super().__init__([10] * 24)
    self.folder, self.deaths = folder, deaths

  def frame(self, video, number):
    image = super().frame(video, number)
    if len(self.reads) > 12 and len(list(self.folder.iterdir())) < self.deaths:
      (self.folder / str(os.getpid())).touch()
      time.sleep(1)  # The first batch is on its way.
      kill_self()
    return image


def kill_self():
  os.kill(os.getpid(), signal.SIGKILL)


def bus_error():
  os.kill(os.getpid(), signal.SIGBUS)


def exit_silently():
  os._exit(0)


def wait_forever():
  threading.Event().wait()


def raise_bad_input():
  raise UserError('video 5 is damaged')


def raise_runtime_error():
  raise RuntimeError('video 5 is odd')


def raise_no_space():
  raise OSError(errno.ENOSPC, 'No space left on device')
