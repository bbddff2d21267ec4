"""Attention functions: from queries, keys and values to the output of every head."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Key

from dropmae_jax.model import asad, fast_asad
from dropmae_jax.model.chunks import NO_LOOP, Loop, in_chunks

# (query, key, value), each [b, l, m, e], to [b, l, m, e].
Attention = Callable[[Array, Array, Array], Array]
# The same with dropped pairs; also takes `draw_keys` and `drop_rate`, as
# `fast_asad.asad_attention` does.
DropoutAttention = Callable[..., Array]


def dense_attention(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  present: Bool[Array, 'b l'] | None = None,
  loop: Loop = NO_LOOP,
) -> Float[Array, 'b l m e']:
  """Softmax attention without dropout; the softmax is in float32.

  The backward pass of a loop of more than one chunk rematerialises the logits.

  Args:
    query: one vector per token and head.
    key: likewise.
    value: likewise.
    present: the tokens that are attended to, at least one of a sample; None: all.
    loop: the size of the chunks.
  """

  def attend(query: Array, key: Array, value: Array, present: Array | None) -> Array:
    query, key, value = (rearrange(each, 'b l m e -> b m l e') for each in (query, key, value))
    logits = jnp.einsum('bmie,bmje->bmij', query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    if present is not None:
      logits = jnp.where(present[:, :, None], logits, -jnp.inf)
    probs = jax.nn.softmax(logits).astype(value.dtype)
    return rearrange(jnp.einsum('bmij,bmje->bmie', probs, value), 'b m l e -> b l m e')

  if present is not None:
    present = repeat(present, 'b l -> b m l', m=query.shape[2])
  return in_chunks(attend, query, key, value, present, loop, rematerialise=True)


class Implementations(NamedTuple):
  """The functions that compute attention: without dropped pairs, and with them."""

  dense: Attention = dense_attention
  dropout: DropoutAttention = fast_asad.asad_attention


def plain(rule: str = 'asad') -> Implementations:
  """Returns the implementations that run on any device, without loops and kernels.

  Args:
    rule: a name in `asad.ATTENTION_DROPOUTS`.
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
  """Returns an attention function for every decoder block, each with its own draw.

  A rate that drops no pair gives dense attention.

  Args:
    keys: one per sample; every block folds in its index.
    num_blocks: decoder depth.
    tokens_per_frame: n.
    drop_rate: P; 0 switches the dropout off, as in evaluation.
    implementations: how attention is computed.
  """
  if asad.num_dropped(tokens_per_frame, drop_rate) == 0:
    return [implementations.dense] * num_blocks
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  return [
    partial(implementations.dropout, draw_keys=fold(keys, block), drop_rate=drop_rate)
    for block in range(num_blocks)
  ]
