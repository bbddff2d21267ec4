"""Attention: a function from queries, keys and values to mixed values."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Key

from dropmae_jax.model import asad, fast_asad
from dropmae_jax.model.asad import num_dropped
from dropmae_jax.model.chunks import AT_ONCE, Loop, by_groups

# (query, key, value), each [b, l, m, e], to [b, l, m, e].
Attention = Callable[[Array, Array, Array], Array]
# One that drops pairs: it takes the `draw_keys` and the `drop_rate` of `fast_asad.asad_attention`.
DropoutAttention = Callable[..., Array]


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


class Implementations(NamedTuple):
  """How attention is computed, without dropped pairs and with."""

  dense: Attention = dense_attention
  dropout: DropoutAttention = fast_asad.asad_attention


def plain(rule: str = 'asad') -> Implementations:
  """Returns the implementations that run anywhere.

  Args:
    rule: the name of an entry of `asad.ATTENTION_DROPOUTS`.
  """
  if rule == 'asad':
    return Implementations()
  attend = partial(fast_asad.attention_with_rule, rule=asad.ATTENTION_DROPOUTS[rule])
  return Implementations(dropout=attend)


def decoder_attentions(
  keys: Key[Array, ' b'],
  *,
  num_blocks: int,
  tokens_per_frame: int,
  drop_rate: float,
  implementations: Implementations,
) -> list[Attention]:
  """Returns one attention per decoder block: ASAD with its own draw, or dense where P drops none.

  Args:
    keys: one per sample; every block folds in its number.
    num_blocks: decoder depth.
    tokens_per_frame: n.
    drop_rate: P; 0 switches the dropout off, as in evaluation.
    implementations: of both kinds.
  """
  if num_dropped(tokens_per_frame, drop_rate) == 0:
    return [implementations.dense] * num_blocks
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  return [
    partial(implementations.dropout, draw_keys=fold(keys, block), drop_rate=drop_rate)
    for block in range(num_blocks)
  ]
