"""What an attention is: a function from queries, keys and values to mixed values."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from dropmae_jax import asad, asad_gpu, asad_tpu
from dropmae_jax.groups import AT_ONCE, Loop, by_groups
from dropmae_jax.on_each_device import on_each_device

# (query, key, value), each [b, l, m, e], to [b, l, m, e].
Attention = Callable[[Array, Array, Array], Array]
# One that drops pairs: it takes the `draw_keys` and the `drop_rate` of `asad.asad_attention` too.
AsadAttention = Callable[..., Array]
# Programs of ASAD: see `programs_for`.
KINDS = ('auto', 'xla', 'fused')

# What a CPU's core works on should stay in its caches: so many logits, measured with 392 tokens and
# two cores (python -m benchmarks.step_time).
CACHED_LOGITS = 4 * 392**2
# And what a TPU works on, in its on-chip memory: XLA then puts nearly all of it there (python -m
# benchmarks.compile_report).
ON_CHIP_LOGITS = 32 * 392**2


def dense_attention(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  loop: Loop = AT_ONCE,
) -> Float[Array, 'b l m e']:
  """Plain softmax attention, scaled by the root of the head width; softmax in float32.

  Args:
    query: one vector per token and head.
    key: likewise.
    value: likewise.
    loop: over groups of heads; the gradient of more than one computes logits anew.
  """

  def attend(query: Array, key: Array, value: Array, nothing: None) -> Array:
    del nothing
    query, key, value = (rearrange(each, 'b l m e -> b m l e') for each in (query, key, value))
    logits = jnp.einsum('bmie,bmje->bmij', query, key, preferred_element_type=jnp.float32)
    attention = jax.nn.softmax(logits * query.shape[-1] ** -0.5).astype(value.dtype)
    return rearrange(jnp.einsum('bmij,bmje->bmie', attention, value), 'b m l e -> b l m e')

  return by_groups(attend, query, key, value, None, loop, recompute=True)


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


class Programs(NamedTuple):
  """How attention is computed, without drops and with."""

  dense: Attention = dense_attention
  asad: AsadAttention = asad.asad_attention


# Those that run anywhere.
PLAIN = Programs()


def programs_for(
  kind: str,
  mesh: Mesh,
  *,
  tokens_per_frame: int,
  num_heads: int,
  head_width: int,
  dtype: DTypeLike,
) -> Programs:
  """Returns the programs for devices and sizes; all have one law, and nearly one draw.

  Args:
    kind: 'xla' runs anywhere; 'fused' has kernels of ASAD, for TPUs and for Hopper GPUs, and there
      cuDNN's flash attention; 'auto' is 'xla' as long as nobody has timed the kernels, a few heads
      at a time on CPUs, by measurement, and on TPUs, by their compiler's count of cycles.
    mesh: devices that a batch is split over.
    tokens_per_frame: n.
    num_heads: of the decoder.
    head_width: of the decoder.
    dtype: of what is multiplied.

  Raises:
    ValueError: the kernels are asked for where there are none.
  """
  if kind not in KINDS:
    raise ValueError(f'attention={kind!r} is unknown; use one of {", ".join(KINDS)}.')
  if kind == 'xla':
    return PLAIN
  device = mesh.devices.flat[0]
  loops = _loops(mesh)
  if kind == 'fused':
    sizes = tokens_per_frame, num_heads, head_width
    if reason := unsupported(device, *sizes, dtype):
      raise ValueError(f"attention='fused' has no kernel for {reason}; use attention='xla'.")
    if device.platform == 'gpu':
      return Programs(
        partial(flash_attention, mesh=mesh), partial(asad_gpu.asad_attention, mesh=mesh)
      )
    return loops._replace(asad=partial(asad_tpu.asad_attention, mesh=mesh))
  return loops


def _loops(mesh: Mesh) -> Programs:
  """Returns XLA's programs, a few heads at a time where that is faster."""
  at_once = logits_at_once(mesh.devices.flat[0].platform, max(1, len(mesh.local_devices)))
  loop = Loop(at_once, mesh if mesh.size > 1 else None)
  return Programs(partial(dense_attention, loop=loop), partial(asad.asad_attention, loop=loop))


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


def decoder_attentions(
  keys: Key[Array, ' b'],
  *,
  num_blocks: int,
  tokens_per_frame: int,
  drop_rate: float,
  programs: Programs,
) -> list[Attention]:
  """Returns one attention per decoder block: ASAD with its own draw, or dense where P drops none.

  Args:
    keys: one per sample; every block folds in its number.
    num_blocks: decoder depth.
    tokens_per_frame: n.
    drop_rate: P; 0 switches the dropout off, as in evaluation.
    programs: of both kinds.
  """
  if asad.num_dropped(tokens_per_frame, drop_rate) == 0:
    return [programs.dense] * num_blocks
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  return [
    partial(programs.asad, draw_keys=fold(keys, block), drop_rate=drop_rate)
    for block in range(num_blocks)
  ]
