"""What the builder tells its user, and how it ends early."""

import logging
import sys

import tqdm

log = logging.getLogger('tfds_kinetics')


class BadInput(ValueError):
  """Input that the user can mend; the message names the value and the remedy."""


class Stopped(Exception):
  """The build was interrupted; what is finished is kept."""


def say(text: str) -> None:
  """Tells the user on the terminal, or through the log where there is none."""
  log.info(text)
  if sys.stderr.isatty():
    tqdm.tqdm.write(text, file=sys.stderr)
