"""Devices to compile for without having them, and the speeds that their data sheets give.

They are named in one word: `h100`, `8xh100`, or a slice of TPUs as Google Cloud calls it, `v5e-16`.
"""

import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dropmae_jax.runtime.errors import UserError, did_you_mean

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
# There is no GPU at hand to try out kernels on.
GPU_OPTIONS = {'xla_gpu_enable_triton_gemm': False, 'xla_gpu_autotune_level': 0}
# What XLA has to know of a GPU that it cannot see: from NVIDIA's data sheets and whitepapers.
GPU_CONFIG = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
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
  threads_per_core_limit: {threads}
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
  """The numbers of a GPU for `GPU_CONFIG`; sizes in KiB, threads of a multiprocessor."""

  name: str
  major: int
  minor: int
  multiprocessors: int
  lanes: int
  ghz: float
  l2_cache: int
  shared_memory: int
  threads: int = 2048


class Target(NamedTuple):
  """A kind of device, with the speeds of its data sheet, which real programs do not reach.

  Attributes:
    flops: per second, of bfloat16 matrix products.
    memory: bytes.
    memory_bandwidth: bytes per second.
    source: of these numbers.
    gpu: what XLA must know of it; None for other devices.
    slices: TPU: the shapes of slices by their number of chips, as the compiler writes them;
      None for other devices.
  """

  flops: float
  memory: float
  memory_bandwidth: float
  source: str
  gpu: Gpu | None = None
  slices: dict[int, str] | None = None

  @property
  def platform(self) -> str:
    """As JAX calls it."""
    return 'gpu' if self.gpu else 'tpu' if self.slices else 'cpu'

  @property
  def usable_memory(self) -> float:
    """Bytes that programs get: of a GPU the three quarters that JAX takes."""
    return self.memory * (0.75 if self.gpu else 1)


# Of one chip, the compiler knows no slice: `devices` takes one of four.
FLAT_SLICES = {4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
CUBIC_SLICES = {4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4'}
TPU_SHEET = 'Google Cloud TPU documentation'
GPU_SHEET = 'NVIDIA data sheet (dense)'
TARGETS = {
  'tpu_v4': Target(275e12, 32e9, 1200e9, TPU_SHEET, slices=CUBIC_SLICES),
  'tpu_v5e': Target(197e12, 16e9, 800e9, TPU_SHEET, slices=FLAT_SLICES),
  'tpu_v6e': Target(918e12, 32e9, 1600e9, TPU_SHEET, slices=FLAT_SLICES),
  'a100': Target(
    312e12, 80e9, 2039e9, GPU_SHEET,
    Gpu('NVIDIA A100-SXM4-80GB', 8, 0, 108, 64, 1.41, 40 * 1024, 164),
  ),
  'h100': Target(
    989e12, 80e9, 3350e9, GPU_SHEET,
    Gpu('NVIDIA H100 80GB HBM3', 9, 0, 132, 128, 1.98, 50 * 1024, 228),
  ),
  'h200': Target(
    989e12, 141e9, 4800e9, GPU_SHEET,
    Gpu('NVIDIA H200', 9, 0, 132, 128, 1.98, 50 * 1024, 228),
  ),
  'rtx4090': Target(
    165.2e12, 24e9, 1008e9, 'NVIDIA Ada GPU architecture whitepaper (dense, sums in float32)',
    Gpu('NVIDIA GeForce RTX 4090', 8, 9, 128, 128, 2.52, 72 * 1024, 100, threads=1536),
  ),
  # For tests of the reports: the numbers are of no device.
  'cpu': Target(1e12, 16e9, 100e9, 'made up'),
}  # fmt: skip

# The names of TPUs in jax, and in `TARGETS`. Those of GPUs are in `TARGETS` already.
TPU_KINDS = {
  'TPU v4': 'tpu_v4',
  'TPU v5 lite': 'tpu_v5e',
  'TPU v5e': 'tpu_v5e',
  'TPU v6 lite': 'tpu_v6e',
  'TPU v6e': 'tpu_v6e',
}


def parse(text: str) -> tuple[Target, int]:
  """Returns the kind and the number of the devices that a word names.

  Args:
    text: a key of `TARGETS`, with a number before it if it is not one device (`8xh100`), or a
      slice of TPUs (`v5e-16`). Slices of v4 count TensorCores, two a chip, and a chip is a device.

  Raises:
    UserError: the kind is unknown, or there is no such slice.
  """
  name, number = _kind_and_number(text)
  if name not in TARGETS:
    words = [*TARGETS, '8xh100', 'v4-8', 'v5e-16', 'v6e-16']
    raise UserError(f'--target={text} names no device; {did_you_mean(text, words)}')
  target = TARGETS[name]
  if target.slices and number not in (1, *target.slices):
    sizes = ', '.join(map(str, target.slices))
    raise UserError(f'--target={text}: {name} has slices of {sizes} chips; give one of these.')
  if number < 1:
    raise UserError(f'--target={text} names no device; give 1 or more.')
  return target, number


def _kind_and_number(text: str) -> tuple[str, int]:
  if match := re.fullmatch(r'(\d{1,6})x(\w+)', text):
    return match[2], int(match[1])
  if match := re.fullmatch(r'(v\d\w*)-(\d{1,6})', text):
    cores = 2 if match[1] == 'v4' else 1
    # An odd number of cores is no number of chips.
    return f'tpu_{match[1]}', 0 if int(match[2]) % cores else int(match[2]) // cores
  return text, 1


def devices(text: str) -> list[jax.Device]:
  """Returns devices that programs can be compiled for but, except for 'cpu', not run on.

  Args:
    text: as in `parse`.

  Raises:
    UserError: the word names no devices, the compiler is not installed, or this process has fewer
      CPU devices.
  """
  target, number = parse(text)
  name, _ = _kind_and_number(text)
  if name == 'cpu':
    found = jax.devices('cpu')
    if len(found) < number:
      raise UserError(f'--target={text}: this process has {len(found)} CPU devices; name those.')
    return found[:number]
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
    shape = target.slices[max(number, min(target.slices))]
    topology = {'platform': 'tpu', 'topology_name': f'{name.removeprefix("tpu_")}:{shape}'}
  try:
    return topologies.get_topology_desc(**topology).devices[:number]
  except (RuntimeError, OSError, ValueError) as error:
    reason = str(error).splitlines()[0][:150]
    raise UserError(f'--target={text} needs its compiler ({reason}); {remedy}.') from error


def known_peak(device_kind: str) -> tuple[float, str] | None:
  """Returns the bfloat16 FLOPs per second of a data sheet, and its name; None if unknown."""
  for name, target in TARGETS.items():
    if name == TPU_KINDS.get(device_kind) or (target.gpu and target.gpu.name == device_kind):
      return target.flops, f'data sheet of {name}, bfloat16'
  return None


def gpu_config(target: Target) -> str:
  """Describes a GPU to XLA, as a text proto."""
  gpu = target.gpu
  return GPU_CONFIG.format(
    name=gpu.name,
    major=gpu.major,
    minor=gpu.minor,
    threads=gpu.threads,
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
