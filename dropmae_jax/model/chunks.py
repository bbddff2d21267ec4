"""Attention in chunks of a few heads of a few samples, and on every device of a mesh."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from einops import rearrange
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Shaped


def on_each_device(function: Callable, mesh: Mesh | None) -> Callable:
  """Returns `function`, run by every device of a mesh on its own part of the batch.

  Loops and kernels need this: XLA cannot partition them by itself.

  Args:
    function: from arrays to arrays, all with the batch as first axis.
    mesh: the devices, whose axes together split the batch; None: one device.
  """
  if mesh is None:
    return function
  batch = PartitionSpec(mesh.axis_names)
  return jax.shard_map(function, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)


class Loop(NamedTuple):
  """How attention is split into chunks that are computed one after the other.

  Attributes:
    logits_at_once: the most logits of a chunk, which has one head of one sample at least; None
      means no loop.
    mesh: the devices that the batch is split over, as in `on_each_device`.
  """

  logits_at_once: int | None = None
  mesh: Mesh | None = None


NO_LOOP = Loop()


class ChunkCounts(NamedTuple):
  """Into how many parts the samples and the heads are split; a chunk is one part of each."""

  samples: int
  heads: int

  @property
  def total(self) -> int:
    """The number of chunks."""
    return self.samples * self.heads


def chunk_counts(shape: tuple[int, int, int], logits_at_once: int | None) -> ChunkCounts:
  """Returns how to split a batch into chunks that are as large as allowed.

  Heads are split first, and samples only if one head of all samples is still too large. If b has
  no suitable divisor, all heads of fewer samples can be the larger chunk, and are taken then.

  Args:
    shape: b, l, m.
    logits_at_once: see `Loop`.
  """
  b, length, num_heads = shape
  # Matrices of logits [l, l] in a chunk.
  most = math.inf if logits_at_once is None else logits_at_once / length**2
  heads = _largest_divisor(num_heads, most / b)
  samples = _largest_divisor(b, most / heads)
  fewer_samples = _largest_divisor(b, most / num_heads)
  more_heads = _largest_divisor(num_heads, most / fewer_samples)
  samples, heads = max((samples, heads), (fewer_samples, more_heads), key=math.prod)
  return ChunkCounts(b // samples, num_heads // heads)


def _largest_divisor(number: int, most: float) -> int:
  return max(k for k in range(1, number + 1) if number % k == 0 and k <= max(most, 1))


def split_heads(
  per_head: Shaped[Array, 'b m ...'], counts: ChunkCounts
) -> Shaped[Array, 'g c k ...']:
  """Returns what belongs to the heads by chunk: g chunks of k heads of c samples."""
  pattern = '(s c) (h k) ... -> (s h) c k ...'
  return rearrange(per_head, pattern, s=counts.samples, h=counts.heads)


def in_chunks(
  attend: Callable[[Array, Array, Array, Any], Array],
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  per_head: Any,
  loop: Loop,
  *,
  rematerialise: bool = False,
) -> Float[Array, 'b l m e']:
  """Computes attention, at once or in a loop over chunks of heads and samples.

  A loop is faster if the logits of a chunk stay in the caches of a CPU, or in the on-chip memory of
  a TPU.

  Args:
    attend: from the queries, keys, values and `per_head` of a chunk to its output.
    query: one vector per token and head.
    key: likewise.
    value: likewise.
    per_head: a tree of arrays [b, m, ...]; None: there are none.
    loop: the size of the chunks.
    rematerialise: a loop stores no residuals: its backward pass rematerialises them.
  """

  def attend_on_device(query: Array, key: Array, value: Array, per_head: Any) -> Array:
    counts = chunk_counts(query.shape[:3], loop.logits_at_once)
    if counts.total == 1:
      return attend(query, key, value, per_head)
    attend_chunk = jax.checkpoint(attend) if rematerialise else attend
    sizes = {'s': counts.samples, 'h': counts.heads}
    tokens = (
      rearrange(each, '(s c) l (h k) e -> (s h) c l k e', **sizes) for each in (query, key, value)
    )
    per_head = jax.tree.map(lambda each: split_heads(each, counts), per_head)
    output = jax.lax.map(lambda chunk: attend_chunk(*chunk), (*tokens, per_head))
    return rearrange(output, '(s h) c l k e -> (s c) l (h k) e', **sizes)

  if loop.logits_at_once is not None:
    attend_on_device = on_each_device(attend_on_device, loop.mesh)
  return attend_on_device(query, key, value, per_head)
