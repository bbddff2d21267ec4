"""ASAD attention as two fused TPU kernels: a drop-in for `asad.asad_attention`.

Logits, weights, noise, the exact search and the softmax of a sample's heads stay on the chip. Main
memory sees queries, keys, values and the output, two numbers for each query, and one bit for each
pair that may be dropped: the gradient reads those instead of drawing again, which costs 16 KB a
head and saves the noise, and any doubt that it finds the same pairs.

The noise is that of `sampling`, by place and key, so that the draw is the same on any mesh, and the
same as XLA's but for pairs whose keys are equal in the 16 bits that are compared there.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from dropmae_jax.kernels.tpu import passes
from dropmae_jax.kernels.tpu.passes import LANES, SUBLANES, WORD
from dropmae_jax.model import weighted_sampling
from dropmae_jax.model.asad import num_dropped
from dropmae_jax.model.on_each_device import on_each_device

# Of VMEM, for keys and logits; a core has 16 MB for a kernel unless told otherwise.
SCRATCH_BYTES = 10 * 2**20


def heads_at_once(num_heads: int, head_width: int) -> int:
  """Returns how many heads share a program."""
  return min(num_heads, LANES // head_width)


def unsupported(tokens_per_frame: int, num_heads: int, head_width: int) -> str:
  """Returns why attention of these sizes cannot be had, or '' if it can."""
  if LANES % head_width:
    return f'heads of width {head_width}, which does not divide {LANES}'
  heads = heads_at_once(num_heads, head_width)
  if num_heads % heads:
    return f'{num_heads} heads of width {head_width}, of which {heads} go together'
  rows, columns = _padded(tokens_per_frame)
  if 2 * heads * 2 * rows * columns * 4 > SCRATCH_BYTES:
    return f'{tokens_per_frame} tokens per frame, whose logits do not fit on the chip'
  return ''


def _padded(n: int) -> tuple[int, int]:
  """Returns the rows and columns of the registers that hold [n, n]."""
  return pl.cdiv(n, SUBLANES) * SUBLANES, pl.cdiv(n, LANES) * LANES


class _Setting(NamedTuple):
  """What else a kernel is compiled for."""

  count: int
  mesh: Mesh | None
  interpret: bool


class _Kept(NamedTuple):
  """What the gradient needs.

  `bits` has 32 rows of keys in each word, as `asad_tpu_kernels.pack` says; of `sums`, four rows
  belong to a head: largest logit and sum of powers, of the one frame and of the other.
  """

  query: Float[Array, 'b l d']
  key: Float[Array, 'b l d']
  value: Float[Array, 'b l d']
  bits: Int[Array, 'b m f w i']
  sums: Float[Array, 'b g r n']


def _blocks(shape: tuple[int, ...], programs: int) -> pl.BlockSpec:
  """Cuts an array into what a program has of it: its share of lanes, or of heads."""
  if len(shape) == 1:
    return pl.BlockSpec(memory_space=pltpu.SMEM)
  if len(shape) == 3:
    return pl.BlockSpec((1, shape[1], shape[2] // programs), lambda b, g: (b, 0, g))
  part = (1, shape[1] // programs, *shape[2:])
  return pl.BlockSpec(part, lambda b, g: (b, g, *(0 for _ in shape[2:])))


def _run(
  kernel: Callable, arguments: list, results: list, scratch: list, programs: int, interpret: bool
) -> Sequence[Array]:
  """Runs a kernel for every sample and every few heads of it.

  Args:
    kernel: takes a reference for each argument, result and scratch.
    arguments: [b, l, d], cut by lanes; [b, m, ...], cut by heads; or [x], which are read whole.
    results: shapes and types of likewise.
    scratch: shapes, float32.
    programs: of a sample.
    interpret: without a TPU, for tests.
  """
  return pl.pallas_call(
    kernel,
    grid=(results[0].shape[0], programs),
    in_specs=[_blocks(each.shape, programs) for each in arguments],
    out_specs=[_blocks(each.shape, programs) for each in results],
    out_shape=results,
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
    name=f'asad_{kernel.func.__name__}',
    interpret=interpret,
  )(*arguments)


def _forward(query: Array, key: Array, value: Array, words: Array, setting: _Setting) -> tuple:
  """Returns the output [b, l, m, e] and what the gradient needs.

  Args:
    query: [b, l, m, e].
    key: likewise.
    value: likewise.
    words: int32 [b, m, 3]: two to key the noise by, and a coin.
    setting: the rest.
  """
  _, length, num_heads, width = query.shape
  n, heads = length // 2, heads_at_once(num_heads, width)
  rows, columns = _padded(n)
  kernel = partial(passes.forward, count=setting.count, width=width)

  def local(query: Array, key: Array, value: Array, words: Array) -> Sequence[Array]:
    b, programs = query.shape[0], num_heads // heads
    bits = (b, num_heads, 2, pl.cdiv(rows, SUBLANES * WORD) * SUBLANES, columns)
    return _run(
      kernel,
      [words.ravel(), query, key, value],
      [
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct(bits, jnp.int32),
        jax.ShapeDtypeStruct((b, programs, heads * 4, n), jnp.float32),
      ],
      [(heads, 2, rows, columns), (heads, 2, n, n), (2, heads * width, n)],
      programs,
      setting.interpret,
    )

  tokens = [rearrange(each, 'b l m e -> b l (m e)') for each in (query, key, value)]
  output, bits, sums = on_each_device(local, setting.mesh)(*tokens, words)
  return output.reshape(query.shape), _Kept(*tokens, bits, sums)


def _backward(setting: _Setting, kept: _Kept, gradient: Array) -> tuple[Array | None, ...]:
  _, length, num_heads, width = gradient.shape
  heads = heads_at_once(num_heads, width)
  kernel = partial(passes.backward, width=width)

  def local(*arguments: Array) -> Sequence[Array]:
    likewise = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arguments[:3]]
    scratch = [(2, length // 2, heads * width)] * 2
    return _run(kernel, list(arguments), likewise, scratch, num_heads // heads, setting.interpret)

  upper = rearrange(gradient, 'b l m e -> b l (m e)')
  found = on_each_device(local, setting.mesh)(*kept, upper)
  return *(each.reshape(gradient.shape) for each in found), None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, words: Array, setting: _Setting) -> Array:
  return _forward(query, key, value, words, setting)[0]


_attend.defvjp(_forward, _backward)


def _words(draw_keys: Key[Array, ' b'], num_heads: int) -> Int[Array, 'b m 3']:
  """Returns what is random of every head: two words for its noise, and from which end ties go."""
  first, second, from_behind = weighted_sampling.head_seeds(draw_keys, num_heads)
  words = jax.lax.bitcast_convert_type(jnp.stack([first, second], axis=-1), jnp.int32)
  return jnp.concatenate([words, from_behind[..., None].astype(jnp.int32)], axis=-1)


def asad_attention(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  mesh: Mesh | None = None,
  interpret: bool = False,
) -> Float[Array, 'b l m e']:
  """Attention with a fresh draw of dropped pairs; no gradient flows through the draw.

  Args:
    query: one vector per token and head; the first half of the l tokens is the earlier frame. Of
      sizes that `unsupported` has nothing against.
    key: likewise.
    value: likewise.
    draw_keys: random keys, one per sample.
    drop_rate: P, the share of within-frame pairs to drop. Must drop at least one pair.
    mesh: the devices that the batch is split over, all axes along the first axis; None is one.
    interpret: computes the same without a TPU, slowly.
  """
  setting = _Setting(num_dropped(query.shape[1] // 2, drop_rate), mesh, interpret)
  return _attend(query, key, value, _words(draw_keys, query.shape[2]), setting)


def dropped_pairs(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  mesh: Mesh | None = None,
  interpret: bool = False,
) -> Bool[Array, 'b f m i n']:
  """Returns the pairs that `asad_attention` drops, given the same."""
  n = query.shape[1] // 2
  setting = _Setting(num_dropped(n, drop_rate), mesh, interpret)
  kept = _forward(query, key, key, _words(draw_keys, query.shape[2]), setting)[1]
  unpack = partial(passes.unpack, rows=n)
  marks = jax.vmap(jax.vmap(jax.vmap(unpack)))(kept.bits[..., :n])
  return rearrange(marks, 'b m f j i -> b f m i j')
