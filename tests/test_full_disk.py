"""A disk that is really full does not end a run; what is lost is said once."""

import json
import subprocess
import time

import pytest
from conftest import assert_one_sentence, run_python, train_arguments
from test_commands import assert_same_weights, losses

# Fills the disk of the workdir at step 3, once it has the checkpoint of step 2; frees it at step 7.
FILLING = """
import os, pathlib, sys, time
from dropmae_jax import main
from dropmae_jax.runtime import report
real = report.Report.after_step
workdir = next(each.partition('=')[2] for each in sys.argv if each.startswith('--workdir='))
filler = pathlib.Path(workdir).parent / 'filler'
def after_step(self, step, metrics):
  while step == 3 and not pathlib.Path(workdir, 'checkpoints', '2').exists():
    time.sleep(0.01)
  if step == 3:
    for name in 'log.txt', 'metrics.jsonl':
      # What is left of a block could be written. Spaces may stand before a line of json.
      with pathlib.Path(workdir, name).open('a') as file:
        file.write(' ' * (-file.tell() % 4096))
    fill(filler)
  elif step == 7:
    filler.unlink()
  real(self, step, metrics)
def fill(path):
  size = 2**20
  with path.open('wb', buffering=0) as file:
    while size:
      try:
        file.write(bytes(size))
      except OSError:
        size //= 2
report.Report.after_step = after_step
main.command()
"""


@pytest.fixture
def disk(tmp_path):
  """A small file system."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=32m', 'tmpfs', str(folder)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip('needs the right to mount a file system, as root has')
  yield folder
  subprocess.run(['umount', '--lazy', str(folder)], check=True)


def test_a_full_disk_that_is_freed_does_not_change_a_run(trained, data_dir, disk):
  workdir = disk / 'run'
  arguments = train_arguments(
    data_dir, workdir, '--config.num_steps=8', '--config.checkpoint.every_steps=2'
  )
  done = run_python('-c', FILLING, *arguments[2:], timeout=120)
  seconds = time.time() - (workdir / 'log.txt').stat().st_mtime
  assert done.returncode == 0, done.stderr
  assert seconds < 10, 'the end of the process hangs'
  for name in ('log.txt', 'metrics.jsonl'):
    told = f'{workdir / name} cannot be written (No space left on device); training goes on without'
    assert done.stdout.count(told) == 1
  assert done.stdout.count('the checkpoint of step 4 could not be written (') == 1
  for step in range(1, 9):
    assert f'step {step}/8' in done.stdout
  assert set(losses(workdir)) <= set(losses(trained))
  assert losses(workdir)[-1] == losses(trained)[-1]
  assert_same_weights(workdir, trained)


def test_a_disk_that_is_full_at_the_start_is_one_sentence(data_dir, disk):
  workdir = disk / 'run'
  workdir.mkdir()
  (workdir / 'metrics.jsonl').write_text(json.dumps({'step': 0}) + '\n')
  subprocess.run(['dd', 'if=/dev/zero', f'of={disk / "filler"}'], capture_output=True, check=False)
  done = run_python(*train_arguments(data_dir, workdir, '--config.num_steps=8'))
  assert_one_sentence(done, 'cannot be written (No space left on device); make room there')
  assert losses_of(workdir) == [0]


def losses_of(workdir):
  return [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_disk_that_cannot_be_written_is_one_sentence(data_dir, disk):
  subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
  done = run_python(*train_arguments(data_dir, disk / 'run', '--config.num_steps=8'))
  assert_one_sentence(done, 'cannot be written (Read-only file system); make room there, or give')
