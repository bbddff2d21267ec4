"""How a loader process uses memory, and that it leaves nothing behind."""

import ctypes

import pytest
from conftest import run_python
from processes import running

# Frees 12 MB again and again; page faults show whether the memory is reused.
FAULTS = """
import resource
import numpy as np
from dropmae_jax.data import loader_process
{before}
def make():
  return [np.ones(3_000_000, np.uint8) for _ in range(4)]
make()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
  make()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), 'mallopt'), reason='the C library has no mallopt'
)
def test_freed_memory_is_reused_without_page_faults():
  plain, kept = (
    int(run_python('-c', FAULTS.format(before=line)).stdout)
    for line in ('', 'loader_process.keep_freed_memory()')
  )
  assert kept < 100 < plain / 10


def test_a_process_that_just_exits_leaves_no_shared_memory():
  program = (
    'from dropmae_jax.data.loader_process import RingWriter; print(RingWriter(1, (8,)).name)'
  )
  done = run_python('-c', program)
  assert done.stdout
  assert done.stderr == ''  # Otherwise Python's resource tracker tells that it had to remove some.


# A trainer that starts a process of its loader, which prints its process id.
TRAINER = """
import subprocess, sys
worker = (
  'import os, time; from dropmae_jax.data import loader_process;'
  'loader_process.start_worker(0, 1, trainer=os.getppid()); print(os.getpid(), flush=True);'
  'time.sleep(60)'
)
subprocess.run([sys.executable, '-c', worker])
"""


def test_a_process_ends_when_its_trainer_is_killed():
  with running('-c', TRAINER) as trainer:
    assert trainer.stdout.readline()
    trainer.kill()
    trainer.communicate(timeout=30)  # Until the worker has closed its end of the pipe too.
