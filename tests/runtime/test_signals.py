"""What signals do to a run: one stops it after a checkpoint, a second one ends it at once."""

import json
import os
import signal
import sys
import threading
import time
import types
import unittest.mock

import jax
import numpy as np
import pytest
from conftest import run_python

from dropmae_jax.runtime import multihost
from dropmae_jax.runtime.errors import ExitStatus, RunFailed, UserError
from dropmae_jax.runtime.report import NonFiniteLoss
from tfds_kinetics import __main__ as builder

BOTH = (signal.SIGINT, signal.SIGTERM)
STOP = multihost.STOP_SIGNALS


@pytest.fixture(autouse=True)
def _uncaught_signals():
  """An uncaught signal fails the test, rather than ending all tests."""

  def fail(number, _):
    raise AssertionError(f'signal {number} is not caught')

  before = {each: signal.signal(each, fail) for each in STOP}
  yield
  for each, handler in before.items():
    signal.signal(each, handler)


def handlers(numbers=BOTH):
  return [signal.getsignal(each) for each in numbers]


@pytest.fixture
def interruption():
  return multihost.Interruption()


@pytest.fixture
def processes(monkeypatch):
  """Makes this process appear as the second of three."""
  monkeypatch.setattr(multihost.jax, 'process_count', lambda: 3)
  monkeypatch.setattr(multihost.jax, 'process_index', lambda: 1)
  return monkeypatch


@pytest.mark.parametrize('number', STOP)
def test_the_first_signal_is_recorded_and_the_handlers_are_restored(interruption, number):
  before = handlers(STOP)
  with pytest.raises(ZeroDivisionError), interruption.watched():
    assert (interruption.is_requested(), interruption.is_due(3)) == (False, False)
    os.kill(os.getpid(), number)
    assert (interruption.is_requested(), interruption.is_due(4)) == (True, True)
    assert interruption.signal_name == number.name
    # Some schedulers send more than one at once.
    for each in STOP:
      os.kill(os.getpid(), each)
    assert interruption.signal_name == number.name
    raise ZeroDivisionError
  assert handlers(STOP) == before


def test_ctrl_c_stays_ignored(interruption):
  """As in the background of a script, where SIGTERM still stops the run."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with interruption.watched():
    os.kill(os.getpid(), signal.SIGINT)
    assert not interruption.is_requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.signal_name == 'SIGTERM'
    assert handlers()[0] == signal.SIG_IGN
  assert handlers()[0] == signal.SIG_IGN


@pytest.mark.parametrize('is_ignored', [False, True])
def test_ctrl_c_stays_ignored_by_the_builder_too(monkeypatch, capsys, is_ignored):
  if is_ignored:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
  seen = []
  monkeypatch.setattr(sys, 'argv', ['x', '--config=folder', '--videos=x', '--data_dir=y'])
  monkeypatch.setattr(builder.log, 'handlers', [])
  monkeypatch.setattr(builder, '_run', lambda _: seen.append(handlers()) or 'done')
  assert builder.main() == 0
  theirs = builder._interrupt
  assert seen == [[signal.SIG_IGN if is_ignored else theirs, theirs]]


@pytest.mark.parametrize('number', [each for each in STOP if each != signal.SIGTERM])
def test_several_processes_leave_sigterm_to_jax(interruption, processes, number):
  """Its service chooses the step; Ctrl-C on one process is forwarded to it."""
  received, due = [], {5}
  signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
  before = handlers()
  reached = lambda step: step in due
  processes.setattr(multihost.multihost_utils, 'reached_preemption_sync_point', reached)
  with interruption.watched():
    assert handlers()[1] == before[1]
    for _ in range(2):
      os.kill(os.getpid(), number)
      assert received == [signal.SIGTERM]
    assert [interruption.is_requested(), interruption.is_due(4)] == [False, False]
    assert [interruption.is_due(5), interruption.signal_name] == [True, 'SIGTERM']
  assert handlers() == before


def test_a_step_that_takes_longer_is_said_to_be_the_last(interruption, monkeypatch):
  monkeypatch.setattr(multihost, 'GRACE_SECONDS', 0.01)
  restored = threading.Event()
  monkeypatch.setattr(multihost.ctypes, 'CDLL', lambda _: unittest.mock.Mock())
  monkeypatch.setattr(multihost._log, 'warning', lambda text: restored.set() or said.append(text))
  said = []
  with interruption.watched():
    os.kill(os.getpid(), signal.SIGUSR1)
    assert restored.wait(30)
  (text,) = said
  assert text.startswith('SIGUSR1: stopping after this step; another signal ends the run at once')


# Each child process sends itself two signals and hangs.
TWICE = """
import itertools, os, signal, time
from dropmae_jax.runtime import multihost
multihost.GRACE_SECONDS = 0.2

def child(first, second):
  interruption = multihost.Interruption()
  with interruption.watched():
    os.kill(os.getpid(), first)
    os.write(1, b'saving\\n' if interruption.is_requested() else b'ignored\\n')
    os.kill(os.getpid(), second)  # Too soon to be another request.
    time.sleep(0.5)
    os.kill(os.getpid(), second)
    time.sleep(30)
    os._exit(9)

children = {}
for first, second in itertools.product((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), repeat=2):
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
  assert sorted(done.stdout.split()) == ['True'] * 9 + ['saving'] * 9, done.stderr


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


@pytest.mark.parametrize('own', [None, UserError('mine'), RunFailed('mine'), TypeError('mine')])
@pytest.mark.parametrize('status', [2, 1])
def test_an_error_of_one_process_is_raised_on_all(processes, own, status):
  other = np.frombuffer(bytes([status]) + b'theirs'.ljust(multihost.MESSAGE_BYTES, b'\0'), np.uint8)
  gather = lambda mine: np.stack([np.zeros_like(mine), mine, other])
  processes.setattr(multihost.multihost_utils, 'process_allgather', gather)
  kind = type(own) if own else {2: UserError, 1: RunFailed}[status]
  message = 'mine' if own else 'process 2 has ended: theirs'
  with pytest.raises(kind, match=f'^{message}$'), multihost.failing_together():
    if own:
      raise own
  processes.setattr(multihost.multihost_utils, 'process_allgather', lambda mine: mine[None])
  with multihost.failing_together():
    pass


class Ended(BaseException):
  """Raised in place of the end of this process."""


@pytest.fixture
def ended(processes):
  """The statuses with which this process has ended."""
  statuses = []

  def end(status):
    statuses.append(status)
    raise Ended

  processes.setattr(multihost, 'POLL_SECONDS', 0.01)
  processes.setattr(multihost, '_ending', types.SimpleNamespace(acquire=lambda: None))
  processes.setattr(multihost.multihost_utils, 'sync_global_devices', lambda _: None)
  processes.setattr(multihost.os, '_exit', end)
  return statuses


class Slow(RuntimeError):
  exit_status = ExitStatus.UNAVAILABLE


def failure(workdir):
  return json.loads((workdir / 'failure.json').read_text())


@pytest.mark.parametrize(
  ('error', 'status', 'message'),
  [
    (UserError('why'), 2, 'why'),
    (Slow('why'), ExitStatus.UNAVAILABLE, 'why'),
    (KeyError('why'), 1, "'why'"),
    (
      jax.errors.JaxRuntimeError('UNAVAILABLE: closed\nand more'), ExitStatus.UNAVAILABLE,
      'another process of this run, or the connection to it, is gone (UNAVAILABLE: closed); the'
      ' same command, given to all, resumes from the last checkpoint.',
    ),
    # Another start would end in the same way.
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: memory'), 1, 'RESOURCE_EXHAUSTED: memory'),
  ],
)  # fmt: skip
def test_a_failed_process_says_why_to_the_others(tmp_path, ended, capsys, error, status, message):
  (tmp_path / 'failure.json').write_text('')  # By process 0.
  with pytest.raises(Ended), multihost.ending_together() as failures:
    failures.share(tmp_path)
    raise error
  assert ended == [status]
  expected = {'process': 1, 'status': status, 'message': message}
  assert failure(tmp_path) == expected
  err = capsys.readouterr().err
  assert err.endswith(f'error: {message}\n')
  assert ('Traceback' in err) == (not hasattr(error, 'exit_status'))
  # What was said first stays.
  with pytest.raises(Ended), multihost.ending_together() as failures:
    failures.share(tmp_path)
    raise UserError('a consequence')
  assert failure(tmp_path) == expected


def test_before_there_is_a_workdir_nothing_is_written(ended):
  with pytest.raises(Ended), multihost.ending_together():
    raise UserError('why')
  assert ended == [2]


def test_what_an_earlier_start_said_is_gone(tmp_path, ended, monkeypatch):
  (tmp_path / 'failure.json').write_text('{"process": 1, "status": 7, "message": "why"}')
  monkeypatch.setattr(multihost.jax, 'process_index', lambda: 0)
  with multihost.ending_together() as failures:
    failures.share(tmp_path)
    time.sleep(0.1)
  assert ended == []
  assert (tmp_path / 'failure.json').read_text() == ''


def test_an_error_of_all_processes_propagates(tmp_path, ended):
  (tmp_path / 'failure.json').write_text('')
  with pytest.raises(NonFiniteLoss), multihost.ending_together() as failures:
    failures.share(tmp_path)
    raise NonFiniteLoss('why', 3)
  assert ended == []
  assert (tmp_path / 'failure.json').read_text() == ''


def test_a_process_ends_with_the_failure_of_another(tmp_path, ended, capsys, monkeypatch):
  """Also if its own error is a consequence of the other's end."""
  monkeypatch.setattr(multihost.threading, 'excepthook', lambda _: None)

  def store(**changes):
    values = {'process': 2, 'status': 7, 'message': 'why', **changes}
    (tmp_path / 'failure.json').write_text(json.dumps(values))

  with multihost.ending_together() as failures:
    failures.share(tmp_path)
    store(process=1)  # Its own.
    time.sleep(0.1)
    assert ended == []
    store()
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
      time.sleep(0.01)
  assert ended == [7]
  with pytest.raises(Ended), multihost.ending_together() as failures:
    failures.share(tmp_path)
    raise RuntimeError('the other is gone')
  assert set(ended) == {7}
  assert 'error: process 2 has ended: why\n' in capsys.readouterr().err
  time.sleep(0.1)
  count = len(ended)
  time.sleep(0.1)
  assert len(ended) == count  # The thread has ended.


@pytest.mark.parametrize('first', ['first', 'a longer text of the first'])
def test_all_get_the_text_of_the_first(processes, first):
  lengths = iter([len(first), first.encode()])

  def broadcast(mine):
    value = next(lengths)
    if isinstance(value, int):
      return np.int32(value)
    assert len(mine) == len(value)
    return np.frombuffer(value, np.uint8)

  processes.setattr(multihost.multihost_utils, 'broadcast_one_to_all', broadcast)
  assert multihost.text_of_first('of another') == first


@pytest.mark.parametrize(
  ('options', 'method'),
  [(('a:1', 3, 2), 'deactivate'), ((None, None, None), None)],
)
@pytest.mark.parametrize(('ids', 'devices'), [(None, None), ('0', [0]), ('1,2', [1, 2])])
def test_processes_join_with_the_given_options(monkeypatch, options, method, ids, devices):
  joined = []
  monkeypatch.setattr(
    multihost.jax.distributed, 'initialize', lambda *given, **more: joined.append((given, more))
  )
  names = ('coordinator_address', 'num_processes', 'process_id')
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '3')
  given = dict(zip(names, options, strict=True))
  multihost.join(distributed=options[0] is None, local_device_ids=ids, **given)
  more = {'cluster_detection_method': method, 'heartbeat_timeout_seconds': 100}
  assert joined == [((*options, devices), more)]

  def fail(*_, **__):
    raise RuntimeError('DEADLINE\nand more')

  monkeypatch.setattr(multihost.jax.distributed, 'initialize', fail)
  with pytest.raises(UserError, match=r'were not found \(DEADLINE\); give'):
    multihost.join(distributed=options[0] is None, **dict(zip(names, options, strict=True)))
