"""What the builder tells its user, and how it ends early."""

import logging
import re
import sys

import tqdm

log = logging.getLogger('tfds_kinetics')


class BadInput(ValueError):
  """Input that the user can mend; the message names the value and the remedy."""


class Stopped(Exception):
  """The build was interrupted; what is finished is kept."""


class ProgramError(Exception):
  """A bug in the builder or a library: it ends the build, and no video is skipped for it.

  It is made of text alone. An error that the builder could not read would be taken for a process
  that was killed.
  """


def one_line(text: str) -> str:
  """Shows line ends and other control characters, which file names may have, by their codes."""
  return re.sub(
    '[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]',
    lambda found: found[0].encode('unicode_escape').decode(),
    text,
  )


def say(text: str) -> None:
  """Tells the user on the terminal, or through the log where there is none."""
  text = one_line(text)
  log.info(text)
  if sys.stderr.isatty():
    tqdm.tqdm.write(text, file=sys.stderr)
