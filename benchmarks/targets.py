"""Devices to compile for without having them, and what their makers say of their speed."""

import os
import pathlib
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dropmae_jax.runtime.errors import UserError

# Libraries that hold the compilers, of the versions that fit the pinned jax.
TPU_COMPILER = "pip install 'jax[tpu]'"
GPU_COMPILER = 'pip install --no-deps jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0} nvidia-cudnn-cu12'
# Else libtpu asks the machine that it is on what it is, and lets one process in at a time.
COMPILE_ONLY = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
# What XLA asks of a GPU that it cannot see; of the makers' data sheets and architecture papers.
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
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


class Gpu(NamedTuple):
  """The inside of a GPU, for `GPU_CONFIG`; sizes in KiB."""

  name: str
  major: int
  multiprocessors: int
  lanes: int
  ghz: float
  l2_cache: int
  shared_memory: int


class Target(NamedTuple):
  """A kind of device; speeds are those of data sheets: nothing runs faster, and most things slower.

  Attributes:
    shapes: TPU: what the compiler calls a slice, by its number of chips.
    flops: a second, of bfloat16 matrix products.
    memory: bytes.
    memory_bandwidth: bytes a second.
    link: bytes a second that a device sends to its neighbours in a ring.
    box: devices that are joined by `link`; 0 is all.
    network: bytes a second that a device sends outside of its box.
    source: of these numbers.
    gpu: its inside.
  """

  shapes: dict[int, str]
  flops: float
  memory: float
  memory_bandwidth: float
  link: float
  box: int
  network: float
  source: str
  gpu: Gpu | None = None


FLAT = {1: '2x2', 2: '2x2', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8'}
CUBE = {1: '2x2x1', 2: '2x2x1', 4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4'}
TPU_SHEET = 'Google Cloud TPU documentation; two of the {} links of a chip make a ring'
GPU_SHEET = 'NVIDIA data sheet (dense); NVLink one way; one {} Gb/s adapter per GPU between boxes'
TARGETS = {
  'tpu_v4': Target(CUBE, 275e12, 32e9, 1200e9, 100e9, 0, 0, TPU_SHEET.format(6)),
  'tpu_v5e': Target(FLAT, 197e12, 16e9, 800e9, 100e9, 0, 0, TPU_SHEET.format(4)),
  'tpu_v6e': Target(FLAT, 918e12, 32e9, 1600e9, 200e9, 0, 0, TPU_SHEET.format(4)),
  'a100': Target(
    {}, 312e12, 80e9, 2039e9, 300e9, 8, 25e9, GPU_SHEET.format(200),
    Gpu('NVIDIA A100-SXM4-80GB', 8, 108, 64, 1.41, 40 * 1024, 164),
  ),
  'h100': Target(
    {}, 989e12, 80e9, 3350e9, 450e9, 8, 50e9, GPU_SHEET.format(400),
    Gpu('NVIDIA H100 80GB HBM3', 9, 132, 128, 1.98, 50 * 1024, 228),
  ),
  'h200': Target(
    {}, 989e12, 141e9, 4800e9, 450e9, 8, 50e9, GPU_SHEET.format(400),
    Gpu('NVIDIA H200', 9, 132, 128, 1.98, 50 * 1024, 228),
  ),
  # For tests of this program: the numbers are of no device.
  'cpu': Target({}, 1e12, 16e9, 100e9, 10e9, 0, 0, 'made up'),
}  # fmt: skip


def devices(name: str, chips: int, target_config: pathlib.Path | None = None) -> list[jax.Device]:
  """Returns devices that programs can be compiled for, but not run on (but for 'cpu').

  Args:
    name: a key of `TARGETS`.
    chips: how many; of more than one GPU box, whole ones.
    target_config: GPU: a file to use instead of `GPU_CONFIG`.

  Raises:
    UserError: there is no such slice or file, or the compiler is not installed.
  """
  target = TARGETS[name]
  if target_config and not target_config.is_file():
    raise UserError(f'--target_config={target_config} is no file; leave it out.')
  if name == 'cpu':
    found = jax.devices('cpu')
    if len(found) < chips:
      raise UserError(f'--chips={chips}: this process has {len(found)} CPU devices; ask for those.')
    return found[:chips]
  return _gpus(target, chips, target_config) if target.gpu else _tpus(name, target, chips)


def _tpus(name: str, target: Target, chips: int) -> list[jax.Device]:
  if chips not in target.shapes:
    known = ', '.join(map(str, target.shapes))
    raise UserError(f'--chips={chips} is no slice of {name}; choose one of {known}.')
  for variable, value in COMPILE_ONLY.items():
    os.environ.setdefault(variable, value)
  shape = f'{name.removeprefix("tpu_")}:{target.shapes[chips]}'
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=shape).devices[:chips]
  except (RuntimeError, OSError, ValueError) as error:
    raise UserError(
      f'--target={name} needs the compiler of TPUs ({_first_line(error)}); {TPU_COMPILER}.'
    ) from error


def _gpus(target: Target, chips: int, target_config: pathlib.Path | None) -> list[jax.Device]:
  boxes = -(-chips // target.box)
  if chips > target.box and chips % target.box:
    raise UserError(f'--chips={chips} is not a number of whole boxes; use a multiple of 8.')
  config = gpu_config(target) if target_config is None else target_config.read_text()
  try:
    return topologies.get_topology_desc(
      platform='cuda',
      topology_name='',
      topology=f'1x{boxes}x{chips // boxes}',
      target_config=config,
    ).devices
  except (RuntimeError, OSError, ValueError) as error:
    if 'GpuTargetConfigProto' in str(error):
      raise UserError(
        f'--target_config={target_config} does not describe a GPU as XLA does; leave it out.'
      ) from error
    remedy = GPU_COMPILER.format(jax.__version__)
    raise UserError(
      f'this target needs the compiler of GPUs ({_first_line(error)}); {remedy}.'
    ) from error


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
    # One KiB of a multiprocessor is the system's.
    shared_memory_of_block=(gpu.shared_memory - 1) * 1024,
  )


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:150]
