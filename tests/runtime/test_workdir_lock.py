"""A second run in the workdir of one that runs is refused, and the first goes on unharmed."""

import errno
import fcntl
import os
import signal
import socket

import pytest
from conftest import run_python, train_arguments
from processes import Processes, running, wait_for_line
from test_commands import assert_same_weights, losses

from dropmae_jax.runtime import workdir_lock
from dropmae_jax.runtime.errors import ExitStatus
from dropmae_jax.runtime.workdir_lock import WorkdirInUse

# Waits after step 3, whose checkpoint is being written, for a file.
PAUSED = """
import pathlib, sys, time
from dropmae_jax import main
from dropmae_jax.runtime import cli, report
real = report.Report.after_step
workdir = next(each.partition('=')[2] for each in sys.argv if each.startswith('--workdir='))
def after_step(self, step, metrics):
  real(self, step, metrics)
  while step == 4 and not pathlib.Path(workdir, 'go on').exists():
    time.sleep(0.01)
report.Report.after_step = after_step
cli.run(main.main)
"""


def test_a_second_start_is_refused_and_the_first_ends_as_if_alone(trained, data_dir, tmp_path):
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=8', '--config.checkpoint.every_steps=3'
  )
  with running('-c', PAUSED, *arguments[2:]) as first:
    wait_for_line(first, 'step 4/8')
    before = sorted(path.name for path in tmp_path.iterdir())
    second = run_python(*arguments)
    assert second.returncode == ExitStatus.UNAVAILABLE
    holder = f'process {first.pid} of {socket.gethostname()} since 20'
    assert f'error: --workdir={tmp_path} is in use by {holder}' in second.stderr
    assert 'Traceback' not in second.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / 'go on').touch()
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
  assert losses(tmp_path) == losses(trained)
  assert_same_weights(tmp_path, trained)


def test_it_is_refused_on_all_processes(data_dir, tmp_path):
  with workdir_lock.held(tmp_path):
    ends = Processes(train_arguments(data_dir, tmp_path, '--config.num_steps=1')).ends()
  for status, _, errors in ends:
    assert status == ExitStatus.UNAVAILABLE, errors
    assert f'is in use by process {os.getpid()} of ' in errors


HOLDS = """
import pathlib, sys, time
from dropmae_jax.runtime import workdir_lock
with workdir_lock.held(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(60)
"""


def test_it_goes_with_its_process(tmp_path):
  with running('-c', HOLDS, tmp_path) as process:
    wait_for_line(process, 'held')
    with (
      pytest.raises(WorkdirInUse, match=f'in use by process {process.pid} of '),
      workdir_lock.held(tmp_path),
    ):
      pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with workdir_lock.held(tmp_path):
      assert f'"pid": {os.getpid()}' in (tmp_path / workdir_lock.FILE).read_text()


@pytest.mark.parametrize('text', ['', '[]', '{"pid": 3'])
def test_a_holder_that_has_not_said_who_it_is(tmp_path, text):
  with (tmp_path / workdir_lock.FILE).open('w') as other:
    other.write(text)
    other.flush()
    fcntl.flock(other, fcntl.LOCK_EX)
    refused = pytest.raises(WorkdirInUse, match='in use by another run; stop')
    with refused, workdir_lock.held(tmp_path):
      pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
  def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, 'flock', flock)
  with workdir_lock.held(tmp_path):
    (told,) = [each.message for each in caplog.records if each.name == 'dropmae_jax']
    assert f'{tmp_path} cannot be locked (No locks available); start no second' in told
