"""Vision-transformer blocks, with the attribute paths of the PyTorch checkpoints.

`blocks.0.attn.qkv` is `blocks.0.attn.qkv` in PyTorch too, so export is a table of rules for leaves.
Parameters are float32; `dtype` is that of the matrix products. The residual stream, the norms and
the softmax are always float32.

To add a backbone size: add a row to `SIZES`.
"""

from typing import Any, NamedTuple

import jax
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dropmae_jax.config import Architecture
from dropmae_jax.model import masking
from dropmae_jax.model.attention import Attention
from dropmae_jax.runtime.errors import check_name

LAYER_NORM_EPSILON = 1e-6


class Size(NamedTuple):
  """A backbone with its decoder, by default the published one, and its published `patch_size`."""

  width: int
  depth: int
  num_heads: int
  patch_size: int
  decoder_width: int = 512
  decoder_depth: int = 8
  decoder_num_heads: int = 16


SIZES = {
  # Toys, whose decoders are as small.
  'XXS': Size(64, 2, 2, patch_size=8, decoder_width=64, decoder_depth=2, decoder_num_heads=2),
  'XS': Size(96, 3, 3, patch_size=8, decoder_width=96, decoder_depth=3, decoder_num_heads=3),
  'S': Size(width=384, depth=12, num_heads=6, patch_size=16),
  'B': Size(width=768, depth=12, num_heads=12, patch_size=16),
  'L': Size(width=1024, depth=24, num_heads=16, patch_size=16),
  'H': Size(width=1280, depth=32, num_heads=16, patch_size=14),
}


def architecture_of_size(size: str, **other: int | float) -> Architecture:
  """Returns the architecture of a row of `SIZES`.

  Args:
    size: a name in `SIZES`.
    **other: further fields of `Architecture`, or other values for those of the row.

  Raises:
    ValueError: there is no such size, or the numbers do not fit together.
  """
  check_name('size', size, SIZES)
  return Architecture(**(SIZES[size]._asdict() | other))


def linear(inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
  """Returns a linear layer with Xavier-uniform weights and zero bias."""
  initial = nnx.initializers.xavier_uniform()
  return nnx.Linear(
    inputs, outputs, kernel_init=initial, dtype=dtype, dot_general=flat_product, rngs=rngs
  )


def flat_product(
  tokens: Float[Array, 'b l d'], kernel: Float[Array, 'd h'], dimensions: Any, **options: Any
) -> Float[Array, 'b l h']:
  """`jax.lax.dot_general` with batch and tokens as one axis: its gradient is faster on CPUs."""
  del dimensions
  flat = rearrange(tokens, 'b l d -> (b l) d')
  product = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **options)
  return rearrange(product, '(b l) h -> b l h', b=tokens.shape[0])


def layer_norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """Returns a float32 layer norm with the published epsilon."""
  return nnx.LayerNorm(width, epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, rngs=rngs)


class PatchEmbed(nnx.Module):
  """Projects patch vectors to tokens: the published strided convolution, as a matrix product."""

  def __init__(self, patch_values: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
    bound = patch_values**-0.5

    def uniform_bias(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    self.proj = nnx.Linear(
      patch_values,
      width,
      kernel_init=nnx.initializers.xavier_uniform(),
      bias_init=uniform_bias,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, patches: Float[Array, 'b k p']) -> Float[Array, 'b k d']:
    return self.proj(patches)


class SelfAttention(nnx.Module):
  """Projections around an attention function; the fused one has layout [q | k | v], head-major."""

  def __init__(self, width: int, num_heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
    self.num_heads = num_heads
    self.qkv = linear(width, 3 * width, dtype=dtype, rngs=rngs)
    self.proj = linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(
    self, tokens: Float[Array, 'b l d'], attend: Attention, wanted: Int[Array, 'b r'] | None = None
  ) -> Float[Array, 'b r d']:
    """Returns the output of the tokens at the indices `wanted`; None: of all tokens."""
    query, key, value = rearrange(
      self.qkv(tokens), 'b l (qkv m e) -> qkv b l m e', qkv=3, m=self.num_heads
    )
    mixed = rearrange(attend(query, key, value), 'b l m e -> b l (m e)')
    return self.proj(mixed if wanted is None else masking.select(mixed, wanted))


class Mlp(nnx.Module):
  """Two linear layers around an exact (erf) GELU."""

  def __init__(self, width: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
    self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = linear(hidden, width, dtype=dtype, rngs=rngs)

  def __call__(self, tokens: Float[Array, 'b l d']) -> Float[Array, 'b l d']:
    return self.fc2(jax.nn.gelu(self.fc1(tokens), approximate=False))


class Block(nnx.Module):
  """A pre-norm transformer block; the caller passes the attention function."""

  def __init__(
    self, width: int, num_heads: int, mlp_ratio: float, *, dtype: DTypeLike, rngs: nnx.Rngs
  ) -> None:
    self.norm1 = layer_norm(width, rngs=rngs)
    self.attn = SelfAttention(width, num_heads, dtype=dtype, rngs=rngs)
    self.norm2 = layer_norm(width, rngs=rngs)
    self.mlp = Mlp(width, int(width * mlp_ratio), dtype=dtype, rngs=rngs)

  def __call__(
    self, tokens: Float[Array, 'b l d'], attend: Attention, wanted: Int[Array, 'b r'] | None = None
  ) -> Float[Array, 'b r d']:
    """Returns the tokens at the indices `wanted` for the next block; None: all tokens."""
    mixed = self.attn(self.norm1(tokens), attend, wanted)
    tokens = mixed + (tokens if wanted is None else masking.select(tokens, wanted))
    return tokens + self.mlp(self.norm2(tokens))
