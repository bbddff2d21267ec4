"""Several processes as one run: how they find one another, agree, and stop at the same step."""

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

# Where a process tells the others why it ends, and how often they look.
FAILURE, LOOK_SECONDS = 'dropmae_jax/failure', 1.0
# How launchers say that they have started more than one process for a job.
LAUNCHED = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')


def join(
  *,
  distributed: bool,
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Makes this process one of several; to be called before anything else of JAX.

  Args:
    distributed: find the others through the environment: TPU pods, SLURM, Open MPI, Kubernetes.
    coordinator_address: 'HOST:PORT' of process 0, where nothing in the environment tells.
    num_processes: likewise.
    process_id: likewise, from 0.

  Raises:
    UserError: the options do not fit one another, or the others were not found.
  """
  explicit = (coordinator_address, num_processes, process_id)
  if any(value is not None for value in explicit) and None in explicit:
    raise UserError(
      '--coordinator_address, --num_processes and --process_id go together; give all three, or'
      ' --distributed where the environment tells them.'
    )
  if coordinator_address is None and not distributed:
    _refuse_strangers()
    return
  if coordinator_address is not None and not 0 <= process_id < num_processes:
    raise UserError(f'--process_id={process_id} is not in 0..{num_processes - 1}.')
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      # What is said here goes before what a launcher says: then a process has all of its devices.
      cluster_detection_method='deactivate' if coordinator_address else None,
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise UserError(
      f'the other processes were not found ({reason}); give --coordinator_address=HOST:PORT,'
      ' --num_processes and --process_id to each.'
    ) from error


def _refuse_strangers() -> None:
  """Refuses to be one of several runs that know nothing of one another, in one workdir."""
  for name in LAUNCHED:
    if int(os.environ.get(name, '1')) > 1:
      raise UserError(
        f'{name}={os.environ[name]}: a launcher has started several processes, which would all'
        ' write to the same --workdir; add --distributed to make them one run, or start one.'
      )


def code_version() -> str:
  """Returns a hash of this package's source and of JAX's version."""
  digest = hashlib.sha256(jax.__version__.encode())
  for path in sorted(pathlib.Path(__file__).parent.glob('*.py')):
    digest.update(path.read_bytes())
  return digest.hexdigest()


def agree(facts: Mapping[str, str]) -> None:
  """Waits for all processes, and compares what must be the same on each.

  Args:
    facts: by name; the names are the same everywhere.

  Raises:
    UserError: on every process; names what differs, and where.
  """
  if jax.process_count() == 1:
    return
  digests = [hashlib.sha256(value.encode()).digest() for value in facts.values()]
  mine = np.frombuffer(b''.join(digests), np.uint8).reshape(len(facts), -1)
  all_of_them = multihost_utils.process_allgather(mine)
  differs = (all_of_them != all_of_them[0]).any(axis=2)
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


def any_of(mine: bool) -> bool:
  """Whether it is true on any process; waits for all of them."""
  if jax.process_count() == 1:
    return mine
  return bool(multihost_utils.process_allgather(np.array(mine)).any())


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends all processes where one cannot go on, with its sentence and its status.

  The others would wait for it in the next step. The process is ended inside this context, without
  unwinding, as JAX would wait for the others then. An error that has an attribute `is_everywhere`
  is one that all processes meet at the same step; it is raised on.
  """
  if jax.process_count() == 1:
    yield
    return
  is_over = threading.Event()

  def look() -> None:
    while not is_over.wait(LOOK_SECONDS):
      _end_as_told()

  threading.Thread(target=look, name='others', daemon=True).start()
  try:
    yield
  except Exception as error:
    if hasattr(error, 'is_everywhere'):
      raise
    status = getattr(error, 'exit_status', None)
    if status is None:
      # What breaks in JAX here may be that another process has ended.
      time.sleep(2 * LOOK_SECONDS)
      _end_as_told()
      traceback.print_exc()
    with contextlib.suppress(Exception):  # Another one may have told first.
      told = json.dumps([jax.process_index(), status or 1, str(error)])
      _client().key_value_set(FAILURE, told)
    _end(str(error), status or 1)
  finally:
    is_over.set()


def _end_as_told() -> None:
  """Ends this process if another has told why it ends."""
  try:
    number, status, sentence = json.loads(_client().key_value_try_get(FAILURE))
  except Exception:  # Nothing is told yet; or the first process is gone.
    return
  if number != jax.process_index():
    _end(f'process {number} has ended: {sentence}', status)


def _client() -> Any:
  # Not public, though multihost_utils is made of it.
  return distributed.global_state.client


def _end(sentence: str, status: int) -> NoReturn:
  print(f'error: {sentence}', file=sys.stderr, flush=True)
  sys.stdout.flush()
  # All have to look before one is missed; the first holds what they look at, and JAX aborts those
  # that outlive it.
  time.sleep((3 if jax.process_index() == 0 else 2) * LOOK_SECONDS)
  os._exit(status)


class Interruption:
  """Turns the first Ctrl-C or SIGTERM into a stop at the next step, which is the same on all hosts.

  In a run of one process a second signal ends it at once. Where there are several, JAX's preemption
  service hears SIGTERM (and of maintenance, on a TPU) and chooses the step; only a second Ctrl-C
  ends a process at once. A signal that is ignored when the run begins, as Ctrl-C is in the
  background of a script, stays ignored.
  """

  signal_name: str | None = None

  def __init__(self) -> None:
    self._old: dict[signal.Signals, Any] = {}

  def _note(self, number: int, _: FrameType | None) -> None:
    self.signal_name = signal.Signals(number).name
    for each in self._old:
      signal.signal(each, signal.SIG_DFL)

  def _pass_on(self, number: int, _: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)

  @contextlib.contextmanager
  def watched(self) -> Iterator[None]:
    """Catches the signals inside, and gives the old handlers back."""
    if jax.process_count() > 1:
      handlers = {signal.SIGINT: self._pass_on}
    else:
      handlers = {signal.SIGINT: self._note, signal.SIGTERM: self._note}
    old = {each: signal.getsignal(each) for each in handlers}
    self._old = {each: handler for each, handler in old.items() if handler is not signal.SIG_IGN}
    try:
      for each in self._old:
        signal.signal(each, handlers[each])
      yield
    finally:
      for each, handler in self._old.items():
        signal.signal(each, handler)

  def is_asked(self) -> bool:
    """Whether a signal came; always False where JAX's service hears of it."""
    return self.signal_name is not None

  def is_due(self, step: int) -> bool:
    """Whether to stop after this step; to be asked after every step, by all processes."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signal_name = 'SIGTERM'
    return self.signal_name is not None
