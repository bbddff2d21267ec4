"""Attention of a few heads of a few samples at a time."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from dropmae_jax.model.on_each_device import on_each_device


class Loop(NamedTuple):
  """What a loop over groups of heads is over.

  Attributes:
    logits_at_once: a group has no more logits, or one head of one sample; None: one group has all.
    mesh: the devices that the batch is split over, all axes along the first axis; None is one.
  """

  logits_at_once: int | None = None
  mesh: Mesh | None = None


AT_ONCE = Loop()


class Groups(NamedTuple):
  """In how many parts a batch and its heads are cut; every two of them make a group."""

  of_samples: int
  of_heads: int

  @property
  def number(self) -> int:
    """How many groups there are."""
    return self.of_samples * self.of_heads


def groups_of(shape: tuple[int, int, int], logits_at_once: int | None) -> Groups:
  """Returns how b, l and m are cut: into heads of all samples, or else into samples too.

  Where b has no divisor that fits, all heads of fewer samples may be the larger group.

  Args:
    shape: b, l, m.
    logits_at_once: see `Loop`.
  """
  b, length, num_heads = shape
  most = math.inf if logits_at_once is None else logits_at_once / length**2
  heads = _largest_divisor(num_heads, most / b)
  samples = _largest_divisor(b, most / heads)
  fewest = _largest_divisor(b, most / num_heads)
  rest = _largest_divisor(num_heads, most / fewest)
  samples, heads = max((samples, heads), (fewest, rest), key=lambda group: group[0] * group[1])
  return Groups(b // samples, num_heads // heads)


def _largest_divisor(number: int, most: float) -> int:
  return max(k for k in range(1, number + 1) if number % k == 0 and k <= max(most, 1))


def cut(numbers: Shaped[Array, 'b m'], groups: Groups) -> Shaped[Array, 'g c k']:
  """Gives every group the numbers of its heads."""
  return rearrange(numbers, '(s c) (h k) -> (s h) c k', s=groups.of_samples, h=groups.of_heads)


def by_groups(
  attend: Callable[[Array, Array, Array, Any], Array],
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  of_heads: Any,
  loop: Loop,
  *,
  recompute: bool = False,
) -> Float[Array, 'b l m e']:
  """Attends, with all heads of all samples at once or in a loop over groups of them.

  A loop is faster where what a group computes then stays in the caches of a CPU, or in the on-chip
  memory of a TPU.

  Args:
    attend: of queries, keys, values, and arrays of `of_heads`.
    query: one vector per token and head.
    key: likewise.
    value: likewise.
    of_heads: arrays [b, m], of which every group sees its own.
    loop: what it is over.
    recompute: a loop keeps nothing for its gradient, which then computes it anew.
  """

  def on_a_device(query: Array, key: Array, value: Array, of_heads: Any) -> Array:
    groups = groups_of(query.shape[:3], loop.logits_at_once)
    if groups.number == 1:
      return attend(query, key, value, of_heads)
    of_group = jax.checkpoint(attend) if recompute else attend
    sizes = {'s': groups.of_samples, 'h': groups.of_heads}
    tokens = (
      rearrange(each, '(s c) l (h k) e -> (s h) c l k e', **sizes) for each in (query, key, value)
    )
    rest = jax.tree.map(lambda each: cut(each, groups), of_heads)
    found = jax.lax.map(lambda group: of_group(*group), (*tokens, rest))
    return rearrange(found, '(s h) c l k e -> (s c) l (h k) e', **sizes)

  if loop.logits_at_once is not None:
    on_a_device = on_each_device(on_a_device, loop.mesh)
  return on_a_device(query, key, value, of_heads)
