"""Several real processes are one run: the same numbers, one report, one stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import portpicker
import pytest
from conftest import COMPILE_ONCE, ROOT, run_python, train_arguments
from test_commands import losses

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.runtime import multihost
from dropmae_jax.runtime.errors import UserError

# Trains, and writes down which videos this process reads.
LISTENING = """
import sys
from absl import app
from dropmae_jax import main
from dropmae_jax.data import frame_pairs
from dropmae_jax.runtime import cli
name = sys.argv.pop()
real = frame_pairs.PairMaker.draw
def draw(self, key):
  with open(name, 'a') as file:
    file.write(f'{key.video}\\n')
  return real(self, key)
frame_pairs.PairMaker.draw = draw
cli.run(lambda: app.run(main.main, flags_parser=main.parse))
"""


class Processes:
  """Two processes of two devices each, which train together."""

  def __init__(self, arguments, *, mine=((), ()), read=None):
    port = portpicker.pick_unused_port()
    self.running = []
    for number in range(2):
      command = [*arguments[2:], *mine[number]] if read else [*arguments, *mine[number]]
      command += [
        f'--coordinator_address=localhost:{port}',
        '--num_processes=2',
        f'--process_id={number}',
      ]
      if read:
        command = ['-c', LISTENING, *command, f'{read}{number}']
      self.running.append(
        subprocess.Popen(
          [sys.executable, *map(str, command)],
          cwd=ROOT,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
          env={**os.environ, **COMPILE_ONCE, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'},
        )
      )

  def wait_for(self, text):
    """Reads what process 0 says until a text comes."""
    for line in self.running[0].stdout:
      if text in line:
        return
    raise AssertionError(self.running[0].stderr.read())

  def ends(self):
    """Waits, and returns (status, output, errors) of both."""
    found = []
    for process in self.running:
      output, errors = process.communicate(timeout=200)
      found.append((process.returncode, output, errors))
    return found


def assert_close_weights(first, second):
  """To float tolerance: sums over devices come in another order."""
  one, other = (saved_weights.load_weights(folder) for folder in (first, second))
  assert one.step == other.step
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
    assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(b) + 1e-6


def test_two_processes_are_one_run(trained, data_dir, tmp_path):
  arguments = train_arguments(
    data_dir, tmp_path / 'run', '--config.num_steps=8', '--config.mesh.fsdp=2',
    '--config.checkpoint.every_steps=2', '--config.checkpoint.keep_last=1',
    '--config.checkpoint.keep_best=2',
  )  # fmt: skip
  ends = Processes(arguments, read=tmp_path / 'read').ends()
  assert [status for status, _, _ in ends] == [0, 0], ends
  steps, values = zip(*losses(tmp_path / 'run'), strict=True)
  expected = [loss for _, loss in losses(trained)]
  assert steps == tuple(range(1, 9))
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  # One report: process 1 tells nothing, and there is one line for a step.
  assert 'step 8/8' in ends[0][1]
  assert 'step 8/8' not in ends[1][1]
  means = {step: (expected[step - 2] + expected[step - 1]) / 2 for step in (2, 4, 6, 8)}
  kept = sorted({8, *sorted(means, key=means.get)[:2]})
  assert sorted(int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir()) == kept
  # Three batches of four are two epochs of six videos; each process reads half of every batch.
  read = [[int(n) for n in (tmp_path / f'read{i}').read_text().split()] for i in range(2)]
  assert all(len(videos) >= 16 for videos in read)
  together = [video for i in range(3) for videos in read for video in videos[2 * i : 2 * i + 2]]
  assert sorted(together[:6]) == sorted(together[6:]) == list(range(6))


@pytest.mark.slow
def test_damage_on_one_host_ends_both_with_its_sentence(data_dir, tmp_path):
  shutil.copytree(data_dir, tmp_path / 'data')
  for shard in (tmp_path / 'data').glob('**/*-train.array_record*'):
    with shard.open('r+b') as file:  # The first record of each.
      file.seek(500)
      file.write(b'damage')
  more = ('--config.num_steps=100000', '--config.data.max_damaged_records=0')
  other = f'--config.data_dir={tmp_path / "data"}'
  began = time.monotonic()
  ends = Processes(train_arguments(data_dir, tmp_path / 'run', *more), mine=((), (other,))).ends()
  assert time.monotonic() - began < 90
  assert [status for status, _, _ in ends] == [2, 2], ends
  told = 'is damaged record 1 of this start, and config.data.max_damaged_records=0.'
  assert told in ends[1][2]
  assert 'error: process 1 has ended: video ' in ends[0][2]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_any_number_of_devices_goes_on(trained, data_dir, tmp_path):
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=100000', '--config.mesh.fsdp=4'
  )
  both = Processes(arguments)
  both.wait_for('step 2/')
  both.running[1].send_signal(signal.SIGTERM)
  ends = both.ends()
  assert [status for status, _, _ in ends] == [75, 75], ends
  (step,) = [int(path.name) for path in (tmp_path / 'checkpoints').iterdir()]
  assert f'SIGTERM: saved at step {step} of 100000' in ends[0][1]
  done = run_python(*train_arguments(data_dir, tmp_path, f'--config.num_steps={step + 2}'))
  assert done.returncode == 0, done.stderr
  assert f'going on after step {step}' in done.stdout
  assert [number for number, _ in losses(tmp_path)] == list(range(1, step + 3))


@pytest.mark.parametrize(
  ('mine', 'message'),
  [
    (['--config.seed=1'], 'disagree with process 0 about: config (process 1); start all with'),
    pytest.param(
      ['--config.mesh.fsdp=3'],
      'disagree with process 0 about: config (process 1)',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      ['--config.data_dir=/none'],
      'disagree with process 0 about: dataset (process 1)',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_processes_that_mean_different_runs_are_refused(data_dir, tmp_path, mine, message):
  arguments = train_arguments(data_dir, tmp_path, '--config.num_steps=8')
  ends = Processes(arguments, mine=((), mine)).ends()
  assert [status for status, _, _ in ends] == [2, 2], ends
  assert message in ends[0][2]
  assert not (tmp_path / 'checkpoints').exists()


def test_a_launcher_without_the_flag_is_refused(monkeypatch):
  nothing = {
    'distributed': False,
    'coordinator_address': None,
    'num_processes': None,
    'process_id': None,
  }
  multihost.join(**nothing)
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
  with pytest.raises(UserError, match=r'SLURM_STEP_NUM_TASKS=4: a launcher .* add --distributed'):
    multihost.join(**nothing)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'coordinator_address': 'a:1'}, 'go together; give all three'),
    ({'process_id': 0}, 'go together; give all three'),
    (
      {'coordinator_address': 'a:1', 'num_processes': 2, 'process_id': 2},
      '--process_id=2 is not in 0..1',
    ),
  ],
)
def test_flags_that_do_not_fit(options, message):
  nothing = {'coordinator_address': None, 'num_processes': None, 'process_id': None}
  with pytest.raises(UserError, match=message):
    multihost.join(distributed=False, **{**nothing, **options})


def test_one_process_agrees_with_itself():
  multihost.agree({'config': json.dumps({})})


def test_the_code_version_is_of_all_source(tmp_path, monkeypatch):
  version = multihost.code_version()
  assert version == multihost.code_version()
  (tmp_path / 'multihost.py').write_text('')
  monkeypatch.setattr(multihost, '__file__', str(tmp_path / 'multihost.py'))
  assert multihost.code_version() != version
