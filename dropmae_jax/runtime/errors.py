"""The errors and exit statuses of all commands.

What the user can fix is a `UserError`: one sentence that names the value and the remedy.
"""

import contextlib
import difflib
import enum
import os
from collections.abc import Iterable, Iterator


class ExitStatus(enum.IntEnum):
  """How a command ends. After a signal that it does not handle it is 128 + the signal's number."""

  DONE = 0
  # Training diverged, the last state was not saved, the loader failed, or an unexpected error.
  FAILED = 1
  BAD_INPUT = 2
  # A step or the loader hung; the same command may succeed when it is started again.
  HUNG = os.EX_UNAVAILABLE
  # A signal stopped the run after a checkpoint: the same command resumes.
  STOPPED = os.EX_TEMPFAIL


class UserError(ValueError):
  """Input that the user can fix; the message names the value and the remedy in one sentence."""

  exit_status = ExitStatus.BAD_INPUT


class RunFailed(RuntimeError):
  """A run cannot continue; the message says why in one sentence."""

  exit_status = ExitStatus.FAILED


# Bugs of this program or a library, as opposed to damage of a file that is read.
PROGRAM_ERRORS = (TypeError, AttributeError, NameError, ImportError)


@contextlib.contextmanager
def os_errors_as_user_errors(what: str, remedy: str) -> Iterator[None]:
  """Turns an OSError inside, such as a missing permission, into a `UserError`.

  Args:
    what: begins the sentence with what cannot be done; the system's reason follows in parentheses.
    remedy: ends the sentence.
  """
  try:
    yield
  except OSError as error:
    raise UserError(f'{what} ({error.strerror or error}); {remedy}') from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns a clause that names the valid name most like `name`, or lists all of them.

  A dotted name with the same last part as `name` is preferred to one with a similar spelling.
  """
  known = sorted(known)
  leaf = name.rpartition('.')[2]
  same_leaf = [each for each in known if each.rpartition('.')[2] == leaf]
  close = same_leaf[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
  return f'did you mean {close[0]!r}?' if close else f'valid are: {", ".join(known)}.'


def check_name(what: str, name: str, table: Iterable[str]) -> None:
  """Checks that a name is in the table that owns it.

  Raises:
    UserError: it is not; the message names the closest one, or all.
  """
  if name not in table:
    raise UserError(f'{what}={name!r} is unknown; {did_you_mean(name, table)}')
