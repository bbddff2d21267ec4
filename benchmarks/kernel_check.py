"""Checks the kernels of ASAD on a device against attention in float32."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dropmae_jax import sharding
from dropmae_jax.config import Config
from dropmae_jax.kernels import implementations
from dropmae_jax.kernels.gpu import asad_gpu
from dropmae_jax.kernels.tpu import asad_tpu
from dropmae_jax.model import attention, fast_asad
from dropmae_jax.model.asad import num_dropped
from dropmae_jax.runtime.errors import UserError

SAMPLES = 2
# Of the norm of the expected result: bfloat16 is off by some thousandths.
TOLERANCE = 0.02


def check(config: Config, device: Any, **how: Any) -> str:
  """Compares the kernels of a device with attention in float32 that drops the same pairs.

  Args:
    config: gives the sizes and P.
    device: only its platform is read.
    how: further arguments of the kernels, such as `interpret`.

  Returns:
    A line with the largest error.

  Raises:
    UserError: the number of dropped pairs is wrong, or the output or a gradient is.
  """
  kernels = asad_tpu if device.platform == 'tpu' else asad_gpu
  a = config.model
  shape = (SAMPLES, a.num_tokens, a.decoder_num_heads, a.decoder_width // a.decoder_num_heads)
  keys = jax.random.split(jax.random.key(0), 4)
  given = [jax.random.normal(key, shape, jnp.dtype(config.dtype)) for key in keys]
  rate = config.objective.attention_dropout
  drawn = {'draw_keys': jax.random.split(jax.random.key(1), SAMPLES), 'drop_rate': rate, **how}
  drops = jax.jit(lambda query, key: kernels.dropped_pairs(query, key, **drawn))(*given[:2])
  counts, count = drops.sum(axis=(1, 3, 4)), num_dropped(a.tokens_per_frame, rate)
  if not (counts == count).all():
    raise _wrong(f'drop {counts.min()} to {counts.max()} pairs of a head instead of {count}')

  def results(attend: Any, query: Any, key: Any, value: Any, d_output: Any) -> list[jax.Array]:
    output, backward = jax.vjp(attend, query, key, value)
    gradients = backward(d_output.astype(output.dtype))
    return [each.astype(jnp.float32) for each in (output, *gradients)]

  def errors_of(attend: Any, plain: Any, prefix: str) -> dict[str, float]:
    actual = jax.jit(partial(results, attend))(*given)
    with jax.default_matmul_precision('highest'):
      expected = results(plain, *(each.astype(jnp.float32) for each in given))
    names = ('output', *(f'gradient of the {name}' for name in ('queries', 'keys', 'values')))
    return {
      f'{prefix}{name}': float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
      for name, one, other in zip(names, actual, expected, strict=True)
    }

  with_drops = partial(fast_asad.attention_with_drops, is_dropped=drops)
  errors = errors_of(partial(kernels.asad_attention, **drawn), with_drops, '')
  if device.platform == 'gpu':
    flash = partial(implementations.flash_attention, mesh=sharding.make_mesh([device]))
    errors |= errors_of(flash, attention.dense_attention, 'flash attention: ')
  # nan, which compares to nothing, is an error too.
  far = [f'{name} {error:.3g}' for name, error in errors.items() if not error < TOLERANCE]
  if far:
    raise _wrong(f'are off, relative to what they should be: {", ".join(far)}')
  largest = max(errors, key=errors.get)
  return (
    f'the kernels drop {count} pairs of a head; largest error: {errors[largest]:.2g}, {largest}'
  )


def _wrong(what: str) -> UserError:
  return UserError(
    f'the fused kernels {what}; please report it with this machine, and use --without_fused.'
  )
