"""What a run reports of its steps: exact numbers, with a clock that the tests set.

Intervals, batch sizes and first steps all differ, so that a mix-up changes a number.
"""

import errno
import io
import json
import logging
import os
import sys
import threading
import time
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dropmae_jax.runtime import report
from dropmae_jax.runtime.report import NonFiniteLoss, Report
from dropmae_jax.train_step import Metrics

log = logging.getLogger('dropmae_jax')


class OnDevice:
  """A number on a device, ready when `done` is set."""

  def __init__(self, value, *, is_done):
    self.value, self.done = np.float32(value), threading.Event()
    if is_done:
      self.done.set()

  def block_until_ready(self):
    assert self.done.wait(30)
    return self

  def __array__(self, *_, **__):
    return np.asarray(self.value)


def metrics_at(step, *, is_done=True, **other):
  values = {'loss': step / 4, 'learning_rate': step / 1024, 'gradient_norm': step * 2.0, **other}
  return Metrics(**{name: OnDevice(value, is_done=is_done) for name, value in values.items()})


@pytest.fixture
def clock(monkeypatch):
  """A clock that shows `now`, which tests set."""
  clock = types.SimpleNamespace(now=100.0, time=time.time)
  clock.perf_counter = lambda: clock.now
  monkeypatch.setattr(report, 'time', clock)
  return clock


@pytest.fixture
def opened(tmp_path, monkeypatch):
  """Opens reports, and closes those that a test left open."""
  closed, real = [], Report.close
  monkeypatch.setattr(Report, 'close', lambda reporter: closed.append(reporter) or real(reporter))
  reports = []

  def make(**options):
    defaults = {'first_step': 0, 'num_steps': 18, 'batch_size': 3, 'log_every': 5}
    reports.append(Report(tmp_path, **(defaults | options)))
    return reports[-1]

  yield make
  for each in reports:
    if each not in closed:
      each.close()


def metrics_of(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def take_steps(reporter, clock, times):
  """Reports steps, each at its time."""
  for step, now in times.items():
    clock.now = now
    reporter.after_step(step, metrics_at(step))


def test_each_line_covers_the_steps_since_the_last_line(tmp_path, clock, opened):
  # The step before the first one, of which the last start has written no line, had 1.0.
  reporter = opened(first_step=7, losses=(1.0,), plateau=(3.0, 4.5))
  take_steps(reporter, clock, {8: 129.0})
  clock.now = 130.0
  reporter.compiled(8)
  take_steps(reporter, clock, {9: 131.0, 10: 134.0, 11: 139.0, 12: 140.0, 13: 142.0, 14: 143.0})
  take_steps(reporter, clock, {15: 146.5})
  with reporter.paused():  # As scores are taken.
    clock.now += 100.0
  take_steps(reporter, clock, {16: 247.0, 17: 247.5, 18: 248.5})
  reporter.close()
  rows = metrics_of(tmp_path)
  # Three pairs a step: two steps in 4 s, five in 12.5 s, and three in 2 s.
  assert [(row['step'], row['pairs_per_second']) for row in rows] == [
    (10, 1.5), (15, 1.2), (18, 4.5),
  ]  # fmt: skip
  for row in rows:
    step = row['step']
    assert (row['loss'], row['learning_rate']) == (step / 4, step / 1024)
    assert (row['gradient_norm'], row['data_wait']) == (step * 2, 0)
  assert [row['loss_mean'] for row in rows] == [1.9375, 3.25, 4.25]
  lines = [line.split(' ', 2)[2] for line in (tmp_path / 'log.txt').read_text().splitlines()]
  assert lines == [
    'first step, compilation included: 30.0 s',
    # Time left: eight steps of 2 s, three of 2.5 s, none.
    'step 10/18  loss 2.5000 (mean 1.9375)  lr 9.77e-03  grad 20.000  1.5 pairs/s'
    '  data wait 0%  left 16 s',
    'step 15/18  loss 3.7500 (mean 3.2500)  lr 1.46e-02  grad 30.000  1.2 pairs/s'
    '  data wait 0%  left 8 s',
    report.ON_PLATEAU,
    'step 18/18  loss 4.5000 (mean 4.2500)  lr 1.76e-02  grad 36.000  4.5 pairs/s'
    '  data wait 0%  left 0 s',
  ]
  assert_same_in_tensorboard(tmp_path, rows)


def assert_same_in_tensorboard(folder, rows):
  """The events that TensorBoard reads have the steps and values of metrics.jsonl."""
  events = EventAccumulator(str(folder / 'tensorboard'))
  events.Reload()
  names = set(rows[0]) - {'step'}
  assert set(events.Tags()['scalars']) == names
  for name in names:
    scalars = [(event.step, event.value) for event in events.Scalars(name)]
    assert scalars == [(row['step'], pytest.approx(row[name])) for row in rows]


def test_scalars_go_on_in_another_file_when_there_is_room_again(
  tmp_path, opened, monkeypatch, capsys
):
  reporter = opened()
  reporter.after_step(5, metrics_at(5))
  with monkeypatch.context() as full:

    def write(*_):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full.setattr(report.RecordWriter, 'write', write)
    for step in (10, 15):
      reporter.after_step(step, metrics_at(step))
  reporter.after_step(18, metrics_at(18))
  reporter.close()
  told = f'{tmp_path}/tensorboard cannot be written (No space left on device); training goes on'
  assert capsys.readouterr().out.count(told) == 1
  rows = metrics_of(tmp_path)
  assert [row['step'] for row in rows] == [5, 10, 15, 18]
  assert_same_in_tensorboard(tmp_path, [rows[0], rows[3]])


def test_a_line_at_the_first_step_includes_the_time_of_compilation(tmp_path, clock, opened):
  reporter = opened(first_step=9)
  take_steps(reporter, clock, {10: 112.0})
  reporter.compiled(10)
  take_steps(reporter, clock, dict.fromkeys(range(11, 16), 122.0))
  reporter.close()
  assert [row['pairs_per_second'] for row in metrics_of(tmp_path)] == [3 / 12, 15 / 10]


def test_data_wait_counts_only_time_in_which_the_devices_are_idle(tmp_path, clock, opened):
  reporter = opened(first_step=5)

  def take(step, *, since, came):
    clock.now = came
    reporter.batch_arrived(since)
    metrics = metrics_at(step, is_done=False)
    reporter.after_step(step, metrics)
    return metrics, reporter._finished

  def finish(step, now):
    clock.now = now
    metrics, finished = step
    for each in metrics:
      each.done.set()
    finished.result(30)  # Set by another thread.

  sixth = take(6, since=100.0, came=104.0)  # The first batch is part of the start.
  seventh = take(7, since=104.0, came=107.0)  # Step 6 is still running.
  finish(sixth, 107.5)
  finish(seventh, 108.0)
  eighth = take(8, since=109.0, came=111.0)  # Step 7 ended before: 2 s.
  finish(eighth, 112.5)
  ninth = take(9, since=111.5, came=113.0)  # Step 8 ended meanwhile: 0.5 s.
  finish(ninth, 114.0)
  clock.now = 120.0
  reporter.after_step(10, metrics_at(10))
  reporter._finished.result(30)
  clock.now = 121.0
  reporter.compiled(10)
  eleventh = take(11, since=119.0, came=122.0)  # Only the last second is in this window.
  finish(eleventh, 123.0)
  take_steps(reporter, clock, {12: 123.0, 13: 123.0, 14: 123.0, 15: 125.0})
  reporter.close()
  assert [row['data_wait'] for row in metrics_of(tmp_path)] == [2.5 / 20, 1 / 4]
  assert 'data wait 12%' in (tmp_path / 'log.txt').read_text()


@pytest.mark.parametrize('bad', ['loss', 'gradient_norm'])
@pytest.mark.parametrize('number', [0, 1])
def test_the_first_step_that_is_not_finite_is_named_on_every_process(
  tmp_path, opened, monkeypatch, bad, number
):
  """At the next line, or before a checkpoint."""
  monkeypatch.setattr(report.jax, 'process_index', lambda: number)
  reporter = opened(first_step=6)
  for step in (7, 8, 9):
    reporter.after_step(step, metrics_at(step, **{bad: np.nan} if step > 7 else {}))
  for find in (reporter.check_finite, lambda: reporter.after_step(10, metrics_at(10))):
    with pytest.raises(NonFiniteLoss, match=f'the {bad} of step 8 is nan; the last') as caught:
      find()
    assert caught.value.step == 8
  reporter.close()
  if number == 0:
    assert metrics_of(tmp_path) == []


def test_only_the_first_process_writes(tmp_path, opened, monkeypatch, capsys):
  monkeypatch.setattr(report.jax, 'process_index', lambda: 2)
  reporter = opened()
  log.info('a note')
  log.warning('a fault')
  reporter.after_step(5, metrics_at(5))
  reporter.compiled(5)
  reporter.close()
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr() == ('', 'process 2: a fault\n')


def test_a_restart_drops_the_lines_of_steps_that_will_be_repeated(tmp_path, opened):
  lines = [json.dumps({'step': step, 'loss': 1.0}) for step in (5, 10, 11, 15)]
  whole = '\n'.join([*lines, 'no json', '{"loss": 3}', '{"step": 1'])  # The last line is cut short.
  (tmp_path / 'metrics.jsonl').write_bytes(b'\xff\0\n' + whole.encode() + b'\xc3')
  reporter = opened(first_step=10)
  assert (tmp_path / 'metrics.jsonl').read_text() == f'{lines[0]}\n{lines[1]}\n'
  reporter.after_step(15, metrics_at(15))
  reporter.close()
  assert [row['step'] for row in metrics_of(tmp_path)] == [5, 10, 15]
  assert not list(tmp_path.glob('*.partial'))


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize('is_terminal', [False, True])
def test_lines_are_shown_once_and_a_terminal_has_a_bar(
  tmp_path, opened, monkeypatch, capsys, is_terminal
):
  errors = Terminal() if is_terminal else io.StringIO()
  monkeypatch.setattr(sys, 'stderr', errors)
  before = list(log.handlers)
  reporter = opened(first_step=8, log_every=2)
  log.info('a note of 100 %')
  log.warning('a fault')
  for step in (9, 10):
    reporter.after_step(step, metrics_at(step))
  reporter.close()
  # As they are without a report.
  assert (log.handlers, log.level, log.propagate) == (before, logging.NOTSET, True)
  shown, kept = capsys.readouterr().out, (tmp_path / 'log.txt').read_text()
  for text in (shown, kept):
    assert [text.count(line) for line in ('a note of 100 %\n', 'a fault\n')] == [1, 1]
  # Above a bar lines have no time, and the numbers of a step are in the bar.
  assert shown.startswith('a note') == is_terminal
  assert 'step 10/18' in kept
  assert ('step 10/18' in shown) != is_terminal
  assert ('10/18' in errors.getvalue()) == ('loss 2.5' in errors.getvalue()) == is_terminal


class Gone(Terminal):
  """A terminal that is closed."""

  def write(self, _):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_is_logged_forges_no_line(tmp_path, opened, capsys):
  """A stack is several lines, but none of them are of the error's making."""
  reporter = opened()
  log.warning('video a\n2026-01-01 step 9\x1b[2J\u202e cannot be read')
  try:
    raise ValueError('b\x1b[2J')
  except ValueError:
    log.exception('c')
  reporter.close()
  for text in (capsys.readouterr().out, (tmp_path / 'log.txt').read_text()):
    first, *stack = text.splitlines()
    assert first.endswith(r'video a\n2026-01-01 step 9\u001b[2J\u202e cannot be read')
    assert stack[0].endswith('c') and stack[-1] == r'ValueError: b\u001b[2J'
    assert all(line.isprintable() for line in stack)


@pytest.mark.parametrize('errors', [Gone, Terminal, io.StringIO])
def test_a_terminal_that_is_closed_does_not_end_a_run(tmp_path, opened, monkeypatch, errors):
  monkeypatch.setattr(sys, 'stderr', Terminal())
  reporter = opened()
  monkeypatch.setattr(reporter._bar, 'fp', errors())
  for handler in reporter._handlers:
    if type(handler) is not report._LogFile:
      handler.setStream(Gone())
  log.info('a note')
  for step in (5, 10, 15, 18):
    reporter.after_step(step, metrics_at(step))
  reporter.close()
  assert 'a note\n' in (tmp_path / 'log.txt').read_text()
  assert [row['step'] for row in metrics_of(tmp_path)] == [5, 10, 15, 18]
