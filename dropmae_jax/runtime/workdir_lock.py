"""A lock on the workdir of a run, so that no second run writes to it at the same time.

The system holds it for the first process of a run, and releases it when that ends, however it ends.
"""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import BinaryIO

import jax

from dropmae_jax.runtime import multihost
from dropmae_jax.runtime.errors import ExitStatus, RunFailed, UserError, remedy_of
from dropmae_jax.runtime.paths import Path

FILE = 'lock'

_log = logging.getLogger('dropmae_jax')


class WorkdirInUse(RunFailed):
  """Another run holds the workdir; it may end, as one whose job is queued again does."""

  exit_status = ExitStatus.UNAVAILABLE


@contextlib.contextmanager
def held(
  workdir: Path, option: str = '--workdir', *, folder: pathlib.Path | None = None
) -> Iterator[None]:
  """Holds the lock inside; all processes of a run call this together.

  A file system that has no locks is logged, and the run goes on without one.

  Args:
    workdir: of the run; exists.
    option: which the user gave it by.
    folder: of this machine for a workdir in a bucket, which has no locks: only runs of this machine
      are kept apart.

  Raises:
    WorkdirInUse: on every process; the message says where the other run is, and since when.
    UserError: on every process; the workdir cannot be written.
  """
  with contextlib.ExitStack() as stack:
    refused = None
    if jax.process_index() == 0:
      try:
        stack.enter_context(_locked(folder or workdir, f'{option}={workdir}', option))
      except (UserError, WorkdirInUse) as error:
        refused = [isinstance(error, UserError), str(error)]
    refused = json.loads(multihost.text_of_first(json.dumps(refused)))
    if refused:
      is_input, message = refused
      raise (UserError if is_input else WorkdirInUse)(message)
    yield


@contextlib.contextmanager
def _locked(folder: pathlib.Path, what: str, option: str) -> Iterator[None]:
  try:
    # Not truncated before it is locked, as it says who holds it.
    file = (folder / FILE).open('ab+', buffering=0)
  except OSError as error:
    remedy = remedy_of(error, 'give another one, make room, or change its permissions')
    raise UserError(f'{what} cannot be written ({error.strerror}); {remedy}.') from error
  with file:
    try:
      # Of the open file, so a library that opens the file too cannot release it.
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise WorkdirInUse(
        f'{what} is in use by {_holder(file)}; stop that run or wait until it has'
        f' ended, or give another {option}.'
      ) from error
    except OSError as error:
      _log.warning(
        f'{folder} cannot be locked ({error.strerror}); start no second run with this {option}'
        ' while this one runs.'
      )
    else:
      since = time.strftime('%Y-%m-%d %H:%M:%S %Z')
      holder = {'host': socket.gethostname(), 'pid': os.getpid(), 'since': since}
      with contextlib.suppress(OSError):  # On a full disk it is locked all the same.
        file.truncate(0)
        file.write(json.dumps(holder).encode())
        os.fsync(file.fileno())
    yield


def _holder(file: BinaryIO) -> str:
  file.seek(0)
  try:
    holder = json.loads(file.read())
    return f'process {holder["pid"]} of {holder["host"]} since {holder["since"]}'
  except (ValueError, KeyError, TypeError):  # It has not said so yet, or its disk is full.
    return 'another run'
