"""ASAD attention as two fused TPU kernels, which replace `fast_asad.asad_attention`.

Logits, weights, noise, the exact search and the softmax of a sample's heads stay on the chip. Main
memory holds queries, keys, values, the output, two numbers per query, and one bit per within-frame
pair. The backward pass reads these bits instead of drawing again: they take 16 KB per head, and
save computing the noise and relying on a draw that must come out the same.

The noise is that of `weighted_sampling`, by index and key. So the draw is the same on any mesh, and
the same as XLA's, except for pairs whose scores are equal in the 16 bits that XLA compares.
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
from dropmae_jax.model.chunks import on_each_device

# VMEM for scores and logits. A kernel has 16 MB of VMEM by default.
SCRATCH_BYTES = 10 * 2**20


def heads_at_once(num_heads: int, head_width: int) -> int:
  """Returns how many heads a program computes."""
  return min(num_heads, LANES // head_width)


def unsupported(tokens_per_frame: int, num_heads: int, head_width: int) -> str:
  """Returns why there is no kernel for these sizes, or '' if there is one."""
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


class _Options(NamedTuple):
  """What a kernel is compiled for, besides the shapes of its arguments."""

  count: int
  mesh: Mesh | None
  interpret: bool | pltpu.InterpretParams


class _Residuals(NamedTuple):
  """What the backward pass reads; `bits` and `sums` are those of `passes.forward`."""

  query: Float[Array, 'b l d']
  key: Float[Array, 'b l d']
  value: Float[Array, 'b l d']
  bits: Int[Array, 'b m f w i']
  sums: Float[Array, 'b g r n']


def _block_spec(shape: tuple[int, ...], programs: int) -> pl.BlockSpec:
  """Returns which part of an array a program sees: its lanes or its heads of one sample."""
  if len(shape) == 1:
    return pl.BlockSpec(memory_space=pltpu.SMEM)
  if len(shape) == 3:
    return pl.BlockSpec((1, shape[1], shape[2] // programs), lambda b, g: (b, 0, g))
  part = (1, shape[1] // programs, *shape[2:])
  return pl.BlockSpec(part, lambda b, g: (b, g, *(0 for _ in shape[2:])))


def _run(
  kernel: Callable,
  arguments: list,
  results: list,
  scratch: list,
  programs: int,
  interpret: bool | pltpu.InterpretParams,
) -> Sequence[Array]:
  """Runs the programs of a kernel for every sample.

  Args:
    kernel: takes a reference for each argument, result and scratch array.
    arguments: [b, l, d], split by lanes; [b, m, ...], split by heads; or [x], which every program
      sees as a whole.
    results: their shapes and dtypes; split likewise.
    scratch: shapes, float32.
    programs: per sample.
    interpret: see `asad_attention`.
  """
  return pl.pallas_call(
    kernel,
    grid=(results[0].shape[0], programs),
    in_specs=[_block_spec(each.shape, programs) for each in arguments],
    out_specs=[_block_spec(each.shape, programs) for each in results],
    out_shape=results,
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
    name=f'asad_{kernel.func.__name__}',
    interpret=interpret,
  )(*arguments)


def _forward(
  query: Array, key: Array, value: Array, words: Array, options: _Options
) -> tuple[Array, _Residuals]:
  """Returns the output [b, l, m, e] and the residuals."""
  _, length, num_heads, width = query.shape
  n, heads = length // 2, heads_at_once(num_heads, width)
  rows, columns = _padded(n)
  kernel = partial(passes.forward, count=options.count, width=width)

  def run_on_device(query: Array, key: Array, value: Array, words: Array) -> Sequence[Array]:
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
      options.interpret,
    )

  tokens = [rearrange(each, 'b l m e -> b l (m e)') for each in (query, key, value)]
  output, bits, sums = on_each_device(run_on_device, options.mesh)(*tokens, words)
  return output.reshape(query.shape), _Residuals(*tokens, bits, sums)


def _backward(
  options: _Options, residuals: _Residuals, d_output: Array
) -> tuple[Array | None, ...]:
  _, length, num_heads, width = d_output.shape
  heads = heads_at_once(num_heads, width)
  kernel = partial(passes.backward, width=width)

  def run_on_device(*arguments: Array) -> Sequence[Array]:
    results = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arguments[:3]]
    scratch = [(2, length // 2, heads * width)] * 2
    return _run(kernel, list(arguments), results, scratch, num_heads // heads, options.interpret)

  d_tokens = rearrange(d_output, 'b l m e -> b l (m e)')
  gradients = on_each_device(run_on_device, options.mesh)(*residuals, d_tokens)
  return *(each.reshape(d_output.shape) for each in gradients), None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, words: Array, options: _Options) -> Array:
  return _forward(query, key, value, words, options)[0]


_attend.defvjp(_forward, _backward)


def _words(draw_keys: Key[Array, ' b'], num_heads: int) -> Int[Array, 'b m 3']:
  """Returns the `HeadSeeds` of every head as int32."""
  first, second, ties_from_end = weighted_sampling.head_seeds(draw_keys, num_heads)
  words = jax.lax.bitcast_convert_type(jnp.stack([first, second], axis=-1), jnp.int32)
  return jnp.concatenate([words, ties_from_end[..., None].astype(jnp.int32)], axis=-1)


def asad_attention(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  mesh: Mesh | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, 'b l m e']:
  """Attention with ASAD; no gradient flows through the draw.

  As `fast_asad.asad_attention`, for tokens of the sizes that `unsupported` allows. The batch is
  split over a mesh as in `on_each_device`; with True or the parameters of Pallas' interpreter as
  `interpret` it runs without a TPU, slowly.
  """
  options = _Options(num_dropped(query.shape[1] // 2, drop_rate), mesh, interpret)
  return _attend(query, key, value, _words(draw_keys, query.shape[2]), options)


def dropped_pairs(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  mesh: Mesh | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> Bool[Array, 'b f m i n']:
  """Returns the pairs that `asad_attention` drops with the same arguments."""
  n = query.shape[1] // 2
  options = _Options(num_dropped(n, drop_rate), mesh, interpret)
  residuals = _forward(query, key, key, _words(draw_keys, query.shape[2]), options)[1]
  unpack = partial(passes.unpack, rows=n)
  marks = jax.vmap(jax.vmap(jax.vmap(unpack)))(residuals.bits[..., :n])
  return rearrange(marks, 'b m f j i -> b f m i j')
