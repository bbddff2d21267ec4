"""Draws of every program of ASAD by given logits, for tests of their law."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from dropmae_jax.kernels.gpu import asad_gpu
from dropmae_jax.kernels.tpu import asad_tpu
from dropmae_jax.model import fast_asad, weighted_sampling
from dropmae_jax.model.asad import num_dropped

PROGRAMS = ('xla', 'fused')
# Of heads with the same logits, the kernels draw for so many at a time.
HEADS = 4
# And of so many samples: interpreted programs copy all results for each of them.
SAMPLES = 50
# Those of GPUs, for so many heads of a sample; they are slow.
GPU_HEADS = 128
# Pallas has no public name for it. What is copied from past an array's end is 0, as by hardware.
INTERPRET_GPU = InterpretGPUParams(
  detect_races=True, out_of_bounds_reads='uninitialized', uninitialized_memory='zero'
)


def tokens_with(logits):
  """Returns queries and keys [1, l, 1, e] that have the logits [1, f, 1, i, n]."""
  own, other = (each[0, :, 0] for each in logits)
  rows = [jnp.concatenate([own[0], other[0]], axis=1), jnp.concatenate([other[1], own[1]], axis=1)]
  matrix = jnp.concatenate(rows)
  length = len(matrix)
  width = 1 << (length - 1).bit_length()
  key = jnp.pad(matrix.T, ((0, 0), (0, width - length))) * width**0.5
  return jnp.eye(length, width)[None, :, None], key[None, :, None]


def drops_of_gpu(key, logits, *, draws, drop_rate):
  """Returns as `drops` does, by the kernels of GPUs: of bfloat16, two of which make a logit."""
  query, key_tokens = tokens_with(logits)
  exact = key_tokens * 2**0.5
  high = exact.astype(jnp.bfloat16)
  low = (exact - high).astype(jnp.bfloat16)
  both = jnp.concatenate([query, query], -1).astype(jnp.bfloat16), jnp.concatenate([high, low], -1)
  query, key_tokens = (
    jnp.broadcast_to(each, (*each.shape[:2], GPU_HEADS, each.shape[3])) for each in both
  )
  settings = {
    'drop_rate': drop_rate,
    'interpret': dataclasses.replace(INTERPRET_GPU, detect_races=False),
  }
  found = [
    asad_gpu.dropped_pairs(query, key_tokens, draw_keys=each[None], **settings)
    for each in jax.random.split(key, draws // GPU_HEADS)
  ]
  return rearrange(jnp.stack(found), 'a b f m i n -> (a b m) f i n')


def drops(program, key, logits, *, draws, drop_rate):
  """Returns draws [b, f, i, n] by logits [1, f, 1, i, n], in interpret mode of kernels."""
  n = logits.own.shape[-1]
  if program == 'xla':
    weights = fast_asad.sampling_weights(logits)
    weights = jnp.broadcast_to(weights, (draws, *weights.shape[1:]))
    keys = jax.random.split(key, draws)
    seeds = weighted_sampling.head_seeds(keys, 1)
    return weighted_sampling.sample_drops(seeds, weights, num_dropped(n, drop_rate))[:, :, 0]
  query, key_tokens = (
    jnp.broadcast_to(each, (SAMPLES, each.shape[1], HEADS, each.shape[3]))
    for each in tokens_with(logits)
  )

  def some(keys):
    return asad_tpu.dropped_pairs(
      query, key_tokens, draw_keys=keys, drop_rate=drop_rate, interpret=True
    )

  keys = jax.random.split(key, (draws // HEADS // SAMPLES, SAMPLES))
  return rearrange(jax.lax.map(some, keys), 'a b f m i n -> (a b m) f i n')
