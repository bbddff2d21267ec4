"""How every command line of the package answers bad input: one sentence, exit status 2."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class BadInput(ValueError):
  """Input that the user can mend; the message names the value and the remedy in one sentence."""


class Parser(argparse.ArgumentParser):
  """An argument parser that answers bad input as everything else here does."""

  def error(self, message: str) -> NoReturn:
    """Refuses the command line."""
    raise BadInput(f'{message}; --help lists what there is.')


def run(main: Callable[[], int | None]) -> NoReturn:
  """Runs a command and ends the process: with its status, or with 2 after bad input."""
  try:
    status = main()
  except BadInput as error:
    print(f'error: {error}', file=sys.stderr)
    status = 2
  sys.exit(status)


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns a clause that names the valid name most like `name`, or lists all of them."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f'did you mean {close[0]!r}?' if close else f'valid are: {", ".join(known)}.'
