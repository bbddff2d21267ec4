"""What an attention is: a function from queries, keys and values to mixed values."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from dropmae_jax import asad, asad_tpu

# (query, key, value), each [b, l, m, e], to [b, l, m, e].
Attention = Callable[[Array, Array, Array], Array]
# One that drops pairs: it takes the `draw_keys` and the `drop_rate` of `asad.asad_attention` too.
AsadAttention = Callable[..., Array]
# Programs of ASAD: see `asad_attention_of_kind`.
KINDS = ('auto', 'xla', 'fused')


def dense_attention(
  query: Float[Array, 'b l m e'], key: Float[Array, 'b l m e'], value: Float[Array, 'b l m e']
) -> Float[Array, 'b l m e']:
  """Plain softmax attention, scaled by the root of the head width; softmax in float32."""
  query, key, value = (rearrange(each, 'b l m e -> b m l e') for each in (query, key, value))
  logits = jnp.einsum('bmie,bmje->bmij', query, key, preferred_element_type=jnp.float32)
  attention = jax.nn.softmax(logits * query.shape[-1] ** -0.5).astype(value.dtype)
  return rearrange(jnp.einsum('bmij,bmje->bmie', attention, value), 'b m l e -> b l m e')


def asad_attention_of_kind(
  kind: str, mesh: Mesh, *, tokens_per_frame: int, num_heads: int, head_width: int
) -> AsadAttention:
  """Returns a program of ASAD for devices and sizes; all have one law, and nearly one draw.

  Args:
    kind: 'xla' runs anywhere; 'fused' is two kernels for TPUs; 'auto' is 'xla', as long as nobody
      has timed the kernels on a TPU.
    mesh: devices that a batch is split over.
    tokens_per_frame: n.
    num_heads: of the decoder.
    head_width: of the decoder.

  Raises:
    ValueError: the kernels are asked for where there are none.
  """
  if kind not in KINDS:
    raise ValueError(f'attention={kind!r} is unknown; use one of {", ".join(KINDS)}.')
  if kind != 'fused':
    return asad.asad_attention
  platform = mesh.devices.flat[0].platform
  reason = asad_tpu.unsupported(tokens_per_frame, num_heads, head_width)
  if platform != 'tpu':
    reason = f'devices of the kind {platform!r}'
  if reason:
    raise ValueError(f"attention='fused' has no kernel for {reason}; use attention='xla'.")
  return partial(asad_tpu.asad_attention, mesh=mesh)


def decoder_attentions(
  keys: Key[Array, ' b'],
  *,
  num_blocks: int,
  tokens_per_frame: int,
  drop_rate: float,
  asad_attention: AsadAttention = asad.asad_attention,
) -> list[Attention]:
  """Returns one attention per decoder block: ASAD with its own draw, or dense where P drops none.

  Args:
    keys: one per sample; every block folds in its number.
    num_blocks: decoder depth.
    tokens_per_frame: n.
    drop_rate: P; 0 switches the dropout off, as in evaluation.
    asad_attention: the program of ASAD.
  """
  if asad.num_dropped(tokens_per_frame, drop_rate) == 0:
    return [dense_attention] * num_blocks
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  return [
    partial(asad_attention, draw_keys=fold(keys, block), drop_rate=drop_rate)
    for block in range(num_blocks)
  ]
