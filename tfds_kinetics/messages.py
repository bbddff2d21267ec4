"""Messages to the user, and the exceptions that end a build."""

import logging
import sys

import tqdm

from tfds_kinetics.escapes import one_line

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


def say(text: str) -> None:
  """Logs a line, and shows it on the terminal if there is one."""
  text = one_line(text)
  log.info(text)
  if sys.stderr.isatty():
    tqdm.tqdm.write(text, file=sys.stderr)
