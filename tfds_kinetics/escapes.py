"""Escapes text from outside before it is shown or logged. Nothing heavy is imported here."""

import contextlib
import json
import sys
import traceback
from types import TracebackType


def one_line(text: str) -> str:
  """Escapes, in the way of JSON, every character that is not shown as itself.

  All text from outside passes through here before it is shown or logged: names of files and
  tensors, labels, metadata, messages of libraries. Line ends would forge rows of a table or a log,
  escape sequences would command the terminal, and marks of direction show a name as another one.
  """
  if text.isprintable():
    return text
  # JSON leaves DEL as it is.
  escaped = (c if c.isprintable() else json.dumps(c)[1:-1].replace('\x7f', '\\u007f') for c in text)
  return ''.join(escaped)


def print_stack(
  kind: type[BaseException], error: BaseException, stack: TracebackType | None
) -> None:
  """Prints an unexpected error as Python does, but escaped; for `sys.excepthook`."""
  with contextlib.suppress(OSError):
    for line in ''.join(traceback.format_exception(kind, error, stack)).rstrip('\n').split('\n'):
      print(one_line(line), file=sys.stderr, flush=True)
