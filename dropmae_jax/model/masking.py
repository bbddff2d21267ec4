"""Masking schemes: which patches of both frames the encoder sees.

To add a scheme: write a function with the signature of `random_masking` and list it in
`MASKING_SCHEMES`. The property tests run on every entry.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped


class Masking(NamedTuple):
  """A partition of the l tokens of every sample; indices in the order that the encoder sees."""

  visible: Int[Array, 'b k']
  masked: Int[Array, 'b r']


def num_visible(num_tokens: int, mask_ratio: float) -> int:
  """Returns how many tokens of a sample stay visible: l (1 - ratio), truncated as published.

  Raises:
    ValueError: no token would be visible, or none masked.
  """
  visible = int(num_tokens * (1 - mask_ratio))
  if not 0 < visible < num_tokens:
    raise ValueError(
      f'{mask_ratio=} leaves {visible} of {num_tokens} tokens visible; choose a ratio above 0 and'
      ' below 1 that leaves at least one visible and one masked.'
    )
  return visible


def masking_from_noise(noise: Float[Array, 'b l'], visible: int) -> Masking:
  """Keeps the `visible` tokens with the lowest noise, ordered by noise."""
  order = jnp.argsort(noise, axis=1)
  return Masking(visible=order[:, :visible], masked=order[:, visible:])


def random_masking(keys: Key[Array, ' b'], *, num_tokens: int, mask_ratio: float) -> Masking:
  """Masks uniformly over both frames jointly, so the number per frame varies.

  Args:
    keys: one per sample, so that the draw does not depend on how a batch is sharded.
    num_tokens: l, the tokens of both frames.
    mask_ratio: share of the tokens to mask, between 0 and 1.

  Raises:
    ValueError: see `num_visible`.
  """
  noise = jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(keys)
  return masking_from_noise(noise, num_visible(num_tokens, mask_ratio))


MASKING_SCHEMES = {'random': random_masking}


def check_scheme(name: str, *, num_tokens: int, mask_ratio: float) -> None:
  """Draws once from an entry of `MASKING_SCHEMES`, which may be a user's.

  Raises:
    ValueError: a token is neither visible nor masked, or both; or none is visible, or none masked.
  """
  keys = jax.random.split(jax.random.key(0), 2)
  drawn = MASKING_SCHEMES[name](keys, num_tokens=num_tokens, mask_ratio=mask_ratio)
  is_partition = (
    isinstance(drawn, Masking)
    and all(each.ndim == 2 and len(each) == 2 and each.size for each in drawn)
    and np.array_equal(np.sort(np.concatenate(drawn, axis=1)), [range(num_tokens)] * 2)
  )
  if not is_partition:
    raise ValueError(
      f'masking={name!r} must return Masking(visible, masked) that names each of the {num_tokens}'
      ' tokens of every sample once.'
    )


def is_masked(masking: Masking) -> Bool[Array, 'b l']:
  """Returns True for masked tokens, in frame order."""
  visible = jnp.zeros(masking.visible.shape, bool)
  masked = jnp.ones(masking.masked.shape, bool)
  return in_frame_order(jnp.concatenate([visible, masked], axis=1)[..., None], masking)[..., 0]


def select(tokens: Shaped[Array, 'b l d'], indices: Int[Array, 'b k']) -> Shaped[Array, 'b k d']:
  """Gathers the tokens at `indices`, of which no two may be equal in a sample.

  XLA is told that they are unique, which makes the scatter in the gradient deterministic on GPUs.
  """
  pick = {'unique_indices': True, 'mode': 'promise_in_bounds'}
  return jax.vmap(lambda tokens, indices: tokens.at[indices].get(**pick))(tokens, indices)


def in_frame_order(tokens: Array, masking: Masking) -> Array:
  """Reorders [b, l, d] from (visible, masked) to frame order."""
  indices = jnp.concatenate([masking.visible, masking.masked], axis=1)
  return select(tokens, jnp.argsort(indices, axis=1))


def restore(
  visible: Float[Array, 'b k d'], mask_token: Float[Array, '1 1 d'], masking: Masking
) -> Float[Array, 'b l d']:
  """Puts the visible tokens back in frame order, and the mask token everywhere else."""
  batch, num_masked = masking.masked.shape
  filler = jnp.broadcast_to(mask_token, (batch, num_masked, visible.shape[-1]))
  return in_frame_order(jnp.concatenate([visible, filler.astype(visible.dtype)], axis=1), masking)
