"""How a loader process uses memory."""

import ctypes

import pytest
from conftest import run_python

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
