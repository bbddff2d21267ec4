"""Several processes as one run: they connect, compare their settings, and stop at the same step."""

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import ExitStatus, RunFailed, UserError
from dropmae_jax.runtime.paths import Path, client_errors_as_os_errors

# The file of the workdir in which a process says why it ends, and how often the others look for it.
FAILURE_FILE, POLL_SECONDS = 'failure.json', 1.0
# Of a message to the other processes.
MESSAGE_BYTES = 4096
_ending = threading.Lock()
# How errors of JAX say that a process, or the connection to it, is gone.
LOST = re.compile('UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|Gloo|NCCL')
# A process that is silent for so long is gone: JAX then ends the others.
HEARTBEAT_SECONDS = 100
# Of a terminal that is closed, Ctrl-C, schedulers (SLURM's --signal is often USR1).
STOP_SIGNALS = signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
# Signals that follow the first one sooner are the same request: some schedulers and shells send one
# to a process and to its group.
GRACE_SECONDS = 1.0
# Where launchers put the number of processes that they started for a job.
LAUNCHED = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')


def join(
  *,
  distributed: bool,
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
  local_device_ids: str | None = None,
) -> None:
  """Connects this process to the others of the run; to be called before any other use of JAX.

  Args:
    distributed: get the rest from the environment: TPU pods, SLURM, Open MPI, Kubernetes.
    coordinator_address: 'HOST:PORT' of process 0, where the environment does not say it.
    num_processes: likewise.
    process_id: likewise, from 0.
    local_device_ids: numbers of the devices of this host to use, as 'I' or 'I,J'; None: all, or
      those that the launcher says.

  Raises:
    UserError: the options contradict one another, or the other processes were not found.
  """
  explicit = (coordinator_address, num_processes, process_id)
  if any(value is not None for value in explicit) and None in explicit:
    raise UserError(
      '--coordinator_address, --num_processes and --process_id go together; give all three, or'
      ' --distributed where the environment tells them.'
    )
  if local_device_ids and not re.fullmatch(r'\d+(,\d+)*', local_device_ids):
    raise UserError(f'--local_device_ids={local_device_ids} is not a list of numbers such as 0,1.')
  if coordinator_address is None and not distributed:
    check_not_launched()
    return
  if coordinator_address is not None and not 0 <= process_id < num_processes:
    raise UserError(f'--process_id={process_id} is not in 0..{num_processes - 1}.')
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      [int(each) for each in local_device_ids.split(',')] if local_device_ids else None,
      # Explicit options take precedence over a launcher, which would limit the devices.
      cluster_detection_method='deactivate' if coordinator_address else None,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise UserError(
      f'the other processes were not found ({reason}); give --coordinator_address=HOST:PORT,'
      ' --num_processes and --process_id to each.'
    ) from error


def check_not_launched() -> None:
  """Raises if this is one of several processes that are not connected but share a workdir."""
  for name in LAUNCHED:
    count = os.environ.get(name, '1')
    if not count.isdecimal():
      raise UserError(f'{name}={count!r} in the environment is not a number; unset or correct it.')
    if int(count) > 1:
      raise UserError(
        f'{name}={count}: a launcher has started several processes, which would all'
        ' write to the same --workdir; add --distributed to make them one run, or start one.'
      )


def code_version() -> str:
  """Returns a hash of the source of this package, sub-packages included, and of JAX's version."""
  digest, package = hashlib.sha256(jax.__version__.encode()), pathlib.Path(__file__).parents[1]
  for path in sorted(package.rglob('*.py')):
    digest.update(f'{path.relative_to(package)}\0'.encode())
    digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Raises an error of one process on all; all processes call this together.

  For what is done before there is a workdir, by which they hear of failures later. No process may
  wait for others inside.
  """
  failure = None
  try:
    yield
  except Exception as error:
    failure = error
  if jax.process_count() > 1:
    status = getattr(failure, 'exit_status', ExitStatus.FAILED) if failure else ExitStatus.DONE
    message = str(failure or '').encode(errors='replace')[:MESSAGE_BYTES]
    own = bytes([status]) + message.ljust(MESSAGE_BYTES, b'\0')
    gathered = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
    for process, (status, *message) in enumerate(gathered.tolist()):
      if status and failure is None:
        text = bytes(message).rstrip(b'\0').decode(errors='replace')
        kind = UserError if status == ExitStatus.BAD_INPUT else RunFailed
        failure = kind(f'process {process} has ended: {text}')
  if failure:
    raise failure


def agree(
  facts: Mapping[str, str], remedy: str = 'start all with the same command, code and data'
) -> None:
  """Waits for all processes, and checks that they agree.

  Args:
    facts: by name, what must be the same on all; every process gives the same names.
    remedy: ends the sentence of the error.

  Raises:
    UserError: on every process; names what differs, and on which.
  """
  if jax.process_count() == 1:
    return
  digests = [hashlib.sha256(value.encode()).digest() for value in facts.values()]
  own = np.frombuffer(b''.join(digests), np.uint8).reshape(len(facts), -1)
  gathered = multihost_utils.process_allgather(own)
  differs = (gathered != gathered[0]).any(axis=2)
  if differs.any():
    differences = [
      f'{name} (process {", ".join(map(str, np.flatnonzero(differs[:, fact])))})'
      for fact, name in enumerate(facts)
      if differs[:, fact].any()
    ]
    raise UserError(
      'the processes of this run disagree with process 0 about:'
      f' {"; ".join(differences)}; {remedy}.'
    )


def any_of(value: bool) -> bool:
  """Whether a value is true on any process; waits for all processes."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.array(value)).any())


def wait_for_all(what: str) -> None:
  """Waits for all processes.

  Args:
    what: name of the place, the same on all.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def text_of_first(text: str) -> str:
  """Returns the text of the first process on all; waits for all processes. None may be empty."""
  if jax.process_count() == 1:
    return text
  content = np.frombuffer(text.encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
  return multihost_utils.broadcast_one_to_all(np.resize(content, length)).tobytes().decode()


@contextlib.contextmanager
def ending_together() -> Iterator['Failures']:
  """Ends all processes if one of them fails, with the same error message and exit status.

  Otherwise they would wait for it in the next step. A failed process exits inside this context,
  without unwinding, because JAX would then wait for the others. An error with an attribute
  `is_everywhere` is raised on all processes at the same step, so it propagates as usual.

  Yields:
    An object that has to be told of the workdir, which has to be shared by all processes; before,
    they do not hear of a failure unless `failing_together` or `agree` tells them.
  """
  failures = Failures()
  if jax.process_count() == 1:
    yield failures
    return
  try:
    yield failures
  except Exception as error:
    if hasattr(error, 'is_everywhere'):
      raise
    message, status = str(error), getattr(error, 'exit_status', None)
    if status is None:
      # An error in JAX may be the consequence of another process's end.
      time.sleep(2 * POLL_SECONDS)
      failures.end_if_another_failed()
      sys.excepthook(*sys.exc_info())
      status = ExitStatus.FAILED
      if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(message):
        status = ExitStatus.UNAVAILABLE
        message = (
          f'another process of this run, or the connection to it, is gone'
          f' ({message.splitlines()[0]}); the same command, given to all, resumes from the last'
          ' checkpoint.'
        )
    failures.store(message, status)
    with contextlib.suppress(Exception):  # It must end.
      failures.before_end()
    _end(message, status)
  finally:
    failures.close()


_log = logging.getLogger('dropmae_jax')


class Failures:
  """How a process tells the others why it ends: by a file, which outlives it.

  Attributes:
    before_end: called before this process ends for that.
  """

  def __init__(self) -> None:
    self._path: Path | None = None
    self._is_over = threading.Event()
    self.before_end: Callable[[], None] = lambda: None

  def share(self, workdir: Path) -> None:
    """Tells the others by a file in a folder from now on; all processes call this together."""
    if jax.process_count() == 1:
      return
    path = workdir / FAILURE_FILE
    if jax.process_index() == 0:
      # On network file systems, a change of a file is seen sooner than a new file.
      with client_errors_as_os_errors(path):
        path.write_text('')
    wait_for_all('failures are shared')
    self._path = path
    threading.Thread(target=self._poll, name='multihost', daemon=True).start()

  def _poll(self) -> None:
    while not self._is_over.wait(POLL_SECONDS):
      self.end_if_another_failed()

  def close(self) -> None:
    """Does not look for failures any more."""
    self._is_over.set()

  def store(self, message: str, status: int) -> None:
    """Says why this process ends, unless another one has said so before."""
    if self._path:
      with contextlib.suppress(OSError), client_errors_as_os_errors(self._path):
        if not self._path.read_text():
          failure = {'process': jax.process_index(), 'status': status, 'message': message}
          self._path.write_text(json.dumps(failure))

  def end_if_another_failed(self) -> None:
    """Ends this process if another one has said why it ends."""
    if not self._path:
      return
    try:
      with client_errors_as_os_errors(self._path):
        failure = json.loads(self._path.read_text())
    except (OSError, ValueError):  # None has failed yet, or it is still writing.
      return
    if failure['process'] != jax.process_index():
      with contextlib.suppress(Exception):
        self.before_end()
      _end(f'process {failure["process"]} has ended: {failure["message"]}', failure['status'])


def _end(message: str, status: int) -> NoReturn:
  _ending.acquire()  # Two threads may come here; the first one ends the process.
  cli.print_error(message)
  with contextlib.suppress(OSError):
    sys.stdout.flush()
  # All others must poll before this process is gone, and the first one ends last, as JAX aborts
  # processes that outlive it.
  time.sleep((3 if jax.process_index() == 0 else 2) * POLL_SECONDS)
  os._exit(status)


class Interruption:
  """Turns the first of STOP_SIGNALS into a stop after the current step, the same on all hosts.

  In a run of one process, another one later than GRACE_SECONDS ends it at once. With several
  processes, JAX's preemption service handles SIGTERM (and, on TPUs, notices of maintenance) and
  chooses the step; the others are turned into SIGTERM, and end a process at once when they come
  again. A signal that is ignored when the run starts, as Ctrl-C is in the background of a script,
  stays ignored.
  """

  signal_name: str | None = None

  def __init__(self) -> None:
    self._old: dict[signal.Signals, Any] = {}
    self._is_asked = False
    self._came, self._is_over = threading.Event(), threading.Event()

  def _handle(self, number: int, _: FrameType | None) -> None:
    if self._is_asked:
      return
    self._is_asked = True
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.signal_name = signal.Signals(number).name
    self._came.set()

  def _let_the_next_end(self) -> None:
    """Restores the default of all signals, GRACE_SECONDS after the first one came."""
    self._came.wait()
    if self._is_over.wait(GRACE_SECONDS):
      return
    # Python sets handlers in the main thread only, and runs them there, where native code may hang.
    libc_signal = ctypes.CDLL(None).signal
    libc_signal.argtypes, libc_signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    for each in self._old:
      libc_signal(each, None)
    # Last, as it waits where nobody reads the output.
    if jax.process_index() == 0:
      _log.warning(
        f'{self.signal_name or "a signal"}: stopping after this step; another signal ends the run'
        ' at once, without a checkpoint'
      )

  @contextlib.contextmanager
  def watched(self) -> Iterator[None]:
    """Handles the signals inside, and restores the old handlers after."""
    several = jax.process_count() > 1
    numbers = [each for each in STOP_SIGNALS if not (several and each == signal.SIGTERM)]
    old = {each: signal.getsignal(each) for each in numbers}
    self._old = {each: handler for each, handler in old.items() if handler is not signal.SIG_IGN}
    second = threading.Thread(target=self._let_the_next_end, name='interruption', daemon=True)
    second.start()
    try:
      for each in self._old:
        signal.signal(each, self._handle)
      yield
    finally:
      self._is_over.set()
      self._came.set()
      second.join()
      for each, handler in self._old.items():
        signal.signal(each, handler)

  def is_requested(self) -> bool:
    """Whether a signal came; always False before JAX's preemption service has chosen the step."""
    return self.signal_name is not None

  def is_due(self, step: int) -> bool:
    """Whether to stop after this step; all processes call it after every step."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signal_name = 'SIGTERM'
    return self.signal_name is not None
