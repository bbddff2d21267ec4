"""Training commands whose loader hangs or reads damaged records."""

import os
import shutil
import time

import pytest
from conftest import assert_one_sentence, run_python, train_arguments
from processes import running, wait_for_line

from dropmae_jax.runtime.errors import ExitStatus

# The threads that read hang from the tenth frame on.
HANGING = """
import itertools, threading
from dropmae_jax import main
from dropmae_jax.data import video_source
from dropmae_jax.runtime import cli
count, real = itertools.count(), video_source.TfdsVideos.frame
def frame(self, video, number):
  if next(count) >= 40:
    print('hanging', flush=True)
    threading.Event().wait()
  return real(self, video, number)
video_source.TfdsVideos.frame = frame
cli.run(main.main)
"""


def test_a_loader_that_hangs_ends_the_run_with_stacks(data_dir, tmp_path):
  done = run_python(
    '-c', HANGING, *train_arguments(data_dir, tmp_path, '--config.data.num_threads=2')[2:],
    '--config.num_steps=8', '--config.data.stall_seconds=3',
  )  # fmt: skip
  assert done.returncode == ExitStatus.UNAVAILABLE, done.stderr
  assert 'error: no batch came within data.stall_seconds=3' in done.stderr
  assert 'Traceback' not in done.stderr
  assert ' in frame' in (tmp_path / 'log.txt').read_text()


@pytest.mark.slow
def test_a_signal_while_the_loader_hangs_saves_the_last_step(data_dir, tmp_path):
  arguments = train_arguments(data_dir, tmp_path, '--config.num_steps=100')
  with running('-c', HANGING, *arguments[2:]) as process:
    wait_for_line(process, 'hanging')
    time.sleep(3)
    process.terminate()
    output, errors = process.communicate(timeout=120)
  assert process.returncode == os.EX_TEMPFAIL, errors
  (folder,) = (tmp_path / 'checkpoints').iterdir()
  assert f'SIGTERM: saved at step {folder.name} of 100' in output


@pytest.mark.slow
def test_too_many_damaged_records_end_the_run_in_one_sentence(data_dir, tmp_path):
  shutil.copytree(data_dir, tmp_path / 'data')
  for shard in (tmp_path / 'data').glob('**/*-train.array_record*'):
    with shard.open('r+b') as file:
      file.seek(500)
      file.write(b'damage')
  done = run_python(
    *train_arguments(tmp_path / 'data', tmp_path / 'run', '--config.num_steps=100000'),
    '--config.data.max_damaged_records=2',
  )
  assert_one_sentence(done, 'cannot be read: record ')
  assert (
    'It is damaged record 3 of this start, and config.data.max_damaged_records=2.' in done.stderr
  )
  assert done.stdout.count('Another video is taken instead; damaged record') == 2
