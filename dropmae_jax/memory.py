"""What the training step needs of a device's memory, and how a batch is made to fit.

The compiler says how much a program needs. That is held against what the device tells before the
first step, rather than running out of memory in it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dropmae_jax import sharding
from dropmae_jax.config import Config
from dropmae_jax.runtime import multihost
from dropmae_jax.runtime.errors import RunFailed, UserError, first_line, lacks_memory
from dropmae_jax.train_step import build

# Batches that wait on the devices for the next steps, beside the program's own.
PREFETCHED = 2


class Fit(NamedTuple):
  """A compiled step.

  Attributes:
    config: the one that it was compiled for.
    step: None if the compiler itself has refused it for lack of memory.
    needed: bytes of each device; infinite if it was refused.
  """

  config: Config
  step: jax.stages.Compiled | None
  needed: float


def device_limit(device: jax.Device) -> int | None:
  """Returns the bytes of a device that programs get; None if it does not tell, as CPUs do not.

  On GPUs this is the share that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION).
  """
  return (device.memory_stats() or {}).get('bytes_limit')


def lower_step(config: Config, devices: list[jax.Device]) -> jax.stages.Lowered:
  """Traces the step of a config for its mesh of these devices.

  Raises:
    UserError: batch or attention do not fit the devices.
    ValueError: the mesh does not.
  """
  mesh = sharding.make_mesh(devices, config.mesh)
  model = build(config, mesh)
  size = config.model.image_size
  frames = jax.ShapeDtypeStruct(
    (config.batch_size, 2, size, size, 3), jnp.uint8, sharding=sharding.batch_sharding(mesh)
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct((), key.dtype, sharding=sharding.replicated(mesh))
  return model.step.lower(model.abstract_state, frames, key)


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Returns the bytes that a compiled program needs on a device; `total` adds them up."""
  sizes = compiled.memory_analysis()
  memory = {
    name: getattr(sizes, f'{name}_size_in_bytes')
    for name in ('argument', 'output', 'alias', 'temp', 'generated_code')
  }
  memory['total'] = sum(memory.values()) - 2 * memory['alias']
  return memory


def prefetched(config: Config, number: int) -> int:
  """Returns the bytes on each of so many devices of the batches that wait there."""
  return PREFETCHED * config.batch_size // number * 2 * config.model.image_size**2 * 3


def compile_step(
  config: Config, devices: list[jax.Device], options: dict[str, Any] | None = None
) -> Fit:
  """Compiles the step of a config for these devices."""
  lowered = lower_step(config, devices)
  try:
    step = lowered.compile(options)
  except jax.errors.JaxRuntimeError as error:
    if not lacks_memory(error):
      raise
    return Fit(config, None, float('inf'))
  return Fit(config, step, memory_of(step)['total'] + prefetched(config, len(devices)))


def fitting_step(
  config: Config,
  devices: list[jax.Device],
  limit: float | None,
  *,
  stored: int | None = None,
) -> Fit:
  """Compiles the step, with the fewest micro-batches that fit if their number is not given.

  Args:
    config: of the run; `accumulation_steps` is 0 for a number that fits.
    devices: all of the run.
    limit: the bytes of each that programs get; None: unknown, so everything fits.
    stored: the number of micro-batches to try first, in place of 1.

  Raises:
    UserError: it does not fit; names what does.
  """
  is_auto = not config.accumulation_steps
  first = dataclasses.replace(config, accumulation_steps=config.accumulation_steps or stored or 1)
  fit = compile_step(first, devices)
  if _fits(fit, limit):
    return fit
  smaller = _fewest_micro_batches(first, devices, limit)
  if is_auto and smaller:
    return smaller
  raise UserError(_sentence(fit, smaller, devices, limit))


def _fits(fit: Fit, limit: float | None) -> bool:
  """Whether a step fits on all processes, which call this together."""
  return not multihost.any_of(limit is not None and fit.needed > limit)


def _fewest_micro_batches(config: Config, devices: list[jax.Device], limit: float) -> Fit | None:
  """Finds the fewest micro-batches that fit, of more than the config has; None if none do."""
  best, numbers = None, more_micro_batches(config, len(devices))
  # What more micro-batches need is less, so the numbers are searched by halves.
  while numbers:
    middle = len(numbers) // 2
    fit = compile_step(dataclasses.replace(config, accumulation_steps=numbers[middle]), devices)
    fits = _fits(fit, limit)
    best, numbers = (fit, numbers[:middle]) if fits else (best, numbers[middle + 1 :])
  return best


def more_micro_batches(config: Config, number: int) -> list[int]:
  """Returns the larger numbers of micro-batches that a batch on so many devices divides into."""
  per_device = config.batch_size // number
  first = config.accumulation_steps + 1
  return [n for n in range(first, per_device + 1) if per_device % n == 0]


def _sentence(fit: Fit, smaller: Fit | None, devices: list[jax.Device], limit: float) -> str:
  config = fit.config
  need = 'more' if fit.step is None else f'{fit.needed / 1e9:.2f} GB'
  text = (
    f'config: a step of batch_size={config.batch_size} with'
    f' accumulation_steps={config.accumulation_steps} needs {need} of each device, and a program'
    f' gets {limit / 1e9:.2f} GB'
  )
  if smaller is not None:
    number = smaller.config.accumulation_steps
    largest = config.batch_size * config.accumulation_steps // number
    return (
      f'{text}; give --config.accumulation_steps={number}, which computes the same, or'
      f' --config.batch_size={largest} or less.'
    )
  for flags in _other_flags(config, len(devices)):
    if _fits(compile_step(dataclasses.replace(config, **flags), devices), limit):
      given = ' '.join(
        f'--config.{name}={value}'
        if name != 'mesh'
        else f'--config.mesh.data=1 --config.mesh.fsdp={value.fsdp}'
        for name, value in flags.items()
      )
      return f'{text}, with which no batch fits; give {given}.'
  return f'{text}, with which no batch fits; use devices with more memory, or more of them.'


def _other_flags(config: Config, number: int) -> list[dict]:
  """What helps where one sample a device at a time does not fit, the cheapest first."""
  one = {'accumulation_steps': config.batch_size // number}
  whole = {**one, 'remat': 'full'}
  split = {'mesh': dataclasses.replace(config.mesh, data=1, fsdp=number)}
  return [whole, {**one, **split}, {**whole, **split}]


@contextlib.contextmanager
def exhaustion_as_failure(fit: Fit, number: int) -> Iterator[None]:
  """Raises RunFailed with what would help, if a device has no memory left inside.

  Args:
    fit: what runs inside.
    number: of devices.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not lacks_memory(error):
      raise
    flags = [f'--config.accumulation_steps={n}' for n in more_micro_batches(fit.config, number)]
    flags += ['--config.remat=full'] * (fit.config.remat != 'full')
    remedy = f'give {flags[0]}, which computes the same' if flags else 'use more devices'
    raise RunFailed(
      f'a device has no memory left ({first_line(error)}); the step alone needs'
      f' {fit.needed / 1e9:.2f} GB of it; stop other programs on it, or {remedy}.'
    ) from error
