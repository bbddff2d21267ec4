"""The training step as the compiler of some device makes it: what is read off it, and projected."""

import collections
import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import hlo
from benchmarks.hlo import Collective
from benchmarks.targets import Target
from dropmae_jax import sharding, train
from dropmae_jax.config import Config, MeshOptions
from dropmae_jax.runtime.errors import UserError

# There is no GPU at hand to try out kernels on.
GPU_OPTIONS = {'xla_gpu_enable_triton_gemm': False, 'xla_gpu_autotune_level': 0}
# Leaves out searches for speed: see --quick.
QUICK_OPTIONS = {'exec_time_optimization_effort': -1.0}


def lower_step(options: Config, devices: list[jax.Device]) -> jax.stages.Lowered:
  """Traces the step of a recipe for the mesh that it asks for.

  Raises:
    UserError: mesh, batch and devices do not fit one another.
  """
  try:
    mesh = sharding.make_mesh(devices, options.mesh)
  except ValueError as error:
    raise UserError(f'config: {error}') from error
  program = train.build(options, mesh)
  size = options.model.image_size
  frames = jax.ShapeDtypeStruct(
    (options.batch_size, 2, size, size, 3), jnp.uint8, sharding=sharding.batch_sharding(mesh)
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct((), key.dtype, sharding=sharding.replicated(mesh))
  return program.step.lower(program.abstract_state, frames, key)


def compile_step(
  options: Config, devices: list[jax.Device], target: Target, *, quick: bool = False
) -> dict[str, Any]:
  """Compiles and analyses the step of a recipe; it may turn out not to fit."""
  compiler_options = (GPU_OPTIONS if target.gpu else {}) | (QUICK_OPTIONS if quick else {})
  began = time.monotonic()
  try:
    lowered = lower_step(options, devices)
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
  result = {'compile_seconds': time.monotonic() - began} | analyse(compiled, len(devices))
  # Neither counts what is in a loop more than once, and only the compiled one may have its products
  # there, between messages; that of GPUs is not told.
  result['flops'] = max(result['flops'], flops_before_compilation(options, len(devices)))
  for name in ('flops', 'bytes_accessed'):
    result[name] *= options.accumulation_steps
  return result | {'projected': project(result, target)}


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Reads off a compiled program the bytes that it needs on a device; `total` adds them up."""
  sizes = compiled.memory_analysis()
  memory = {
    name: getattr(sizes, f'{name}_size_in_bytes')
    for name in ('argument', 'output', 'alias', 'temp', 'generated_code')
  }
  memory['total'] = sum(memory.values()) - 2 * memory['alias']
  return memory | {'peak': getattr(sizes, 'peak_memory_in_bytes', 0)}


def analyse(compiled: jax.stages.Compiled, num_devices: int) -> dict[str, Any]:
  """Reads off a compiled step what a device computes, keeps, runs, and sends."""
  program = hlo.Program(compiled.as_text(), num_devices)
  collectives = program.collectives()
  # The compiler of GPUs does not tell.
  cost = compiled.cost_analysis() or {'flops': 0.0, 'bytes accessed': 0.0}
  cycles, of_pallas = program.expected_cycles()
  return {
    'flops': cost['flops'],
    'bytes_accessed': cost['bytes accessed'],
    'main_memory_bytes': program.memory_bytes(),
    'memory': memory_of(compiled),
    'kernels': dict(program.kernels()),
    'expected_cycles': cycles,
    'pallas_kernels': of_pallas,
    'collectives': summarise(collectives),
    'sent_bytes': sum(each.sent_bytes for each in collectives),
    'sent_beside_other_work': sum(each.sent_bytes for each in collectives if each.overlaps),
    'groups': sorted({each.group for each in collectives}),
  }


def flops_before_compilation(options: Config, devices: int) -> float:
  """Counts the FLOPs of one device's share of the batch in the program that a compiler is given."""
  share = dataclasses.replace(
    options, batch_size=options.batch_size // devices, mesh=MeshOptions(), attention='xla'
  )
  return lower_step(share, jax.devices('cpu')[:1]).cost_analysis()['flops']


def project(found: dict[str, Any], target: Target) -> dict[str, float]:
  """Projects the seconds of a step, by data-sheet speeds that no real program reaches.

  `least` is all at once: FLOPs, memory and messages fully overlapped. `most` is one after the
  other. `efficiency` is the share of a step that is left for the work of one device, with messages
  after it or beside it; `efficiency_at_peak` that of messages after a step that ran at the peak
  FLOP rate and never waited for memory: the worst case.
  """
  compute = found['flops'] / target.flops
  memory = found['main_memory_bytes'] / target.memory_bandwidth
  outside = target.box and max(found['groups'], default=1) > target.box
  messages = found['sent_bytes'] / (target.network if outside else target.link)
  alone = max(compute, memory)
  return {
    'compute': compute,
    'memory': memory,
    'messages': messages,
    'least': max(alone, messages),
    'most': compute + memory + messages,
    'efficiency_beside': alone / max(alone, messages),
    'efficiency_after': alone / (alone + messages),
    'efficiency_at_peak': compute / (compute + messages),
  }


def summarise(found: list[Collective]) -> list[dict]:
  """Adds up by kind, type and group: number a step, MB handed in, MB sent; the most first."""
  rows: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0, 0])
  for each in found:
    row = rows[each.kind, each.dtypes, each.group]
    row[0] += each.times
    row[1] += each.times * each.operand_bytes / 1e6
    row[2] += each.sent_bytes / 1e6
  return [
    {
      'kind': kind,
      'dtypes': dtypes,
      'group': group,
      'number': number,
      'operand_mb': operand,
      'sent_mb': sent,
    }
    for (kind, dtypes, group), (number, operand, sent) in sorted(
      rows.items(), key=lambda row: -row[1][2]
    )
  ]
