"""A build goes on whatever the videos do to it, and many machines may share it."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import mutations
import pytest
from conftest import ROOT, run_python
from test_tfds_build import DATASET, PARTIAL, command, contents, job_of, skipped_of, write
from test_tfds_shards import build_here, flags
from test_tfds_video import pictures, write_video

from tfds_kinetics import shards
from tfds_kinetics.video import FrameOptions, UnusableVideo

# Runs the builder, with another `read_jpegs` in its processes.
SCRIPT = """
import os, signal, sys, time
from tfds_kinetics import __main__ as command, shards, workers
real = shards.read_jpegs
workers.GRACE = {grace}
def read_jpegs(path, options):
  if '{name}' in path:
    {deed}
  return real(path, options)
shards.read_jpegs = read_jpegs
if __name__ == '__main__':
  sys.exit(command.main())
"""


def started(clips, folder, *, deed, name='', options=()):
  """A builder in a process group of its own; something happens at each video with `name` in it."""
  script = folder / 'build.py'
  script.write_text(SCRIPT.format(name=name, deed=deed, grace=(1.0, 0.5)))
  process = subprocess.Popen(
    [sys.executable, script, *command(clips, folder, '--workers=2', *options)[2:]],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  STARTED.append(process)
  return process


STARTED = []


@pytest.fixture(autouse=True)
def no_build_outlives_its_test():
  yield
  while STARTED:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(STARTED.pop().pid, signal.SIGKILL)


def until_there_is(pattern, process, folder):
  """Waits for a file of the unfinished build, which `process` may not remove again."""
  deadline = time.monotonic() + 60
  while not list((folder / PARTIAL).glob(pattern)):
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline, f'no {pattern}'
    time.sleep(0.01)


def until_reading(process, folder):
  """Waits for the process of a worker to begin a video; its `deed` must keep it there."""
  until_there_is('*.current', process, folder)


def report_of(folder):
  return json.loads((folder / DATASET / 'build_report.json').read_text())


@pytest.mark.parametrize(
  ('deed', 'options', 'reason'),
  [
    (
      'os.kill(os.getpid(), signal.SIGSEGV)',
      [],
      'the process that read it crashed, twice',
    ),
    (
      'while True: pass',
      ['--time_limit=0.5'],
      'it takes longer than --time_limit=0.5 seconds, at one point of it',
    ),
  ],
)
def test_a_video_that_crashes_or_blocks_its_reader_is_listed_like_any_other(
  clips, tmp_path, deed, options, reason
):
  script = tmp_path / 'build.py'
  script.write_text(SCRIPT.format(name='swaying', deed=deed, grace=(6.0, 0.5)))
  done = run_python(script, *command(clips, tmp_path)[2:], '--workers=2', *options)
  assert done.returncode == 0, done.stderr
  reasons = {pathlib.Path(path).name: reason for path, reason in skipped_of(tmp_path).items()}
  culprits = {path.name for path in clips.glob('*/swaying/*.mp4')}
  assert culprits
  assert set(reasons) == culprits | {'broken.mp4'}
  assert {reasons[name] for name in culprits} == {reason}
  assert report_of(tmp_path)['totals']['videos'] == 8 - len(culprits)
  assert not list(tmp_path.glob('kinetics_frames/folder/*.partial'))


@pytest.mark.parametrize(
  ('deed', 'options', 'message'),
  [
    (
      'os.kill(os.getpid(), signal.SIGKILL)',
      '',
      'was ended twice (SIGKILL), as where memory is sh',
    ),
    pytest.param(
      'time.sleep(1e6)',
      '--time_limit=1',
      'was not read within 1.5 s, as its process got too littl',
      marks=pytest.mark.slow,
    ),
    (
      "raise OSError(24, 'not now')",
      '',
      'the build cannot go on ([Errno 24] not now); raise the ',
    ),
  ],
)
def test_what_the_machine_does_to_a_video_is_no_verdict(clips, tmp_path, deed, options, message):
  script = tmp_path / 'build.py'
  script.write_text(SCRIPT.format(name='swaying', deed=deed, grace=(1.0, 0.5)))
  done = run_python(script, *command(clips, tmp_path)[2:], '--workers=2', *options.split())
  assert done.returncode == 2, done.stderr
  assert message in done.stderr.splitlines()[-1]
  assert 'Traceback' not in done.stderr
  tables = [json.loads(path.read_text()) for path in (tmp_path / PARTIAL).glob('*-0*.json')]
  assert not [row for table in tables for row in table['skipped'] if 'swaying' in row['path']]
  done = run_python(*command(clips, tmp_path, *options.split()))
  assert done.returncode == 0, done.stderr
  assert list(skipped_of(tmp_path)) == ['train/bouncing/broken.mp4']


def unprivileged(*arguments):
  """Runs the builder without the right of root to read everything."""
  bounds = ['setpriv', '--bounding-set=-all', '--inh-caps=-all'] if os.geteuid() == 0 else []
  return subprocess.run(
    [*bounds, sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
  )


def test_videos_that_may_not_be_read_are_listed_and_tried_again(data_dir, clips, tmp_path):
  root = tmp_path / 'videos'
  shutil.copytree(clips / 'train', root / 'train')
  shutil.copytree(clips / 'val', root / 'val')
  locked = sorted(root.glob('*/swaying/*.mp4'))
  for path in locked:
    path.chmod(0)
  names = {path.relative_to(root).as_posix() for path in locked}
  reason = 'it cannot be opened: Permission denied'
  assert unprivileged(*command(root, tmp_path / 'whole')).returncode == 0
  assert {skipped_of(tmp_path / 'whole')[name] for name in names} == {reason}
  # An unfinished build is whole as long as they cannot be read, and goes on when they can be.
  assert unprivileged(*command(root, tmp_path, '--shard_range=0/1')).returncode == 0
  again = unprivileged(*command(root, tmp_path, '--shard_range=0/1'))
  assert 'resuming: 9 of 9 shards are there' in again.stderr
  for path in locked:
    path.chmod(0o644)
  done = unprivileged(*command(root, tmp_path))
  assert done.returncode == 0, done.stderr
  assert f'resuming: {9 - len(locked)} of 9 shards are there' in done.stderr
  assert contents(tmp_path / DATASET) == contents(data_dir / DATASET)


def test_a_disk_that_fails_is_tried_again(clips, tmp_path, monkeypatch):
  """Whatever FFmpeg makes of it: the verdict is marked by whether the bytes can be had."""
  job = job_of(clips, 'val')
  monkeypatch.setattr(shards, '_is_unreadable', lambda path: True)
  monkeypatch.setattr(shards, 'read_jpegs', lambda *_: (_ for _ in ()).throw(UnusableVideo('EIO')))
  table = write(job, tmp_path)
  assert [row['unread'] for row in table['skipped']] == [True] * len(job.videos)
  assert shards.finished_table(job, tmp_path) == table
  monkeypatch.undo()
  assert shards.finished_table(job, tmp_path) is None
  assert write(job, tmp_path)['videos']


def test_a_process_that_is_killed_once_costs_nothing(data_dir, clips, tmp_path):
  script = tmp_path / 'build.py'
  deed = (
    f'flag = {str(tmp_path / "killed")!r}\n'
    '    if not os.path.exists(flag):\n'
    "      open(flag, 'w').close()\n"
    '      os.kill(os.getpid(), signal.SIGKILL)'
  )
  script.write_text(SCRIPT.format(name='swaying', deed=deed, grace=(1.0, 0.5)))
  done = run_python(script, *command(clips, tmp_path)[2:], '--workers=2')
  assert done.returncode == 0, done.stderr
  assert 'a process ended at train/swaying/' in done.stderr
  assert contents(tmp_path / DATASET) == contents(data_dir / DATASET)


@pytest.mark.parametrize(
  'deed',
  [
    pytest.param("raise TypeError('planted')", marks=pytest.mark.slow),
    "raise type('OfNoModule', (Exception,), {})('planted')",
  ],
  ids=['TypeError', 'an error that cannot be pickled'],
)
def test_a_mistake_in_a_program_ends_the_build_and_is_no_verdict(data_dir, clips, tmp_path, deed):
  script = tmp_path / 'build.py'
  script.write_text(SCRIPT.format(name='swaying', deed=deed, grace=(1.0, 0.5)))
  done = run_python(script, *command(clips, tmp_path)[2:], '--workers=2')
  assert done.returncode == 1, done.stderr
  assert ': planted (while reading ' in done.stderr.splitlines()[-1]
  assert '/swaying/' in done.stderr.splitlines()[-1]
  tables = [json.loads(path.read_text()) for path in (tmp_path / PARTIAL).glob('*-0*.json')]
  assert not [row for table in tables for row in table['skipped'] if 'swaying' in row['path']]
  assert not (tmp_path / DATASET).exists()
  # What is finished is kept, and the video is taken once the mistake is mended.
  done = run_python(*command(clips, tmp_path, '--workers=2'))
  assert done.returncode == 0, done.stderr
  assert not tables or f'resuming: {len(tables)} of 9 shards are there' in done.stderr
  assert contents(tmp_path / DATASET) == contents(data_dir / DATASET)


def other_containers(folder):
  """A small video in each of the containers that mutations are called after."""
  folder.mkdir()
  for name, (codec, pixels) in {
    'a.avi': ('mpeg4', 'yuv420p'),
    'a.mkv': ('libx264', 'yuv420p'),
    'a.webm': ('libvpx', 'yuv420p'),
    'a.ts': ('libx264', 'yuv420p'),
    'a.flv': ('flv', 'yuv420p'),
    'a.mpg': ('mpeg2video', 'yuv420p'),
    'a.mov': ('mjpeg', 'yuvj420p'),
    'a.wmv': ('wmv2', 'yuv420p'),
    'faststart.mp4': ('libx264', 'yuv420p'),
  }.items():
    movflags = 'faststart' * (name == 'faststart.mp4')
    write_video(folder / name, codec, pixels, pictures(64, 96), movflags=movflags)
  files = sorted(folder.iterdir())
  assert {path.suffix for path in files} == set(mutations.SUFFIXES)
  return files


@pytest.mark.slow
def test_a_thousand_damaged_videos(clips, tmp_path):
  good = sorted(clips.glob('*/*/*_*.mp4'))
  root = tmp_path / 'videos'
  shutil.copytree(clips / 'train', root / 'train')
  shutil.copytree(clips / 'val', root / 'val')
  sources = [*good[:2], *other_containers(tmp_path / 'sources')]
  count = mutations.write_mutations(sources, root, count=1000, seed=0)
  done = run_python(*command(root, tmp_path, '--time_limit=30'))
  assert done.returncode == 0, done.stderr
  rows = report_of(tmp_path)['videos']
  assert {row['path'] for row in rows} == {
    path.relative_to(root).as_posix() for path in root.rglob('*.*') if path.is_file()
  }
  assert len(rows) == count + 9
  assert all(row['reason'] for row in rows if row['outcome'] == 'skipped')
  kept = {row['path']: row for row in rows if row['outcome'] == 'kept'}
  assert set(kept) >= {path.relative_to(clips).as_posix() for path in good}
  undamaged = [path for path in kept if '/whole_' in path]
  assert len(undamaged) == len(list(root.glob('train/mutated/whole_*')))

  # What is kept of the good ones is what a build without the bad ones has.
  def frames(data_dir, split):
    import tensorflow_datasets as tfds

    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = tfds.builder_from_directory(data_dir / DATASET).as_data_source(
      split, deserialize_method=raw
    )
    return {record for record in (source[number] for number in range(len(source)))}

  clean = tmp_path / 'clean'
  done = run_python(*command(clips, clean))
  assert done.returncode == 0, done.stderr
  for split in ('train', 'val'):
    assert frames(clean, split) <= frames(tmp_path, split)


@pytest.mark.parametrize(
  ('number', 'workers'),
  [
    (signal.SIGKILL, 3),
    (signal.SIGTERM, 2),
    pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
  ],
)
def test_a_build_that_was_stopped_ends_like_one_that_was_not(
  data_dir, clips, tmp_path, number, workers
):
  process = started(clips, tmp_path, deed='time.sleep(1e6)', name='swaying')
  until_there_is('train-*.json', process, tmp_path)
  if number == signal.SIGKILL:
    os.killpg(process.pid, number)
  else:
    process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert not (tmp_path / DATASET).exists()
  if number != signal.SIGKILL:
    assert process.returncode == 75, errors
    assert 'the same command resumes from there' in errors
    assert 'Traceback' not in errors
  done = run_python(*command(clips, tmp_path, f'--workers={workers}'))
  assert done.returncode == 0, done.stderr
  there = int(re.search(r'resuming: (\d) of 9 shards are there', done.stderr)[1])
  counted = [int(number) for number in re.findall(r'shard (\d+) of 9: ', done.stderr)]
  assert counted == list(range(there + 1, 10))
  assert contents(tmp_path / DATASET) == contents(data_dir / DATASET)
  assert not (tmp_path / PARTIAL).exists()


def test_an_array_job_writes_what_one_machine_does(clips, tmp_path):
  options = FrameOptions(short_side=32, jpeg_quality=50, frame_stride=2, max_frames=3)
  own = command(clips, tmp_path, *flags(options))
  ranges = [
    subprocess.Popen(
      [sys.executable, *own, '--workers=1', f'--shard_range={number}/3'],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in (0, 2)
  ]
  for process in ranges:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert '3 of 9 shards belong to range' in output
  early = run_python(*own, '--finalise')
  assert early.returncode == 2
  assert '3 of 9 shards are not in' in early.stderr
  assert run_python(*own, '--shard_range=1/3').returncode == 0
  done = run_python(*own, '--finalise')
  assert done.returncode == 0, done.stderr
  assert '8 videos, 24 frames' in done.stdout
  assert contents(tmp_path / DATASET) == contents(build_here(clips, tmp_path / 'here', options))
  assert not (tmp_path / PARTIAL).exists()
  again = run_python(*own, '--shard_range=1/3')
  assert again.returncode == 0
  assert 'there is nothing left to do' in again.stdout


def test_a_full_disk_is_no_fault_of_the_video(clips, tmp_path, monkeypatch):
  """Frames are spooled while a video is read; what that disk says is the builder's business."""

  class Full:
    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

    def write(self, _):
      raise OSError(28, 'No space left on device')

  monkeypatch.setattr(shards.tempfile, 'TemporaryFile', lambda dir: Full())
  with pytest.raises(OSError, match='No space left'):
    write(job_of(clips, 'val'), tmp_path)
  assert not list(tmp_path.iterdir())


def test_ctrl_c_does_not_wait_for_the_video_nor_break_off_when_repeated(clips, tmp_path):
  process = started(clips, tmp_path, deed='time.sleep(1e6)')
  until_reading(process, tmp_path)
  for _ in range(3):
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
  _, errors = process.communicate(timeout=30)
  assert process.returncode == 75, errors
  assert 'the same command resumes from there' in errors
  assert 'Traceback' not in errors


def test_a_suspended_build_blames_no_video(clips, tmp_path):
  """It suspends itself at a video, with all of its processes."""
  (video, *_) = clips.glob('val/*/*.mp4')
  deed = 'os.killpg(0, signal.SIGSTOP); time.sleep(1)'
  process = started(clips, tmp_path, deed=deed, name=video.name, options=['--time_limit=2'])
  assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
  time.sleep(6)
  os.killpg(process.pid, signal.SIGCONT)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  assert list(skipped_of(tmp_path)) == ['train/bouncing/broken.mp4']


def test_workers_end_when_the_builder_is_killed(clips, tmp_path):
  process = started(clips, tmp_path, deed='time.sleep(1e6)')
  until_reading(process, tmp_path)
  threads = pathlib.Path(f'/proc/{process.pid}/task').glob('*/children')
  children = [pid for thread in threads for pid in thread.read_text().split()]
  assert len(children) > 1  # A worker, and the process that Python keeps for shared resources.
  process.kill()
  process.wait()
  deadline = time.monotonic() + 30
  while any(pathlib.Path(f'/proc/{pid}').exists() for pid in children):
    assert time.monotonic() < deadline
    time.sleep(0.1)


def test_a_mistyped_option_does_not_cost_what_is_finished(data_dir, clips, tmp_path):
  assert run_python(*command(clips, tmp_path, '--shard_range=0/2')).returncode == 0
  there = sorted((tmp_path / PARTIAL).iterdir())
  wrong = run_python(*command(clips, tmp_path, '--max_frames=5'))
  assert wrong.returncode == 2
  assert 'holds an unfinished build of other videos or options' in wrong.stderr
  assert sorted((tmp_path / PARTIAL).iterdir()) == there
  assert run_python(*command(clips, tmp_path)).returncode == 0
  assert contents(tmp_path / DATASET) == contents(data_dir / DATASET)


def test_a_shard_is_written_by_one_task_only(clips, tmp_path):
  """Whatever the number of ranges: 1/3 is shards 1, 4, 7 of 0..8; 0/4 is 0, 4, 8; 0/2 the even."""
  go_on = tmp_path / 'go_on'
  deed = f'while not os.path.exists({str(go_on)!r}): time.sleep(0.05)'
  first = started(clips, tmp_path, deed=deed, options=['--shard_range=1/3'])
  until_reading(first, tmp_path)
  try:
    for other in ('--shard_range=1/3', '--shard_range=0/4', '--workers=1'):
      refused = run_python(*command(clips, tmp_path, other))
      assert refused.returncode == 2
      assert 'another build is writing ' in refused.stderr
    assert run_python(*command(clips, tmp_path, '--shard_range=0/3')).returncode == 0
  finally:
    go_on.touch()
  _, errors = first.communicate(timeout=60)
  assert first.returncode == 0, errors
  assert len(list((tmp_path / PARTIAL).glob('*-0*.json'))) == 6
  assert not list((tmp_path / PARTIAL).glob('*.current'))


def test_a_root_with_a_way_up_behind_a_link(data_dir, clips, tmp_path):
  (tmp_path / 'link').symlink_to(clips / 'train')
  done = run_python(*command(tmp_path / 'link' / '..', tmp_path))
  assert done.returncode == 0, done.stderr
  assert contents(tmp_path / DATASET) == contents(data_dir / DATASET)
