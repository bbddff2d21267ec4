"""What a loader process asks of its machine."""

import ctypes

import pytest
from conftest import run_python

# Pictures of 12 MB, each given up before the next: page faults tell whether the memory is kept.
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
def test_memory_that_was_given_up_is_used_again_without_page_faults():
  plain, kept = (
    int(run_python('-c', FAULTS.format(before=line)).stdout)
    for line in ('', 'loader_process.keep_freed_memory()')
  )
  assert kept < 100 < plain / 10
