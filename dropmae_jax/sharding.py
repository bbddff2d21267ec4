"""The device mesh, and the one place that says what lies where on it.

Two axes: a batch is split over both; parameters and moments are split over `fsdp` and repeated
over `data`. Devices are numbered host by host, so that a host's devices hold one block of the
batch, and that a group which shares parameters stays within a host or slice as far as it can.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dropmae_jax.config import MeshOptions

AXES = ('data', 'fsdp')


def make_mesh(
  devices: Sequence[jax.Device] | None = None, options: MeshOptions | None = None
) -> Mesh:
  """Returns a mesh of the given devices, or of all devices of all processes.

  Raises:
    ValueError: the options ask for another number of devices than there are.
  """
  devices = sorted(devices or jax.devices(), key=_by_neighbourhood)
  shape = mesh_shape(len(devices), options or MeshOptions())
  # Explicit axes would need every reshape of the model to name its sharding.
  return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2)


def mesh_shape(number: int, options: MeshOptions) -> tuple[int, int]:
  """Returns the lengths of the axes of a mesh of so many devices.

  Raises:
    ValueError: the options ask for another number of them.
  """
  shape = (options.data or number // options.fsdp, options.fsdp)
  if shape[0] * shape[1] != number:
    raise ValueError(
      f'mesh.data={options.data} and mesh.fsdp={options.fsdp} do not share out the {number} devices'
      ' that there are; mesh.fsdp must divide them, and mesh.data=0 takes what is left.'
    )
  return shape


def _by_neighbourhood(device: jax.Device) -> tuple[int, int, int]:
  return getattr(device, 'slice_index', 0) or 0, device.process_index, device.id


def platform_of(mesh: Mesh) -> str:
  """Returns the kind of a mesh's devices, such as 'cpu' or 'gpu'."""
  return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
  """Where small things lie: whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Where a batch lies: its first axis split over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def state_sharding(mesh: Mesh, state: Any) -> Any:
  """Says for every array of a state where it lies; `state` may be abstract.

  Matrices, of parameters and of moments alike, are split over `fsdp` along their longest axis that
  it divides. All else (biases, norms, embeddings, the step) is whole on every device: it is
  little, and splitting it would cost a message each.
  """
  return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, mesh)), state)


def _spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  parts = mesh.shape['fsdp']
  fitting = [axis for axis in range(len(shape)) if shape[axis] % parts == 0]
  if len(shape) != 2 or parts == 1 or not fitting:
    return PartitionSpec()
  longest = max(fitting, key=lambda axis: shape[axis])
  return PartitionSpec(*('fsdp' if axis == longest else None for axis in range(2)))


def check_batch(batch_size: int, accumulation_steps: int, mesh: Mesh | AbstractMesh) -> None:
  """Refuses a batch that micro-batches or devices do not divide.

  Raises:
    ValueError: names both numbers and the next batch size that fits.
  """
  parts = mesh.size * accumulation_steps
  if batch_size < 1 or batch_size % parts:
    fitting = f'batch_size={max(1, round(batch_size / parts)) * parts}'
    if batch_size > 0 and batch_size % mesh.size == 0:
      per_device = batch_size // mesh.size
      most = min(accumulation_steps, per_device)
      fewer = next(n for n in range(most, 0, -1) if per_device % n == 0)
      fitting = f'accumulation_steps={fewer}'
    raise ValueError(
      f'batch_size={batch_size} is not divisible by {mesh.size} devices x'
      f' accumulation_steps={accumulation_steps}; use for example {fitting}.'
    )


def to_devices(batch: np.ndarray, mesh: Mesh) -> jax.Array:
  """Makes one global array of the blocks that all processes hold, in the order of processes.

  The array shares no memory with the batch, as it might on CPUs.
  """
  batch = batch.copy() if platform_of(mesh) == 'cpu' else batch
  return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def put_everywhere(value: jax.Array, mesh: Mesh) -> jax.Array:
  """Copies a value that every process has made alike to all devices."""
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))(value)


def gather(tree: Any) -> Any:
  """Returns arrays that lie on the devices of a mesh whole, as numpy arrays of every process."""
  # One after the other, as together they may not fit on a device.
  return jax.tree.map(
    lambda x: jax.device_get(jax.device_put(x, replicated(x.sharding.mesh))), tree
  )


def abstract_on(mesh: Mesh, state: Any) -> Any:
  """Gives every shape of an abstract state its place, for restoring into."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    state,
    state_sharding(mesh, state),
  )
