"""From uint8 frames to model input, on the device: flips, normalisation, and its inverse."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def normalise(frames: UInt8[Array, '... c']) -> Float[Array, '... c']:
  """Normalises uint8 by the mean and deviation of ImageNet; returns float32."""
  mean, deviation = jnp.array(IMAGENET_MEAN), jnp.array(IMAGENET_DEVIATION)
  return (frames.astype(jnp.float32) / 255 - mean) / deviation


def denormalise(frames: Float[Array, '... c']) -> UInt8[Array, '... c']:
  """The inverse of `normalise`, rounded and clipped to uint8."""
  mean, deviation = jnp.array(IMAGENET_MEAN), jnp.array(IMAGENET_DEVIATION)
  return jnp.clip(jnp.round((frames * deviation + mean) * 255), 0, 255).astype(jnp.uint8)


def flip_and_normalise(
  keys: Key[Array, ' b'], frames: UInt8[Array, 'b f h w c'], *, shared: bool
) -> Float[Array, 'b f h w c']:
  """Flips each frame left to right with probability one half, and normalises.

  Args:
    keys: one per sample.
    frames: uint8 pairs.
    shared: flip both frames of a pair or neither; otherwise each is drawn on its own.
  """

  def flip_pair(key: Array, pair: Array) -> Array:
    frame_keys = jnp.stack([key, key]) if shared else jax.random.split(key)
    is_flipped = jax.vmap(jax.random.bernoulli)(frame_keys)[:, None, None, None]
    return jnp.where(is_flipped, pair[:, :, ::-1], pair)

  return normalise(jax.vmap(flip_pair)(keys, frames))
