"""Kernels on many devices."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec


def on_each_device(function: Callable, mesh: Mesh | None) -> Callable:
  """Has every device of a mesh do its share of the batch; XLA does not cut kernels by itself."""
  if mesh is None:
    return function
  batch = PartitionSpec(mesh.axis_names)
  return jax.shard_map(function, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)
