"""One command starts a process per device of this machine, and these are one run."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, assert_one_sentence, run_python, train_arguments
from processes import running

from dropmae_jax import main
from dropmae_jax.runtime import local_processes
from dropmae_jax.runtime.errors import ExitStatus

# Runs a command of Python three times; each gets its number as the last option.
START = """
import signal, sys
from dropmae_jax.runtime import local_processes
local_processes.END_SECONDS = 1.0
CHILD = '''
import os, signal, sys, time
number = int(sys.argv[-2].removeprefix('--process_id='))
def tell(*words):
  # One call: print() makes several where Python does not buffer, and lines of processes mix.
  os.write(1, (' '.join(map(str, words)) + chr(10)).encode())
def until_alone():
  # The last one waits until it is known how the others have ended.
  parent = os.getppid()
  while len(open(f'/proc/{parent}/task/{parent}/children').read().split()) > 1:
    time.sleep(0.01)
%s
'''
sys.exit(local_processes.run(local_processes.connected([sys.executable, '-c', CHILD], 3)))
"""


def test_every_process_is_told_its_place():
  done = run_python('-c', START.replace('%s', 'tell(*sys.argv[-4:-2], number, sys.argv[-1])'))
  assert (done.returncode, done.stderr) == (0, '')
  lines = sorted(line.split() for line in done.stdout.splitlines())
  assert [line[1:] for line in lines] == [
    ['--num_processes=3', n, f'--local_device_ids={n}'] for n in '012'
  ]
  (address,) = {line[0] for line in lines}
  assert address.startswith('--coordinator_address=localhost:')


@pytest.mark.parametrize(
  ('program', 'status'),
  [
    ('number == 2 and until_alone(); sys.exit([0, 2, 69][number])', 2),
    ('number == 2 and until_alone(); sys.exit([75, 75, 0][number])', 75),
    (
      'number == 1 and os.kill(os.getpid(), signal.SIGKILL)\n'
      'number == 2 and until_alone(); sys.exit([0, 0, 69][number])',
      137,
    ),
    # Those that do not end are killed.
    ('sys.exit(1) if number == 1 else time.sleep(60)', 1),
  ],
)
def test_the_status_is_that_of_the_first_that_failed(program, status):
  began = time.monotonic()
  assert run_python('-c', START.replace('%s', program)).returncode == status
  assert time.monotonic() - began < 30


WAITING = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
def save(*_):
  tell('saved', number)
  os._exit(75)
signal.signal(signal.SIGTERM, save)
tell('ready', number)
time.sleep(60)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_all_of_them(number):
  """And if this process is killed, they stop too."""
  with running('-c', START.replace('%s', WAITING)) as process:
    lines = iter(process.stdout.readline, '')
    assert sorted(next(lines) for _ in range(3)) == ['ready 0\n', 'ready 1\n', 'ready 2\n']
    process.send_signal(number)
    assert sorted(lines) == ['saved 0\n', 'saved 1\n', 'saved 2\n']
    assert process.wait(timeout=30) == (-number if number == signal.SIGKILL else 75)


@pytest.mark.parametrize(('given', 'cores', 'expected'), [((), 7, 2), ((), 2, 1), ((5,), 7, 5)])
def test_they_share_the_cores(data_dir, tmp_path, monkeypatch, run_here, given, cores, expected):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(cores))
  run = mock.Mock(return_value=0)
  monkeypatch.setattr(local_processes, 'run', run)
  threads = [f'--config.data.num_threads={number}' for number in given or (0,)]
  arguments = train_arguments(data_dir, tmp_path, '--local_processes=3', *threads)[2:]
  done = run_here(main.main, *arguments)
  assert done.returncode == 0, done.stderr
  for number, command in enumerate(run.call_args.args[0]):
    assert command[len(main.COMMAND) :][: len(arguments)] == arguments
    # The last of an option that is given twice counts.
    assert '--local_processes=1' in command[-6:]
    assert f'--config.data.num_threads={expected}' in command[-6:]
    assert f'--process_id={number}' in command[-6:]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--local_processes=2', '--distributed'], 'starts all processes of a run itself; give it alo'),
    (['--distributed', '--local_device_ids=a'], '--local_device_ids=a is not a list of numbers su'),
  ],
)
def test_options_that_contradict_one_another(data_dir, tmp_path, run_here, options, message):
  arguments = train_arguments(data_dir, tmp_path, '--config.num_steps=1', *options)[2:]
  done = run_here(main.main, *arguments)
  assert_one_sentence(done, message)


def test_a_launcher_around_it_is_refused(data_dir, tmp_path, monkeypatch, run_here):
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '2')
  arguments = train_arguments(data_dir, tmp_path, '--config.num_steps=1', '--local_processes=2')[2:]
  assert_one_sentence(
    run_here(main.main, *arguments), 'SLURM_STEP_NUM_TASKS=2: a launcher has started sev'
  )


# The first process of a container, as which a trainer starts another that hangs.
FIRST = """
import os, sys
from dropmae_jax import main
from dropmae_jax.runtime import local_processes
assert os.getpid() == 1
main.COMMAND = [sys.executable, '-c', '''
import time
from dropmae_jax.runtime import watchdog
watchdog.POLL_SECONDS = 0.1
watchdog.Watchdog(1.0).watch('work')
time.sleep(60)
''']
main.command()
"""


def test_the_first_process_of_a_container_is_ended_too(data_dir, tmp_path):
  """The kernel lets no signal do that."""
  separate = ['unshare', '--pid', '--fork', '--mount-proc']
  if subprocess.run([*separate, 'true'], capture_output=True, check=False).returncode:
    pytest.skip('needs the right to make a namespace for processes, as root has')
  arguments = train_arguments(data_dir, tmp_path, '--config.num_steps=1')[2:]
  done = subprocess.run(
    [*separate, sys.executable, '-c', FIRST, *arguments], cwd=ROOT, capture_output=True, text=True,
    timeout=60, check=False,
  )  # fmt: skip
  assert done.returncode == ExitStatus.ABORTED, done.stderr
  assert 'error: work took more than 1 s; ' in done.stderr


@pytest.mark.slow
def test_eight_processes_of_one_device_are_one_of_eight(data_dir, tmp_path, monkeypatch):
  """The same losses; each loader reads its share of every batch and nothing else."""
  more = ('--config.num_steps=4', '--config.batch_size=8')
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '8')
  done = run_python(*train_arguments(data_dir, tmp_path / 'one', *more))
  assert done.returncode == 0, done.stderr
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
  arguments = train_arguments(data_dir, tmp_path / 'eight', *more, '--local_processes=8')
  done = run_python(*arguments, timeout=400)
  assert done.returncode == 0, done.stderr
  assert '8 x cpu' in done.stdout
  losses = [
    [
      json.loads(line)['loss']
      for line in (tmp_path / name / 'metrics.jsonl').read_text().split('\n')[:-1]
    ]
    for name in ('one', 'eight')
  ]
  assert len(losses[0]) == 4
  np.testing.assert_allclose(*losses, rtol=1e-6)
