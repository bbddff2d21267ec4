"""What the compiled training step needs of a device's memory."""

import jax
import jax.numpy as jnp

from dropmae_jax import sharding
from dropmae_jax.config import Config
from dropmae_jax.train_step import build


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
