"""Batches on the devices come in order and without a gap, also when the loader fails."""

import contextlib
import errno
import gc
import mmap
import multiprocessing
import os
import re
import subprocess
import threading
import time
import types

import jax
import numpy as np
import pytest
from sources import (
  DyingVideos,
  FaultyVideos,
  NumberedVideos,
  bus_error,
  exit_silently,
  kill_self,
  raise_bad_input,
  raise_no_space,
  raise_runtime_error,
  wait_forever,
)

from dropmae_jax.config import DataOptions
from dropmae_jax.data import frame_pairs, loader, loader_process, prefetch
from dropmae_jax.data.prefetch import Interrupted, LoaderFailed, Prefetcher
from dropmae_jax.runtime.errors import UserError

STEPS = 12


def make_batches(videos, num_workers=0, num_threads=0, batch_size=4):
  options = DataOptions(frame_gap=4, num_workers=num_workers, num_threads=num_threads)
  return lambda step: frame_pairs.pair_batches(
    videos, options, image_size=16, batch_size=batch_size, seed=7, first_step=step
  )


def shared_memory(processes=()):
  """The shared memory of loader processes, by default of all that this process has started."""
  prefix = loader_process.run_prefix(os.getpid())
  own = tuple(f'{prefix}{process}-' for process in processes) or prefix
  return [path for path in loader_process.SHARED_MEMORY.iterdir() if path.name.startswith(own)]


def assert_no_shared_memory(processes=()):
  """Memory of dead processes is removed, and what the trainer has open is released soon."""
  deadline = time.monotonic() + 5
  while shared_memory(processes) and time.monotonic() < deadline:
    gc.collect()
    time.sleep(0.1)
  assert not shared_memory(processes)


def prefetching(make, *, first_step=0, stall_seconds=60.0):
  """A context of a prefetcher of frames."""
  return contextlib.closing(
    Prefetcher(
      make,
      first_step=first_step,
      to_device=lambda batch: jax.device_put(batch['frames'].copy()),
      stall_seconds=stall_seconds,
    )
  )


def logged(caplog):
  return [each.getMessage() for each in caplog.records if each.name == 'dropmae_jax']


def plain(count, first_step=0):
  stream = make_batches(NumberedVideos([10] * 24))(first_step)
  return [next(stream)['frames'] for _ in range(count)]


def assert_next(batches, count, first_step=0):
  for expected in plain(count, first_step):
    np.testing.assert_array_equal(next(batches), expected)


def started_processes(number=2):
  """The loader processes, once all run."""
  deadline = time.monotonic() + 30
  while len(loader_processes()) < number and time.monotonic() < deadline:
    time.sleep(0.01)
  return loader_processes()


def loader_processes():
  return [each for each in multiprocessing.active_children() if 'grain' in each.name]


@pytest.mark.parametrize(('num_workers', 'num_threads'), [(0, 0), (0, 2), (2, 0)])
def test_the_batches_are_those_of_the_plain_stream(num_workers, num_threads, caplog):
  videos = NumberedVideos([10] * 24)
  with prefetching(make_batches(videos, num_workers, num_threads), first_step=3) as batches:
    assert_next(batches, STEPS, first_step=3)
  assert logged(caplog) == []
  assert not loader_processes()
  assert 'prefetch' not in {thread.name for thread in threading.enumerate()}


def test_two_batches_are_ready_on_the_device_and_no_more():
  copied = []
  batches = Prefetcher(
    make_batches(NumberedVideos([10] * 24)),
    first_step=0,
    to_device=lambda batch: (
      copied.append(threading.current_thread().name),
      jax.device_put(batch['frames']),
    )[1],
    stall_seconds=60.0,
  )
  with contextlib.closing(batches):
    for taken in range(3):
      deadline = time.monotonic() + 10
      while len(copied) < taken + prefetch.AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
      time.sleep(0.2)
      assert copied == ['prefetch'] * (taken + prefetch.AHEAD)
      next(batches)


@pytest.mark.parametrize(
  ('fault', 'how'),
  [(kill_self, 'killed by signal 9'), (exit_silently, 'exit status 0')],
)
@pytest.mark.parametrize('first_step', [0, 4])
def test_a_loader_restarts_after_the_death_of_a_process(
  tmp_path, fault, how, first_step, monkeypatch, caplog
):
  """Also if it dies in its first batch, long before anything waits for that or checks it."""
  videos = FaultyVideos(fault, str(tmp_path / 'marker'))
  began = time.monotonic()
  may_watch, watch = threading.Event(), prefetch._Reader._watch
  monkeypatch.setattr(prefetch._Reader, '_watch', lambda reader: (may_watch.wait(), watch(reader)))
  with prefetching(make_batches(videos, num_workers=2), first_step=first_step) as batches:
    first = [process.pid for process in started_processes()]
    while first_step and len(loader_processes()) == len(first):
      time.sleep(0.01)
    may_watch.set()
    assert_next(batches, STEPS, first_step)
    assert shared_memory([process.pid for process in loader_processes()])
    assert_no_shared_memory(first)
  assert_no_shared_memory()
  assert (tmp_path / 'marker').exists()
  (message,) = logged(caplog)
  assert re.fullmatch(
    rf'a process of the loader died \({how}\), death 1 of this run; the loader is restarted from'
    r' step \d+',
    message,
  )
  assert time.monotonic() - began < 50
  assert not loader_processes()


@pytest.mark.parametrize('fault', [kill_self, pytest.param(exit_silently, marks=pytest.mark.slow)])
def test_deaths_in_a_row_end_the_run(fault, caplog):
  with (
    prefetching(make_batches(FaultyVideos(fault), num_workers=1)) as batches,
    pytest.raises(LoaderFailed, match=r'died 3 times in a row \(the last: .*lower config'),
  ):
    for _ in range(STEPS):
      next(batches)
  # Batches may have come between earlier deaths, but none between the last three.
  before_last, last = (re.search(r'from step (\d+)', line)[1] for line in logged(caplog)[-2:])
  assert before_last == last
  assert not loader_processes()


def test_deaths_with_batches_between_do_not(tmp_path, caplog):
  with prefetching(make_batches(DyingVideos(tmp_path, 4), num_workers=1)) as batches:
    assert_next(batches, 6)
  assert len(logged(caplog)) == 4
  assert 'death 4 of this run' in logged(caplog)[-1]


@pytest.mark.parametrize(
  ('num_workers', 'num_threads'),
  [pytest.param(0, 0, marks=pytest.mark.slow), (0, 1), (2, 0)],
)
def test_a_loader_that_hangs_ends_with_stacks(num_workers, num_threads, capfd, caplog):
  release = threading.Event()
  videos = FaultyVideos(wait_forever if num_workers else release.wait)
  stall = 15 if num_workers else 2  # Processes have to start within it.
  make = make_batches(videos, num_workers, num_threads)
  began = time.monotonic()
  message = f'no batch came within data.stall_seconds={stall}; log.txt shows where'
  with (
    prefetching(make, stall_seconds=stall) as batches,
    pytest.raises(LoaderFailed, match=message),
  ):
    for _ in range(STEPS):
      next(batches)
  assert time.monotonic() - began < 2 * stall + 10
  (message,) = logged(caplog)
  assert 'the loader hangs' in message
  assert '__next__' in message
  assert 'prefetch.py' in message
  if num_workers:
    err = capfd.readouterr().err
    print(err)
    assert 'wait_forever' in err
  release.set()
  time.sleep(0.2)
  assert not loader_processes()


def test_a_run_that_is_to_stop_does_not_wait_for_a_loader_that_hangs(monkeypatch):
  monkeypatch.setattr(prefetch, 'END_SECONDS', 0.5)
  hangs, release = threading.Event(), threading.Event()
  batches = Prefetcher(
    make_batches(FaultyVideos(lambda: (hangs.set(), release.wait()))),
    first_step=0,
    to_device=lambda batch: jax.device_put(batch['frames']),
    stall_seconds=60.0,
    is_interrupted=hangs.is_set,
  )
  try:
    with pytest.raises(Interrupted):
      for _ in range(STEPS):
        next(batches)
    batches.close()  # Raises LoaderStalled if it waits for the thread.
  finally:
    release.set()


@pytest.mark.parametrize(('num_workers', 'num_threads'), [(0, 0), (0, 2), (2, 0)])
@pytest.mark.parametrize('fault', [raise_bad_input, raise_runtime_error])
def test_an_error_of_reading_is_raised_and_nothing_is_restarted(
  num_workers, num_threads, fault, caplog
):
  with (
    prefetching(make_batches(FaultyVideos(fault), num_workers, num_threads)) as batches,
    pytest.raises((UserError, RuntimeError), match='video 5 is') as raised,
  ):
    for _ in range(STEPS):
      next(batches)
  assert not isinstance(raised.value, LoaderFailed)
  assert logged(caplog) == []
  assert not loader_processes()


@pytest.mark.parametrize('pairs', loader.CHUNK_PAIRS[::2])
def test_shared_memory_does_not_grow_with_the_batch(pairs, monkeypatch):
  """Far ahead of the step, a loader uses as much as it may. Where less is free, it uses less."""
  num_workers, chunks_per_batch = 2, 20
  videos = NumberedVideos([10] * 24)
  make = make_batches(videos, num_workers, batch_size=chunks_per_batch * loader.CHUNK_PAIRS[0])
  of_process = loader.CHUNKS_PER_WORKER * pairs * 2 * 16 * 16 * 3
  monkeypatch.setattr(loader_process, 'free_memory', lambda: num_workers * of_process)
  with prefetching(make) as batches:
    next(batches)
    time.sleep(1)
    sizes = [path.stat().st_size for path in shared_memory()]
    assert len(sizes) == num_workers
    assert all(of_process < size <= of_process + 2 * mmap.PAGESIZE for size in sizes)
    with contextlib.closing(make(1)) as stream:
      for _ in range(3):
        np.testing.assert_array_equal(next(batches), next(stream)['frames'])
  assert_no_shared_memory()


def test_memory_is_allocated_whole_or_not_at_all(monkeypatch):
  writer = loader_process.RingWriter(3, (100, 1000))
  memory = loader_process.SHARED_MEMORY / writer.name
  assert memory.stat().st_blocks * 512 >= 300_000  # Really allocated.
  writer.close()

  def no_room(descriptor, offset, size):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(loader_process.os, 'posix_fallocate', no_room)
  before = set(loader_process.SHARED_MEMORY.iterdir())
  with pytest.raises(OSError, match='No space left'):
    loader_process.RingWriter(3, (100, 1000))
  assert set(loader_process.SHARED_MEMORY.iterdir()) <= before


def test_a_process_waits_until_the_trainer_has_read_a_slot():
  """It may overwrite a chunk only after the trainer has copied it."""
  writer, reader = loader_process.RingWriter(3, (2, 4)), loader_process.RingReader()
  slots = []
  for number in range(3):
    slot, out = writer.next_slot()
    out[:] = number
    slots.append(slot)
  ahead = threading.Thread(target=lambda: slots.append(writer.next_slot()[0]), daemon=True)
  ahead.start()
  ahead.join(0.2)
  assert ahead.is_alive()
  for number in range(3):
    copy = np.empty((2, 4), np.uint8)
    reader.copy(slots[number], copy)
    assert (copy == number).all()
    ahead.join(10)
    assert not ahead.is_alive()
  assert slots[3].number == 3
  for _ in range(2):
    writer.next_slot()
  reader.stop()
  writer.next_slot()  # Does not wait.
  reader.close()
  assert_no_shared_memory()


def test_too_little_shared_memory_is_refused_before_processes_start(monkeypatch):
  system = types.SimpleNamespace(f_bavail=2, f_frsize=4096)
  monkeypatch.setattr(loader_process.os, 'statvfs', lambda _: system)
  with (
    prefetching(make_batches(NumberedVideos([10] * 24), 12, batch_size=4096)) as batches,
    pytest.raises(
      UserError, match=r'num_workers=12 needs 1 MB of shared .* has 0 MB free; lower .*--shm-size'
    ),
  ):
    next(batches)
  assert not loader_processes()


@pytest.mark.parametrize(('fault', 'how'), [(bus_error, LoaderFailed), (raise_no_space, UserError)])
def test_full_shared_memory_is_named_as_the_cause(fault, how):
  with (
    prefetching(make_batches(FaultyVideos(fault), num_workers=1)) as batches,
    pytest.raises(how, match=r'/dev/shm is full.*--shm-size'),
  ):
    for _ in range(STEPS):
      next(batches)


def test_only_memory_of_dead_runs_is_removed():
  dead = subprocess.Popen(['true'])
  dead.wait()
  own = loader_process.run_prefix(os.getpid())
  elsewhere = f'dropmae-1-{dead.pid}-1-x'  # Its trainer may be alive in another container.
  names = f'{loader_process.run_prefix(dead.pid)}1-x', f'{own}{dead.pid}-x', f'{own}1-x', elsewhere
  paths = [loader_process.SHARED_MEMORY / name for name in names]
  for path in paths:
    path.touch()
  with contextlib.closing(make_batches(NumberedVideos([10]), 1)(0)):
    pass  # A loader that begins removes it.
  assert [path.exists() for path in paths] == [False, True, True, True]
  loader_process.unlink_memory_of_dead_processes()
  assert [path.exists() for path in paths] == [False, False, True, True]
  for path in paths[2:]:
    path.unlink()


def test_an_error_of_starting_is_raised():
  def make(step):
    raise UserError(f'nothing at {step}')

  with (
    prefetching(make, first_step=5) as batches,
    pytest.raises(UserError, match='nothing at 5'),
  ):
    next(batches)


def test_copies_are_explicit_and_do_not_change_the_transfer_guard_of_the_loop():
  make = make_batches(NumberedVideos([10] * 24))
  with prefetching(make) as batches, jax.transfer_guard('disallow'):
    frames = [next(batches) for _ in range(3)]
    jax.jit(lambda x: x + x)(frames[0])
    with pytest.raises(Exception, match=r'[Dd]isallow'):
      jax.jit(lambda x: x + x)(np.ones(3))


def test_stop_signals_do_not_end_processes_that_are_starting(caplog):
  """It takes them a second until they ignore the signals themselves."""
  with prefetching(make_batches(NumberedVideos([10] * 24), num_workers=2)) as batches:
    hit = set()
    deadline = time.monotonic() + 30
    while len(hit) < 2 and time.monotonic() < deadline:
      for process in loader_processes():
        if process.pid not in hit:
          for number in loader_process.STOP_SIGNALS:
            os.kill(process.pid, number)
          hit.add(process.pid)
    assert len(hit) == 2
    assert_next(batches, 4)
  assert logged(caplog) == []
