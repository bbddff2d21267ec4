"""Attention in chunks of heads and samples is the same as all at once."""

from functools import partial

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dropmae_jax.model import attention, chunks, fast_asad


@pytest.mark.parametrize(
  ('heads', 'mesh'),
  [
    pytest.param(2, None, marks=pytest.mark.slow),  # One head of two of the four samples.
    (2, 'two devices'),  # One head of both samples of a device.
    pytest.param(2 * 4, None, marks=pytest.mark.slow),  # Two heads of all samples.
    pytest.param(2 * 4, 'two devices', marks=pytest.mark.slow),  # Three heads of both samples.
  ],
)
def test_attention_in_chunks_is_as_all_at_once(heads, mesh):
  arguments = attention_cases.tokens(4, b=4, m=6)
  logits = heads * 32**2
  drawn = {'draw_keys': jax.random.split(jax.random.key(1), 4), 'drop_rate': 0.3}
  mesh = mesh and jax.sharding.Mesh(jax.devices()[:2], ('data',))
  present = jnp.asarray(np.random.default_rng(0).random((4, 32)) < 0.5)
  for attend in (
    partial(fast_asad.asad_attention, **drawn),
    attention.dense_attention,
    partial(attention.dense_attention, present=present),
  ):

    def results(at_once, attend=attend):
      output, pull = jax.vjp(partial(attend, loop=chunks.Loop(at_once, mesh)), *arguments)
      return output, *pull(jnp.cos(output))

    compiled = jax.jit(results, static_argnums=0)
    for one, other in zip(compiled(logits), compiled(None), strict=True):
      np.testing.assert_allclose(one, other, atol=2e-6)


def test_a_loop_of_dense_attention_stores_no_logits():
  arguments = attention_cases.tokens(4, b=2, n=64, m=4, e=4)
  attend = partial(attention.dense_attention, loop=chunks.Loop(128**2))
  _, pullback = jax.eval_shape(lambda *x: jax.vjp(attend, *x), *arguments)
  stored = sum(leaf.size for leaf in jax.tree.leaves(pullback))
  assert stored < 2 * 4 * 128**2


def test_every_head_of_a_chunk_has_its_own_numbers():
  rng = np.random.default_rng(0)
  tokens, per_head = (
    jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 8, 6, 3), (4, 6))
  )

  def attend(query, key, value, per_head):
    return query * per_head[:, None, :, None] + key - value

  loop = chunks.Loop(8 * 8**2)
  assert chunks.chunk_counts(tokens.shape[:3], loop.logits_at_once) == (1, 3)  # Two heads each.
  arguments = tokens, 2 * tokens, tokens**2, per_head
  output = chunks.in_chunks(attend, *arguments, loop)
  np.testing.assert_allclose(output, attend(*arguments), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('shape', 'at_once', 'expected'),
  [
    ((2, 392, 16), None, (1, 1)),
    ((2, 392, 16), 8 * 392**2, (1, 4)),
    ((2, 392, 16), 4 * 392**2, (1, 8)),
    ((2, 392, 12), 8 * 392**2, (1, 3)),
    ((64, 392, 16), 8 * 392**2, (8, 16)),
    ((6, 392, 16), 4 * 392**2, (6, 4)),
    ((6, 392, 16), 6 * 392**2, (1, 16)),
    ((2, 392, 3), 10, (2, 3)),
    # 37 has no divisor from 2 to 32.
    ((37, 392, 16), 32 * 392**2, (37, 1)),
    ((2, 98, 12), 8 * 392**2, (1, 1)),
  ],
)
def test_chunks_are_as_large_as_is_allowed(shape, at_once, expected):
  assert chunks.chunk_counts(shape, at_once) == expected
