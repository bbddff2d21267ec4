"""How commands end: by signals, and when nobody reads on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

EXPORT = """
import pathlib, sys, time
from dropmae_jax.runtime import atomic_file, cli

def main():
  with atomic_file.staged(pathlib.Path(sys.argv[1]), num_bytes=1) as partial:
    partial.write_text('half')
    print('writing', flush=True)
    time.sleep(60)

cli.run(main)
"""


def start(program, *arguments, before=(), **options):
  return subprocess.Popen(
    [*before, sys.executable, '-c', program, *map(str, arguments)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONUNBUFFERED': ''},
    **options,
  )


# As what a script starts in the background: deaf to Ctrl-C, without a terminal and without input.
BACKGROUND = ('setsid', 'sh', '-c', 'trap "" INT QUIT; exec "$@" < /dev/null', 'sh')


@pytest.mark.parametrize(
  ('number', 'before'), [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGTERM, BACKGROUND)]
)
def test_a_signal_leaves_nothing_behind(tmp_path, number, before):
  process = start(EXPORT, tmp_path / 'out.pth', before=before)
  assert process.stdout.readline() == 'writing\n'
  assert len(list(tmp_path.iterdir())) == 1
  if before:
    process.send_signal(signal.SIGINT)  # Is ignored, as that was asked for.
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(timeout=0.5)
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert errors == f'stopped by {number.name}\n'
  assert list(tmp_path.iterdir()) == []


# What it removes at the end takes it a while.
CLEANING = """
import time
from dropmae_jax.runtime import cli

def main():
  try:
    print('working', flush=True)
    time.sleep(60)
  finally:
    print('cleaning', flush=True)
    time.sleep(0.5)
    print('clean', flush=True)

cli.run(main)
"""


def test_a_second_sigterm_does_not_break_off_the_cleaning():
  process = start(CLEANING)
  for text in ('working', 'cleaning'):
    assert process.stdout.readline() == f'{text}\n'
    process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=60) == ('clean\n', 'stopped by SIGTERM\n')
  assert process.returncode == 128 + signal.SIGTERM


PRINT = """
import sys
from dropmae_jax.runtime import cli

def main():
  print('begun', flush=True)
  sys.stdin.readline()
  for number in range({count}):
    print(number, flush={flush})

cli.run(main)
"""


@pytest.mark.parametrize(('count', 'flush'), [(100_000, True), (100_000, False), (1, False)])
def test_output_that_nobody_reads_ends_the_command_quietly(count, flush):
  """Also if it is so little that it is written at the very end."""
  program = PRINT.replace('{flush}', str(flush)).replace('{count}', str(count))
  process = start(program, stdin=subprocess.PIPE)
  assert process.stdout.readline() == 'begun\n'
  process.stdout.close()
  process.stdin.close()
  errors = process.stderr.read()
  assert process.wait(timeout=60) == 128 + signal.SIGPIPE
  assert errors == ''


INNER_PIPE = """
import os
from dropmae_jax.runtime import cli

def main():
  reader, writer = os.pipe()
  os.close(reader)
  os.write(writer, b'x')

cli.run(main)
"""


def test_other_broken_pipes_are_errors():
  process = start(INNER_PIPE)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 1
  assert 'BrokenPipeError' in errors


# The process ends when it has read a line: before Python ends, or after, in C's own functions.
ENDING = """
import atexit, ctypes, sys
from dropmae_jax.runtime import cli

library = ctypes.CDLL(None)
if {within}:
  atexit.register(sys.stdin.readline)
else:
  library.on_exit(library.getchar, None)
atexit.register(lambda: print('ending', flush=True))
cli.run({main})
"""


@pytest.mark.parametrize('within', [True, False])
@pytest.mark.parametrize('main', ['lambda: 3', 'lambda: sys.exit(3)'])
def test_a_signal_at_the_very_end_changes_no_status(main, within):
  """As the trainer's last seconds, when all is saved; absl ends its commands by sys.exit."""
  process = start(
    ENDING.replace('{main}', main).replace('{within}', str(within)), stdin=subprocess.PIPE
  )
  assert process.stdout.readline() == 'ending\n'
  time.sleep(0.3)
  process.send_signal(signal.SIGTERM)
  assert process.communicate('\n', timeout=60) == ('', '')
  assert process.returncode == 3
