"""The centre head: from search tokens to maps of score, size and offset, and from these to a box.

Batch statistics are those of groups of samples, which are the same on any number of devices; the
published training has one group of 32 samples on each GPU. Running statistics are not part of the
module: they come as a pure dict and are returned as one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dropmae_jax.model import masking

EPSILON = 1e-5
MOMENTUM = 0.1
# Scores and sizes are within [LEAST, 1 - LEAST].
LEAST = 1e-4
# The branches of the head, and the channels of their maps.
BRANCHES = {'ctr': 1, 'offset': 2, 'size': 2}
NUM_NORMALISED = 4  # Convolutions of a branch that a batch norm follows.


class Maps(NamedTuple):
  """What the head says of every cell of the search grid.

  Attributes:
    score: that the centre of the object is in the cell.
    size: width and height of its box, as fractions of the search image.
    offset: x and y of its centre from the corner of the cell, in cells.
  """

  score: Float[Array, 'b s s']
  size: Float[Array, 'b s s 2']
  offset: Float[Array, 'b s s 2']


class BatchNorm(nnx.Module):
  """A batch norm over groups of samples; always in float32."""

  def __init__(self, channels: int) -> None:
    self.scale = nnx.Param(jnp.ones(channels))
    self.bias = nnx.Param(jnp.zeros(channels))

  def __call__(
    self, maps: Float[Array, 'b s s c'], running: dict, group_size: int | None
  ) -> tuple[Float[Array, 'b s s c'], dict]:
    """Returns normalised maps and the running statistics after them.

    Args:
      maps: what to normalise.
      running: `running_mean`, `running_var` and `num_batches_tracked`.
      group_size: samples of a group, or more than there are; None: the running statistics are used
        and stay as they are.
    """
    maps = maps.astype(jnp.float32)
    if group_size is None:
      centred, variance = maps - running['running_mean'], running['running_var']
    else:
      grouped = rearrange(maps, '(g n) h w c -> g n h w c', n=min(group_size, len(maps)))
      mean = grouped.mean(axis=(1, 2, 3), keepdims=True)
      centred = grouped - mean
      variance = jnp.square(centred).mean(axis=(1, 2, 3), keepdims=True)
      running = _moved(running, mean, variance, grouped[0, ..., 0].size)
    normal = centred * (jax.lax.rsqrt(variance + EPSILON) * self.scale) + self.bias
    return normal.reshape(maps.shape), running


def _moved(running: dict, mean: Array, variance: Array, count: int) -> dict:
  """Returns running statistics after a batch: moved towards the mean over its groups.

  Args:
    running: before it.
    mean: of every group, [g, 1, 1, 1, c].
    variance: of every group, biased.
    count: how many numbers they are of; the running variance is unbiased.
  """
  groups = (0, 1, 2, 3)
  unbiased = variance.mean(axis=groups) * (count / (count - 1))
  moved = {
    'running_mean': running['running_mean'] * (1 - MOMENTUM) + mean.mean(axis=groups) * MOMENTUM,
    'running_var': running['running_var'] * (1 - MOMENTUM) + unbiased * MOMENTUM,
    'num_batches_tracked': running['num_batches_tracked'] + 1,
  }
  return jax.lax.stop_gradient(moved)


def _convolution(
  inputs: int, outputs: int, side: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Conv:
  """Returns a convolution with Xavier-uniform weights and a bias drawn as PyTorch does."""
  bound = (inputs * side**2) ** -0.5

  def uniform_bias(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return nnx.Conv(
    inputs,
    outputs,
    (side, side),
    kernel_init=nnx.initializers.xavier_uniform(),
    bias_init=uniform_bias,
    dtype=dtype,
    rngs=rngs,
  )


class CentreHead(nnx.Module):
  """Three branches of convolutions; names and order of the layers are the published ones."""

  def __init__(self, width: int, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
    for branch, outputs in BRANCHES.items():
      sizes = [width, *(channels >> layer for layer in range(NUM_NORMALISED))]
      for layer in range(NUM_NORMALISED):
        convolution = _convolution(sizes[layer], sizes[layer + 1], 3, dtype=dtype, rngs=rngs)
        layers = nnx.List([convolution, BatchNorm(sizes[layer + 1])])
        setattr(self, f'conv{layer + 1}_{branch}', layers)
      last = _convolution(sizes[-1], outputs, 1, dtype=dtype, rngs=rngs)
      setattr(self, f'conv{NUM_NORMALISED + 1}_{branch}', last)

  def __call__(
    self, features: Float[Array, 'b s s d'], statistics: dict, *, group_size: int | None = None
  ) -> tuple[Maps, dict]:
    """Returns the maps, and the running statistics after this batch.

    Args:
      features: of the search image.
      statistics: running ones, as of `initial_statistics`.
      group_size: samples whose batch statistics are taken together, in training; None: the running
        statistics are used and stay as they are.
    """
    raw, after = {}, {}
    for branch in BRANCHES:
      maps = features
      for layer in range(1, NUM_NORMALISED + 1):
        name = f'conv{layer}_{branch}'
        convolution, norm = getattr(self, name)
        maps, running = norm(convolution(maps), statistics[name][1], group_size)
        maps, after[name] = jax.nn.relu(maps), {1: running}
      raw[branch] = getattr(self, f'conv{NUM_NORMALISED + 1}_{branch}')(maps).astype(jnp.float32)
    score, size = (jnp.clip(jax.nn.sigmoid(raw[x]), LEAST, 1 - LEAST) for x in ('ctr', 'size'))
    return Maps(score=score[..., 0], size=size, offset=raw['offset']), after


def initial_statistics(channels: int) -> dict:
  """Returns running statistics with mean 0 and variance 1, by the paths of their batch norms."""
  return {
    f'conv{layer + 1}_{branch}': {
      1: {
        'running_mean': jnp.zeros(channels >> layer),
        'running_var': jnp.ones(channels >> layer),
        'num_batches_tracked': jnp.zeros((), jnp.int32),
      }
    }
    for branch in BRANCHES
    for layer in range(NUM_NORMALISED)
  }


def best_cell(score: Float[Array, 'b s s']) -> Int[Array, ' b']:
  """Returns the cell with the highest score, row by row; of equal ones the first."""
  return jnp.argmax(rearrange(score, 'b h w -> b (h w)'), axis=1)


def decode(maps: Maps, cells: Int[Array, ' b'] | None = None) -> Float[Array, 'b 4']:
  """Returns the box that the maps give at one cell of every sample.

  Gradients flow to size and offset at these cells.

  Args:
    maps: of the head.
    cells: which ones, row by row; None: those with the highest score.

  Returns:
    cx, cy, w, h as fractions of the search image.
  """
  if cells is None:
    cells = best_cell(maps.score)
  side = maps.score.shape[-1]
  size, offset = (
    masking.select(rearrange(each, 'b h w c -> b (h w) c'), cells[:, None])[:, 0]
    for each in (maps.size, maps.offset)
  )
  corner = jnp.stack([cells % side, cells // side], axis=1)
  return jnp.concatenate([(corner + offset) / side, size], axis=1)
