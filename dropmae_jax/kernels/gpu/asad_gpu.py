"""ASAD attention as fused kernels for Hopper GPUs: a drop-in for `asad.asad_attention`.

Logits, weights and the softmax stay on the chip. Main memory sees tokens, filled up to whole tiles,
the output in float32, a number for each query, a byte of marks for 64 keys, and, between the two
kernels of the forward pass, 16 bits for each pair that may be dropped: its rank, for which XLA then
searches the border of what is dropped, as it does for its own form. Ranks are those of `sampling`,
so that both draw the same, but for what rounding tips over: of logits, and of a GPU's approximate
logarithms. The kernels are Pallas' for Mosaic GPU.
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
from dropmae_jax.model.on_each_device import on_each_device
from dropmae_jax.model.weighted_sampling import HeadSeeds

# A product of tensor cores adds up so many terms at a time.
STEP = 16
# So that a thread can have 128 registers.
MOST_WARPGROUPS = 4
# Of a multiprocessor, but for what the system, reductions and barriers take.
SHARED_BYTES = 223 * 1024
COMPUTE_CAPABILITY = '9.0'


def unsupported(tokens_per_frame: int, head_width: int, dtype: DTypeLike) -> str:
  """Returns why attention of these sizes cannot be had, or '' if it can."""
  if jnp.dtype(dtype) != jnp.bfloat16:
    return f'{jnp.dtype(dtype).name}, but for bfloat16'
  if head_width % STEP:
    return f'heads of width {head_width}, which is no multiple of {STEP}'
  rows = pl.cdiv(tokens_per_frame, TILE) * TILE
  # Of `attend`, which needs most.
  if rows > MOST_WARPGROUPS * TILE or rows * (14 * head_width + 324) > SHARED_BYTES:
    return f'{tokens_per_frame} tokens per frame with heads of width {head_width}: too many'
  return ''


class _Setting(NamedTuple):
  """What else a kernel is compiled for."""

  num_heads: int
  tokens_per_frame: int
  count: int
  mesh: Mesh | None
  interpret: Any

  @property
  def rows(self) -> int:
    """Tokens of a frame, filled up for tensor cores."""
    return max(TILE, pl.cdiv(self.tokens_per_frame, STEP) * STEP)


class _Kept(NamedTuple):
  """What the gradient needs; tokens are filled up to `r` rows, the others to `w`, whole tiles."""

  query: Float[Array, 'b f r d']
  key: Float[Array, 'b f r d']
  value: Float[Array, 'b f r d']
  output: Float[Array, 'b f w d']
  lse: Float[Array, 'b f m w']
  bits: UInt8[Array, 'b f m w k']


class _Kernels:
  """The kernels, for arrays of a size."""

  def __init__(self, setting: _Setting, batch_size: int, lanes: int) -> None:
    self.setting, self.batch_size, self.lanes = setting, batch_size, lanes
    width = lanes // setting.num_heads
    tiles = Tiles(interpret=bool(setting.interpret))
    self.sizes = Sizes(setting.tokens_per_frame, setting.rows, width, tiles)
    self.num_tiles, last = self.sizes.num_tiles, self.sizes.chunks[-1][1]
    self.whole = self.num_tiles * TILE
    # In shared memory.
    self.of_tiles = shared(self.num_tiles, TILE, width)
    self.of_frames = shared(2, self.whole, width)
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
      grid=(self.setting.num_heads, 2, self.batch_size),
      grid_names=('head', 'frame', 'sample'),
      num_threads=self.num_tiles,
      thread_name='tile',
      compiler_params=plgpu.CompilerParams(approx_math=True),
      interpret=self.setting.interpret,
    )(*arguments)

  def rank(self, *arguments: Array) -> UInt16[Array, 'b f m r r']:
    """Runs `asad_gpu_forward.rank`."""
    rows, heads = self.sizes.rows, self.setting.num_heads
    return self._run(
      forward.rank,
      arguments,
      self._result(heads, rows, rows, dtype=jnp.uint16),
      arrivals=3,
      queries=self.of_tiles,
      keys=self.of_frames,
      staged=self.ranks,
      last_staged=self.last_ranks,
    )

  def attend(self, *arguments: Array) -> tuple[Array, Array, Array]:
    """Runs `asad_gpu_forward.attend`."""
    return self._run(
      forward.attend,
      arguments,
      (
        self._result(self.whole, self.lanes, dtype=jnp.float32),
        self._result(self.setting.num_heads, self.whole, dtype=jnp.float32),
        self._result(self.setting.num_heads, self.whole, TILE, dtype=jnp.uint8),
      ),
      arrivals=5,
      queries=self.of_tiles,
      keys=self.of_frames,
      values=self.of_frames,
      near=self.ranks,
      last_near=self.last_ranks,
      packed=self.bytes,
      mixed=shared(self.num_tiles, TILE, self.sizes.width, dtype=jnp.float32),
      sums=self.numbers,
      near_barriers=plgpu.Barrier(num_arrivals=1, num_barriers=self.num_tiles),
    )

  def query_gradient(self, *arguments: Array) -> Float[Array, 'b f w d']:
    """Runs `asad_gpu_backward.query_gradient`."""
    return self._run(
      backward.query_gradient,
      arguments,
      self._result(self.whole, self.lanes, dtype=arguments[0].dtype),
      arrivals=9,
      queries=self.of_tiles,
      uppers=self.of_tiles,
      keys=self.of_frames,
      values=self.of_frames,
      sums=self.numbers,
      means=self.numbers,
      packed=self.bytes,
      mixed=self.of_tiles,
    )

  def key_gradients(self, *arguments: Array) -> tuple[Array, Array]:
    """Runs `asad_gpu_backward.key_gradients`."""
    numbers = shared(2, self.whole, dtype=jnp.float32, plain=True)
    return self._run(
      backward.key_gradients,
      arguments,
      (self._result(self.whole, self.lanes, dtype=arguments[1].dtype),) * 2,
      arrivals=11,
      queries=self.of_frames,
      uppers=self.of_frames,
      keys=self.of_tiles,
      values=self.of_tiles,
      sums=numbers,
      means=numbers,
      packed=self.bytes,
      mixed=self.of_tiles,
      rounded=self.square,
    )


def _filled(tokens: Float[Array, 'b l m e'], rows: int) -> Float[Array, 'b f r d']:
  """Parts frames, joins heads, and fills rows up with zeros."""
  frames = rearrange(tokens, 'b (f n) m e -> b f n (m e)', f=2)
  return jnp.pad(frames, ((0, 0), (0, 0), (0, rows - frames.shape[2]), (0, 0)))


def _tokens(found: Float[Array, 'b f w d'], shape: tuple[int, ...]) -> Float[Array, 'b l m e']:
  """The inverse of `_filled`."""
  return rearrange(found[:, :, : shape[1] // 2], 'b f n (m e) -> b (f n) m e', m=shape[2])


def _forward(
  query: Array, key: Array, value: Array, seeds: HeadSeeds, setting: _Setting
) -> tuple[Array, _Kept]:
  """Returns the output [b, l, m, e] and what the gradient needs.

  Args:
    query: [b, l, m, e].
    key: likewise.
    value: likewise.
    seeds: of the heads.
    setting: the rest.
  """

  def local(query: Array, key: Array, value: Array, seeds: HeadSeeds) -> tuple:
    tokens = [_filled(each, setting.rows) for each in (query, key, value)]
    kernels = _Kernels(setting, query.shape[0], tokens[0].shape[-1])
    words = jnp.stack(seeds[:2], axis=-1)
    ranks = kernels.rank(jax.lax.bitcast_convert_type(words, jnp.int32), *tokens[:2])
    from_behind = weighted_sampling.of_heads(seeds.from_behind)
    border, ranks = weighted_sampling.find_border(ranks, setting.count, from_behind)
    numbers = [each[:, 0, :, 0, 0].astype(jnp.int32) for each in border]
    output, lse, bits = kernels.attend(jnp.stack(numbers, axis=-1), *tokens, ranks)
    mixed = _tokens(output, query.shape).astype(query.dtype)
    return mixed, _Kept(*tokens, output, lse, bits)

  return on_each_device(local, setting.mesh)(query, key, value, seeds)


def _backward(setting: _Setting, kept: _Kept, gradient: Array) -> tuple[Array | None, ...]:
  def local(kept: _Kept, gradient: Array) -> tuple[Array, ...]:
    kernels = _Kernels(setting, gradient.shape[0], kept.query.shape[-1])
    upper = _filled(gradient, setting.rows)
    both = upper.astype(jnp.float32) * kept.output[:, :, : setting.rows]
    mean = rearrange(both, 'b f r (m e) -> b f m r e', m=setting.num_heads).sum(axis=-1)
    mean = jnp.pad(mean, ((0, 0),) * 3 + ((0, kernels.whole - setting.rows),))
    given = *kept[:3], upper, kept.lse, mean, kept.bits
    found = kernels.query_gradient(*given), *kernels.key_gradients(*given)
    return tuple(_tokens(each, gradient.shape) for each in found)

  return *on_each_device(local, setting.mesh)(kept, gradient), None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, seeds: HeadSeeds, setting: _Setting) -> Array:
  return _forward(query, key, value, seeds, setting)[0]


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
  """Attention with a fresh draw of dropped pairs; no gradient flows through the draw.

  Args:
    query: bfloat16, one vector per token and head; the first half of the l tokens is the earlier
      frame. Of sizes that `unsupported` has nothing against.
    key: likewise.
    value: likewise.
    draw_keys: random keys, one per sample.
    drop_rate: P, the share of within-frame pairs to drop. Must drop at least one pair.
    mesh: the devices that the batch is split over, all axes along the first axis; None is one.
    interpret: parameters of Pallas' interpreter, which computes the same without a GPU, slowly.
  """
  seeds = weighted_sampling.head_seeds(draw_keys, query.shape[2])
  return _attend(query, key, value, seeds, _setting(query, drop_rate, mesh, interpret))


def _setting(query: Array, drop_rate: float, mesh: Mesh | None, interpret: Any) -> _Setting:
  n, num_heads = query.shape[1] // 2, query.shape[2]
  return _Setting(num_heads, n, num_dropped(n, drop_rate), mesh, interpret)


def dropped_pairs(
  query: Float[Array, 'b l m e'],
  key: Float[Array, 'b l m e'],
  *,
  draw_keys: Key[Array, ' b'],
  drop_rate: float,
  mesh: Mesh | None = None,
  interpret: Any = False,
) -> Bool[Array, 'b f m i n']:
  """Returns the pairs that `asad_attention` drops, given the same."""
  setting = _setting(query, drop_rate, mesh, interpret)
  seeds = weighted_sampling.head_seeds(draw_keys, setting.num_heads)
  bits = _forward(query, key, key, seeds, setting)[1].bits
  marks = (bits[..., None, :] >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & 1
  n = setting.tokens_per_frame
  return rearrange(marks, 'b f m i k j -> b f m i (k j)')[:, :, :, :n, :n].astype(bool)
