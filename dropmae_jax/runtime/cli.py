"""The command lines of the package: their parser, and their exit statuses."""

import argparse
import contextlib
import logging
import os
import pathlib
import select
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from etils import epath

from dropmae_jax.runtime.errors import RunFailed, UserError, did_you_mean
from dropmae_jax.runtime.paths import local_path, user_path, workdir_path
from tfds_kinetics.messages import one_line, print_stack


class LineFormatter(logging.Formatter):
  """Formats a record as one line, whatever text from outside is in it, and then its stack."""

  def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
    """Returns the line."""
    return one_line(super().formatMessage(record))

  def formatException(self, ei: object) -> str:  # noqa: N802
    """Returns the lines of the stack."""
    return '\n'.join(map(one_line, super().formatException(ei).split('\n')))


class Terminated(KeyboardInterrupt):
  """SIGTERM as an exception, so that temporary folders are removed, as after Ctrl-C."""


def _argument(read: Callable[[str], Any]) -> Callable[[str], Any]:
  def argument(text: str) -> Any:
    try:
      return read(text)
    except UserError as error:
      raise argparse.ArgumentTypeError(str(error)) from error

  return argument


class Parser(argparse.ArgumentParser):
  """An argument parser that raises `UserError` on bad input and accepts no abbreviations.

  An option of the type `pathlib.Path` is a `paths.local_path`, one of `epath.Path` a
  `paths.user_path`, and one of 'workdir' a `paths.workdir_path`.
  """

  def __init__(self, **options: object) -> None:
    super().__init__(allow_abbrev=False, **options)
    self.register('type', pathlib.Path, _argument(local_path))
    self.register('type', epath.Path, _argument(user_path))
    self.register('type', 'workdir', _argument(workdir_path))

  def error(self, message: str) -> NoReturn:
    """Raises the error of a bad command line."""
    raise UserError(f'{message}; --help lists what there is.')

  def parse_args(
    self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
  ) -> argparse.Namespace:
    """Parses a command line; the error about an unknown option names the closest one."""
    # Argparse has no public list of its options, and would report missing options first.
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


def run(main: Callable[[], int | None], *, end: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
  """Runs a command and ends the process with its exit status.

  After an error it is that of the error (`errors.ExitStatus`). After Ctrl-C, SIGTERM or SIGPIPE
  (nobody reads the output any more) it is 128 + the signal's number, as in shells. A command with
  its own handlers for Ctrl-C and SIGTERM sets them in `main`. SIGTERM while the process exits,
  which can take libraries some time, does not change the status.

  Args:
    main: returns the status; None is 0.
    end: ends the process with a status.
  """
  signal.signal(signal.SIGTERM, _terminate)
  _open_closed_streams()
  sys.excepthook = print_stack
  logging.lastResort.setFormatter(LineFormatter())  # Of warnings until a run has its log.
  try:
    status = main()
    sys.stdout.flush()
  except (UserError, RunFailed) as error:
    print_error(str(error))
    status = error.exit_status
  except KeyboardInterrupt as error:
    number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    with contextlib.suppress(OSError):
      print(one_line(f'stopped by {number.name}'), file=sys.stderr)
    status = 128 + number
  except BrokenPipeError:
    if not _is_output_closed():
      raise
    discard_output()
    status = 128 + signal.SIGPIPE
  finally:
    # While libraries are still ending, Python would already have restored the default handler.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
  end(status or 0)


def _open_closed_streams() -> None:
  """Opens the standard streams that are closed, as by `>&-`, so that no other file takes theirs."""
  for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
    if getattr(sys, name) is None:
      stream = open(os.devnull, mode)  # noqa: SIM115
      os.set_inheritable(stream.fileno(), True)  # The watchdog and other processes have it too.
      setattr(sys, name, stream)


def print_line(text: str) -> None:
  """Prints a line of results; what is in it from outside makes no other lines."""
  print(one_line(text), flush=True)


def print_error(message: str) -> None:
  """Prints an error where users look for it, if that can be written."""
  with contextlib.suppress(OSError):
    print(one_line(f'error: {message}'), file=sys.stderr, flush=True)


def discard_output() -> None:
  """Discards the standard output from now on, and what Python would still write of it at exit."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(number: int, _: FrameType | None) -> NoReturn:
  # A second SIGTERM must not interrupt the cleanup.
  signal.signal(number, signal.SIG_IGN)
  raise Terminated


def _is_output_closed() -> bool:
  """Whether the standard output is the broken pipe, rather than another pipe of the command."""
  poll = select.poll()
  poll.register(sys.stdout.fileno(), 0)
  return bool(poll.poll(0))
