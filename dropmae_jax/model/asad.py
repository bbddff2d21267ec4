"""Adaptive spatial-attention dropout (ASAD): the published rule, and the table of such rules.

In every decoder block, a fixed number of within-frame (query, key) pairs is removed before the
softmax, so that attention has to look at the other frame (Wu et al., DropMAE, CVPR 2023, section
3.3). This file is the definition. Training draws from the same distribution with `fast_asad` or
with the kernels of TPUs and GPUs.

To add a rule: write a function with the signature of `asad` and list it in `ATTENTION_DROPOUTS`.
The tests of counts and gradients run on every entry.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Key

EPSILON = 1e-6


class Logits(NamedTuple):
  """Attention logits, float32, of query i of frame f with keys of its own and the other frame."""

  own: Float[Array, 'b f m i n']
  other: Float[Array, 'b f m i n']


def num_dropped(tokens_per_frame: int, drop_rate: float) -> int:
  """Returns how many pairs are dropped per sample and head: int(P (n - 1)) times 2n queries.

  The product is truncated in double precision, as published. It is 0 if P is below 1 / (n - 1).
  """
  return int(drop_rate * (tokens_per_frame - 1)) * 2 * tokens_per_frame


def sampling_weights(logits: Logits) -> Float[Array, 'b f m i n']:
  """Returns the weight with which each within-frame pair is drawn; 0 for a token with itself.

  The weights of a query sum to its largest attention to the other frame (plus 1e-6). They are
  distributed in proportion to its attention within its own frame (plus 1e-6 each).
  """
  attention = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
  own, other = jnp.split(attention, 2, axis=-1)
  best_match = other.max(axis=-1, keepdims=True) + EPSILON
  is_self = jnp.eye(own.shape[-1], dtype=bool)
  candidates = jnp.where(is_self, 0.0, own + EPSILON)
  return best_match * candidates / candidates.sum(axis=-1, keepdims=True)


def draw_without_replacement(
  keys: Key[Array, ' b'], weights: Float[Array, 'b f m i n'], count: int
) -> Bool[Array, 'b f m i n']:
  """Draws `count` pairs for every sample and head, jointly over the queries of both frames.

  Successive weighted draws without replacement are the pairs with the `count` lowest scores
  E / weight, where E is exponential noise (Gumbel top-k; torch.multinomial does the same).
  """
  _, f, _, i, _ = weights.shape
  flat = rearrange(weights, 'b f m i n -> b m (f i n)')
  noise = jax.vmap(lambda key: jax.random.exponential(key, flat.shape[1:]))(keys)
  scores = jnp.where(flat > 0, noise / flat, jnp.inf)
  _, drawn = jax.lax.top_k(-scores, count)
  is_drawn = jnp.put_along_axis(jnp.zeros(flat.shape, bool), drawn, True, axis=-1, inplace=False)
  return rearrange(is_drawn, 'b m (f i n) -> b f m i n', f=f, i=i)


def asad(keys: Key[Array, ' b'], logits: Logits, *, drop_rate: float) -> Bool[Array, 'b f m i n']:
  """Marks the within-frame pairs that ASAD drops.

  Args:
    keys: random keys, one per sample.
    logits: already scaled by the inverse root of the head width.
    drop_rate: P; `num_dropped` pairs are dropped for every sample and head.
  """
  count = num_dropped(logits.own.shape[-1], drop_rate)
  return draw_without_replacement(keys, sampling_weights(logits), count)


# (keys, logits, *, drop_rate) to the pairs that are dropped.
DropoutRule = Callable[..., Bool[Array, 'b f m i n']]
# The names are the values of `config.objective.dropout_rule`.
ATTENTION_DROPOUTS: dict[str, DropoutRule] = {'asad': asad}


def check_rule(name: str, *, tokens_per_frame: int, drop_rate: float) -> None:
  """Traces an entry of `ATTENTION_DROPOUTS`, which may be a user's.

  Raises:
    ValueError: it does not return booleans of the shape of the logits.
  """
  shape = 2, 2, 3, tokens_per_frame, tokens_per_frame
  logits = Logits(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 2)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
  drop = jax.eval_shape(partial(ATTENTION_DROPOUTS[name], drop_rate=drop_rate), keys, logits)
  if getattr(drop, 'shape', None) != shape or drop.dtype != bool:
    returned = f'{drop.dtype} {list(drop.shape)}' if hasattr(drop, 'shape') else repr(drop)
    raise ValueError(
      f'dropout_rule={name!r} must return booleans of the shape of logits.own, here {list(shape)};'
      f' it returns {returned}.'
    )
