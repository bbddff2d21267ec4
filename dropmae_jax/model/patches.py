"""Frames to patch vectors and back, and the reconstruction targets (He et al. 2022, section 3)."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


def patchify(frames: Float[Array, 'b f h w c'], patch_size: int) -> Float[Array, 'b l p']:
  """Cuts frames into patch vectors, row by row; within a patch: row, column, colour (fastest)."""
  return rearrange(
    frames, 'b f (gh ph) (gw pw) c -> b (f gh gw) (ph pw c)', ph=patch_size, pw=patch_size
  )


def unpatchify(patches: Float[Array, 'b l p'], patch_size: int) -> Float[Array, 'b f h w c']:
  """Returns pairs of square frames from their patch vectors; the inverse of `patchify`."""
  grid = round((patches.shape[1] / 2) ** 0.5)
  pattern = 'b (f gh gw) (ph pw c) -> b f (gh ph) (gw pw) c'
  return rearrange(patches, pattern, f=2, gh=grid, ph=patch_size, pw=patch_size)


def patch_statistics(
  patches: Float[Array, 'b l p'],
) -> tuple[Float[Array, 'b l 1'], Float[Array, 'b l 1']]:
  """Returns mean and standard deviation of each patch: unbiased, with 1e-6 inside the root."""
  mean = patches.mean(axis=-1, keepdims=True)
  variance = patches.var(axis=-1, keepdims=True, ddof=1)
  return mean, jnp.sqrt(variance + 1e-6)


def normalise_patches(patches: Float[Array, 'b l p']) -> Float[Array, 'b l p']:
  """Normalises every patch to mean 0 and deviation 1, as published (norm_pix_loss)."""
  mean, deviation = patch_statistics(patches)
  return (patches - mean) / deviation
