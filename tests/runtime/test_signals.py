"""What signals do to a run: one stops it after a checkpoint, a second one ends it at once."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
from conftest import run_python

from dropmae_jax.runtime import multihost
from dropmae_jax.runtime.errors import ExitStatus, UserError
from dropmae_jax.runtime.report import NonFiniteLoss
from tfds_kinetics import __main__ as builder

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _uncaught_signals():
  """An uncaught signal fails the test, rather than ending all tests."""

  def fail(number, _):
    raise AssertionError(f'signal {number} is not caught')

  for each in BOTH:
    signal.signal(each, fail)


def handlers():
  return [signal.getsignal(each) for each in BOTH]


@pytest.fixture
def interruption():
  return multihost.Interruption()


@pytest.fixture
def processes(monkeypatch):
  """Makes this process appear as the second of three."""
  monkeypatch.setattr(multihost.jax, 'process_count', lambda: 3)
  monkeypatch.setattr(multihost.jax, 'process_index', lambda: 1)
  return monkeypatch


@pytest.mark.parametrize('number', BOTH)
def test_the_first_signal_is_recorded_and_the_handlers_are_restored(interruption, number):
  before = handlers()
  with pytest.raises(ZeroDivisionError), interruption.watched():
    assert (interruption.is_requested(), interruption.is_due(3)) == (False, False)
    os.kill(os.getpid(), number)
    assert (interruption.is_requested(), interruption.is_due(4)) == (True, True)
    assert interruption.signal_name == number.name
    # The next signal ends the process, even if Python no longer runs handlers.
    assert handlers() == [signal.SIG_DFL] * 2
    raise ZeroDivisionError
  assert handlers() == before


def test_ctrl_c_stays_ignored(interruption):
  """As in the background of a script, where SIGTERM still stops the run."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with interruption.watched():
    os.kill(os.getpid(), signal.SIGINT)
    assert not interruption.is_requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.signal_name == 'SIGTERM'
    assert handlers() == [signal.SIG_IGN, signal.SIG_DFL]
  assert handlers()[0] == signal.SIG_IGN


@pytest.mark.parametrize('is_ignored', [False, True])
def test_ctrl_c_stays_ignored_by_the_builder_too(monkeypatch, capsys, is_ignored):
  if is_ignored:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
  found = []
  monkeypatch.setattr(sys, 'argv', ['x', '--config=folder', '--videos=x', '--data_dir=y'])
  monkeypatch.setattr(builder.log, 'handlers', [])
  monkeypatch.setattr(builder, '_run', lambda _: found.append(handlers()) or 'done')
  assert builder.main() == 0
  theirs = builder._interrupt
  assert found == [[signal.SIG_IGN if is_ignored else theirs, theirs]]


def test_several_processes_leave_sigterm_to_jax(interruption, processes):
  """Its service chooses the step; Ctrl-C on one process is forwarded to it."""
  received, due = [], {5}
  signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
  before = handlers()
  reached = lambda step: step in due
  processes.setattr(multihost.multihost_utils, 'reached_preemption_sync_point', reached)
  with interruption.watched():
    assert handlers()[1] == before[1]
    os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGTERM]
    assert handlers() == [signal.SIG_DFL, before[1]]
    assert [interruption.is_requested(), interruption.is_due(4)] == [False, False]
    assert [interruption.is_due(5), interruption.signal_name] == [True, 'SIGTERM']
  assert handlers() == before


# Each child process sends itself two signals and hangs.
TWICE = """
import itertools, os, signal, time
from dropmae_jax.runtime import multihost

def child(first, second):
  interruption = multihost.Interruption()
  with interruption.watched():
    os.kill(os.getpid(), first)
    os.write(1, b'saving\\n' if interruption.is_requested() else b'ignored\\n')
    os.kill(os.getpid(), second)
    time.sleep(30)
    os._exit(9)

children = {}
for first, second in itertools.product((signal.SIGINT, signal.SIGTERM), repeat=2):
  pid = os.fork()
  if not pid:
    child(first, second)
  children[pid] = second
for pid, second in children.items():
  # Written at once, so that no line of a child comes in between.
  by_second = -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == second
  os.write(1, f'{by_second}\\n'.encode())
"""


def test_a_second_signal_ends_a_save_that_hangs():
  done = run_python('-c', TWICE)
  assert sorted(done.stdout.split()) == ['True'] * 4 + ['saving'] * 4, done.stderr


@pytest.mark.parametrize('several', [True, False])
def test_any_of_is_about_all_processes(processes, several):
  if not several:
    processes.setattr(multihost.jax, 'process_count', lambda: 1)
  gather = lambda mine: np.array([False, bool(mine), others])
  processes.setattr(multihost.multihost_utils, 'process_allgather', gather)
  for mine, others in ((False, False), (True, False), (False, True)):
    assert multihost.any_of(mine) == (mine or (others and several))


def test_what_processes_disagree_about_is_named(processes):
  facts = {'one': 'same', 'two': 'mine', 'three': 'same', 'four': 'mine'}

  def gather(mine):
    others = np.repeat(mine[None], 3, axis=0)
    others[2, 1] += 1
    others[1:, 3] += 1
    return others

  processes.setattr(multihost.multihost_utils, 'process_allgather', gather)
  with pytest.raises(
    UserError, match=r'about: two \(process 2\); four \(process 1, 2\); start all'
  ):
    multihost.agree(facts)
  processes.setattr(
    multihost.multihost_utils, 'process_allgather', lambda mine: np.repeat(mine[None], 3, axis=0)
  )
  multihost.agree(facts)


class Ended(BaseException):
  """Raised in place of the end of this process."""


class Service:
  """The key-value store of the processes."""

  def __init__(self):
    self.stored = {}

  def key_value_set(self, key, value):
    assert key not in self.stored
    self.stored[key] = value

  def key_value_try_get(self, key):
    return self.stored[key]


@pytest.fixture
def service(processes):
  service, service.ended = Service(), []

  def end(status):
    service.ended.append(status)
    raise Ended

  processes.setattr(multihost, 'POLL_SECONDS', 0.01)
  processes.setattr(multihost, '_client', lambda: service)
  processes.setattr(multihost.os, '_exit', end)
  return service


class Slow(RuntimeError):
  exit_status = ExitStatus.HUNG


@pytest.mark.parametrize(
  ('error', 'status'), [(UserError('why'), 2), (Slow('why'), ExitStatus.HUNG), (KeyError('why'), 1)]
)
def test_a_failed_process_stores_its_failure_for_the_others(service, capsys, error, status):
  with pytest.raises(Ended), multihost.ending_together():
    raise error
  assert service.ended == [status]
  assert json.loads(service.stored[multihost.FAILURE_KEY]) == [1, status, str(error)]
  err = capsys.readouterr().err
  assert err.endswith(f'error: {error}\n')
  assert ('Traceback' in err) == isinstance(error, KeyError)


def test_an_error_of_all_processes_propagates(service):
  with pytest.raises(NonFiniteLoss), multihost.ending_together():
    raise NonFiniteLoss('why', 3)
  assert (service.ended, service.stored) == ([], {})


def test_a_process_ends_with_the_failure_of_another(service, capsys, monkeypatch):
  """Also if its own error is a consequence of the other's end."""
  monkeypatch.setattr(multihost.threading, 'excepthook', lambda _: None)
  with multihost.ending_together():
    service.stored[multihost.FAILURE_KEY] = json.dumps([1, 7, 'its own'])
    time.sleep(0.1)
    assert service.ended == []
    service.stored[multihost.FAILURE_KEY] = json.dumps([2, 7, 'why'])
    deadline = time.monotonic() + 10
    while not service.ended and time.monotonic() < deadline:
      time.sleep(0.01)
  assert service.ended == [7]
  with pytest.raises(Ended), multihost.ending_together():
    raise RuntimeError('the other is gone')
  assert set(service.ended) == {7}
  assert 'error: process 2 has ended: why\n' in capsys.readouterr().err
  time.sleep(0.1)
  count = len(service.ended)
  time.sleep(0.1)
  assert len(service.ended) == count  # The thread has ended.


@pytest.mark.parametrize(
  ('options', 'method'),
  [(('a:1', 3, 2), 'deactivate'), ((None, None, None), None)],
)
def test_processes_join_with_the_given_options(monkeypatch, options, method):
  joined = []
  monkeypatch.setattr(
    multihost.jax.distributed, 'initialize', lambda *given, **more: joined.append((given, more))
  )
  names = ('coordinator_address', 'num_processes', 'process_id')
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '3')
  multihost.join(distributed=options[0] is None, **dict(zip(names, options, strict=True)))
  assert joined == [(options, {'cluster_detection_method': method})]

  def fail(*_, **__):
    raise RuntimeError('DEADLINE\nand more')

  monkeypatch.setattr(multihost.jax.distributed, 'initialize', fail)
  with pytest.raises(UserError, match=r'were not found \(DEADLINE\); give'):
    multihost.join(distributed=options[0] is None, **dict(zip(names, options, strict=True)))
