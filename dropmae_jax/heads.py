"""Attention of a few heads at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
from einops import rearrange
from jaxtyping import Array, Float


def num_groups(shape: tuple[int, int, int], logits_at_once: int | None) -> int:
  """Returns how many groups of heads `by_heads` makes of b, l and m."""
  b, length, num_heads = shape
  most = math.inf if logits_at_once is None else logits_at_once
  sizes = (size for size in range(num_heads, 0, -1) if num_heads % size == 0)
  fitting = (size for size in sizes if b * size * length**2 <= most)
  return num_heads // next(fitting, 1)


def by_heads(
  attend: Callable[[Array, Array, Array, Any], Array],
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  of_heads: Any,
  logits_at_once: int | None,
) -> Float[Array, 'b l m e']:
  """Attends, with all heads at once or in a loop over groups of them.

  On CPUs a loop is faster: what it computes stays in the caches.

  Args:
    attend: of queries, keys, values, and arrays of `of_heads`.
    query: one vector per token and head.
    key: likewise.
    value: likewise.
    of_heads: arrays [b, m], of which every group sees its own.
    logits_at_once: a group has as many heads as have no more logits, or one; None: all.
  """
  groups = num_groups(query.shape[:3], logits_at_once)
  if groups == 1:
    return attend(query, key, value, of_heads)
  tokens = (rearrange(each, 'b l (g m) e -> g b l m e', g=groups) for each in (query, key, value))
  rest = jax.tree.map(lambda each: rearrange(each, 'b (g m) -> g b m', g=groups), of_heads)
  found = jax.lax.map(lambda group: attend(*group), (*tokens, rest))
  return rearrange(found, 'g b l m e -> b l (g m) e')
