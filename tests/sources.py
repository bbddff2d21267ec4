"""Video sources of the loader's tests; its processes import this file, so it imports little."""

import errno
import os
import signal
import threading
import time

import numpy as np

from dropmae_jax.runtime.errors import UserError


class NumberedVideos:
  """Videos whose pixels say which frame they are of; counts what is read."""

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
  """All frames are one picture, of which no two crops are the same."""

  def frame(self, video, number):
    rows, columns = np.mgrid[:20, :30].astype(np.uint8)
    return np.stack([12 * rows, 8 * columns, 5 * (rows + columns)], axis=-1)


class FaultyVideos(NumberedVideos):
  """Something happens when a video is read: once in all processes together, or every time."""

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


class MortalVideos(NumberedVideos):
  """Its process dies in the second batch that it makes, until as many as `lives` have."""

  def __init__(self, folder, lives):
    super().__init__([10] * 24)
    self.folder, self.lives = folder, lives

  def frame(self, video, number):
    image = super().frame(video, number)
    if len(self.reads) > 12 and len(list(self.folder.iterdir())) < self.lives:
      (self.folder / str(os.getpid())).touch()
      time.sleep(1)  # The first batch is on its way.
      kill_self()
    return image


def kill_self():
  os.kill(os.getpid(), signal.SIGKILL)


def bus_error():
  os.kill(os.getpid(), signal.SIGBUS)


def exit_without_a_word():
  os._exit(0)


def wait_for_ever():
  threading.Event().wait()


def raise_bad_input():
  raise UserError('video 5 is damaged')


def raise_runtime_error():
  raise RuntimeError('video 5 is odd')


def raise_no_space():
  raise OSError(errno.ENOSPC, 'No space left on device')
