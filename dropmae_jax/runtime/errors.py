"""The errors and exit statuses of all commands.

What the user can fix is a `UserError`: one sentence that names the value and the remedy.
"""

import contextlib
import difflib
import enum
import errno
import os
import signal
from collections.abc import Iterable, Iterator

from tfds_kinetics import shortages


class ExitStatus(enum.IntEnum):
  """How a command ends; above BAD_INPUT, the same command of training may get further."""

  DONE = 0
  # Training diverged, the last state was not saved, or an unexpected error.
  FAILED = 1
  BAD_INPUT = 2
  # The loader brought no batch in time, another process of the run is gone, or another run uses the
  # workdir.
  UNAVAILABLE = os.EX_UNAVAILABLE
  # A signal stopped the run after a checkpoint.
  STOPPED = os.EX_TEMPFAIL
  # The watchdog ended a run that hung, or JAX one whose other processes are gone (SIGABRT).
  ABORTED = 128 + signal.SIGABRT
  # From outside: no memory is left, or an operator (SIGKILL).
  KILLED = 128 + signal.SIGKILL
  # Native code crashed (SIGSEGV); the next start leaves out the record that was read then.
  CRASHED = 128 + signal.SIGSEGV


class UserError(ValueError):
  """Input that the user can fix; the message names the value and the remedy in one sentence."""

  exit_status = ExitStatus.BAD_INPUT


class RunFailed(RuntimeError):
  """A run cannot continue; the message says why in one sentence."""

  exit_status = ExitStatus.FAILED


# Bugs of this program or a library, as opposed to damage of a file that is read.
PROGRAM_ERRORS = (TypeError, AttributeError, NameError, ImportError)
# What says nothing about a file that is read when it is raised.
NO_DAMAGE = (*PROGRAM_ERRORS, MemoryError)


def lacks_memory(error: BaseException | None) -> bool:
  """Whether an error says that memory ran out, on this machine or on a device."""
  if isinstance(error, MemoryError):
    return True
  # TensorStore calls full disks and too few open files so too.
  is_other = _is_disk_full(error) or shortages.shortage(error) not in (None, errno.ENOMEM)
  return 'RESOURCE_EXHAUSTED' in str(error) and not is_other


def _is_disk_full(error: BaseException | None) -> bool:
  full = errno.ENOSPC, errno.EDQUOT
  return getattr(error, 'errno', None) in full or any(os.strerror(e) in str(error) for e in full)


@contextlib.contextmanager
def memory_errors_as_failures() -> Iterator[None]:
  """Raises RunFailed if memory runs out inside, on this machine or on a device."""
  try:
    yield
  except Exception as error:
    if isinstance(error, UserError | RunFailed) or not lacks_memory(error):
      raise
    if isinstance(error, MemoryError):
      raise RunFailed(
        f'this machine has no memory left ({first_line(error)}); lower config.batch_size or'
        ' config.data.num_threads, or use more processes.'
      ) from error
    raise RunFailed(
      f'a device has no memory left ({first_line(error)}); lower config.batch_size, raise'
      ' config.accumulation_steps, set config.remat=full, or shard the state by config.mesh.fsdp.'
    ) from error


@contextlib.contextmanager
def os_errors_as_user_errors(what: str, remedy: str) -> Iterator[None]:
  """Turns an OSError inside, such as a missing permission, into a `UserError`.

  Args:
    what: begins the sentence with what cannot be done; the system's reason follows in parentheses.
    remedy: ends the sentence, unless the machine is short of something (`remedy_of`).
  """
  try:
    yield
  except OSError as error:
    remedy = remedy_of(error, remedy.removesuffix('.'))
    raise UserError(f'{what} ({error.strerror or error}); {remedy}.') from error


def remedy_of(error: BaseException, otherwise: str) -> str:
  """Returns what to do if files, processes, memory or room are short, or `otherwise`."""
  if _is_disk_full(error):
    return 'make room there'
  number = shortages.shortage(error)
  return otherwise if number is None else shortages.REMEDIES[number]


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, or its type if it has no message."""
  # TensorStore appends what was opened, in hundreds of words.
  text = str(error).partition(' [tensorstore_spec=')[0]
  return next(iter(text.strip().splitlines()), '') or type(error).__name__


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
