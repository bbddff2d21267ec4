"""ASAD attention as fused kernels for Hopper GPUs, which replace `fast_asad.asad_attention`.

Logits, weights and the softmax stay on the chip. Main memory holds the tokens, padded to whole
tiles, the output in float32, one number per query, and 64 bytes of marks per query. Between the two
kernels of the forward pass it also holds a rank of 16 bits per within-frame pair, from which XLA
finds the cutoff, as for its own implementation.

The ranks are those of `weighted_sampling`, so the draw is the same as XLA's, except where rounding
decides: of logits, and of a GPU's approximate logarithms. The kernels are written in Pallas Mosaic
GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key, UInt8, UInt16

from dropmae_jax.kernels.gpu import backward, forward
from dropmae_jax.kernels.gpu.tile import TILE, Sizes, Tiles, shared
from dropmae_jax.model import weighted_sampling
from dropmae_jax.model.asad import num_dropped
from dropmae_jax.model.chunks import on_each_device
from dropmae_jax.model.weighted_sampling import HeadSeeds

# The number of terms that tensor cores sum at a time.
STEP = 16
# With more, a thread could not have 128 registers.
MOST_WARPGROUPS = 4
# Of a multiprocessor, without what the system, reductions and barriers take.
SHARED_BYTES = 223 * 1024
COMPUTE_CAPABILITY = '9.0'


def unsupported(tokens_per_frame: int, head_width: int, dtype: DTypeLike) -> str:
  """Returns why there is no kernel for these sizes, or '' if there is one."""
  if jnp.dtype(dtype) != jnp.bfloat16:
    return f'{jnp.dtype(dtype).name}, but for bfloat16'
  if head_width % STEP:
    return f'heads of width {head_width}, which is no multiple of {STEP}'
  rows = pl.cdiv(tokens_per_frame, TILE) * TILE
  # The shared memory of `attend`, which needs most.
  if rows > MOST_WARPGROUPS * TILE or rows * (14 * head_width + 324) > SHARED_BYTES:
    return f'{tokens_per_frame} tokens per frame with heads of width {head_width}: too many'
  return ''


class _Options(NamedTuple):
  """What a kernel is compiled for, besides the shapes of its arguments."""

  num_heads: int
  tokens_per_frame: int
  count: int
  mesh: Mesh | None
  interpret: Any

  @property
  def rows(self) -> int:
    """Tokens per frame, padded for tensor cores."""
    return max(TILE, pl.cdiv(self.tokens_per_frame, STEP) * STEP)


class _Residuals(NamedTuple):
  """What the backward pass reads. Tokens are padded to r rows, the others to w: whole tiles.

  `lse` and `bits` are those of `forward.attend`.
  """

  query: Float[Array, 'b f r d']
  key: Float[Array, 'b f r d']
  value: Float[Array, 'b f r d']
  output: Float[Array, 'b f w d']
  lse: Float[Array, 'b f m w']
  bits: UInt8[Array, 'b f m w k']


class _Kernels:
  """The kernels for arrays of one size."""

  def __init__(self, options: _Options, batch_size: int, lanes: int) -> None:
    self.options, self.batch_size, self.lanes = options, batch_size, lanes
    width = lanes // options.num_heads
    tiles = Tiles(interpret=bool(options.interpret))
    self.sizes = Sizes(options.tokens_per_frame, options.rows, width, tiles)
    self.num_tiles, last = self.sizes.num_tiles, self.sizes.chunks[-1][1]
    self.whole = self.num_tiles * TILE
    # Types of arrays in shared memory.
    self.tiles_type = shared(self.num_tiles, TILE, width)
    self.frames_type = shared(2, self.whole, width)
    self.square = shared(self.num_tiles, TILE, TILE)
    self.bytes = shared(self.num_tiles, TILE, TILE, dtype=jnp.uint8, plain=True)
    self.numbers = shared(self.num_tiles, TILE, dtype=jnp.float32, plain=True)
    self.ranks = shared(self.num_tiles, TILE, TILE, dtype=jnp.uint16)
    self.last_ranks = shared(self.num_tiles, TILE, last, dtype=jnp.uint16)

  def _result(self, *shape: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((self.batch_size, 2, *shape), dtype)

  def _run(
    self, kernel: Callable, arguments: tuple, results: Any, arrivals: int, **scratch: Any
  ) -> Any:
    def named(*references: Any, **scratch: Any) -> None:
      kernel(*references, **scratch, sizes=self.sizes)

    named.__name__ = f'asad_{kernel.__name__}'
    barrier = plgpu.Barrier(num_arrivals=arrivals * self.num_tiles)
    return plgpu.kernel(
      named,
      out_type=results,
      scratch_types={'barrier': barrier, **scratch},
      grid=(self.options.num_heads, 2, self.batch_size),
      grid_names=('head', 'frame', 'sample'),
      num_threads=self.num_tiles,
      thread_name='tile',
      compiler_params=plgpu.CompilerParams(approx_math=True),
      interpret=self.options.interpret,
    )(*arguments)

  def rank(self, *arguments: Array) -> UInt16[Array, 'b f m r r']:
    """Runs `forward.rank`."""
    rows, heads = self.sizes.rows, self.options.num_heads
    return self._run(
      forward.rank,
      arguments,
      self._result(heads, rows, rows, dtype=jnp.uint16),
      arrivals=3,
      queries=self.tiles_type,
      keys=self.frames_type,
      staged=self.ranks,
      last_staged=self.last_ranks,
    )

  def attend(self, *arguments: Array) -> tuple[Array, Array, Array]:
    """Runs `forward.attend`."""
    return self._run(
      forward.attend,
      arguments,
      (
        self._result(self.whole, self.lanes, dtype=jnp.float32),
        self._result(self.options.num_heads, self.whole, dtype=jnp.float32),
        self._result(self.options.num_heads, self.whole, TILE, dtype=jnp.uint8),
      ),
      arrivals=5,
      queries=self.tiles_type,
      keys=self.frames_type,
      values=self.frames_type,
      next_ranks=self.ranks,
      last_ranks=self.last_ranks,
      packed=self.bytes,
      mixed=shared(self.num_tiles, TILE, self.sizes.width, dtype=jnp.float32),
      sums=self.numbers,
      next_ranks_barriers=plgpu.Barrier(num_arrivals=1, num_barriers=self.num_tiles),
    )

  def query_gradient(self, *arguments: Array) -> Float[Array, 'b f w d']:
    """Runs `backward.query_gradient`."""
    return self._run(
      backward.query_gradient,
      arguments,
      self._result(self.whole, self.lanes, dtype=arguments[0].dtype),
      arrivals=9,
      queries=self.tiles_type,
      upstream=self.tiles_type,
      keys=self.frames_type,
      values=self.frames_type,
      sums=self.numbers,
      means=self.numbers,
      packed=self.bytes,
      mixed=self.tiles_type,
    )

  def key_gradients(self, *arguments: Array) -> tuple[Array, Array]:
    """Runs `backward.key_gradients`."""
    numbers = shared(2, self.whole, dtype=jnp.float32, plain=True)
    return self._run(
      backward.key_gradients,
      arguments,
      (self._result(self.whole, self.lanes, dtype=arguments[1].dtype),) * 2,
      arrivals=11,
      queries=self.frames_type,
      upstream=self.frames_type,
      keys=self.tiles_type,
      values=self.tiles_type,
      sums=numbers,
      means=numbers,
      packed=self.bytes,
      mixed=self.tiles_type,
      rounded=self.square,
    )


def _padded(tokens: Float[Array, 'b l m e'], rows: int) -> Float[Array, 'b f r d']:
  """Splits tokens by frame, merges heads, and pads rows with zeros."""
  frames = rearrange(tokens, 'b (f n) m e -> b f n (m e)', f=2)
  return jnp.pad(frames, ((0, 0), (0, 0), (0, rows - frames.shape[2]), (0, 0)))


def _unpadded(tokens: Float[Array, 'b f w d'], shape: tuple[int, ...]) -> Float[Array, 'b l m e']:
  """The inverse of `_padded`, for tokens of this shape."""
  return rearrange(tokens[:, :, : shape[1] // 2], 'b f n (m e) -> b (f n) m e', m=shape[2])


def _forward(
  query: Array, key: Array, value: Array, seeds: HeadSeeds, options: _Options
) -> tuple[Array, _Residuals]:
  """Returns the output [b, l, m, e] and the residuals."""

  def run_on_device(query: Array, key: Array, value: Array, seeds: HeadSeeds) -> tuple:
    tokens = [_padded(each, options.rows) for each in (query, key, value)]
    kernels = _Kernels(options, query.shape[0], tokens[0].shape[-1])
    words = jnp.stack(seeds[:2], axis=-1)
    ranks = kernels.rank(jax.lax.bitcast_convert_type(words, jnp.int32), *tokens[:2])
    ties_from_end = weighted_sampling.expand_heads(seeds.ties_from_end)
    cutoff, ranks = weighted_sampling.find_cutoff(ranks, options.count, ties_from_end)
    numbers = [each[:, 0, :, 0, 0].astype(jnp.int32) for each in cutoff]
    output, lse, bits = kernels.attend(jnp.stack(numbers, axis=-1), *tokens, ranks)
    mixed = _unpadded(output, query.shape).astype(query.dtype)
    return mixed, _Residuals(*tokens, output, lse, bits)

  return on_each_device(run_on_device, options.mesh)(query, key, value, seeds)


def _backward(
  options: _Options, residuals: _Residuals, d_output: Array
) -> tuple[Array | None, ...]:
  def run_on_device(residuals: _Residuals, d_output: Array) -> tuple[Array, ...]:
    kernels = _Kernels(options, d_output.shape[0], residuals.query.shape[-1])
    d_tokens = _padded(d_output, options.rows)
    products = d_tokens.astype(jnp.float32) * residuals.output[:, :, : options.rows]
    mean = rearrange(products, 'b f r (m e) -> b f m r e', m=options.num_heads).sum(axis=-1)
    mean = jnp.pad(mean, ((0, 0),) * 3 + ((0, kernels.whole - options.rows),))
    arguments = *residuals[:3], d_tokens, residuals.lse, mean, residuals.bits
    gradients = kernels.query_gradient(*arguments), *kernels.key_gradients(*arguments)
    return tuple(_unpadded(each, d_output.shape) for each in gradients)

  return *on_each_device(run_on_device, options.mesh)(residuals, d_output), None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, seeds: HeadSeeds, options: _Options) -> Array:
  return _forward(query, key, value, seeds, options)[0]


_attend.defvjp(_forward, _backward)


def asad_attention(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  value: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  mesh: Mesh | None = None,
  interpret: Any = False,
) -> Float[Array, 'b l m e']:
  """Attention with ASAD; no gradient flows through the draw.

  As `fast_asad.asad_attention`, for bfloat16 tokens of the sizes that `unsupported` allows. The
  batch is split over a mesh as in `on_each_device`; with the parameters of Pallas' interpreter as
  `interpret` it runs without a GPU, slowly.
  """
  seeds = weighted_sampling.head_seeds(draw_keys, query.shape[2])
  return _attend(query, key, value, seeds, _options(query, drop_rate, mesh, interpret))


def _options(query: Array, drop_rate: float, mesh: Mesh | None, interpret: Any) -> _Options:
  n, num_heads = query.shape[1] // 2, query.shape[2]
  return _Options(num_heads, n, num_dropped(n, drop_rate), mesh, interpret)


def dropped_pairs(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  mesh: Mesh | None = None,
  interpret: Any = False,
) -> Bool[Array, 'b f m i n']:
  """Returns the pairs that `asad_attention` drops with the same arguments."""
  options = _options(query, drop_rate, mesh, interpret)
  seeds = weighted_sampling.head_seeds(draw_keys, options.num_heads)
  bits = _forward(query, key, key, seeds, options)[1].bits
  marks = (bits[..., None, :] >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & 1
  n = options.tokens_per_frame
  return rearrange(marks, 'b f m i k j -> b f m i (k j)')[:, :, :, :n, :n].astype(bool)
