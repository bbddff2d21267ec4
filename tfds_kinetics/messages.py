"""Messages to the user: escaped text, and the exceptions that end a build.

Nothing heavy is imported here, as other programs use only the escapes.
"""

import contextlib
import json
import logging
import sys
import traceback
from types import TracebackType

log = logging.getLogger('tfds_kinetics')


class BadInput(ValueError):
  """Input that the user can fix; the message names the value and the remedy."""


class Stopped(Exception):
  """The build was interrupted; what is finished is kept."""


class ProgramError(Exception):
  """A bug in the builder or in a library: it ends the build, and no video is skipped for it.

  It holds text only, because it is sent between processes: an exception that cannot be unpickled
  would look like a process that was killed.
  """


def one_line(text: str) -> str:
  """Escapes, in the way of JSON, every character that is not shown as itself.

  All text from outside passes through here before it is shown or logged: names of files and
  tensors, labels, metadata, messages of libraries. Line ends would forge rows of a table or a log,
  escape sequences would command the terminal, and marks of direction show a name as another one.
  """
  if text.isprintable():
    return text
  return ''.join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def print_stack(
  kind: type[BaseException], error: BaseException, stack: TracebackType | None
) -> None:
  """Prints an unexpected error as Python does, but escaped; for `sys.excepthook`."""
  with contextlib.suppress(OSError):
    for line in ''.join(traceback.format_exception(kind, error, stack)).rstrip('\n').split('\n'):
      print(one_line(line), file=sys.stderr, flush=True)


def say(text: str) -> None:
  """Logs a line, and shows it on the terminal if there is one."""
  text = one_line(text)
  log.info(text)
  if sys.stderr.isatty():
    import tqdm  # The one heavy import; see above.

    tqdm.tqdm.write(text, file=sys.stderr)
