"""Chooses the implementation of attention by device and sizes: XLA's or kernels."""

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
from dropmae_jax.model.chunks import Loop, on_each_device

# See `choose`.
KINDS = ('auto', 'xla', 'fused')

# Logits at a time per core of a CPU, so that they stay in its caches. Measured with 392 tokens and
# two cores (python -m benchmarks.step_time).
CACHED_LOGITS = 4 * 392**2
# Logits at a time on a TPU: XLA then puts nearly all of them in on-chip memory (python -m
# benchmarks.compiler.report).
ON_CHIP_LOGITS = 32 * 392**2


def flash_attention(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  mesh: Mesh,
) -> Float[Array, 'b l m e']:
  """Attention without dropout by cuDNN, which stores no logits: NVIDIA GPUs, 16-bit floats.

  Heads wider than 128, or not a multiple of 8, use `dense_attention`. The batch is split over the
  mesh as in `on_each_device`.
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
  """Returns the implementations of attention for these devices and sizes.

  All have the same distribution. With the same keys, a few in some thousand dropped pairs can
  differ between XLA and the kernels.

  Args:
    kind: 'xla' runs anywhere. 'fused' has kernels for ASAD, on TPUs and Hopper GPUs, and on these
      GPUs cuDNN's flash attention. 'auto' is 'xla' until the kernels have been timed, with a loop
      over chunks where that is faster: on CPUs, as measured, and on TPUs, by the cycle counts of
      their compiler.
    mesh: the devices that a batch is split over.
    tokens_per_frame: n.
    num_heads: of the decoder.
    head_width: of the decoder.
    dtype: of the matrix products.
    rule: a name in `asad.ATTENTION_DROPOUTS`. Only ASAD has kernels and loops.

  Raises:
    ValueError: `kind` is unknown, or 'fused' and there are no kernels for this case.
  """
  if kind not in KINDS:
    raise ValueError(f'attention={kind!r} is unknown; use one of {", ".join(KINDS)}.')
  if rule != 'asad' and kind == 'fused':
    raise ValueError(f"attention='fused' has no kernel for dropout_rule={rule!r}; use 'auto'.")
  if kind == 'xla':
    return attention.plain(rule)
  device = mesh.devices.flat[0]
  at_once = logits_at_once(device.platform, max(1, len(mesh.local_devices)))
  loop = Loop(at_once, mesh if mesh.size > 1 else None)
  dense = partial(dense_attention, loop=loop)
  if kind == 'fused':
    sizes = tokens_per_frame, num_heads, head_width
    if reason := unsupported(device, *sizes, dtype):
      raise ValueError(f"attention='fused' has no kernel for {reason}; use attention='xla'.")
    if device.platform == 'gpu':
      return Implementations(
        partial(flash_attention, mesh=mesh), partial(asad_gpu.asad_attention, mesh=mesh)
      )
    return Implementations(dense, partial(asad_tpu.asad_attention, mesh=mesh))
  if rule != 'asad':
    return Implementations(dense, attention.plain(rule).dropout)
  return Implementations(dense, partial(fast_asad.asad_attention, loop=loop))


def logits_at_once(platform: str, devices: int = 1) -> int | None:
  """Returns how many logits a device should compute at a time; None: all.

  Args:
    platform: such as 'cpu'.
    devices: how many of them share the cores of this process.
  """
  if platform == 'tpu':
    return ON_CHIP_LOGITS
  return len(os.sched_getaffinity(0)) * CACHED_LOGITS // devices if platform == 'cpu' else None


def unsupported(
  device: Any, tokens_per_frame: int, num_heads: int, head_width: int, dtype: DTypeLike
) -> str:
  """Returns why a device has no kernels for these sizes, or '' if it has.

  Of the device, only `platform` and, if it exists, `compute_capability` are read.
  """
  if device.platform == 'tpu':
    return asad_tpu.unsupported(tokens_per_frame, num_heads, head_width)
  if device.platform != 'gpu':
    return f'devices of the kind {device.platform!r}'
  capability = getattr(device, 'compute_capability', 'unknown')
  if capability != asad_gpu.COMPUTE_CAPABILITY:
    return f'GPUs of compute capability {capability}, but for {asad_gpu.COMPUTE_CAPABILITY}'
  return asad_gpu.unsupported(tokens_per_frame, head_width, dtype)
