"""Two real processes are one run: the same losses, one report, one stop."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import run_python, train_arguments
from processes import Processes
from test_commands import assert_same_weights, losses, metrics_of

from dropmae_jax.runtime import multihost
from dropmae_jax.runtime.errors import UserError

# Trains, and appends the number of each video that this process reads to PREFIX and its process id.
RECORDING = """
import sys
from dropmae_jax import main
from dropmae_jax.data import frame_pairs
from dropmae_jax.runtime import cli
name = 'PREFIX' + sys.argv[-1].partition('=')[2]
real = frame_pairs.PairMaker.draw
def draw(self, key):
  with open(name, 'a') as file:
    file.write(f'{key.video}\\n')
  return real(self, key)
frame_pairs.PairMaker.draw = draw
cli.run(main.main)
"""


def test_two_processes_are_one_run(trained, data_dir, tmp_path):
  arguments = train_arguments(
    data_dir, tmp_path / 'run', '--config.num_steps=8', '--config.mesh.fsdp=2',
    '--config.checkpoint.every_steps=2', '--config.checkpoint.keep_last=1',
    '--config.checkpoint.keep_every=4', '--config.score_every=8',
  )  # fmt: skip
  program = RECORDING.replace('PREFIX', str(tmp_path / 'read'))
  ends = Processes(arguments, program=program).ends()
  assert [status for status, _, _ in ends] == [0, 0], ends
  steps, values = zip(*losses(tmp_path / 'run'), strict=True)
  expected = [loss for _, loss in losses(trained)]
  assert steps == tuple(range(1, 9))
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  scored = [row for row in metrics_of(tmp_path / 'run') if 'held_out/loss' in row]
  assert [row['step'] for row in scored] == [8]
  # Process 1 reports nothing.
  assert 'step 8/8' in ends[0][1]
  assert 'step 8/8' not in ends[1][1]
  kept = {path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()}
  assert kept == {'4', '8'}
  # Three batches of four are two epochs of six videos; each process reads half of every batch.
  read = [[int(n) for n in (tmp_path / f'read{i}').read_text().split()] for i in range(2)]
  assert all(len(videos) >= 16 for videos in read)
  together = [video for i in range(3) for videos in read for video in videos[2 * i : 2 * i + 2]]
  assert sorted(together[:6]) == sorted(together[6:]) == list(range(6))


@pytest.mark.slow
def test_a_killed_process_does_not_change_the_result(data_dir, tmp_path):
  """Both are started again, and end with the same bits as a run without a fault."""
  arguments = [
    train_arguments(
      data_dir, tmp_path / name, '--config.num_steps=40', '--config.checkpoint.every_steps=3',
      '--config.step_stall_seconds=5',
    )
    for name in ('calm', 'killed')
  ]  # fmt: skip
  assert [status for status, _, _ in Processes(arguments[0]).ends()] == [0, 0]
  both = Processes(arguments[1])
  both.wait_for('step 7/')
  both.running[1].kill()
  assert [status for status, _, _ in both.ends()] == [-signal.SIGABRT, -signal.SIGKILL]
  ends = Processes(arguments[1]).ends()
  assert [status for status, _, _ in ends] == [0, 0], ends
  assert 'resuming after step' in ends[0][1]
  assert_same_weights(tmp_path / 'killed', tmp_path / 'calm')


@pytest.mark.slow
def test_damage_on_one_host_ends_both_with_the_same_message(data_dir, tmp_path):
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
  message = 'is damaged record 1 of this start, and config.data.max_damaged_records=0.'
  assert message in ends[1][2]
  assert 'error: process 1 has ended: video ' in ends[0][2]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_the_run_resumes_on_any_number_of_devices(
  trained, data_dir, tmp_path
):
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=100000', '--config.mesh.fsdp=4',
    f'--config.init_from={trained}',
  )  # fmt: skip
  both = Processes(arguments)
  both.wait_for('step 2/')
  both.running[1].send_signal(signal.SIGTERM)
  ends = both.ends()
  assert [status for status, _, _ in ends] == [75, 75], ends
  (step,) = [int(path.name) for path in (tmp_path / 'checkpoints').iterdir()]
  assert f'SIGTERM: saved at step {step} of 100000' in ends[0][1]
  done = run_python(*train_arguments(data_dir, tmp_path, f'--config.num_steps={step + 2}'))
  assert done.returncode == 0, done.stderr
  assert f'resuming after step {step}' in done.stdout
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
      'process 1 has ended: there is no dataset kinetics_frames/folder in data_dir',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_processes_with_different_settings_are_refused(data_dir, tmp_path, mine, message):
  arguments = train_arguments(data_dir, tmp_path, '--config.num_steps=8')
  ends = Processes(arguments, mine=((), mine)).ends()
  assert [status for status, _, _ in ends] == [2, 2], ends
  assert message in ends[0][2]
  assert not (tmp_path / 'checkpoints').exists()


# Process 1 finds no checkpoint, where process 0 reads one.
ONE_WITHOUT = """
import pathlib, sys
from dropmae_jax import main
from dropmae_jax.pytorch import init_from
from dropmae_jax.runtime import cli
real = init_from.read
def read(path, architecture):
  return real(path if sys.argv[-1].endswith('=0') else pathlib.Path('WORKDIR'), architecture)
init_from.read = read
cli.run(main.main)
"""


def test_weights_that_one_process_cannot_read_end_both(trained, data_dir, tmp_path):
  arguments = train_arguments(data_dir, tmp_path / 'run', f'--config.init_from={trained}')
  program = ONE_WITHOUT.replace('WORKDIR', str(tmp_path))
  ends = Processes(arguments, program=program).ends()
  assert [status for status, _, _ in ends] == [2, 2], ends
  message = f'config.init_from={trained}: {tmp_path} holds no checkpoint'
  assert f'process 1 has ended: {message}' in ends[0][2]
  assert message in ends[1][2]
  assert not (tmp_path / 'run').exists()


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
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', 'four')
  with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS='four' in the environment is not a nu"):
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
def test_options_that_contradict_one_another(options, message):
  nothing = {'coordinator_address': None, 'num_processes': None, 'process_id': None}
  with pytest.raises(UserError, match=message):
    multihost.join(distributed=False, **{**nothing, **options})


def test_one_process_agrees_with_itself():
  multihost.agree({'config': json.dumps({})})


def test_the_code_version_depends_on_every_sub_package(tmp_path, monkeypatch):
  package = tmp_path / 'dropmae_jax'
  for name in ('train.py', 'runtime/multihost.py', 'model/mae.py'):
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    (package / name).write_text('x = 1\n')
  monkeypatch.setattr(multihost, '__file__', str(package / 'runtime' / 'multihost.py'))
  versions = [multihost.code_version()]
  assert multihost.code_version() == versions[0]
  (package / 'model' / 'mae.py').write_text('x = 2\n')
  versions.append(multihost.code_version())
  (package / 'model' / 'vit.py').touch()
  versions.append(multihost.code_version())
  (package / 'data').mkdir()
  (package / 'model' / 'vit.py').rename(package / 'data' / 'vit.py')
  versions.append(multihost.code_version())
  (package / 'data' / 'vit.py').rename(
    package / 'data' / 'vat.py'
  )  # Only renamed: the order is the same.
  versions.append(multihost.code_version())
  (package / 'data' / 'notes.txt').write_text('no code')
  assert multihost.code_version() == versions[-1]
  monkeypatch.setattr(multihost.jax, '__version__', '0.0')
  versions.append(multihost.code_version())
  assert len(set(versions)) == 6
