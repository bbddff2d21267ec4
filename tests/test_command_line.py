"""How commands end: by signals, and when nobody reads on."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT

EXPORT = """
import pathlib, sys, time
from dropmae_jax import command_line, destination

def main():
  with destination.staged(pathlib.Path(sys.argv[1]), num_bytes=1) as partial:
    partial.write_text('half')
    print('writing', flush=True)
    time.sleep(60)

command_line.run(main)
"""


def start(program, *arguments):
  return subprocess.Popen(
    [sys.executable, '-c', program, *map(str, arguments)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(tmp_path, number):
  process = start(EXPORT, tmp_path / 'out.pth')
  assert process.stdout.readline() == 'writing\n'
  assert len(list(tmp_path.iterdir())) == 1
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert errors == f'stopped by {number.name}\n'
  assert list(tmp_path.iterdir()) == []


PRINT = """
from dropmae_jax import command_line

def main():
  for number in range(100_000):
    print(number, flush={flush})

command_line.run(main)
"""


@pytest.mark.parametrize('flush', [True, False])
def test_output_that_nobody_reads_ends_the_command_quietly(flush):
  process = start(PRINT.replace('{flush}', str(flush)))
  assert process.stdout.readline() == '0\n'
  process.stdout.close()
  errors = process.stderr.read()
  assert process.wait(timeout=60) == 128 + signal.SIGPIPE
  assert errors == ''


INNER_PIPE = """
import os
from dropmae_jax import command_line

def main():
  reader, writer = os.pipe()
  os.close(reader)
  os.write(writer, b'x')

command_line.run(main)
"""


def test_other_broken_pipes_are_errors():
  process = start(INNER_PIPE)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 1
  assert 'BrokenPipeError' in errors


ENDING = """
import atexit, sys, time
from dropmae_jax import command_line

@atexit.register
def tidy_up():
  print('tidying', flush=True)
  time.sleep(1)
  print('tidy', flush=True)

command_line.run({main})
"""


@pytest.mark.parametrize('main', ['lambda: 3', 'lambda: sys.exit(3)'])
def test_a_signal_at_the_very_end_changes_no_status(main):
  """As the trainer's last seconds, when all is saved; absl ends its commands by sys.exit."""
  process = start(ENDING.replace('{main}', main))
  assert process.stdout.readline() == 'tidying\n'
  process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=60) == ('tidy\n', '')
  assert process.returncode == 3
