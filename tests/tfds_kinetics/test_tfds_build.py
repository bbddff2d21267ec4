"""Building a dataset: what is in it, what is left out and why, stopping and going on."""

import fcntl
import json
import os
import pathlib
import re
import shutil
from functools import partial

import numpy as np
import pytest
from conftest import run_python

from tfds_kinetics import build, shards, workers
from tfds_kinetics.configs import COLLECTIONS
from tfds_kinetics.messages import BadInput, log
from tfds_kinetics.tree import Video, list_videos
from tfds_kinetics.video import FrameOptions, UnusableVideo, read_jpegs

DATASET = pathlib.Path('kinetics_frames/folder', shards.VERSION)
PARTIAL = DATASET.with_name(f'{shards.VERSION}.partial')


def command(videos, data_dir, *more):
  arguments = ['--config=folder', f'--videos={videos}', f'--data_dir={data_dir}', *more]
  return ['-m', 'tfds_kinetics', *arguments]


def contents(folder):
  """Everything of a dataset that may not depend on how it was built, so not the times it took."""
  files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
  files = {name: content for name, content in files.items() if not name.endswith(('.log', '.txt'))}
  report = json.loads(files['build_report.json'])
  report['totals'].pop('seconds')
  for row in report['videos']:
    row.pop('seconds')
  return files | {'build_report.json': report}


def skipped_of(data_dir):
  """Why each video was left out, by its path."""
  report = json.loads((data_dir / DATASET / 'build_report.json').read_text())
  return {row['path']: row['reason'] for row in report['videos'] if row['outcome'] == 'skipped'}


def job_of(root, split, videos=None):
  """The first shard of a split."""
  videos = videos or list_videos(COLLECTIONS['folder'], root).videos[split]
  return shards.shard_jobs(root, split, videos, FrameOptions())[0]


def write(job, folder):
  return shards.write_shard(job, folder, verdicts={}, before_video=lambda video: None)


def test_it_opens_in_any_project_without_tensorflow(data_dir):
  program = (
    'import sys, tensorflow_datasets as tfds\n'
    f's = tfds.data_source("kinetics_frames/folder", split="train", data_dir="{data_dir}")\n'
    'print(len(s), s[13]["jpeg"].shape, "tensorflow" in sys.modules, "jax" in sys.modules)'
  )
  done = run_python('-c', program)
  assert done.stdout.split('\n')[0] == '48 (48, 64, 3) False False', done.stderr


def test_a_second_build_reuses_the_first(data_dir, clips):
  before = contents(data_dir / DATASET)
  done = run_python(*command(clips, data_dir))
  assert done.returncode == 0
  assert 'nothing to do' in done.stderr
  assert contents(data_dir / DATASET) == before


def test_the_number_of_workers_changes_nothing(data_dir, clips, tmp_path):
  done = run_python(*command(clips, tmp_path, '--workers=1'))
  assert done.returncode == 0, done.stderr
  assert contents(tmp_path / DATASET) == contents(data_dir / DATASET)


def test_a_dataset_of_other_videos_is_not_overwritten(data_dir, clips, tmp_path):
  fewer = tmp_path / 'fewer'
  shutil.copytree(clips / 'train', fewer / 'train')
  before = contents(data_dir / DATASET)
  done = run_python(*command(fewer, data_dir))
  assert done.returncode == 2
  assert 'holds a dataset of other videos or options; remove that folder' in done.stderr
  assert contents(data_dir / DATASET) == before


def test_damaged_videos(clips, tmp_path):
  good = next(clips.glob('val/*/*.mp4')).read_bytes()
  options = FrameOptions()
  path = tmp_path / 'clip.mp4'

  def reason(content):
    path.write_bytes(content)
    with pytest.raises(UnusableVideo) as caught:
      list(read_jpegs(str(path), options))
    return str(caught.value)

  assert 'cannot be opened' in reason(b'')
  assert 'cannot be opened' in reason(good[: len(good) // 2])
  middle = len(good) // 3
  torn = good[:middle] + bytes(2000) + good[middle + 2000 :]
  assert 'packets are damaged' in reason(torn)
  suggested = float(reason(torn).rsplit('=')[1].split()[0])
  path.write_bytes(torn)
  kept = list(read_jpegs(str(path), FrameOptions(max_damage=suggested)))
  assert 0 < len(kept) <= 8


def test_long_videos_are_spread_over_files(clips, tmp_path, monkeypatch):
  monkeypatch.setattr(shards, 'RECORDS_PER_FILE', 5)
  job = job_of(clips, 'val')
  table = write(job, tmp_path)
  assert [row['records'] for row in table['files']] == [5, 3]
  assert shards.finished_table(job, tmp_path) == table
  (tmp_path / table['files'][1]['name']).write_bytes(b'')
  assert shards.finished_table(job, tmp_path) is None


# A disk that is full after a few shards.
FULL = """
import errno, sys
from tfds_kinetics import __main__ as command, shards
real = shards.FrameFiles.close
def close(self):
  if self._name in ('train-00003', 'train-00004'):
    raise OSError(errno.ENOSPC, 'No space left on device')
  return real(self)
shards.FrameFiles.close = close
if __name__ == '__main__':
  sys.exit(command.main())
"""


def test_a_full_disk_is_one_sentence_and_keeps_what_is_there(data_dir, clips, tmp_path):
  script = tmp_path / 'full.py'
  script.write_text(FULL)
  done = run_python(script, *command(clips, tmp_path)[2:], '--workers=1')
  assert done.returncode == 2
  assert 'cannot be written: [Errno 28] No space left on device; what is finished is kept' in (
    done.stderr
  )
  assert 'Traceback' not in done.stderr
  done = run_python(*command(clips, tmp_path))
  assert done.returncode == 0, done.stderr
  # The worker goes on until it hears of the error.
  assert re.search('resuming: [3-7] of 9 shards are there', done.stderr)
  assert contents(tmp_path / DATASET) == contents(data_dir / DATASET)


def test_videos_that_go_away_stop_the_build_and_are_not_listed_as_broken(clips, tmp_path):
  videos = list_videos(COLLECTIONS['folder'], clips).videos['val']
  planned = [Video(v.path, v.label, v.size + 1) for v in videos]
  with pytest.raises(shards.SourceChanged, match='bytes when the build began'):
    write(job_of(clips, 'val', planned), tmp_path)
  job = job_of(tmp_path / 'gone', 'val', videos)
  with pytest.raises(BadInput, match='is gone now; leave the videos alone'):
    workers.write_shards([job], tmp_path, 1)
  assert not list(tmp_path.glob('*.array_record'))


def test_names_that_are_no_text_and_links_to_nowhere_are_listed(clips, tmp_path):
  root = tmp_path / 'videos'
  shutil.copytree(clips / 'val', root)
  (root / 'nowhere.mp4').symlink_to(root / 'none')
  with open(os.fsencode(root) + b'/odd\xff.mp4', 'wb') as file:
    file.write(next(clips.glob('val/*/*.mp4')).read_bytes())
  done = run_python(*command(root, tmp_path))
  assert done.returncode == 0, done.stderr
  reasons = skipped_of(tmp_path)
  assert set(reasons) == {'nowhere.mp4', 'odd\\xff.mp4'}
  assert 'not valid UTF-8' in reasons['odd\\xff.mp4']
  assert 'cannot be opened' in reasons['nowhere.mp4']


def test_two_builders_do_not_meet(clips, tmp_path):
  lock = tmp_path / DATASET.with_name(f'{shards.VERSION}.lock')
  lock.parent.mkdir(parents=True)
  with lock.open('w') as held:
    fcntl.lockf(held, fcntl.LOCK_EX)
    done = run_python(*command(clips, tmp_path))
    assert done.returncode == 2
    assert 'another build is writing' in done.stderr
  assert run_python(*command(clips, tmp_path)).returncode == 0
  assert not lock.exists()


def test_kinetics_needs_its_layout_and_counts_its_classes(clips, tmp_path):
  with pytest.raises(BadInput, match='has no train folder, which --config=kinetics400 needs'):
    build.plan(COLLECTIONS['kinetics400'], clips / 'train', tmp_path, FrameOptions())
  done = run_python(
    '-m', 'tfds_kinetics', '--config=kinetics400', f'--videos={clips}', f'--data_dir={tmp_path}'
  )
  assert done.returncode == 0, done.stderr
  assert 'a complete copy has 400 classes' in done.stdout
  assert (tmp_path / 'kinetics_frames/kinetics400/2.0.0/index-val.npz').exists()
  log = (tmp_path / 'kinetics_frames/kinetics400/2.0.0/build.log').read_text()
  assert 'broken.mp4: it cannot be opened' in log


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'none of the 1 videos in --videos='),
    ([], 'Mend them, remove {tmp}/out/kinetics_frames/folder/2.0.0.partial and'),
    (['--beam_runner=DirectRunner'], "pip install -e '.[beam]'"),
  ],
)
def test_what_is_found_late_is_one_sentence_and_status_2(tmp_path, arguments, message):
  """What is seen at once is in test_wrong_inputs.py."""
  (tmp_path / 'junk').mkdir()
  (tmp_path / 'junk' / 'a.mp4').write_bytes(b'junk')
  done = run_python(*command(tmp_path / 'junk', tmp_path / 'out', *arguments))
  assert done.returncode == 2
  assert message.format(tmp=tmp_path) in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'out' / DATASET).exists()


@pytest.mark.parametrize(
  'environment',
  [
    {'PYTHONIOENCODING': 'ascii'},
    pytest.param(
      {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}, marks=pytest.mark.slow
    ),
  ],
)
def test_the_locale_changes_nothing(clips, tmp_path, monkeypatch, environment):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  root = tmp_path / 'videos'
  root.mkdir()
  shutil.copy(next(clips.glob('val/*/*.mp4')), root / 'bär ☂.mp4')
  (root / 'größe.mp4').write_bytes(b'junk')
  done = run_python(*command(root, tmp_path))
  assert done.returncode == 0, done.stderr
  assert '1 videos, 8 frames, ' in done.stdout
  assert list(skipped_of(tmp_path)) == ['größe.mp4']
  with np.load(tmp_path / DATASET / 'index-train.npz') as index:
    assert list(index['path']) == ['bär ☂.mp4']


# Network file systems keep a file that is open and removed in its folder, under another name.
NFS = """
import os, sys
from tfds_kinetics import __main__ as command
real = os.unlink
def unlink(path, *, dir_fd=None):
  if dir_fd is not None and not str(path).startswith('.nfs'):
    there = os.stat(path, dir_fd=dir_fd)
    for number in os.listdir('/proc/self/fd'):
      try:
        if os.path.samestat(os.stat(f'/proc/self/fd/{number}'), there):
          return os.rename(path, f'.nfs{number}', src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
      except OSError:
        pass
  return real(path, dir_fd=dir_fd)
os.unlink = unlink
if __name__ == '__main__':
  sys.exit(command.main())
"""


def test_nothing_is_open_any_more_when_the_shards_are_removed(data_dir, clips, tmp_path):
  script = tmp_path / 'nfs.py'
  script.write_text(NFS)
  done = run_python(script, *command(clips, tmp_path)[2:])
  assert done.returncode == 0, done.stderr
  assert [path.name for path in (tmp_path / DATASET).parent.iterdir()] == [shards.VERSION]
  assert contents(tmp_path / DATASET) == contents(data_dir / DATASET)


def test_what_cannot_be_removed_in_the_end_does_not_fail_the_build(clips, tmp_path, monkeypatch):
  def failing(folder, ignore_errors=False, **_):
    if not ignore_errors:
      raise OSError(39, 'Directory not empty', str(folder))

  monkeypatch.setattr(build.shutil, 'rmtree', failing)
  planned = build.plan(COLLECTIONS['folder'], clips, tmp_path, FrameOptions())
  assert build.build(planned, partial(workers.write_shards, workers=1)).is_dir()


def test_a_build_called_from_python_leaves_only_the_dataset(clips, tmp_path):
  before = list(log.handlers)
  planned = build.plan(COLLECTIONS['folder'], clips, tmp_path, FrameOptions())
  build.build(planned, partial(workers.write_shards, workers=1))
  assert log.handlers == before
  assert list((tmp_path / DATASET).parent.iterdir()) == [tmp_path / DATASET]


def test_a_finished_shard_is_not_written_again(clips, tmp_path):
  job, read = job_of(clips, 'train'), []
  tables = [
    shards.write_shard(job, tmp_path, verdicts={}, before_video=read.append) for _ in range(2)
  ]
  assert tables[0] == tables[1]
  assert read == list(job.videos)
