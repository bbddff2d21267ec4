"""How commands read their options, and how they end: by signals, and when nobody reads on."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError, os_errors_as_user_errors, remedy_of
from tfds_kinetics.messages import one_line

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


# As a command in the background of a script: it ignores Ctrl-C and has no terminal and no input.
BACKGROUND = ('setsid', 'sh', '-c', 'trap "" INT QUIT; exec "$@" < /dev/null', 'sh')


@pytest.mark.parametrize(
  ('number', 'before'), [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGTERM, BACKGROUND)]
)
def test_a_signal_leaves_nothing_behind(tmp_path, number, before):
  process = start(EXPORT, tmp_path / 'out.pth', before=before)
  assert process.stdout.readline() == 'writing\n'
  assert len(list(tmp_path.iterdir())) == 1
  if before:
    process.send_signal(signal.SIGINT)  # Stays ignored.
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(timeout=0.5)
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert errors == f'stopped by {number.name}\n'
  assert list(tmp_path.iterdir()) == []


# Its cleanup takes until a line comes in.
CLEANING = """
import sys, time
from dropmae_jax.runtime import cli

def main():
  try:
    print('working', flush=True)
    time.sleep(60)
  finally:
    print('cleaning', flush=True)
    sys.stdin.readline()
    print('clean', flush=True)

cli.run(main)
"""


def test_a_second_sigterm_does_not_interrupt_the_cleanup():
  process = start(CLEANING, stdin=subprocess.PIPE)
  for text in ('working', 'cleaning'):
    assert process.stdout.readline() == f'{text}\n'
    process.send_signal(signal.SIGTERM)
  assert process.communicate('\n', timeout=60) == ('clean\n', 'stopped by SIGTERM\n')
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
  """Also if there is so little output that it is written only at exit."""
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


# At exit it waits for a line of input: in a Python exit handler, or in one of C after Python's end.
EXITING = """
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
def test_a_signal_during_exit_does_not_change_the_status(main, within):
  """As in the last seconds of the trainer, when all is saved."""
  process = start(
    EXITING.replace('{main}', main).replace('{within}', str(within)), stdin=subprocess.PIPE
  )
  assert process.stdout.readline() == 'ending\n'
  time.sleep(0.3)
  process.send_signal(signal.SIGTERM)
  assert process.communicate('\n', timeout=60) == ('', '')
  assert process.returncode == 3


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('--sede=3 --output=x', 'there is no option --sede; did you mean --seed=3?'),
    ('--out=x', 'there is no option --out; did you mean --output=x?'),  # No abbreviations.
    ('--h --output=x', "argument '--h' is not understood"),  # Nor where only -h begins like it.
    ('--zzz', 'there is no option --zzz; valid are: '),
    ('--seed=x --output=x', "argument --seed: invalid int value: 'x'; --help lists"),
    ('--seed=3', 'the following arguments are required: --output; --help lists'),
    ('--output=x more', "argument 'more' is not understood; --help lists"),
  ],
)
def test_bad_options(arguments, message):
  parser = cli.Parser()
  parser.add_argument('--seed', type=int)
  parser.add_argument('--output', required=True)
  assert parser.parse_args(['--seed=3', '--output', 'x']).seed == 3
  with pytest.raises(UserError) as refused:
    parser.parse_args(arguments.split())
  assert message in str(refused.value)


@pytest.mark.parametrize(
  ('error', 'remedy'),
  [
    (OSError(errno.EMFILE, 'Too many open files'), 'raise the limit of open files (ulimit -n)'),
    (OSError(errno.EAGAIN, 'Try again'), 'raise the limits of processes and memory'),
    (OSError(errno.ENOSPC, 'No space left on device'), 'make room'),
  ],
)
def test_what_is_short_is_said(error, remedy):
  with pytest.raises(UserError) as refused, os_errors_as_user_errors('x cannot be', 'make room.'):
    raise error
  assert str(refused.value).startswith(f'x cannot be ({error.strerror}); {remedy}')
  # Libraries raise errors of their own, with that of the system in the text.
  other = RuntimeError(f'write() failed: {os.strerror(error.errno)}')
  assert remedy_of(other, 'make room').startswith(remedy)


def test_a_path_may_begin_at_home(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  parser = cli.Parser()
  parser.add_argument('--output', type=pathlib.Path)
  for text, path in (('~/x', '/home/me/x'), ('a/~/x', 'a/~/x'), ('a:b', 'a:b'), ('.', '.')):
    assert parser.parse_args([f'--output={text}']).output == pathlib.Path(path)
  with pytest.raises(UserError, match='argument --output: ~nobody-here/x has no home folder; give'):
    parser.parse_args(['--output=~nobody-here/x'])


FORGED = 'a\nerror: b\x1b[2J\u202e\udce9'
SHOWN = r'a\nerror: b\u001b[2J\u202e\udce9'
FAILING = """
import logging
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError

def main():
  logging.getLogger('dropmae_jax').warning({text!r})
  raise {error}({text!r})

cli.run(main)
"""


def test_ascii_is_escaped_where_it_is_not_printable():
  assert one_line('a\nb\x1b\x7f') == r'a\nb\u001b\u007f'


@pytest.mark.parametrize(
  ('error', 'status', 'last'),
  [
    ('UserError', 2, [f'error: {SHOWN}']),
    ('OSError', 1, ['OSError: a', SHOWN.partition(r'\n')[2]]),  # After the lines of a stack.
  ],
)
def test_messages_forge_no_line(error, status, last):
  """Whatever library or file the text is from: in a warning, an error, an unexpected one."""
  process = start(FAILING.replace('{error}', error).replace('{text!r}', ascii(FORGED)))
  _, errors = process.communicate(timeout=60)
  assert process.returncode == status
  warning, *lines = errors.splitlines()
  assert warning == SHOWN
  assert lines[-len(last) :] == last
  assert all(line.isprintable() for line in lines)
