"""A video whose record crashes the process is named by the next start, and left out."""

import os
import re
import signal
import sys

import numpy as np
import pytest
from conftest import run_python, train_arguments

from dropmae_jax.data import crashes
from dropmae_jax.data.mixture import mixture_of
from dropmae_jax.data.video_source import DamagedRecord
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.runtime.mirror import Mirror
from dropmae_jax.runtime.watchdog import Watchdog

# Reading video 2 crashes in native code.
CRASHING = """
import os, signal, time
from dropmae_jax import main
from dropmae_jax.data import video_source
from dropmae_jax.runtime import cli
real = video_source.TfdsVideos.frame
def frame(self, video, number):
  if video == 2:
    signal.raise_signal(signal.SIGSEGV)
  return real(self, video, number)
video_source.TfdsVideos.frame = frame
cli.run(main.main)
"""


def test_a_video_that_crashes_a_run_is_left_out_by_the_next_start(data_dir, tmp_path):
  arguments = train_arguments(data_dir, tmp_path, '--config.num_steps=4')
  done = run_python('-c', CRASHING, *arguments[2:])
  assert done.returncode == -signal.SIGSEGV, done.stderr
  assert 'Fatal Python error: Segmentation fault' in done.stderr
  done = run_python('-c', CRASHING, *arguments[2:])
  assert done.returncode == 0, done.stderr
  log = (tmp_path / 'log.txt').read_text()
  sentence = 'is left out, as reading it has ended an earlier start (Segmentation fault); remove '
  assert f'{sentence}{tmp_path / "left_out.json"} to read it again. Another video is taken' in log
  assert 'damaged record 1 of at most 10.' in log
  assert re.search(
    r'process 0 of the last start ended by a signal:\n.* Fatal Python error: Segm', log
  )
  assert not {'crash-0.txt', 'reading-0.bin'} & set(os.listdir(tmp_path))


class Videos:
  """Four videos of one frame each, of a value of their own."""

  fingerprint = 'four'

  def __len__(self):
    return 4

  def num_frames(self, video):
    return 1

  def frame(self, video, number):
    return np.full((2, 2, 3), video, np.uint8)


@pytest.fixture
def watchdog():
  watching = Watchdog(600.0)
  yield watching
  watching.close()


def left_out_of(workdir, watchdog, videos=None):
  """Returns the videos that a start leaves out, and their messages."""
  left_out = {}
  with crashes.left_out(mixture_of(videos or Videos()), Mirror(workdir), watchdog) as mixture:
    (source,) = mixture.datasets
    for video in range(len(source)):
      try:
        assert source.frame(video, 0)[0, 0, 0] == video
      except DamagedRecord as error:
        left_out[video] = str(error)
  return left_out


def leave(workdir, process, stacks, readings):
  """Writes the files that a process leaves when it ends by a signal."""
  (workdir / f'crash-{process}.txt').write_text(stacks)
  np.array(readings, crashes.READING).tofile(workdir / f'reading-{process}.bin')


def test_all_processes_leave_out_what_the_first_one_found(tmp_path, watchdog, monkeypatch):
  """Only the first reads and writes the list, as others may see an older file."""
  monkeypatch.setattr(crashes.jax, 'process_index', lambda: 1)
  monkeypatch.setattr(crashes.multihost, 'text_of_first', lambda text: '[[0, 3, "Bus error"]]')
  (tmp_path / 'left_out.json').write_text('older')
  with crashes.left_out(mixture_of(Videos()), Mirror(tmp_path), watchdog) as mixture:
    assert {'crash-1.txt', 'reading-1.bin'} < set(os.listdir(tmp_path))
    with pytest.raises(DamagedRecord, match='video 3 '):
      mixture.datasets[0].frame(3, 0)


STACKS = """Fatal Python error: Bus error

Thread 0x00007f0000000001 (most recent call first):
  File "a.py", line 1 in frame

Current thread 0x00007f0000000002 (most recent call first):
  File "a.py", line 1 in frame
"""
READINGS = [(0x7F0000000001, 0, 1), (0x7F0000000002, 0, 3), (0, 0, 0)]


def test_the_video_of_the_crashed_thread_is_blamed(tmp_path, watchdog):
  leave(tmp_path, 0, STACKS, READINGS)
  left_out = left_out_of(tmp_path, watchdog)
  assert list(left_out) == [3]
  assert left_out[3].startswith(
    'video 3 (dataset 0) is left out, as reading it has ended an earlier'
  )
  # Crashes of any process are added to those of before, and those of others with another number.
  leave(tmp_path, 11, STACKS.replace('Bus', 'Another'), [(0x7F0000000002, 0, 0)])
  assert list(left_out_of(tmp_path, watchdog)) == [0, 3]
  assert os.listdir(tmp_path) == ['left_out.json']
  # Another dataset has other videos.
  other = Videos()
  other.fingerprint = 'others'
  assert left_out_of(tmp_path, watchdog, other) == {}


@pytest.mark.parametrize(
  ('stacks', 'readings'),
  [
    ('', READINGS),  # Killed from outside.
    ('The watchdog ended this process: step 3 hung.\n' + STACKS, READINGS),
    (STACKS.replace('Current thread', 'Thread'), READINGS),
    (STACKS.replace('Current thread 0x00007f0000000002', 'Current thread 0x3'), READINGS),
    (STACKS, []),
  ],
)
def test_nothing_is_blamed_without_evidence(tmp_path, watchdog, stacks, readings):
  leave(tmp_path, 0, stacks, readings)
  assert left_out_of(tmp_path, watchdog) == {}


def test_a_list_that_cannot_be_read_is_named(tmp_path, watchdog):
  (tmp_path / 'left_out.json').write_text('{')
  with pytest.raises(UserError, match=r'left_out.json cannot be read .*; remove it to read all'):
    left_out_of(tmp_path, watchdog)


def test_what_is_read_is_noted_for_every_thread(tmp_path, watchdog):
  with crashes.left_out(mixture_of(Videos()), Mirror(tmp_path), watchdog) as mixture:
    mixture.datasets[0].frame(1, 0)
    mixture.datasets[0].frame(2, 0)
    rows = np.fromfile(tmp_path / 'reading-0.bin', crashes.READING)
    assert rows['thread'].astype(bool).sum() == 1
    assert rows[0]['video'] == 2
    assert mixture.fingerprint == 'four'


def test_afterwards_stacks_go_to_the_terminal_again(tmp_path, watchdog, monkeypatch):
  files = []
  monkeypatch.setattr(crashes.faulthandler, 'enable', files.append)
  left_out_of(tmp_path, watchdog)
  assert [each.name for each in files] == [str(tmp_path / 'crash-0.txt'), sys.__stderr__.name]


def test_where_files_cannot_be_mapped_all_is_read(tmp_path, watchdog, monkeypatch, caplog):
  def fail(*_, **__):
    raise OSError(19, 'No such device')

  monkeypatch.setattr(crashes.np, 'memmap', fail)
  assert left_out_of(tmp_path, watchdog) == {}
  assert 'cannot be mapped ([Errno 19] No such device)' in caplog.text
