"""Devices to compile for without having them, and the speeds that their data sheets give."""

import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dropmae_jax.runtime.errors import UserError

# How to install the compilers, in the versions that fit the installed jax.
TPU_COMPILER = "pip install 'jax[tpu]'"
GPU_COMPILER = 'pip install --no-deps jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0} nvidia-cudnn-cu12'
# Without these, libtpu queries the machine for its TPUs, and only one process at a time may use it.
COMPILE_ONLY = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
# What XLA has to know of a GPU that it cannot see: from NVIDIA's data sheets and whitepapers.
GPU_CONFIG = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: 0 }}
  core_count: {multiprocessors}
  fpus_per_core: {lanes}
  clock_rate_ghz: {ghz}
  memory_bandwidth: {memory_bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {l2_cache}
  shared_memory_per_core: {shared_memory}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_memory_of_block}
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


class Gpu(NamedTuple):
  """The numbers of a GPU for `GPU_CONFIG`; sizes in KiB."""

  name: str
  major: int
  multiprocessors: int
  lanes: int
  ghz: float
  l2_cache: int
  shared_memory: int


class Target(NamedTuple):
  """A kind of device, with the speeds of its data sheet, which real programs do not reach.

  Attributes:
    flops: per second, of bfloat16 matrix products.
    memory: bytes.
    memory_bandwidth: bytes per second.
    source: of these numbers.
    gpu: what XLA must know of it; None for other devices.
    slice: TPU: a topology, as the compiler writes it, that has 4 chips.
  """

  flops: float
  memory: float
  memory_bandwidth: float
  source: str
  gpu: Gpu | None = None
  slice: str = ''


TPU_SHEET = 'Google Cloud TPU documentation'
GPU_SHEET = 'NVIDIA data sheet (dense)'
TARGETS = {
  'tpu_v4': Target(275e12, 32e9, 1200e9, TPU_SHEET, slice='v4:2x2x1'),
  'tpu_v5e': Target(197e12, 16e9, 800e9, TPU_SHEET, slice='v5e:2x2'),
  'tpu_v6e': Target(918e12, 32e9, 1600e9, TPU_SHEET, slice='v6e:2x2'),
  'a100': Target(
    312e12, 80e9, 2039e9, GPU_SHEET,
    Gpu('NVIDIA A100-SXM4-80GB', 8, 108, 64, 1.41, 40 * 1024, 164),
  ),
  'h100': Target(
    989e12, 80e9, 3350e9, GPU_SHEET,
    Gpu('NVIDIA H100 80GB HBM3', 9, 132, 128, 1.98, 50 * 1024, 228),
  ),
  'h200': Target(
    989e12, 141e9, 4800e9, GPU_SHEET,
    Gpu('NVIDIA H200', 9, 132, 128, 1.98, 50 * 1024, 228),
  ),
  # For tests of the reports: the numbers are of no device.
  'cpu': Target(1e12, 16e9, 100e9, 'made up'),
}  # fmt: skip


def devices(name: str, number: int) -> list[jax.Device]:
  """Returns devices that programs can be compiled for but, except for 'cpu', not run on.

  Args:
    name: a key of `TARGETS`.
    number: how many; TPUs: at most 4.

  Raises:
    UserError: the compiler is not installed.
  """
  target = TARGETS[name]
  if name == 'cpu':
    return jax.devices('cpu')[:number]
  if target.gpu:
    remedy = GPU_COMPILER.format(jax.__version__)
    topology = {
      'platform': 'cuda',
      'topology_name': '',
      'topology': f'1x1x{number}',
      'target_config': gpu_config(target),
    }
  else:
    for variable, value in COMPILE_ONLY.items():
      os.environ.setdefault(variable, value)
    remedy = TPU_COMPILER
    topology = {'platform': 'tpu', 'topology_name': target.slice}
  try:
    return topologies.get_topology_desc(**topology).devices[:number]
  except (RuntimeError, OSError, ValueError) as error:
    reason = str(error).splitlines()[0][:150]
    raise UserError(f'--target={name} needs its compiler ({reason}); {remedy}.') from error


def gpu_config(target: Target) -> str:
  """Describes a GPU to XLA, as a text proto."""
  gpu = target.gpu
  return GPU_CONFIG.format(
    name=gpu.name,
    major=gpu.major,
    multiprocessors=gpu.multiprocessors,
    lanes=gpu.lanes,
    ghz=gpu.ghz,
    memory_bandwidth=int(target.memory_bandwidth),
    memory=int(target.memory),
    l2_cache=gpu.l2_cache * 1024,
    shared_memory=gpu.shared_memory * 1024,
    # The system reserves one KiB of a multiprocessor.
    shared_memory_of_block=(gpu.shared_memory - 1) * 1024,
  )
