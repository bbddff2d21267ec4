"""Messages to the user, and the exceptions that end a build."""

import logging
import re
import sys

import tqdm

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
  """Escapes line ends and other control characters, which file names may contain."""
  return re.sub(
    '[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]',
    lambda found: found[0].encode('unicode_escape').decode(),
    text,
  )


def say(text: str) -> None:
  """Logs a line, and shows it on the terminal if there is one."""
  text = one_line(text)
  log.info(text)
  if sys.stderr.isatty():
    tqdm.tqdm.write(text, file=sys.stderr)
