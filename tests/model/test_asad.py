"""The law of attention dropout: what is dropped, how often, and what gradients see of it."""

import itertools
import os
from functools import partial

import draws
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dropmae_jax.kernels import implementations
from dropmae_jax.model import attention, chunks, fast_asad, weighted_sampling
from dropmae_jax.model.asad import Logits, num_dropped


def qkv(seed, *, b=2, n=16, m=3, e=8, scale=1.0):
  keys = jax.random.split(jax.random.key(seed), 3)
  return [scale * jax.random.normal(key, (b, 2 * n, m, e)) for key in keys]


def scaled_logits(query, key):
  logits = fast_asad.products(fast_asad.by_frame(query), fast_asad.by_frame(key))
  return Logits(*(each * query.shape[-1] ** -0.5 for each in logits))


def draw(seed, query, key, count):
  weights = fast_asad.sampling_weights(scaled_logits(query, key))
  keys = jax.random.split(jax.random.key(seed), query.shape[0])
  seeds = weighted_sampling.head_seeds(keys, query.shape[2])
  return weighted_sampling.sample_drops(seeds, weights, count), weights


@pytest.mark.parametrize(
  ('length', 'rate', 'expected'),
  [
    (392, 0.05, 3528),
    (392, 0.1, 7448),
    (392, 0.15, 11368),
    (392, 0.2, 15288),
    (392, 0.3, 22736),
    (512, 0.1, 12800),
    (32, 0.2, 96),
    (32, 0.4, 192),
    (202, 0.29, 28 * 202),
    (202, 0.57, 56 * 202),
    (392, 0.005, 0),
    (392, 0.0, 0),
  ],
)
def test_number_dropped_is_the_published_truncation(length, rate, expected):
  assert num_dropped(length // 2, rate) == expected


@pytest.mark.parametrize('scale', [0.0, 1.0, 20.0])
@pytest.mark.parametrize('rate', [0.1, 0.5, 1.0])
def test_exactly_the_stated_number_and_never_the_diagonal(scale, rate):
  query, key, _ = qkv(0, scale=scale)
  count = num_dropped(16, rate)
  drops, _ = draw(1, query, key, count)
  np.testing.assert_array_equal(drops.sum(axis=(1, 3, 4)), count)
  assert not np.einsum('bfmii->', np.asarray(drops, np.int64))


def test_weights_of_a_query_sum_to_its_best_match_in_the_other_frame():
  query, key, _ = qkv(2)
  logits = scaled_logits(query, key)
  other = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)[..., 16:]
  _, weights = draw(0, query, key, 32)
  np.testing.assert_allclose(weights.sum(-1), other.max(-1) + 1e-6, rtol=1e-5)


@pytest.mark.parametrize('spread', [0.0, 1.0, 100.0])
@pytest.mark.parametrize('is_marked', [False, True])
def test_powers_are_summed_alike_in_passes_and_at_once(spread, is_marked):
  """GPUs do the one, and all others the other."""
  marks = ~jnp.eye(16, dtype=bool) if is_marked else None
  logits = spread * jax.random.normal(jax.random.key(0), (2, 2, 3, 16, 16))
  in_passes, at_once = (
    function(logits, scale=0.5, marks=marks)
    for function in (fast_asad._power_sums_in_passes, fast_asad._power_sums_at_once)
  )
  assert len(in_passes) == 2 + is_marked
  for one, other in zip(in_passes, at_once, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)


def test_marks_are_packed_alike_at_once_and_by_eighths():
  """CPUs do the other, and all others the one."""
  rows = jax.random.bernoulli(jax.random.key(0), shape=(2, 2, 3, 24, 5))
  bits = fast_asad._packed_at_once(rows)
  np.testing.assert_array_equal(bits, fast_asad._packed_by_eighths(rows))
  np.testing.assert_array_equal(fast_asad.unpacked(bits, 24), rows)


def test_own_frame_is_the_querys_own():
  """Key 3 of frame x is what every query likes; it can be dropped for frame x alone."""
  query = jnp.ones((1, 8, 1, 4))
  key = jnp.zeros((1, 8, 1, 4)).at[0, 3].set(10.0)
  logits = scaled_logits(query, key)
  assert (logits.own[0, 0, 0, :, 3] == 20).all()
  assert (logits.other[0, 1, 0, :, 3] == 20).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 24), st.sampled_from([1, 2, 4, 100, 2**16 - 1]))
def test_lowest_marks_exactly_that_many_with_ties_by_position(seed, count, distinct):
  rng = np.random.default_rng(seed)
  ranks = rng.integers(0, distinct, (2, 2, 1, 3, 4)).astype(np.uint16)
  from_behind = rng.integers(0, 2, (2, 1, 1, 1, 1)).astype(bool)
  marks = np.asarray(weighted_sampling.lowest(jnp.asarray(ranks), count, jnp.asarray(from_behind)))
  for sample in range(2):
    flat = ranks[sample].ravel().astype(int)
    place = np.arange(24)[:: -1 if from_behind[sample].item() else 1]
    expected = np.zeros(24, bool)
    expected[np.lexsort((place, flat))[:count]] = True
    np.testing.assert_array_equal(marks[sample].ravel(), expected)


@pytest.mark.parametrize('n', [16, 196, 256, 289])
def test_rows_of_any_length_are_counted(n):
  ranks = np.random.default_rng(n).integers(0, 2**16 - 1, (1, 2, 2, n, n)).astype(np.uint16)
  for count in (1, 2 * n, 2 * n * n):
    marks = np.asarray(
      weighted_sampling.lowest(jnp.asarray(ranks), count, jnp.zeros((1, 1, 2, 1, 1), bool))
    )
    for head in range(2):
      assert marks[:, :, head].sum() == count
      inside, outside = (
        ranks[:, :, head][each] for each in (marks[:, :, head], ~marks[:, :, head])
      )
      assert not len(outside) or inside.max() <= outside.min()


def test_ranks_order_as_the_values_do_over_the_whole_range():
  values = np.float32(2.0) ** np.linspace(-3.9, 59, 4001, dtype=np.float32)
  shape = (1, 1, 1, 1, -1)
  ranks = np.asarray(weighted_sampling.to_ranks(jnp.asarray(values).reshape(shape)))
  assert (np.diff(ranks.ravel().astype(int)) > 0).all()
  odd = jnp.asarray([0.0, 1e-3, jnp.inf, 1e30, 3e38]).reshape(shape)
  ranks = np.asarray(weighted_sampling.to_ranks(odd)).ravel().tolist()
  assert ranks == [
    0,
    0,
    weighted_sampling.NEVER,
    weighted_sampling.NEVER - 1,
    weighted_sampling.NEVER - 1,
  ]


@pytest.mark.parametrize('program', draws.PROGRAMS)
def test_every_subset_has_its_exact_probability(program):
  """All 924 ways to drop 6 of 12 pairs, against successive draws without replacement."""
  n, count, drawn = 3, 6, 100_000
  logits = Logits(*jax.random.normal(jax.random.key(5), (2, 1, 2, 1, n, n)) * 1.5)
  weights = np.asarray(fast_asad.sampling_weights(logits), np.float64).ravel()
  candidates = np.flatnonzero(weights)
  assert len(candidates) == 12
  w = weights[candidates]
  subsets = np.array(list(itertools.combinations(range(12), count)))
  inside = np.zeros((len(subsets), 12), bool)
  np.put_along_axis(inside, subsets, True, axis=1)

  def density(u):
    # The chosen clocks ring before time -log(u) / (rate of the rest).
    rest = (w * ~inside).sum(axis=1, keepdims=True)
    return np.where(inside, 1 - u ** (w / rest), 1.0).prod(axis=1)

  probability, _ = scipy.integrate.quad_vec(density, 0, 1, epsabs=1e-9)
  assert probability.sum() == pytest.approx(1)

  draw = jax.jit(partial(draws.drops, program, draws=drawn, drop_rate=0.5))
  code = np.asarray(draw(jax.random.key(6), logits)).reshape(drawn, -1)[:, candidates]
  code = code @ (1 << np.arange(12))
  codes = inside @ (1 << np.arange(12))
  observed = np.array([np.count_nonzero(code == c) for c in codes])
  assert observed.sum() == drawn
  likely = probability * drawn >= 5
  observed = np.append(observed[likely], observed[~likely].sum())
  expected = np.append(probability[likely], probability[~likely].sum()) * drawn
  assert scipy.stats.chisquare(observed, expected * drawn / expected.sum()).pvalue > 1e-4


def test_draws_of_heads_samples_and_blocks_differ():
  query, key, value = qkv(3)
  same = [jnp.broadcast_to(x[:1, :, :1], x.shape) for x in (query, key)]
  drops, _ = draw(0, *same, 96)
  flat = np.asarray(drops).transpose(0, 2, 1, 3, 4).reshape(6, -1)
  assert len({row.tobytes() for row in flat}) == 6
  blocks = attention.decoder_attentions(
    jax.random.split(jax.random.key(0), 2),
    num_blocks=2,
    tokens_per_frame=16,
    drop_rate=0.2,
    programs=attention.Implementations(),
  )
  first, second = (attend(query, key, value) for attend in blocks)
  assert not np.allclose(first, second)


@pytest.mark.parametrize(
  ('heads', 'mesh'),
  [
    (2, None),  # One head of two of the four samples.
    (2, 'two devices'),  # One head of both samples of a device.
    pytest.param(2 * 4, None, marks=pytest.mark.slow),  # Two heads of all samples.
    pytest.param(2 * 4, 'two devices', marks=pytest.mark.slow),  # Three heads of both samples.
  ],
)
def test_a_few_heads_at_a_time_are_as_all_at_once(heads, mesh):
  arguments = qkv(4, b=4, m=6)
  logits = heads * 32**2
  drawn = {'draw_keys': jax.random.split(jax.random.key(1), 4), 'drop_rate': 0.3}
  mesh = mesh and jax.sharding.Mesh(jax.devices()[:2], ('data',))
  for attend in (partial(fast_asad.asad_attention, **drawn), attention.dense_attention):

    def results(at_once, attend=attend):
      few = partial(attend, loop=chunks.Loop(at_once, mesh))
      output, pull = jax.vjp(few, *arguments)
      return output, *pull(jnp.cos(output))

    for one, other in zip(results(logits), results(None), strict=True):
      np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize('width', [12, 136])
def test_heads_that_flash_attention_does_not_take_go_without(width):
  arguments = qkv(4, e=width)
  mesh = jax.sharding.Mesh(jax.devices()[:1], ('data',))
  np.testing.assert_array_equal(
    implementations.flash_attention(*arguments, mesh=mesh), attention.dense_attention(*arguments)
  )


def test_flash_attention_is_asked_of_cudnn(monkeypatch):
  """There is no GPU here: XLA takes its place."""
  asked, attend = [], jax.nn.dot_product_attention

  def record(*arguments, implementation):
    asked.append(implementation)
    return attend(*arguments, implementation='xla')

  monkeypatch.setattr(jax.nn, 'dot_product_attention', record)
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('data',))
  found = implementations.flash_attention(*qkv(4, e=16), mesh=mesh)
  np.testing.assert_allclose(found, attention.dense_attention(*qkv(4, e=16)), atol=2e-6)
  assert asked == ['cudnn']


@pytest.mark.parametrize(
  ('kind', 'devices', 'shards'), [('auto', 2, True), ('xla', 2, False), ('auto', 1, False)]
)
def test_every_device_has_groups_of_its_own(kind, devices, shards):
  mesh = jax.sharding.Mesh(jax.devices()[:devices], ('data',))
  sizes = {'tokens_per_frame': 16, 'num_heads': 3, 'head_width': 8, 'dtype': 'float32'}
  programs = implementations.choose(kind, mesh, **sizes)
  drawn = {'draw_keys': jax.random.split(jax.random.key(1), 2), 'drop_rate': 0.3}
  for attend in (programs.dense, partial(programs.asad, **drawn)):
    traced = jax.make_jaxpr(attend)(*qkv(4)).jaxpr
    names = {each.primitive.name for each in every_program(traced) for each in each.eqns}
    assert ('shard_map' in names) == shards


def test_how_much_is_computed_at_once():
  assert implementations.logits_at_once('gpu') is None
  assert (
    implementations.logits_at_once('tpu') == implementations.logits_at_once('tpu', 8) == 32 * 392**2
  )
  # Devices of a CPU share its cores.
  assert implementations.logits_at_once('cpu') == len(os.sched_getaffinity(0)) * 4 * 392**2
  assert implementations.logits_at_once('cpu', 4) == implementations.logits_at_once('cpu') // 4


def test_the_search_is_the_same_in_a_loop_and_written_out(monkeypatch):
  """The former is what CPUs have; the latter runs elsewhere."""
  ranks = jax.random.randint(jax.random.key(0), (2, 2, 3, 16, 16), 0, 300).astype(jnp.uint16)
  from_behind = jax.random.bernoulli(jax.random.key(1), shape=(2, 1, 3, 1, 1))
  mark = partial(weighted_sampling.lowest, ranks, from_behind=from_behind)
  in_loop = [mark(count) for count in (1, 100, 512)]

  def elsewhere(*arguments, default, **others):
    del others
    return default(*arguments)

  monkeypatch.setattr(jax.lax, 'platform_dependent', elsewhere)
  for count, expected in zip((1, 100, 512), in_loop, strict=True):
    assert (expected.sum(axis=(1, 3, 4)) == count).all()
    np.testing.assert_array_equal(mark(count), expected)


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
    # 37 has no divisor of at most 32.
    ((37, 392, 16), 32 * 392**2, (37, 1)),
    ((2, 98, 12), 8 * 392**2, (1, 1)),
  ],
)
def test_groups_are_as_large_as_is_allowed(shape, at_once, expected):
  assert chunks.groups_of(shape, at_once) == expected


def test_a_samples_draw_does_not_depend_on_its_batch():
  query, key, value = qkv(4, b=4)
  keys = jax.random.split(jax.random.key(1), 4)
  whole = fast_asad.asad_attention(query, key, value, draw_keys=keys, drop_rate=0.3)
  half = fast_asad.asad_attention(query[2:], key[2:], value[2:], draw_keys=keys[2:], drop_rate=0.3)
  np.testing.assert_allclose(whole[2:], half, atol=1e-6)


@pytest.mark.parametrize('rate', [0.0, 0.05])
def test_a_rate_that_drops_nothing_is_dense_attention(rate):
  query, key, value = qkv(5)
  keys = jax.random.split(jax.random.key(0), 2)
  (attend,) = attention.decoder_attentions(
    keys, num_blocks=1, tokens_per_frame=16, drop_rate=rate, programs=attention.Implementations()
  )
  assert attend is attention.dense_attention
  nothing = jnp.zeros((2, 2, 3, 16, 16), bool)
  np.testing.assert_allclose(
    attend(query, key, value),
    fast_asad.attention_with_drops(query, key, value, is_dropped=nothing),
    atol=1e-6,
  )


def test_dropped_pairs_have_no_weight_and_the_rest_is_renormalised():
  query, key, _ = qkv(6, b=1, m=1, e=32)
  drops, _ = draw(0, query, key, 96)
  identity = jnp.eye(32)[None, :, None, :]
  mixed = fast_asad.attention_with_drops(query, key, identity, is_dropped=drops)[0, :, 0]
  for frame in range(2):
    own = np.asarray(mixed)[16 * frame :][:16, 16 * frame :][:, :16]
    np.testing.assert_array_equal(own == 0, drops[0, frame, 0])
  np.testing.assert_allclose(mixed.sum(-1), 1, atol=1e-6)


def plain_attention(query, key, value, is_dropped):
  """The definition, on whole matrices [l, l], differentiated by JAX."""
  n = query.shape[1] // 2
  logits = jnp.einsum('bime,bjme->bmij', query, key) * query.shape[-1] ** -0.5
  dropped = jnp.zeros(logits.shape, bool)
  for frame in range(2):
    inside = slice(frame * n, frame * n + n)
    dropped = dropped.at[:, :, inside, inside].set(is_dropped[:, frame])
  attention = jax.nn.softmax(jnp.where(dropped, -jnp.inf, logits), axis=-1)
  return jnp.einsum('bmij,bjme->bime', attention, value)


@pytest.mark.parametrize('from_seeds', [False, True])
@pytest.mark.parametrize(('scale', 'rate', 'n'), [(1.0, 0.3, 16), (1.5, 0.1, 37), (0.0, 1.0, 9)])
def test_gradients_are_those_of_the_definition(scale, rate, n, from_seeds):
  query, key, value = qkv(8, n=n, scale=scale)
  value = value + 1.0
  keys = jax.random.split(jax.random.key(2), 2)
  drops, _ = draw(2, query, key, num_dropped(n, rate))
  if from_seeds:
    ours = partial(fast_asad.asad_attention, draw_keys=keys, drop_rate=rate)
  else:
    ours = partial(fast_asad.attention_with_drops, is_dropped=drops)
  theirs = partial(plain_attention, is_dropped=drops)
  output, defined = ours(query, key, value), theirs(query, key, value)
  assert jnp.linalg.norm(output - defined) <= 1e-6 * jnp.linalg.norm(defined)
  gradients, expected = (
    jax.grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), argnums=(0, 1, 2))(query, key, value)
    for f in (ours, theirs)
  )
  for one, other in zip(gradients, expected, strict=True):
    assert jnp.linalg.norm(one - other) <= 1e-6 * max(float(jnp.linalg.norm(other)), 1e-3)


def test_gradients_in_bfloat16_do_not_suffer_from_what_values_have_in_common():
  query, key, value = qkv(10, n=49, e=32)
  value = value + 3.0
  drops, _ = draw(2, query, key, num_dropped(49, 0.1))

  def gradients(dtype):
    attend = partial(fast_asad.attention_with_drops, is_dropped=drops)
    loss = lambda *x: (attend(*x).astype(jnp.float32) * jnp.cos(jnp.arange(32))).sum()
    given = (each.astype(dtype) for each in (query, key, value))
    return jax.grad(loss, argnums=(0, 1, 2))(*given)

  for ours, exact in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
    assert ours.dtype == jnp.bfloat16
    assert jnp.linalg.norm(ours - exact) < 0.01 * jnp.linalg.norm(exact)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_values_that_are_all_alike_have_no_gradient_for_queries(dtype):
  """However large they are: attention sums to 1, as it is rounded for the products."""
  query, key, value = (each.astype(dtype) for each in qkv(11, n=49, e=32))
  drops, _ = draw(2, query, key, num_dropped(49, 0.1))
  attend = partial(fast_asad.attention_with_drops, is_dropped=drops)

  def of_query(value):
    _, pull = jax.vjp(lambda query: attend(query, key, value), query)
    return jnp.linalg.norm(pull(query)[0].astype(jnp.float32))

  assert of_query(jnp.full_like(value, 64.0)) < 64 * 1e-5 * of_query(value)


def test_noise_is_between_its_ends_for_all_bits():
  bits = jnp.array([0, 1, 2**31, 2**32 - 1], jnp.uint32)
  uniform = np.asarray(weighted_sampling.to_uniform(bits))
  assert (uniform > 0).all()
  assert (uniform < 1).all()
  noise = (-jnp.log(weighted_sampling.to_uniform(bits))).reshape(1, 1, 1, 1, -1)
  ranks = weighted_sampling.to_ranks(noise).ravel()
  assert (noise > 0).all()
  assert ranks[-1] == 0
  assert (jnp.diff(ranks.astype(int)) <= 0).all()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_gradient_keeps_one_bit_for_each_pair_that_may_be_dropped(dtype):
  """And no more than four arrays of the logits' size lie in memory at a time."""
  b, n, m, e = 2, 64, 4, 16
  arguments = [jax.ShapeDtypeStruct((b, 2 * n, m, e), dtype)] * 3
  keys = jax.random.split(jax.random.key(0), b)
  attend = partial(fast_asad.asad_attention, draw_keys=keys, drop_rate=0.1)
  _, pullback = jax.eval_shape(lambda *x: jax.vjp(attend, *x), *arguments)
  kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
  tokens, rows = b * 2 * n * m * e * 4, b * m * 2 * n
  given = 3 * tokens * jnp.dtype(dtype).itemsize // 4
  assert kept == given + tokens + 2 * rows * 4 + rows * n // 8
  gradient = jax.jit(jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2)))
  memory = gradient.lower(*arguments).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * b * m * (2 * n) ** 2 * 4 + 12 * tokens


def test_loops_carry_ranks_and_marks_alone_when_they_are_computed_anew():
  """Else remat takes all that a loop does not change out of it: arrays of the logits' size."""
  query, key, value = qkv(0)
  keys = jax.random.split(jax.random.key(1), 2)
  attend = partial(fast_asad.asad_attention, draw_keys=keys, drop_rate=0.3)
  loss = jax.checkpoint(lambda *qkv: attend(*qkv).sum())
  own = 2 * 2 * 3 * 16 * 16
  carried = [
    operand.aval
    for program in every_program(jax.make_jaxpr(jax.grad(loss))(query, key, value).jaxpr)
    for equation in program.eqns
    if equation.primitive.name in ('scan', 'while')
    for operand in equation.invars
    if operand.aval.size >= own
  ]
  # Forwards and anew: the ranks of the search, of CPUs and others, and the marks of the packing.
  assert {each.dtype.name for each in carried} == {'uint16', 'bool'}
  assert len(carried) <= 6


def every_program(program):
  yield program
  for equation in program.eqns:
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from every_program(inner)


def test_the_draw_is_the_same_on_any_mesh():
  query, key, _ = qkv(9, b=8)
  keys = jax.random.split(jax.random.key(3), 8)
  mesh = jax.make_mesh((4, 2), ('data', 'heads'))

  @jax.jit
  def drops(query, key):
    weights = fast_asad.sampling_weights(scaled_logits(query, key))
    return weighted_sampling.sample_drops(weighted_sampling.head_seeds(keys, 3), weights, 96)

  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  whole = drops(query, key)
  parts = drops(*(jax.device_put(each, spread) for each in (query, key)))
  assert len(parts.sharding.device_set) == 8
  np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize('level', [0.0, 20.0, 60.0])
def test_no_place_is_favoured_and_no_two_draws_are_alike(level):
  """At full size: where pairs are dropped, and what heads, samples and blocks have in common."""
  n, heads, samples, count = 196, 4, 6, 7448
  logits = Logits(*(jnp.full((1, 2, 1, n, n), number) for number in (level, 0.0)))
  weights = jnp.broadcast_to(fast_asad.sampling_weights(logits), (samples, 2, heads, n, n))
  sample = jax.jit(weighted_sampling.sample_drops, static_argnums=2)
  drops = []
  for block in range(4):
    keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.split(jax.random.key(4), 6), block)
    drops.append(
      np.asarray(sample(weighted_sampling.head_seeds(keys, heads), weights, count)).transpose(
        0, 2, 1, 3, 4
      )
    )
  drops = np.concatenate(drops).reshape(-1, 2, n, n)
  assert (drops.sum(axis=(1, 2, 3)) == count).all()
  share = count / (2 * n * (n - 1))
  deviation = np.sqrt(len(drops) * share * (1 - share))
  for axes, size in (((1, 2, 3), 0), ((0, 2, 3), n * (n - 1)), ((0, 1, 3), 2 * (n - 1))):
    if size:
      found = drops.sum(axis=axes)
      z = (found - found.mean()) / (deviation * np.sqrt(size))
      assert np.abs(z).max() < 5, axes
  flat = drops.reshape(len(drops), -1).astype(np.float32)
  common = flat @ flat.T
  expected, spread = count * share, np.sqrt(count * share * (1 - share) ** 2)
  z = (common[np.triu_indices(len(flat), 1)] - expected) / spread
  assert np.abs(z).max() < 5.5
  assert abs(z.mean()) < 0.2
  for shift in (1, n, n * n):  # The next column, row and frame.
    z = ((flat * np.roll(flat, shift, axis=1)).sum(axis=1) - expected) / spread
    assert abs(z.mean()) < 0.8, shift


def test_no_gradient_flows_through_the_draw():
  query, key, value = qkv(7)
  keys = jax.random.split(jax.random.key(2), 2)
  drops, _ = draw(2, query, key, num_dropped(16, 0.3))
  drawn = partial(fast_asad.asad_attention, draw_keys=keys, drop_rate=0.3)
  recorded = partial(fast_asad.attention_with_drops, is_dropped=drops)
  for argument in range(3):
    ours, expected = (
      jax.grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), argnums=argument)(query, key, value)
      for f in (drawn, recorded)
    )
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert np.isfinite(ours).all()
