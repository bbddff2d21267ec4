"""Several processes as one run: they connect, compare their settings, and stop at the same step."""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from dropmae_jax.runtime.errors import UserError

# The key under which a process stores why it ends, and how often the others check it.
FAILURE_KEY, POLL_SECONDS = 'dropmae_jax/failure', 1.0
# Where launchers put the number of processes that they started for a job.
LAUNCHED = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')


def join(
  *,
  distributed: bool,
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Connects this process to the others of the run; to be called before any other use of JAX.

  Args:
    distributed: get the rest from the environment: TPU pods, SLURM, Open MPI, Kubernetes.
    coordinator_address: 'HOST:PORT' of process 0, where the environment does not say it.
    num_processes: likewise.
    process_id: likewise, from 0.

  Raises:
    UserError: the options contradict one another, or the other processes were not found.
  """
  explicit = (coordinator_address, num_processes, process_id)
  if any(value is not None for value in explicit) and None in explicit:
    raise UserError(
      '--coordinator_address, --num_processes and --process_id go together; give all three, or'
      ' --distributed where the environment tells them.'
    )
  if coordinator_address is None and not distributed:
    _check_not_launched()
    return
  if coordinator_address is not None and not 0 <= process_id < num_processes:
    raise UserError(f'--process_id={process_id} is not in 0..{num_processes - 1}.')
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      # Explicit options take precedence over a launcher, which would limit the devices.
      cluster_detection_method='deactivate' if coordinator_address else None,
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise UserError(
      f'the other processes were not found ({reason}); give --coordinator_address=HOST:PORT,'
      ' --num_processes and --process_id to each.'
    ) from error


def _check_not_launched() -> None:
  """Raises if this is one of several processes that are not connected but share a workdir."""
  for name in LAUNCHED:
    if int(os.environ.get(name, '1')) > 1:
      raise UserError(
        f'{name}={os.environ[name]}: a launcher has started several processes, which would all'
        ' write to the same --workdir; add --distributed to make them one run, or start one.'
      )


def code_version() -> str:
  """Returns a hash of the source of this package, sub-packages included, and of JAX's version."""
  digest, package = hashlib.sha256(jax.__version__.encode()), pathlib.Path(__file__).parents[1]
  for path in sorted(package.rglob('*.py')):
    digest.update(f'{path.relative_to(package)}\0'.encode())
    digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()


def agree(facts: Mapping[str, str]) -> None:
  """Waits for all processes, and checks that they agree.

  Args:
    facts: by name, what must be the same on all; every process gives the same names.

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
    found = [
      f'{name} (process {", ".join(map(str, np.flatnonzero(differs[:, fact])))})'
      for fact, name in enumerate(facts)
      if differs[:, fact].any()
    ]
    raise UserError(
      f'the processes of this run disagree with process 0 about: {"; ".join(found)}; start all with'
      ' the same command, code and data.'
    )


def any_of(value: bool) -> bool:
  """Whether a value is true on any process; waits for all processes."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.array(value)).any())


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends all processes if one of them fails, with the same error message and exit status.

  Otherwise they would wait for it in the next step. A failed process exits inside this context,
  without unwinding, because JAX would then wait for the others. An error with an attribute
  `is_everywhere` is raised on all processes at the same step, so it propagates as usual.
  """
  if jax.process_count() == 1:
    yield
    return
  is_over = threading.Event()

  def poll() -> None:
    while not is_over.wait(POLL_SECONDS):
      _end_if_another_failed()

  threading.Thread(target=poll, name='multihost', daemon=True).start()
  try:
    yield
  except Exception as error:
    if hasattr(error, 'is_everywhere'):
      raise
    status = getattr(error, 'exit_status', None)
    if status is None:
      # An error in JAX may be the consequence of another process's end.
      time.sleep(2 * POLL_SECONDS)
      _end_if_another_failed()
      traceback.print_exc()
    with contextlib.suppress(Exception):  # Another process may have stored its failure first.
      failure = json.dumps([jax.process_index(), status or 1, str(error)])
      _client().key_value_set(FAILURE_KEY, failure)
    _end(str(error), status or 1)
  finally:
    is_over.set()


def _end_if_another_failed() -> None:
  try:
    number, status, message = json.loads(_client().key_value_try_get(FAILURE_KEY))
  except Exception:  # None has failed yet, or the first process, which holds the key, is gone.
    return
  if number != jax.process_index():
    _end(f'process {number} has ended: {message}', status)


def _client() -> Any:
  # JAX (0.10.2) has no public interface to the key-value store of its coordinator. What is public,
  # multihost_utils, waits for all processes, of which one has failed here.
  return distributed.global_state.client


def _end(message: str, status: int) -> NoReturn:
  print(f'error: {message}', file=sys.stderr, flush=True)
  sys.stdout.flush()
  # All others must poll before this process is gone. The first process ends last: it holds the key,
  # and JAX aborts processes that outlive it.
  time.sleep((3 if jax.process_index() == 0 else 2) * POLL_SECONDS)
  os._exit(status)


class Interruption:
  """Turns the first Ctrl-C or SIGTERM into a stop after the current step, the same on all hosts.

  In a run of one process a second signal ends it at once. With several processes, JAX's preemption
  service handles SIGTERM (and, on TPUs, notices of maintenance) and chooses the step; only a second
  Ctrl-C ends a process at once. A signal that is ignored when the run starts, as Ctrl-C is in the
  background of a script, stays ignored.
  """

  signal_name: str | None = None

  def __init__(self) -> None:
    self._old: dict[signal.Signals, Any] = {}

  def _record(self, number: int, _: FrameType | None) -> None:
    self.signal_name = signal.Signals(number).name
    for each in self._old:
      signal.signal(each, signal.SIG_DFL)

  def _forward(self, number: int, _: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)

  @contextlib.contextmanager
  def watched(self) -> Iterator[None]:
    """Handles the signals inside, and restores the old handlers after."""
    if jax.process_count() > 1:
      handlers = {signal.SIGINT: self._forward}
    else:
      handlers = {signal.SIGINT: self._record, signal.SIGTERM: self._record}
    old = {each: signal.getsignal(each) for each in handlers}
    self._old = {each: handler for each, handler in old.items() if handler is not signal.SIG_IGN}
    try:
      for each in self._old:
        signal.signal(each, handlers[each])
      yield
    finally:
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
