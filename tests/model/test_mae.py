"""What the model may see, its size, initial parameters and loss, and its precision."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import equations
from conftest import GOLDEN
from flax import nnx, traverse_util
from models import initial_model

from dropmae_jax.config import Objective
from dropmae_jax.model import attention, fast_asad, mae, masking, patches
from dropmae_jax.model.vit import architecture_of_size

TINY = architecture_of_size(
  'XXS', image_size=32, decoder_width=32, decoder_depth=2, decoder_num_heads=2
)


@pytest.fixture(scope='module')
def setting():
  """A model, patch vectors and a masking of two samples."""
  model = initial_model(TINY)
  vectors = jax.random.normal(jax.random.key(1), (2, TINY.num_tokens, TINY.patch_values))
  keys = jax.random.split(jax.random.key(2), 2)
  masked = masking.random_masking(keys, num_tokens=TINY.num_tokens, mask_ratio=0.75)
  return model, vectors, masked


@nnx.jit
def encode(model, vectors, masked):
  return model.encode(vectors, masked)


def dense(model):
  return [attention.dense_attention] * model.architecture.decoder_depth


@nnx.jit
def decode(model, latents, masked, wanted=None):
  return model.decode(latents, masked, dense(model), wanted=wanted)


@nnx.jit
def predict(model, vectors, masked):
  return model(vectors, masked, dense(model))


pretraining_loss = nnx.jit(mae.pretraining_loss, static_argnames='objective')


def test_latents_do_not_see_masked_pixels(setting):
  model, vectors, masked = setting
  is_masked = masking.is_masked(masked)[..., None]
  other = jnp.where(is_masked, 5.0, vectors)
  np.testing.assert_array_equal(encode(model, vectors, masked), encode(model, other, masked))
  assert not np.allclose(encode(model, vectors, masked), encode(model, vectors + 1, masked))


def test_latents_see_visible_pixels_of_the_other_frame(setting):
  model, vectors, masked = setting
  other = vectors.at[:, TINY.tokens_per_frame :].add(1.0)
  first_frame = masked.visible < TINY.tokens_per_frame
  change = jnp.abs(encode(model, vectors, masked) - encode(model, other, masked)).max(-1)
  assert (change[first_frame] > 1e-4).all()


def test_wanted_tokens_are_reconstructed_as_among_all(setting):
  model, vectors, masked = setting
  latents = encode(model, vectors, masked)
  whole = decode(model, latents, masked)
  for wanted in (masked.masked, masked.visible[:, ::-1]):
    part = decode(model, latents, masked, wanted)
    np.testing.assert_allclose(part, masking.select(whole, wanted), atol=2e-6)


@pytest.mark.parametrize('normalise', [True, False])
def test_the_loss_is_the_mean_error_of_the_masked_patches(setting, normalise):
  model, _, _ = setting
  frames = jax.random.normal(jax.random.key(3), (2, 2, TINY.image_size, TINY.image_size, 3))
  keys = jax.random.split(jax.random.key(4), 2)
  objective = Objective(attention_dropout=0.0, normalise_targets=normalise)
  loss = pretraining_loss(model, frames, masking_keys=keys, asad_keys=keys, objective=objective)
  vectors = patches.patchify(frames, TINY.patch_size)
  masked = masking.random_masking(keys, num_tokens=TINY.num_tokens, mask_ratio=0.75)
  targets = patches.normalise_patches(vectors) if normalise else vectors
  errors = np.square(predict(model, vectors, masked) - targets)
  expected = errors[np.asarray(masking.is_masked(masked))].mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_two_frames_are_told_apart(setting):
  model, vectors, _ = setting
  n = TINY.tokens_per_frame
  everything = masking.Masking(
    visible=jnp.broadcast_to(jnp.arange(2 * n), (2, 2 * n)), masked=jnp.zeros((2, 0), jnp.int32)
  )
  swapped = jnp.concatenate([vectors[:, n:], vectors[:, :n]], axis=1)
  plain, other = encode(model, vectors, everything), encode(model, swapped, everything)
  assert not np.allclose(plain[:, :n], other[:, n:], atol=1e-3)


def test_dropout_acts_in_training_and_not_at_rate_zero(setting):
  model, vectors, _ = setting
  frames = patches.unpatchify(vectors, TINY.patch_size)
  key = jax.random.split(jax.random.key(0), 2)

  def loss(seed, rate):
    return float(
      pretraining_loss(
        model,
        frames,
        masking_keys=key,
        asad_keys=jax.random.split(jax.random.key(seed), 2),
        objective=Objective(attention_dropout=rate),
      )
    )

  assert loss(1, 0.0) == loss(2, 0.0)
  assert len({loss(1, 0.0), loss(1, 0.2), loss(2, 0.2)}) == 3


def test_mixed_precision_keeps_parameters_loss_and_output_in_float32(setting):
  full, vectors, masked = setting
  graphdef, params = mae.abstract_model(TINY, dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  model = nnx.merge(graphdef, nnx.state(full))
  low, high = predict(model, vectors, masked), predict(full, vectors, masked)
  assert low.dtype == jnp.float32
  error = float(jnp.linalg.norm(low - high) / jnp.linalg.norm(high))
  assert 1e-4 < error < 3e-2


@pytest.mark.parametrize(
  ('size', 'total', 'tensors'),
  [
    ('S', 47_579_648, 257),
    ('B', 111_909_632, 257),
    ('L', 329_543_936, 401),
    ('H', 657_076_812, 497),
  ],
)
def test_sizes_have_the_published_number_of_parameters(size, total, tensors):
  _, params = mae.abstract_model(architecture_of_size(size))
  assert mae.num_parameters(params) == total
  assert len(jax.tree.leaves(params)) == tensors


def test_initial_parameters_have_the_published_distribution():
  """One block is enough: bounds and deviations depend on the widths alone."""
  recorded = {
    row['name']: row for row in json.loads((GOLDEN / 'vit_b_state_dict.json').read_text())
  }
  architecture = architecture_of_size('B', depth=1, decoder_depth=1)
  params = mae.init_params(jax.random.key(0), architecture)
  for path, leaf in traverse_util.flatten_dict(params).items():
    name = '.'.join(map(str, path)).replace('kernel', 'weight').replace('scale', 'weight')
    row = recorded[name]
    deviation = float(leaf.std())
    if row['init_std'] == 0:
      assert deviation == 0, name
      assert float(leaf.min()) == row['init_min'], name
    else:
      tolerance = 0.15 if leaf.size < 2000 else 0.01
      assert deviation == pytest.approx(row['init_std'], rel=tolerance), name
    if leaf.ndim == 2:  # Uniform.
      assert float(jnp.abs(leaf).max()) == pytest.approx(row['init_max'], rel=1e-2), name


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'image_size': 100}, 'image_size=100 is not a multiple of patch_size=16.*image_size=96'),
    ({'num_heads': 7}, 'width=768 must be a multiple of 4 and of num_heads=7'),
    ({'decoder_num_heads': 7}, 'decoder_width=512 must be .* decoder_num_heads=7'),
  ],
)
def test_impossible_architectures_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    architecture_of_size('B', **fields)


def test_an_unknown_size_is_refused():
  with pytest.raises(ValueError, match="size='M' is unknown; valid are: B, H, L, S, XS, XXS"):
    architecture_of_size('M')


@pytest.mark.parametrize('attention_dropout', [0.0, 0.2])
def test_no_gradient_has_a_non_deterministic_reduction(setting, attention_dropout):
  graphdef, params = nnx.split(setting[0])
  keys = jax.random.split(jax.random.key(3), 2)
  objective = Objective(attention_dropout=attention_dropout)

  def loss(params, frames):
    model, drawn = nnx.merge(graphdef, params), {'masking_keys': keys, 'asad_keys': keys}
    return mae.pretraining_loss(model, frames, objective=objective, **drawn)

  frames = jnp.zeros((2, 2, 32, 32, 3))
  traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, frames).jaxpr
  scatters = [each for each in equations(traced) if each.primitive.name.startswith('scatter')]
  # From selecting visible tokens, restoring their order, selecting masked tokens and targets.
  assert len(scatters) >= 4
  assert all(each.params['unique_indices'] for each in scatters)


@pytest.mark.parametrize('attention_dropout', [0.0, 0.2])
def test_only_matrix_products_and_their_neighbours_are_in_bfloat16(attention_dropout):
  """Softmax, norms, loss, residuals and all sums are in float32, forward and backward."""
  graphdef, params = mae.abstract_model(TINY, dtype=jnp.bfloat16)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(3), 2))
  objective = Objective(attention_dropout=attention_dropout)

  def loss(params, frames, keys):
    drawn = {'masking_keys': keys, 'asad_keys': keys, 'objective': objective}
    return mae.pretraining_loss(nnx.merge(graphdef, params), frames, **drawn)

  frames = jax.ShapeDtypeStruct((2, 2, 32, 32, 3), jnp.float32)
  traced = jax.make_jaxpr(jax.value_and_grad(loss))(params, frames, keys).jaxpr
  low = [
    each for each in equations(traced) if any(v.aval.dtype == jnp.bfloat16 for v in each.invars)
  ]
  names = {each.primitive.name for each in low}
  assert 'dot_general' in names
  # Not exp: the gradient of GELU has it, next to a matrix product.
  assert not names & {'sqrt', 'rsqrt', 'log', 'reduce_max', 'cumsum', 'sort', 'div'}, names


@pytest.mark.parametrize('drops', [False, True])
def test_logits_are_summed_in_float32(drops):
  """Near 100, bfloat16 logits have an error of 0.25, and weights one of a quarter."""
  shape = (1, 32, 1, 64)
  query, key, value = (
    jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16) for seed in range(3)
  )
  query, key = 4 * query + 8, 0.5 * key + 1
  exact = [np.asarray(each, np.float64)[0, :, 0] for each in (query, key, value)]
  logits = exact[0] @ exact[1].T / 8
  assert 60 < np.abs(logits).mean() < 200
  weights = np.exp(logits - logits.max(axis=1, keepdims=True))
  expected = weights / weights.sum(axis=1, keepdims=True) @ exact[2]
  none = jnp.zeros((1, 2, 1, 16, 16), bool)
  attend = (
    functools.partial(fast_asad.attention_with_drops, is_dropped=none)
    if drops
    else attention.dense_attention
  )
  output = np.asarray(attend(query, key, value), np.float64)[0, :, 0]
  assert np.linalg.norm(output - expected) < 0.01 * np.linalg.norm(expected)
