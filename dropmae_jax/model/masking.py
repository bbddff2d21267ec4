"""Which patches the encoder sees: masking schemes over the tokens of both frames jointly.

To add a scheme: write a function with the signature of `random_masking` and list it in
`MASKING_SCHEMES`; the property tests run over that dict.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped


class Masking(NamedTuple):
  """A partition of every sample's l tokens; indices in the order in which they are fed."""

  visible: Int[Array, 'b k']
  masked: Int[Array, 'b r']


def num_visible(num_tokens: int, mask_ratio: float) -> int:
  """Returns how many of a sample's tokens stay visible: the product truncated, as published.

  Raises:
    ValueError: the ratio leaves no token visible or none masked.
  """
  visible = int(num_tokens * (1 - mask_ratio))
  if not 0 < visible < num_tokens:
    raise ValueError(
      f'{mask_ratio=} leaves {visible} of {num_tokens} tokens visible; choose a ratio above 0 and'
      ' below 1 that leaves at least one visible and one masked.'
    )
  return visible


def masking_from_noise(noise: Float[Array, 'b l'], visible: int) -> Masking:
  """Keeps the `visible` tokens of least noise, in the order of their noise."""
  order = jnp.argsort(noise, axis=1)
  return Masking(visible=order[:, :visible], masked=order[:, visible:])


def random_masking(keys: Key[Array, ' b'], *, num_tokens: int, mask_ratio: float) -> Masking:
  """Masks uniformly over both frames jointly, so the share of each frame varies.

  Args:
    keys: one per sample, so that the draw does not depend on how a batch is split.
    num_tokens: l, the tokens of both frames.
    mask_ratio: share of the tokens to mask, between 0 and 1.
  """
  noise = jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(keys)
  return masking_from_noise(noise, num_visible(num_tokens, mask_ratio))


MASKING_SCHEMES = {'random': random_masking}


def is_masked(masking: Masking) -> Bool[Array, 'b l']:
  """Returns True at the masked tokens, in the frames' own order."""
  visible = jnp.zeros(masking.visible.shape, bool)
  masked = jnp.ones(masking.masked.shape, bool)
  return in_frame_order(jnp.concatenate([visible, masked], axis=1)[..., None], masking)[..., 0]


def select(tokens: Shaped[Array, 'b l d'], indices: Int[Array, 'b k']) -> Shaped[Array, 'b k d']:
  """Gathers the tokens at `indices`, of which no two may be equal in a sample.

  XLA is told so: its gradient then has one order in which to add up, on GPUs too.
  """
  pick = {'unique_indices': True, 'mode': 'promise_in_bounds'}
  return jax.vmap(lambda of_sample, places: of_sample.at[places].get(**pick))(tokens, indices)


def in_frame_order(tokens: Array, masking: Masking) -> Array:
  """Reorders [b, l, d] from (visible, masked) to the frames' own order."""
  fed_order = jnp.concatenate([masking.visible, masking.masked], axis=1)
  return select(tokens, jnp.argsort(fed_order, axis=1))


def restore(
  visible: Float[Array, 'b k d'], mask_token: Float[Array, '1 1 d'], masking: Masking
) -> Float[Array, 'b l d']:
  """Puts visible tokens back in place and the mask token everywhere else."""
  batch, num_masked = masking.masked.shape
  filler = jnp.broadcast_to(mask_token, (batch, num_masked, visible.shape[-1]))
  return in_frame_order(jnp.concatenate([visible, filler.astype(visible.dtype)], axis=1), masking)
