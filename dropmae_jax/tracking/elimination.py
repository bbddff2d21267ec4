"""Candidate elimination: search tokens that the template hardly attends to are left out.

After the attention of some blocks, the search tokens with the lowest scores are removed; at the end
there are zeros in their places (OSTrack, Ye et al. 2022, section 3.2). There are two forms, equal
but for rounding:

  masked    all tokens are computed with, and removed ones are not attended to. How many stay is a
            traced array, so one compiled program serves every keep rate of a run.
  gathered  removed tokens are not computed with. How many stay is static.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dropmae_jax.model import masking

# How many search tokens stay after each elimination: static numbers ask for the gathered form, an
# array for the masked one.
Kept = tuple[int, ...] | Int[Array, ' eliminations']


def keep_rate(
  epoch: int, *, full_epochs: int = 20, decay_epochs: int = 50, lowest: float = 0.7
) -> float:
  """Returns the share of the search tokens that an elimination keeps: 1, half a cosine, lowest.

  Args:
    epoch: from 1.
    full_epochs: nothing is removed up to this epoch.
    decay_epochs: how many epochs later the rate is the lowest; 50 in the published training of 100
      epochs, 80 in that of 300.
    lowest: the last rate, also that of tracking.
  """
  progress = min(max(epoch - full_epochs, 0), decay_epochs) / decay_epochs
  return lowest + (1 - lowest) * 0.5 * (math.cos(math.pi * progress) + 1)


def kept_counts(num_tokens: int, rate: float, eliminations: int) -> tuple[int, ...]:
  """Returns how many search tokens stay after each elimination: the rate of those before, up.

  The products are float64, as published: 0.7 * 180 is 125.99999999999999, and 126 stay.
  """
  counts = [num_tokens]
  for _ in range(eliminations):
    counts.append(math.ceil(rate * counts[-1]))
  return tuple(counts[1:])


def centre_token(grid: int) -> int:
  """Returns the template token whose attention ranks the search tokens, of a grid x grid template.

  It is the one at the centre, or before it if there are two.
  """
  return (grid - 1) // 2 * (grid + 1)


class Standing(NamedTuple):
  """The search tokens that are computed with.

  Attributes:
    places: on the search grid, row by row and rising.
    present: which of them are not removed; None: all.
  """

  places: Int[Array, 'b k']
  present: Bool[Array, 'b k'] | None


def everything(batch_size: int, num_tokens: int) -> Standing:
  """Returns all search tokens."""
  return Standing(jnp.broadcast_to(jnp.arange(num_tokens), (batch_size, num_tokens)), None)


def present_tokens(standing: Standing, num_template: int) -> Bool[Array, 'b l'] | None:
  """Returns which of all tokens are attended to, those of the template first; None: all."""
  if standing.present is None:
    return None
  return jnp.pad(standing.present, ((0, 0), (num_template, 0)), constant_values=True)


def attention_received(
  query: Float[Array, 'b m e'],
  key: Float[Array, 'b l m e'],
  present: Bool[Array, 'b l'] | None,
) -> Float[Array, 'b l']:
  """Returns how much one token attends to each: the mean of the heads' softmax, in float32.

  Nothing is differentiated: scores only choose.
  """
  query, key = jax.lax.stop_gradient((query, key))
  logits = jnp.einsum('bme,blme->bml', query, key, preferred_element_type=jnp.float32)
  logits = logits * query.shape[-1] ** -0.5
  if present is not None:
    logits = jnp.where(present[:, None], logits, -jnp.inf)
  return jax.nn.softmax(logits).mean(axis=1)


def eliminate(
  search: Float[Array, 'b k d'],
  standing: Standing,
  scores: Float[Array, 'b k'],
  count: int | Int[Array, ''],
) -> tuple[Float[Array, 'b r d'], Standing]:
  """Keeps the `count` present tokens with the highest scores; of equal ones the first.

  Args:
    search: tokens of the search image.
    standing: which ones they are.
    scores: of these tokens; all above -1.
    count: how many stay; a Python number gathers them, an array marks the others as removed.

  Returns:
    The tokens to go on with, and which ones they are.
  """
  if isinstance(count, int):
    if count >= search.shape[1]:
      return search, standing
    kept = jnp.sort(jax.lax.top_k(scores, count)[1])
    places = masking.select(standing.places[..., None], kept)[..., 0]
    return masking.select(search, kept), Standing(places, None)
  if standing.present is not None:
    scores = jnp.where(standing.present, scores, -1.0)
  rank = jnp.argsort(jnp.argsort(scores, axis=1, descending=True), axis=1)
  present = rank < count
  if standing.present is not None:
    present &= standing.present
  return search, Standing(standing.places, present)


def on_grid(
  search: Float[Array, 'b k d'], standing: Standing, num_tokens: int
) -> Float[Array, 'b x d']:
  """Puts tokens at their places on the search grid, and zeros at those of removed ones."""
  if standing.present is not None:
    search = jnp.where(standing.present[..., None], search, 0.0)
  if search.shape[1] == num_tokens:
    return search

  def put(tokens: Array, places: Array) -> Array:
    grid = jnp.zeros((num_tokens, tokens.shape[-1]), tokens.dtype)
    return grid.at[places].set(tokens, unique_indices=True, mode='promise_in_bounds')

  return jax.vmap(put)(search, standing.places)
