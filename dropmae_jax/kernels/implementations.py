"""Which implementation computes attention: XLA's, or kernels, by devices and sizes."""

import os
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dropmae_jax.kernels.gpu import asad_gpu
from dropmae_jax.kernels.tpu import asad_tpu
from dropmae_jax.model import attention, fast_asad
from dropmae_jax.model.attention import Implementations, dense_attention
from dropmae_jax.model.chunks import Loop
from dropmae_jax.model.on_each_device import on_each_device

# See `choose`.
KINDS = ('auto', 'xla', 'fused')

# What a CPU's core works on should stay in its caches: so many logits, measured with 392 tokens and
# two cores (python -m benchmarks.step_time).
CACHED_LOGITS = 4 * 392**2
# And what a TPU works on, in its on-chip memory: XLA then puts nearly all of it there (python -m
# benchmarks.compiler.report).
ON_CHIP_LOGITS = 32 * 392**2


def flash_attention(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  mesh: Mesh,
) -> Float[Array, 'b l m e']:
  """The same by cuDNN, which stores no logits: NVIDIA GPUs, 16-bit floats.

  Heads that are wider than 128, or no multiple of 8, go through `dense_attention`.

  Args:
    query: one vector per token and head.
    key: likewise.
    value: likewise.
    mesh: the devices that the batch is split over, all axes along the first axis.
  """
  if query.shape[-1] > 128 or query.shape[-1] % 8:
    return dense_attention(query, key, value)
  attend = partial(jax.nn.dot_product_attention, implementation='cudnn')
  return on_each_device(attend, mesh)(query, key, value)


def choose(
  kind: str,
  mesh: Mesh,
  *,
  tokens_per_frame: int,
  num_heads: int,
  head_width: int,
  dtype: DTypeLike,
  rule: str = 'asad',
) -> Implementations:
  """Returns the implementations for devices and sizes.

  All have the same distribution; of some thousand pairs that kernels drop, a few may differ.

  Args:
    kind: 'xla' runs anywhere; 'fused' has kernels of ASAD, for TPUs and for Hopper GPUs, and there
      cuDNN's flash attention; 'auto' is 'xla' as long as nobody has timed the kernels, a few heads
      at a time on CPUs, by measurement, and on TPUs, by their compiler's count of cycles.
    mesh: devices that a batch is split over.
    tokens_per_frame: n.
    num_heads: of the decoder.
    head_width: of the decoder.
    dtype: of what is multiplied.
    rule: of `asad.ATTENTION_DROPOUTS`; only ASAD has kernels, others have the plain form.

  Raises:
    ValueError: the kernels are asked for where there are none.
  """
  if kind not in KINDS:
    raise ValueError(f'attention={kind!r} is unknown; use one of {", ".join(KINDS)}.')
  if rule != 'asad' and kind == 'fused':
    raise ValueError(f"attention='fused' has no kernel for dropout_rule={rule!r}; use 'auto'.")
  if kind == 'xla':
    return attention.plain(rule)
  device = mesh.devices.flat[0]
  loops = _loops(mesh)
  if kind == 'fused':
    sizes = tokens_per_frame, num_heads, head_width
    if reason := unsupported(device, *sizes, dtype):
      raise ValueError(f"attention='fused' has no kernel for {reason}; use attention='xla'.")
    if device.platform == 'gpu':
      return Implementations(
        partial(flash_attention, mesh=mesh), partial(asad_gpu.asad_attention, mesh=mesh)
      )
    return loops._replace(dropout=partial(asad_tpu.asad_attention, mesh=mesh))
  return loops if rule == 'asad' else loops._replace(dropout=attention.plain(rule).dropout)


def _loops(mesh: Mesh) -> Implementations:
  """Returns XLA's implementations, a few heads at a time where that is faster."""
  at_once = logits_at_once(mesh.devices.flat[0].platform, max(1, len(mesh.local_devices)))
  loop = Loop(at_once, mesh if mesh.size > 1 else None)
  return Implementations(
    partial(dense_attention, loop=loop), partial(fast_asad.asad_attention, loop=loop)
  )


def logits_at_once(platform: str, devices: int = 1) -> int | None:
  """Returns how many logits attention should have a device compute at a time; None: all.

  Args:
    platform: such as 'cpu'.
    devices: that share the cores of this process.
  """
  if platform == 'tpu':
    return ON_CHIP_LOGITS
  return len(os.sched_getaffinity(0)) * CACHED_LOGITS // devices if platform == 'cpu' else None


def unsupported(
  device: Any, tokens_per_frame: int, num_heads: int, head_width: int, dtype: DTypeLike
) -> str:
  """Returns why a device has no fused kernels for these sizes, or '' if it has.

  Of the device, only its `platform` and, if it has one, its `compute_capability` are read.
  """
  if device.platform == 'tpu':
    return asad_tpu.unsupported(tokens_per_frame, num_heads, head_width)
  if device.platform != 'gpu':
    return f'devices of the kind {device.platform!r}'
  capability = getattr(device, 'compute_capability', 'unknown')
  if capability != asad_gpu.COMPUTE_CAPABILITY:
    return f'GPUs of compute capability {capability}, but for {asad_gpu.COMPUTE_CAPABILITY}'
  return asad_gpu.unsupported(tokens_per_frame, head_width, dtype)
