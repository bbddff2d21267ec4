"""What an attention is: a function from queries, keys and values to mixed values."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Key

from dropmae_jax import asad

# (query, key, value), each [b, l, m, e], to [b, l, m, e].
Attention = Callable[[Array, Array, Array], Array]


def dense_attention(
  query: Float[Array, 'b l m e'], key: Float[Array, 'b l m e'], value: Float[Array, 'b l m e']
) -> Float[Array, 'b l m e']:
  """Plain softmax attention, scaled by the root of the head width; softmax in float32."""
  query, key, value = (rearrange(each, 'b l m e -> b m l e') for each in (query, key, value))
  logits = jnp.einsum('bmie,bmje->bmij', query, key, preferred_element_type=jnp.float32)
  attention = jax.nn.softmax(logits * query.shape[-1] ** -0.5).astype(value.dtype)
  return rearrange(jnp.einsum('bmij,bmje->bmie', attention, value), 'b m l e -> b l m e')


def decoder_attentions(
  keys: Key[Array, ' b'], *, num_blocks: int, tokens_per_frame: int, drop_rate: float
) -> list[Attention]:
  """Returns one attention per decoder block: ASAD with its own draw, or dense where P drops none.

  Args:
    keys: one per sample; every block folds in its number.
    num_blocks: decoder depth.
    tokens_per_frame: n.
    drop_rate: P; 0 switches the dropout off, as in evaluation.
  """
  if asad.num_dropped(tokens_per_frame, drop_rate) == 0:
    return [dense_attention] * num_blocks
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  return [
    partial(asad.asad_attention, draw_keys=fold(keys, block), drop_rate=drop_rate)
    for block in range(num_blocks)
  ]
