"""The GPU kernels: interpreted, they compute ASAD attention; XLA compiles them for a GPU.

They draw the same pairs as XLA's implementation, whose distribution is tested in
tests/model/test_asad.py and tests/test_golden.py.
"""

import dataclasses
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_near, extreme_tokens, tokens, value_and_gradients
from conftest import run_python
from draws import INTERPRET_GPU, drops_of_xla
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from dropmae_jax import sharding
from dropmae_jax.kernels.gpu import asad_gpu
from dropmae_jax.model import fast_asad
from dropmae_jax.model.asad import num_dropped

fused = partial(asad_gpu.asad_attention, interpret=INTERPRET_GPU)
drop = jax.jit(asad_gpu.dropped_pairs, static_argnames=('drop_rate', 'interpret'))
dropped_pairs = partial(drop, interpret=INTERPRET_GPU)


def rounded(arrays):
  return [each.astype(jnp.bfloat16) for each in arrays]


@pytest.mark.parametrize(
  ('b', 'n', 'm', 'e', 'rate'),
  [
    pytest.param(1, 16, 2, 16, 0.3, marks=pytest.mark.slow),  # Less than a tile.
    (1, 76, 1, 32, 0.1),  # A tile and a narrower one.
    pytest.param(1, 128, 1, 64, 0.2, marks=pytest.mark.slow),  # Two whole tiles.
    pytest.param(1, 196, 2, 32, 0.1, marks=pytest.mark.slow),  # Full size.
  ],
)
def test_output_and_gradients_are_those_of_xla_given_the_drops(b, n, m, e, rate):
  given = rounded(tokens(2, b=b, n=n, m=m, e=e))
  # From JAX 0.12 on, overlapping tiles that write the same ranks are reported as a race.
  tiles_overlap = n > 64 and n % 64 > 0 and jax.__version_info__ >= (0, 12)
  interpret = dataclasses.replace(INTERPRET_GPU, detect_races=not tiles_overlap)
  drawn = {'draw_keys': jax.random.split(jax.random.key(1), b), 'drop_rate': rate}
  drops = dropped_pairs(*given[:2], **drawn, interpret=interpret)
  np.testing.assert_array_equal(drops.sum(axis=(1, 3, 4)), num_dropped(n, rate))
  np.testing.assert_array_equal(drops, drops_of_xla(*given[:2], **drawn))
  ours = value_and_gradients(partial(fused, **drawn, interpret=interpret), given)
  assert {each.dtype for each in ours} == {jnp.dtype('bfloat16')}
  exact = [each.astype(jnp.float32) for each in given]
  expected = value_and_gradients(partial(fast_asad.attention_with_drops, is_dropped=drops), exact)
  assert_near(ours, expected, 0.005)
  assert tiles_overlap or not gpu_callbacks.get_races().races_found


def test_logits_so_far_apart_that_exponentials_underflow():
  given = rounded(extreme_tokens(16, 1, 16))
  drawn = {'draw_keys': jax.random.split(jax.random.key(1), 3), 'drop_rate': 0.5}
  drops = dropped_pairs(*given[:2], **drawn)
  np.testing.assert_array_equal(drops.sum(axis=(1, 3, 4)), num_dropped(16, 0.5))
  assert not np.einsum('bfmii->', np.asarray(drops, np.int64))
  recorded = partial(fast_asad.attention_with_drops, is_dropped=drops)
  ours = value_and_gradients(partial(fused, **drawn), given)
  xla = value_and_gradients(recorded, given)
  exact = value_and_gradients(recorded, [each.astype(jnp.float32) for each in given])
  # Where terms nearly cancel, no implementation has digits left in bfloat16.
  for one, other, expected in zip(ours, xla, exact, strict=True):
    assert np.isfinite(np.asarray(one, np.float32)).all()
    error, allowed = (jnp.linalg.norm(each.ravel() - expected.ravel()) for each in (one, other))
    assert error <= 1.5 * allowed + 1e-6


def test_marks_of_several_whole_tiles():
  query, key, _ = rounded(tokens(2, b=1, n=128, m=1))
  drawn = {'draw_keys': jax.random.split(jax.random.key(1), 1), 'drop_rate': 0.2}
  drops = dropped_pairs(query, key, **drawn)
  np.testing.assert_array_equal(drops, drops_of_xla(query, key, **drawn))
  assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize('rate', [1 / 2, pytest.param(1.0, marks=pytest.mark.slow)])
def test_many_heads_draw_what_xla_draws(rate):
  query, key, _ = rounded(tokens(3, b=1, n=3, m=12, e=16, scale=2.0))
  drawn = {'draw_keys': jax.random.split(jax.random.key(5), 1), 'drop_rate': rate}
  drops = dropped_pairs(query, key, **drawn)
  assert drops.any(axis=(0, 2)).sum() == 12
  np.testing.assert_array_equal(drops, drops_of_xla(query, key, **drawn))


def test_on_a_mesh_every_device_computes_its_part_of_the_batch():
  query, key, _ = rounded(tokens(4, b=2, n=5, m=1))
  drawn = {'draw_keys': jax.random.split(jax.random.key(1), 2), 'drop_rate': 0.5}
  mesh = sharding.make_mesh(jax.devices()[:2])
  text = (
    jax.jit(partial(asad_gpu.dropped_pairs, **drawn, mesh=mesh))
    .trace(query, key)
    .lower(lowering_platforms=('cuda',))
    .as_text()
  )
  assert 'mosaic_gpu' in text
  assert 'tensor<1x2x1x64x64xui16>' in text


def test_64_bytes_of_marks_are_stored_per_query():
  b, n, m, e = 2, 196, 16, 32
  given = [jax.ShapeDtypeStruct((b, 2 * n, m, e), jnp.bfloat16)] * 3
  attend = partial(
    asad_gpu.asad_attention, draw_keys=jax.random.split(jax.random.key(0), b), drop_rate=0.1
  )
  _, pullback = jax.eval_shape(lambda *x: jax.vjp(attend, *x), *given)
  stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
  # Rows of tokens are padded to 208, and those of results to 256.
  lanes = b * 2 * m * e
  assert stored == 3 * lanes * 208 * 2 + lanes * 256 * 4 + b * 2 * m * 256 * (4 + 64)


@pytest.mark.parametrize(
  ('sizes', 'reason'),
  [
    ((196, 32, 'bfloat16'), ''),
    ((256, 32, 'bfloat16'), ''),
    ((128, 64, 'bfloat16'), ''),
    ((196, 32, 'float32'), 'float32, but for bfloat16'),
    ((196, 24, 'bfloat16'), 'heads of width 24, which is no multiple of 16'),
    ((257, 32, 'bfloat16'), '257 tokens per frame with heads of width 32: too many'),
    ((196, 64, 'bfloat16'), '196 tokens per frame with heads of width 64: too many'),
  ],
)
def test_the_reason_why_there_is_no_kernel_is_given(sizes, reason):
  assert asad_gpu.unsupported(*sizes) == reason


COMPILE = """
import sys
import jax, jax.numpy as jnp
jax.config.update('jax_platforms', 'cpu')
from dropmae_jax import sharding
from dropmae_jax.kernels import implementations
from dropmae_jax.runtime import targets
mesh = sharding.make_mesh(targets.devices('2xh100'))
b, n, m, e = 4, int(sys.argv[1]), 4, int(sys.argv[2])
attend = implementations.choose(
  'fused', mesh, tokens_per_frame=n, num_heads=m, head_width=e, dtype='bfloat16').dropout
place = sharding.batch_sharding(mesh)
tokens = jax.ShapeDtypeStruct((b, 2 * n, m, e), jnp.bfloat16, sharding=place)
keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), b))
keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=place)
loss = lambda *x: attend(*x[:3], draw_keys=x[3], drop_rate=0.1).astype(jnp.float32).sum()
gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
made = gradient.lower(tokens, tokens, tokens, keys).compile(targets.GPU_OPTIONS)
text = made.as_text()
assert text.count('custom_call_target="mosaic_gpu') == 4, text
# Matrices of heads; the sum over ties has one without heads.
assert f',{2 * n},{2 * n}]' not in text, text
rows = max(64, -(-n // 16) * 16)
pairs = b // 2 * 2 * m * rows**2
# Two bytes per pair are ranks, the others tokens; an array of 32 bits per pair would add four.
# The matrix product that sums ties has scratch memory of a fixed size.
needed = made.memory_analysis().temp_size_in_bytes - 2**25
print(needed / pairs)
assert needed < 5.9 * pairs
"""


@pytest.mark.skipif(
  not importlib.util.find_spec('jax_cuda12_plugin'), reason="needs pip install 'jax[cuda12]'"
)
@pytest.mark.parametrize(('n', 'e'), [(196, 32), (256, 32), (64, 64), (16, 16)])
def test_the_kernels_compile_for_gpus_and_store_no_logits(n, e):
  done = run_python('-c', COMPILE, str(n), str(e), timeout=600)
  assert done.returncode == 0, done.stderr
