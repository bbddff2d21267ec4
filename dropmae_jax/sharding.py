"""The device mesh, and the one place that says what lies where on it.

One axis so far, `data`: batches are split over it, the state is whole on every device. More axes
belong here and nowhere else.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh of the given devices, or of all devices of all processes."""
  devices = devices or jax.devices()
  return jax.make_mesh((len(devices),), ('data',), devices=devices, axis_types=(AxisType.Auto,))


def state_sharding(mesh: Mesh) -> NamedSharding:
  """Where parameters, moments and the step count lie: on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Where a batch lies: its first axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def check_batch(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
  """Refuses a batch that micro-batches or devices do not divide.

  Raises:
    ValueError: names both numbers and the next batch size that fits.
  """
  parts = mesh.size * accumulation_steps
  if batch_size < 1 or batch_size % parts:
    fitting = max(1, round(batch_size / parts)) * parts
    raise ValueError(
      f'batch_size={batch_size} is not divisible by {mesh.size} devices x'
      f' accumulation_steps={accumulation_steps}; use for example batch_size={fitting}.'
    )


def to_devices(batch: np.ndarray, mesh: Mesh) -> jax.Array:
  """Makes one global array of the shares that all processes hold."""
  return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def abstract_on(mesh: Mesh, tree: Any) -> Any:
  """Gives every shape of an abstract state its place, for restoring into."""
  place = state_sharding(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
