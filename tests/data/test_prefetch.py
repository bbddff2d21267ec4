"""Batches on the devices: in order and without a gap, whatever happens to the loader."""

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
  FaultyVideos,
  MortalVideos,
  NumberedVideos,
  bus_error,
  exit_without_a_word,
  kill_self,
  raise_bad_input,
  raise_no_space,
  raise_runtime_error,
  wait_for_ever,
)

from dropmae_jax.config import DataOptions
from dropmae_jax.data import frame_pairs, loader_process, prefetch
from dropmae_jax.data import loader as blocks
from dropmae_jax.data.prefetch import Feed, LoaderFailed
from dropmae_jax.runtime.errors import UserError

STEPS = 12


def make_batches(videos, num_workers=0, num_threads=0, batch_size=4):
  options = DataOptions(frame_gap=4, num_workers=num_workers, num_threads=num_threads)
  return lambda step: frame_pairs.pair_batches(
    videos, options, image_size=16, batch_size=batch_size, seed=7, first_step=step
  )


def blocks_in_memory(processes=()):
  """The shared memory of loader processes, by default of all that this process has had."""
  prefix = loader_process.run_prefix(os.getpid())
  own = tuple(f'{prefix}{process}-' for process in processes) or prefix
  return [path for path in loader_process.SHARED_MEMORY.iterdir() if path.name.startswith(own)]


def assert_no_blocks(processes=()):
  """What the trainer holds it lets go soon; what it does not know of has to be removed."""
  deadline = time.monotonic() + 5
  while blocks_in_memory(processes) and time.monotonic() < deadline:
    gc.collect()
    time.sleep(0.1)
  assert not blocks_in_memory(processes)


@contextlib.contextmanager
def feeding(make, *, first_step=0, stall_seconds=60.0):
  """Yields a feed of frames, and the list of what it says."""
  said = []
  fed = Feed(
    make,
    first_step=first_step,
    to_device=lambda batch: jax.device_put(batch['frames'].copy()),
    stall_seconds=stall_seconds,
    say=said.append,
  )
  with contextlib.closing(fed):
    yield fed, said


def plain(count, first_step=0):
  stream = make_batches(NumberedVideos([10] * 24))(first_step)
  return [next(stream)['frames'] for _ in range(count)]


def assert_fed(fed, count, first_step=0):
  for expected in plain(count, first_step):
    np.testing.assert_array_equal(next(fed), expected)


def assert_fed_like(fed, make, count):
  """The next batches of a feed that has given one are those of another loader."""
  with contextlib.closing(make(1)) as stream:
    for _ in range(count):
      np.testing.assert_array_equal(next(fed), next(stream)['frames'])


def started_processes(number=2):
  """The loader's processes, once all are there."""
  deadline = time.monotonic() + 30
  while len(loader_processes()) < number and time.monotonic() < deadline:
    time.sleep(0.01)
  return loader_processes()


def loader_processes():
  return [each for each in multiprocessing.active_children() if 'grain' in each.name]


@pytest.mark.parametrize(('num_workers', 'num_threads'), [(0, 0), (0, 2), (2, 0)])
def test_the_feed_is_the_plain_stream(num_workers, num_threads):
  videos = NumberedVideos([10] * 24)
  with feeding(make_batches(videos, num_workers, num_threads), first_step=3) as (fed, said):
    assert_fed(fed, STEPS, first_step=3)
  assert said == []
  assert not loader_processes()
  assert 'feed' not in {thread.name for thread in threading.enumerate()}


def test_two_batches_lie_ahead_on_the_device_and_no_more():
  copied = []
  fed = Feed(
    make_batches(NumberedVideos([10] * 24)),
    first_step=0,
    to_device=lambda batch: (
      copied.append(threading.current_thread().name),
      jax.device_put(batch['frames']),
    )[1],
    stall_seconds=60.0,
    say=print,
  )
  with contextlib.closing(fed):
    for taken in range(3):
      deadline = time.monotonic() + 10
      while len(copied) < taken + prefetch.AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
      time.sleep(0.2)
      assert copied == ['feed'] * (taken + prefetch.AHEAD)
      next(fed)


@pytest.mark.parametrize(
  ('fault', 'how'),
  [(kill_self, 'killed by signal 9'), (exit_without_a_word, 'exit status 0')],
)
@pytest.mark.parametrize('first_step', [0, 4])
def test_the_stream_goes_on_after_a_dead_process(tmp_path, fault, how, first_step, monkeypatch):
  """Also if it dies in its first batch, long before anyone asks for that or looks after it."""
  videos = FaultyVideos(fault, str(tmp_path / 'marker'))
  began = time.monotonic()
  held_up, watch = threading.Event(), prefetch._Reader._watch
  monkeypatch.setattr(prefetch._Reader, '_watch', lambda reader: (held_up.wait(), watch(reader)))
  with feeding(make_batches(videos, num_workers=2), first_step=first_step) as (fed, said):
    first = [process.pid for process in started_processes()]
    while first_step and len(loader_processes()) == len(first):
      time.sleep(0.01)
    held_up.set()
    assert_fed(fed, STEPS, first_step)
    assert blocks_in_memory([process.pid for process in loader_processes()])
    assert_no_blocks(first)
  assert_no_blocks()
  assert (tmp_path / 'marker').exists()
  assert len(said) == 1
  assert said[0].startswith(f'a process of the loader died ({how}), death 1 of this run; it is')
  assert time.monotonic() - began < 50
  assert not loader_processes()


@pytest.mark.parametrize('fault', [kill_self, exit_without_a_word])
def test_deaths_in_a_row_end_it(fault):
  with (
    feeding(make_batches(FaultyVideos(fault), num_workers=1)) as (fed, said),
    pytest.raises(LoaderFailed, match=r'died 3 times in a row \(the last: .*lower config'),
  ):
    for _ in range(STEPS):
      next(fed)
  # Whether batches came between the deaths before is chance; between the last three none did.
  before_last, last = (re.search(r'from step (\d+)', line)[1] for line in said[-2:])
  assert before_last == last
  assert not loader_processes()


def test_deaths_with_batches_between_do_not(tmp_path):
  with feeding(make_batches(MortalVideos(tmp_path, 4), num_workers=1)) as (fed, said):
    assert_fed(fed, 6)
  assert len(said) == 4
  assert 'death 4 of this run' in said[-1]


@pytest.mark.parametrize(
  ('num_workers', 'num_threads'),
  [(0, 0), (0, 1), pytest.param(2, 0, marks=pytest.mark.slow)],
)
def test_a_loader_that_hangs_ends_with_stacks(num_workers, num_threads, capfd):
  release = threading.Event()
  videos = FaultyVideos(wait_for_ever if num_workers else release.wait)
  stall = 15 if num_workers else 2  # Processes have to start within it.
  make = make_batches(videos, num_workers, num_threads)
  began = time.monotonic()
  message = f'no batch came within data.stall_seconds={stall}; log.txt shows where'
  with (
    feeding(make, stall_seconds=stall) as (fed, said),
    pytest.raises(LoaderFailed, match=message),
  ):
    for _ in range(STEPS):
      next(fed)
  assert time.monotonic() - began < 2 * stall + 10
  assert 'the loader hangs' in said[0]
  assert '__next__' in said[0]
  assert 'feed.py' in said[0]
  if num_workers:
    err = capfd.readouterr().err
    print(err)
    assert 'wait_for_ever' in err
  release.set()
  time.sleep(0.2)
  assert not loader_processes()


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('fault', [raise_bad_input, raise_runtime_error])
def test_an_error_of_reading_is_told_and_nothing_is_built_anew(num_workers, fault):
  with (
    feeding(make_batches(FaultyVideos(fault), num_workers)) as (fed, said),
    pytest.raises((UserError, RuntimeError), match='video 5 is') as told,
  ):
    for _ in range(STEPS):
      next(fed)
  assert not isinstance(told.value, LoaderFailed)
  assert said == []
  assert not loader_processes()


@pytest.mark.parametrize('pairs', blocks.BLOCK_PAIRS[::2])
def test_the_memory_that_is_shared_does_not_grow_with_the_batch(pairs, monkeypatch):
  """A loader that nobody waits for fills what it may, and no more; where there is less, less."""
  num_workers, blocks_per_batch = 2, 20
  videos = NumberedVideos([10] * 24)
  make = make_batches(videos, num_workers, batch_size=blocks_per_batch * blocks.BLOCK_PAIRS[0])
  of_process = blocks.BLOCKS_PER_WORKER * pairs * 2 * 16 * 16 * 3
  monkeypatch.setattr(loader_process, 'free_memory', lambda: num_workers * of_process)
  with feeding(make) as (fed, _):
    next(fed)
    time.sleep(1)
    sizes = [block.stat().st_size for block in blocks_in_memory()]
    assert len(sizes) == num_workers
    assert all(of_process < size <= of_process + 2 * mmap.PAGESIZE for size in sizes)
    assert_fed_like(fed, make, 3)
  assert_no_blocks()


def test_memory_is_taken_whole_or_not_at_all(monkeypatch):
  writer, number = loader_process.RingWriter(3, (100, 1000)), os.getpid()
  (block,) = [each for each in loader_process.SHARED_MEMORY.iterdir() if each.name == writer.name]
  assert block.stat().st_blocks * 512 >= 300_000  # Not only promised.
  writer.close()

  def no_room(descriptor, offset, size):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(loader_process.os, 'posix_fallocate', no_room)
  before = set(loader_process.SHARED_MEMORY.iterdir())
  with pytest.raises(OSError, match='No space left'):
    loader_process.RingWriter(3, (100, 1000))
  assert set(loader_process.SHARED_MEMORY.iterdir()) <= before, number


def test_a_process_waits_where_the_trainer_reads_none_of_its_slots():
  """It may overwrite a block only once the trainer has copied it."""
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
  assert_no_blocks()


def test_no_room_for_the_processes_is_told_before_they_start(monkeypatch):
  system = types.SimpleNamespace(f_bavail=2, f_frsize=4096)
  monkeypatch.setattr(loader_process.os, 'statvfs', lambda _: system)
  with (
    feeding(make_batches(NumberedVideos([10] * 24), num_workers=12, batch_size=4096)) as (fed, _),
    pytest.raises(
      UserError, match=r'num_workers=12 needs 1 MB of shared .* has 0 MB free; lower .*--shm-size'
    ),
  ):
    next(fed)
  assert not loader_processes()


@pytest.mark.parametrize(('fault', 'how'), [(bus_error, LoaderFailed), (raise_no_space, UserError)])
def test_shared_memory_that_is_full_is_told(fault, how):
  with (
    feeding(make_batches(FaultyVideos(fault), num_workers=1)) as (fed, _),
    pytest.raises(how, match=r'/dev/shm is full.*--shm-size'),
  ):
    for _ in range(STEPS):
      next(fed)


def test_only_blocks_of_dead_runs_are_removed():
  dead = subprocess.Popen(['true'])
  dead.wait()
  own = loader_process.run_prefix(os.getpid())
  elsewhere = f'dropmae-1-{dead.pid}-1-x'  # Its trainer may be alive in another container.
  names = f'{loader_process.run_prefix(dead.pid)}1-x', f'{own}{dead.pid}-x', f'{own}1-x', elsewhere
  blocks = [loader_process.SHARED_MEMORY / name for name in names]
  for block in blocks:
    block.touch()
  loader_process.unlink_blocks_of_dead_runs()
  assert [block.exists() for block in blocks] == [False, True, True, True]
  loader_process.unlink_blocks_of_dead_processes()
  assert [block.exists() for block in blocks] == [False, False, True, True]
  for block in blocks[2:]:
    block.unlink()


def test_an_error_of_starting_is_told():
  def make(step):
    raise UserError(f'nothing at {step}')

  with feeding(make, first_step=5) as (fed, _), pytest.raises(UserError, match='nothing at 5'):
    next(fed)


def test_copies_are_explicit_and_leave_the_guard_of_the_loop_alone():
  with feeding(make_batches(NumberedVideos([10] * 24))) as (fed, _), jax.transfer_guard('disallow'):
    frames = [next(fed) for _ in range(3)]
    jax.jit(lambda x: x + x)(frames[0])
    with pytest.raises(Exception, match=r'[Dd]isallow'):
      jax.jit(lambda x: x + x)(np.ones(3))


def test_stop_signals_do_not_reach_processes_that_are_starting(tmp_path):
  """Their first act would be to die of it: it takes them a second to say that they ignore it."""
  with feeding(make_batches(NumberedVideos([10] * 24), num_workers=2)) as (fed, said):
    hit = set()
    deadline = time.monotonic() + 30
    while len(hit) < 2 and time.monotonic() < deadline:
      for process in loader_processes():
        if process.pid not in hit:
          for number in loader_process.STOP_SIGNALS:
            os.kill(process.pid, number)
          hit.add(process.pid)
    assert len(hit) == 2
    assert_fed(fed, 4)
  assert said == []
