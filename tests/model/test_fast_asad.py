"""The fast form: its weights and draws, its gradients, and what it stores."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
  assert_near,
  equations,
  plain_attention,
  scaled_logits,
  tokens,
  value_and_gradients,
)
from draws import drops_of_xla

from dropmae_jax.model import asad, fast_asad
from dropmae_jax.model.asad import Logits, num_dropped


@pytest.mark.parametrize('spread', [0.0, 3.0, 60.0])
def test_sampling_weights_are_those_of_the_definition(spread):
  logits = Logits(*spread * jax.random.normal(jax.random.key(1), (2, 2, 2, 3, 16, 16)))
  fast = fast_asad.sampling_weights(Logits(*(each / 0.3 for each in logits)), scale=0.3)
  np.testing.assert_allclose(fast, asad.sampling_weights(logits), rtol=2e-5)


@pytest.mark.parametrize('spread', [0.0, 1.0, 100.0])
@pytest.mark.parametrize('has_mask', [False, True])
def test_exponentials_are_summed_alike_in_two_passes_and_online(spread, has_mask):
  """GPUs use the online form, other devices the two passes."""
  mask = ~jnp.eye(16, dtype=bool) if has_mask else None
  logits = spread * jax.random.normal(jax.random.key(0), (2, 2, 3, 16, 16))
  two_pass, online = (
    function(logits, scale=0.5, mask=mask)
    for function in (fast_asad._exp_sums_two_pass, fast_asad._exp_sums_online)
  )
  assert len(two_pass) == 2 + has_mask
  for one, other in zip(two_pass, online, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)


def test_bits_are_packed_alike_at_once_and_in_a_loop():
  """CPUs use the loop."""
  rows = jax.random.bernoulli(jax.random.key(0), shape=(2, 2, 3, 24, 5))
  bits = fast_asad._pack_at_once(rows)
  np.testing.assert_array_equal(bits, fast_asad._pack_in_loop(rows))
  np.testing.assert_array_equal(fast_asad.unpack_bits(bits, 24), rows)


def test_logits_are_split_by_the_frame_of_the_query():
  """Key 3 of frame x is of the own frame for queries of x, and of the other for those of z."""
  query = jnp.ones((1, 8, 1, 4))
  key = jnp.zeros((1, 8, 1, 4)).at[0, 3].set(10.0)
  logits = scaled_logits(query, key)
  assert (logits.own[0, 0, 0, :, 3] == 20).all()
  assert (logits.other[0, 1, 0, :, 3] == 20).all()


@pytest.mark.parametrize('scale', [0.0, 1.0, 20.0])
@pytest.mark.parametrize('rate', [0.1, 0.5, 1.0])
def test_exactly_the_stated_number_and_never_the_diagonal(scale, rate):
  query, key, _ = tokens(0, scale=scale)
  keys = jax.random.split(jax.random.key(1), 2)
  drops = np.asarray(drops_of_xla(query, key, draw_keys=keys, drop_rate=rate))
  np.testing.assert_array_equal(drops.sum(axis=(1, 3, 4)), num_dropped(16, rate))
  assert not np.einsum('bfmii->bfmi', drops).any()


def test_the_draw_of_a_sample_does_not_depend_on_its_batch():
  arguments = tokens(4, b=4)
  keys = jax.random.split(jax.random.key(1), 4)
  attend = jax.jit(partial(fast_asad.asad_attention, drop_rate=0.3))
  whole = attend(*arguments, draw_keys=keys)
  half = attend(*(each[2:] for each in arguments), draw_keys=keys[2:])
  np.testing.assert_allclose(whole[2:], half, atol=1e-6)


def test_the_draw_is_the_same_on_any_mesh():
  query, key, _ = tokens(9, b=8)
  keys = jax.random.split(jax.random.key(3), 8)
  mesh = jax.make_mesh((4, 2), ('data', 'heads'))
  drops = jax.jit(partial(drops_of_xla, draw_keys=keys, drop_rate=0.2))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  whole = drops(query, key)
  parts = drops(*(jax.device_put(each, spread) for each in (query, key)))
  assert len(parts.sharding.device_set) == 8
  np.testing.assert_array_equal(whole, parts)


def test_dropped_pairs_have_no_weight_and_the_others_are_renormalised():
  query, key, _ = tokens(6, b=1, m=1, e=32)
  keys = jax.random.split(jax.random.key(0), 1)
  drops = drops_of_xla(query, key, draw_keys=keys, drop_rate=0.2)
  identity = jnp.eye(32)[None, :, None, :]
  attend = jax.jit(fast_asad.attention_with_drops)
  weights = attend(query, key, identity, is_dropped=drops)[0, :, 0]
  for frame in range(2):
    own = np.asarray(weights)[16 * frame :][:16, 16 * frame :][:, :16]
    np.testing.assert_array_equal(own == 0, drops[0, frame, 0])
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize('is_drawn', [False, True])
@pytest.mark.parametrize(('scale', 'rate', 'n'), [(1.0, 0.3, 16), (1.5, 0.1, 37), (0.0, 1.0, 9)])
def test_gradients_are_those_of_a_masked_softmax(scale, rate, n, is_drawn):
  """Of one with constant marks: no gradient flows through the draw."""
  query, key, value = tokens(8, n=n, scale=scale)
  drawn = {'draw_keys': jax.random.split(jax.random.key(2), 2), 'drop_rate': rate}
  drops = drops_of_xla(query, key, **drawn)
  if is_drawn:
    ours = partial(fast_asad.asad_attention, **drawn)
  else:
    ours = partial(fast_asad.attention_with_drops, is_dropped=drops)
  plain = partial(plain_attention, is_dropped=drops)
  arguments = query, key, value + 1.0
  assert_near(value_and_gradients(ours, arguments), value_and_gradients(plain, arguments), 1e-6)


def test_a_large_mean_of_values_does_not_harm_gradients_in_bfloat16():
  query, key, value = tokens(10, n=49, e=32)
  keys = jax.random.split(jax.random.key(2), 2)
  drops = drops_of_xla(query, key, draw_keys=keys, drop_rate=0.1)
  attend = partial(fast_asad.attention_with_drops, is_dropped=drops)

  def gradients(dtype):
    loss = lambda *x: (attend(*x).astype(jnp.float32) * jnp.cos(jnp.arange(32))).sum()
    arguments = (each.astype(dtype) for each in (query, key, value + 3.0))
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)

  ours = gradients(jnp.bfloat16)
  assert {each.dtype for each in ours} == {jnp.dtype('bfloat16')}
  assert_near(ours, gradients(jnp.float32), 0.01)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_values_that_are_all_equal_give_queries_no_gradient(dtype):
  """However large they are: attention sums to 1 as rounded for the products."""
  query, key, value = (each.astype(dtype) for each in tokens(11, n=49, e=32))
  keys = jax.random.split(jax.random.key(2), 2)
  drops = drops_of_xla(query, key, draw_keys=keys, drop_rate=0.1)
  attend = partial(fast_asad.attention_with_drops, is_dropped=drops)

  def gradient_norm(value):
    _, pull = jax.vjp(lambda query: attend(query, key, value), query)
    return jnp.linalg.norm(pull(query)[0].astype(jnp.float32))

  assert gradient_norm(jnp.full_like(value, 64.0)) < 64 * 1e-5 * gradient_norm(value)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_one_bit_per_pair_is_stored_and_few_arrays_of_the_size_of_logits_exist(dtype):
  b, n, m, e = 2, 64, 4, 16
  arguments = [jax.ShapeDtypeStruct((b, 2 * n, m, e), dtype)] * 3
  keys = jax.random.split(jax.random.key(0), b)
  attend = partial(fast_asad.asad_attention, draw_keys=keys, drop_rate=0.1)
  _, pullback = jax.eval_shape(lambda *x: jax.vjp(attend, *x), *arguments)
  stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
  rows = b * m * 2 * n
  inputs, output, sums, bits = 3 * rows * e * jnp.dtype(dtype).itemsize, rows * e * 4, 8, n // 8
  assert stored == inputs + output + rows * (sums + bits)
  gradient = jax.jit(jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2)))
  memory = gradient.lower(*arguments).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * rows * 2 * n * 4 + 12 * output


def test_rematerialised_loops_carry_ranks_and_marks_alone():
  """Remat moves what a loop does not change out of it, as arrays of the size of the logits."""
  arguments = tokens(0)
  keys = jax.random.split(jax.random.key(1), 2)
  attend = partial(fast_asad.asad_attention, draw_keys=keys, drop_rate=0.3)
  loss = jax.checkpoint(lambda *qkv: attend(*qkv).sum())
  num_pairs = 2 * 2 * 2 * 16 * 16
  carried = [
    operand.aval
    for equation in equations(jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr)
    if equation.primitive.name in ('scan', 'while')
    for operand in equation.invars
    if operand.aval.size >= num_pairs
  ]
  # In the forward pass and again: the ranks, for CPUs and for others, and the marks to pack.
  assert {each.dtype.name for each in carried} == {'uint16', 'bool'}
  assert len(carried) <= 6
