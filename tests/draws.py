"""Draws of every implementation of ASAD from given logits, for tests of their distribution."""

import functools

import jax
import jax.numpy as jnp
import pytest
from einops import rearrange
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from dropmae_jax.kernels.gpu import asad_gpu
from dropmae_jax.kernels.tpu import asad_tpu
from dropmae_jax.model import asad, fast_asad, weighted_sampling
from dropmae_jax.model.asad import Logits

# `asad.asad`, `fast_asad` and the TPU kernels, whose draw is also compared with XLA's. The GPU
# kernels are too slow when interpreted.
IMPLEMENTATIONS = ('definition', 'xla', pytest.param('fused', marks=pytest.mark.slow))
# Heads with the same logits per sample, and samples per call, for the interpreted TPU kernels: they
# copy all results once per sample.
HEADS, SAMPLES = 4, 50
# Pallas has no public name for this. As in hardware, reads past the end of an array give 0.
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


@functools.partial(jax.jit, static_argnames='drop_rate')
def drops_of_xla(query, key, *, draw_keys, drop_rate):
  """Returns the pairs that `fast_asad.asad_attention` drops."""
  logits = fast_asad.products(fast_asad.by_frame(query), fast_asad.by_frame(key))
  weights = fast_asad.sampling_weights(logits, scale=query.shape[-1] ** -0.5)
  seeds = weighted_sampling.head_seeds(draw_keys, query.shape[2])
  count = asad.num_dropped(query.shape[1] // 2, drop_rate)
  return weighted_sampling.sample_drops(seeds, weights, count)


def drops_of_gpu_and_xla(key, logits, *, heads, drop_rate):
  """Returns draws [heads, f, i, n] of the GPU kernels, and XLA's for the same tokens and key.

  The kernels take bfloat16. A key token has a high and a low part, which are added in the logit.
  """
  query, key_tokens = tokens_with(logits)
  exact = key_tokens * 2**0.5
  high = exact.astype(jnp.bfloat16)
  low = (exact - high).astype(jnp.bfloat16)
  both = jnp.concatenate([query, query], -1).astype(jnp.bfloat16), jnp.concatenate([high, low], -1)
  arguments = [jnp.broadcast_to(each, (*each.shape[:2], heads, each.shape[3])) for each in both]
  drawn = {'draw_keys': key[None], 'drop_rate': drop_rate}
  drops = (
    asad_gpu.dropped_pairs(*arguments, **drawn, interpret=INTERPRET_GPU),
    drops_of_xla(*arguments, **drawn),
  )
  return [rearrange(each, '1 f m i n -> m f i n') for each in drops]


def drops(implementation, key, logits, *, draws, drop_rate):
  """Returns draws [b, f, i, n] from logits [1, f, 1, i, n]; kernels are interpreted."""
  keys = jax.random.split(key, draws)
  if implementation == 'definition':
    same = Logits(*(jnp.broadcast_to(each, (draws, *each.shape[1:])) for each in logits))
    return asad.asad(keys, same, drop_rate=drop_rate)[:, :, 0]
  if implementation == 'xla':
    weights = fast_asad.sampling_weights(logits)
    weights = jnp.broadcast_to(weights, (draws, *weights.shape[1:]))
    count = asad.num_dropped(logits.own.shape[-1], drop_rate)
    seeds = weighted_sampling.head_seeds(keys, 1)
    return weighted_sampling.sample_drops(seeds, weights, count)[:, :, 0]
  query, key_tokens = (
    jnp.broadcast_to(each, (SAMPLES, each.shape[1], HEADS, each.shape[3]))
    for each in tokens_with(logits)
  )

  def some(keys):
    return asad_tpu.dropped_pairs(
      query, key_tokens, draw_keys=keys, drop_rate=drop_rate, interpret=True
    )

  keys = keys[: draws // HEADS].reshape(-1, SAMPLES)
  return rearrange(jax.lax.map(some, keys), 'a b f m i n -> (a b m) f i n')
