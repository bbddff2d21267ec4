"""Batches come in order and without a gap, whatever threads fill them, and faults come through."""

import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from processes import running

from dropmae_jax.data import loader
from dropmae_jax.data.loader import Interrupted, Loader, LoaderStalled

ROWS = 4


def numbered(step, row, out):
  """Fills a row with its number in the stream, not at once."""
  time.sleep(0.0005 * ((step * 7 + row * 3) % 5))
  out[row] = step * ROWS + row


def load(fill=numbered, **options):
  return Loader(fill, lambda: np.zeros(ROWS, int), np.copy, rows=ROWS, **options)


@pytest.mark.parametrize('num_threads', [1, 2, 7])
@pytest.mark.parametrize('first_step', [0, 5])
def test_the_stream_is_a_function_of_the_step(num_threads, first_step):
  batches = load(num_threads=num_threads, first_step=first_step)
  for step in range(first_step, first_step + 12):
    np.testing.assert_array_equal(next(batches), step * ROWS + np.arange(ROWS))
  batches.close()


def test_every_row_is_filled_once_and_no_buffer_before_it_was_moved():
  filled, lock = [], threading.Lock()
  held = {}

  def fill(step, row, out):
    with lock:
      filled.append((step, row))
      assert held.setdefault(id(out), step) == step
    numbered(step, row, out)

  def move(buffer):
    held.pop(id(buffer))
    return buffer.copy()

  batches = Loader(fill, lambda: np.zeros(ROWS, int), move, rows=ROWS, num_threads=5)
  for _ in range(20):
    next(batches)
  batches.close()
  assert len(filled) == len(set(filled))
  assert set(filled) >= {(step, row) for step in range(20) for row in range(ROWS)}


class Late:
  """A batch on a device that is copied from its buffer only when somebody waits for it."""

  def __init__(self, buffer):
    self.buffer, self.copy = buffer, None

  def block_until_ready(self):
    self.copy = self.buffer.copy()
    return self


def test_a_buffer_is_not_filled_again_before_it_has_arrived():
  batches = Loader(numbered, lambda: np.zeros(ROWS, int), Late, rows=ROWS, num_threads=3)
  for step in range(8):
    np.testing.assert_array_equal(next(batches).copy, step * ROWS + np.arange(ROWS))
  batches.close()


def test_two_batches_are_ready_and_no_more():
  moved = []

  def move(buffer):
    moved.append(buffer[0] // ROWS)
    return buffer.copy()

  batches = Loader(numbered, lambda: np.zeros(ROWS, int), move, rows=ROWS, num_threads=2)
  for taken in range(4):
    deadline = time.monotonic() + 60
    while len(moved) < taken + loader.AHEAD:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    time.sleep(0.1)  # For more.
    assert moved == list(range(taken + loader.AHEAD))
    next(batches)
  batches.close()


def test_an_error_comes_where_its_batch_would():
  def fill(step, row, out):
    numbered(step, row, out)
    if step == 3 and row in (1, 2):
      time.sleep(0.05 if row == 1 else 0)
      raise ValueError(f'row {row}')

  batches = load(fill, num_threads=3)
  for step in range(3):
    np.testing.assert_array_equal(next(batches), step * ROWS + np.arange(ROWS))
  for _ in range(2):
    with pytest.raises(ValueError, match='row 1'):
      next(batches)
  batches.close()


def test_a_loader_that_hangs_ends_with_stacks(monkeypatch, caplog):
  monkeypatch.setattr(loader, 'POLL_SECONDS', 0.05)
  monkeypatch.setattr(loader, 'END_SECONDS', 0.1)
  released = threading.Event()

  def wait_for_the_storage(step, row, out):
    if step == 1:
      released.wait()
    numbered(step, row, out)

  batches = load(wait_for_the_storage, num_threads=2, stall_seconds=0.3)
  next(batches)
  with pytest.raises(LoaderStalled, match=r'no batch came within data\.stall_seconds=0\.3'):
    next(batches)
  assert 'in wait_for_the_storage' in caplog.text
  batches.close()  # At once.
  released.set()


def test_a_thread_that_does_not_end_is_told(monkeypatch):
  monkeypatch.setattr(loader, 'END_SECONDS', 0.1)
  released = threading.Event()
  batches = load(lambda *_: released.wait())
  with pytest.raises(LoaderStalled, match=r'did not end within 0\.1 s'):
    batches.close()
  released.set()


def test_a_run_that_is_to_stop_does_not_wait(monkeypatch):
  monkeypatch.setattr(loader, 'POLL_SECONDS', 0.05)
  released = threading.Event()
  batches = load(lambda *_: released.wait(), is_interrupted=lambda: True)
  with pytest.raises(Interrupted):
    next(batches)
  released.set()
  batches.close()


def test_no_thread_and_no_file_is_left():
  def state():
    return set(threading.enumerate()), set(os.listdir('/proc/self/fd'))

  jax.devices()
  before = state()
  for _ in range(3):
    batches = load(num_threads=3)
    next(batches)
    batches.close()
  threads, files = state()
  assert (threads <= before[0], files) == (True, before[1])


# Each row takes two seconds of this process's own time, with a limit of three.
SLOW = """
import time
from dropmae_jax.data.loader import Loader
def fill(step, row, out):
  for _ in range(10):
    time.sleep(0.1)
batches = Loader(fill, list, lambda _: 'moved', rows=1, num_threads=1, stall_seconds=3)
print('ready', flush=True)
print(next(batches), flush=True)
"""


def test_no_time_passes_while_the_process_is_suspended():
  with running('-c', SLOW) as process:
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.stdout.readline() == 'moved\n', process.stderr.read()
