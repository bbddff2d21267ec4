"""Compiles the training step for a device, and reads off what it costs there."""

import dataclasses
import re
import time
from typing import Any

import jax

from benchmarks.compiler import hlo
from dropmae_jax.config import Config
from dropmae_jax.memory import lower_step, memory_of
from dropmae_jax.runtime import targets
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.runtime.targets import Target

# Leaves out searches for speed: see --quick.
QUICK_OPTIONS = {'exec_time_optimization_effort': -1.0}


def compile_step(
  config: Config, device: jax.Device, target: Target, *, quick: bool = False
) -> dict[str, Any]:
  """Compiles the step of a config for one device, and returns what `report` shows of it.

  Of a step that does not fit the memory, the result is only {'refused': REASON}.

  Raises:
    UserError: flash attention is asked for, and cuDNN is not installed.
  """
  compiler_options = (targets.GPU_OPTIONS if target.gpu else {}) | (QUICK_OPTIONS if quick else {})
  began = time.monotonic()
  try:
    lowered = lower_step(config, [device])
  except RuntimeError as error:
    if 'cuDNN' not in str(error):
      raise
    raise UserError(
      'flash attention needs cuDNN; pip install nvidia-cudnn-cu12, or use --without_fused.'
    ) from error
  try:
    compiled = lowered.compile(compiler_options)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    needs = re.search(r'Used [^.]*\S+ of \S+ \w+', str(error))
    return {'refused': needs[0] if needs else str(error).splitlines()[0]}
  compile_seconds = time.monotonic() - began
  program = hlo.Program(compiled.as_text())
  cycles, pallas_kernels = program.expected_cycles()
  kernels = program.kernels()
  # The compiler of GPUs does not count FLOPs. XLA counts what is in a loop once, and only the
  # compiled program may have products in one; so the larger count is the better one.
  counted = (compiled.cost_analysis() or {}).get('flops', 0.0)
  flops = max(counted, flops_before_compilation(config))
  memory_bytes = program.memory_bytes()
  compute, memory = flops / target.flops, memory_bytes / target.memory_bandwidth
  return {
    'compile_seconds': compile_seconds,
    'flops': flops,
    'main_memory_bytes': memory_bytes,
    'memory': memory_of(compiled),
    'kernels': dict(kernels),
    'number_of_kernels': kernels.total(),
    'expected_cycles': cycles,
    'pallas_kernels': pallas_kernels,
    # Seconds by data sheet: FLOPs and memory at the same time, or one after the other.
    'projected': {
      'compute': compute,
      'memory': memory,
      'least': max(compute, memory),
      'most': compute + memory,
    },
  }


def flops_before_compilation(config: Config) -> float:
  """Counts the FLOPs of the program that the compiler is given, on one CPU."""
  plain = dataclasses.replace(config, attention='xla')
  return lower_step(plain, jax.devices('cpu')[:1]).cost_analysis()['flops']
