"""How every command line of the package ends: bad input is one sentence, and a stop is clean."""

import argparse
import contextlib
import difflib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import NoReturn


class BadInput(ValueError):
  """Input that the user can mend; the message names the value and the remedy in one sentence."""

  exit_status = 2


# Mistakes in a program, this one or a library's: whatever a file holds, these say nothing about it.
PROGRAM_ERRORS = (TypeError, AttributeError, NameError, ImportError)


class Terminated(KeyboardInterrupt):
  """SIGTERM, which unwinds the program as Ctrl-C does, so that temporary folders go."""


class Parser(argparse.ArgumentParser):
  """An argument parser that answers bad input as everything else here does."""

  def error(self, message: str) -> NoReturn:
    """Refuses the command line."""
    raise BadInput(f'{message}; --help lists what there is.')


def run(main: Callable[[], int | None]) -> NoReturn:
  """Runs a command and ends the process.

  The status is that of the command; 2 after bad input; and as shells count, 128 + its number after
  a signal: Ctrl-C, SIGTERM, or SIGPIPE where nobody reads the output any more. A command that has
  handlers of its own for the first two sets them later. SIGTERM while the process ends, which takes
  libraries a while, changes no status: a run that has saved all is not one that was stopped.
  """
  signal.signal(signal.SIGTERM, _terminate)
  try:
    status = main()
    sys.stdout.flush()
  except BadInput as error:
    print(f'error: {error}', file=sys.stderr)
    status = error.exit_status
  except KeyboardInterrupt as error:
    number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    print(f'stopped by {number.name}', file=sys.stderr)
    status = 128 + number
  except BrokenPipeError:
    if not _is_output_closed():
      raise
    # Python writes what is left when it ends, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 128 + signal.SIGPIPE
  finally:
    # Python would give a handler of its own back before the libraries' end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
  sys.exit(status)


def _terminate(number: int, _: FrameType | None) -> NoReturn:
  # A second one must not interrupt the cleaning up.
  signal.signal(number, signal.SIG_IGN)
  raise Terminated


def _is_output_closed() -> bool:
  """Whether it was the standard output that broke, and not another pipe of the command."""
  poll = select.poll()
  poll.register(sys.stdout.fileno(), 0)
  return bool(poll.poll(0))


@contextlib.contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
  """Makes one sentence of what the system refuses inside, such as a path that may not be read.

  Args:
    what: cannot be done; the system's reason follows it.
    remedy: the end of the sentence.
  """
  try:
    yield
  except OSError as error:
    raise BadInput(f'{what} ({error.strerror or error}); {remedy}') from error


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns a clause that names the valid name most like `name`, or lists all of them."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f'did you mean {close[0]!r}?' if close else f'valid are: {", ".join(known)}.'
