"""The command lines of the package: how they are read, and how they end."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from dropmae_jax.runtime.errors import RunFailed, UserError, did_you_mean


class Terminated(KeyboardInterrupt):
  """SIGTERM, which unwinds the program as Ctrl-C does, so that temporary folders are removed."""


class Parser(argparse.ArgumentParser):
  """An argument parser that answers bad input by a `UserError`, and knows no abbreviations."""

  def __init__(self, **options: object) -> None:
    super().__init__(allow_abbrev=False, **options)

  def error(self, message: str) -> NoReturn:
    """Refuses the command line."""
    raise UserError(f'{message}; --help lists what there is.')

  def parse_args(
    self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
  ) -> argparse.Namespace:
    """Parses a command line; of an option that is unknown, says which one was probably meant."""
    # Argparse has no public list of its options; and it would name what is missing first.
    options = {option.lstrip('-'): option for option in self._option_string_actions}
    for argument in sys.argv[1:] if args is None else args:
      name, equals, value = argument.partition('=')
      if name.startswith('--') and name[2:] and name[2:] not in options:
        hint = did_you_mean(name[2:], options)
        for bare, option in options.items():
          hint = hint.replace(f'{bare!r}?', f'{option}{equals}{value}?')
        raise UserError(f'there is no option {name}; {hint}')
    arguments, unknown = self.parse_known_args(args, namespace)
    if unknown:
      raise UserError(f'argument {unknown[0]!r} is not understood; --help lists the options.')
    return arguments


def run(main: Callable[[], int | None]) -> NoReturn:
  """Runs a command and ends the process with its exit status.

  After an error it is that of the error (`errors.ExitStatus`); after Ctrl-C, SIGTERM, or SIGPIPE
  (nobody reads the output any more), 128 + the signal's number, as shells count. A command with
  handlers of its own for the first two sets them later. SIGTERM while the process exits, which
  takes libraries a while, does not change the status.
  """
  signal.signal(signal.SIGTERM, _terminate)
  try:
    status = main()
    sys.stdout.flush()
  except (UserError, RunFailed) as error:
    print(f'error: {error}', file=sys.stderr)
    status = error.exit_status
  except KeyboardInterrupt as error:
    number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    print(f'stopped by {number.name}', file=sys.stderr)
    status = 128 + number
  except BrokenPipeError:
    if not _is_output_closed():
      raise
    # Python writes what is left when it exits, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 128 + signal.SIGPIPE
  finally:
    # Python would restore its own handler before the libraries have ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
  sys.exit(status)


def _terminate(number: int, _: FrameType | None) -> NoReturn:
  # A second one must not interrupt the cleanup.
  signal.signal(number, signal.SIG_IGN)
  raise Terminated


def _is_output_closed() -> bool:
  """Whether it was the standard output that broke, and not another pipe of the command."""
  poll = select.poll()
  poll.register(sys.stdout.fileno(), 0)
  return bool(poll.poll(0))
