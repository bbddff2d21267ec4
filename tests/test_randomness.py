"""Every random draw has its own key, which differs by seed, step, sample and purpose."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from models import initial_model

from dropmae_jax import optimizer, train_step
from dropmae_jax.config import Architecture, Objective, OptimizerOptions
from dropmae_jax.model import asad, attention, mae, masking

TINY = Architecture(
  image_size=16, patch_size=4, width=8, depth=1, num_heads=2,
  decoder_width=8, decoder_depth=2, decoder_num_heads=2,
)  # fmt: skip
BATCH = 4


def words(keys):
  """The data of each key."""
  return [tuple(row) for row in np.asarray(jax.random.key_data(keys)).reshape(-1, 2).tolist()]


@pytest.fixture
def draws_of(monkeypatch):
  """A function that runs a step with a cheap loss and returns the keys of each purpose."""
  params = {'weight': jnp.ones(())}
  tx = optimizer.adamw(lambda _: 1.0, OptimizerOptions())

  def run(seed, step, *, shared=False):
    draws = {}

    def flip_and_normalise(keys, frames, *, shared):
      draws.update(flips=words(keys), shared=shared)
      return frames.astype(jnp.float32)

    def loss(model, frames, *, masking_keys, asad_keys, **_):
      draws.update(masks=words(masking_keys), drops=words(asad_keys))
      return model['weight'] * frames.mean()

    monkeypatch.setattr(train_step.pixels, 'flip_and_normalise', flip_and_normalise)
    monkeypatch.setattr(train_step.mae, 'pretraining_loss', loss)
    monkeypatch.setattr(train_step.nnx, 'merge', lambda graphdef, params: params)
    state = train_step.TrainState(jnp.int32(step), params, tx.init(params))
    new, _ = train_step.train_step(
      state, jnp.zeros((BATCH, 2, 4, 4, 3), jnp.uint8), train_step.derive_seeds(seed).steps,
      graphdef=mae.abstract_model(TINY)[0], tx=tx, schedule=lambda _: 1.0,
      objective=Objective(), shared_flip=shared, accumulation_steps=1,
      implementations=attention.plain(),
    )  # fmt: skip
    assert int(new.step) == step + 1
    assert draws.pop('shared') == shared
    return draws

  return run


def test_no_two_purposes_samples_steps_or_seeds_share_a_key(draws_of):
  draws = [draws_of(seed, step, shared=bool(seed)) for seed in (0, 1) for step in (0, 1, 7)]
  assert draws_of(1, 7, shared=True) == draws[-1]
  keys = [
    key for purposes in draws for kind in ('flips', 'masks', 'drops') for key in purposes[kind]
  ]
  assert len(keys) == len(set(keys)) == 6 * 3 * BATCH


def test_the_seeds_that_a_run_derives_differ():
  seeds = [train_step.derive_seeds(seed) for seed in (0, 1, 2**32 - 1)]
  keys = [key for each in seeds for key in words(jnp.stack([each.init, each.steps]))]
  assert len(set(keys)) == 6
  assert len({each.data for each in seeds}) == 3


def test_initial_parameters_depend_on_the_key_and_no_two_are_equal():
  one, other = (
    traverse_util.flatten_dict(mae.init_params(jax.random.key(seed), TINY)) for seed in (0, 1)
  )
  drawn = {path: leaf for path, leaf in one.items() if (leaf != other[path]).any()}
  # All except position tables, norms and biases; but the bias of the patch embedding is drawn.
  fixed = {path for path in one if path[-1] in ('bias', 'scale', *optimizer.FIXED)}
  assert set(drawn) == set(one) - fixed | {('patch_embed', 'proj', 'bias')}
  for shape in {leaf.shape for leaf in drawn.values()}:
    alike = [np.asarray(leaf).tobytes() for leaf in drawn.values() if leaf.shape == shape]
    assert len(set(alike)) == len(alike), shape


def test_initial_parameters_have_the_keys_of_flax():
  @jax.jit
  def flax_keys(key):
    return nnx.to_pure_dict(nnx.state(mae.MaskedAutoencoder(TINY, rngs=nnx.Rngs(params=key))))

  key = jax.random.key(3)
  jax.tree.map(np.testing.assert_array_equal, mae.init_params(key, TINY), flax_keys(key))


@pytest.fixture
def used(monkeypatch):
  """The keys that the pre-training loss gives to the masking and to every attention."""
  draws = {'masks': [], 'drops': [], 'rates': [], 'dense': 0}

  def scheme(keys, *, num_tokens, mask_ratio):
    draws['masks'].append(keys)
    return masking.random_masking(keys, num_tokens=num_tokens, mask_ratio=mask_ratio)

  def asad_attention(query, key, value, *, draw_keys, drop_rate):
    draws['drops'].append(draw_keys)
    draws['rates'].append(drop_rate)
    return attention.dense_attention(query, key, value)

  def dense_attention(query, key, value):
    draws['dense'] += 1
    return attention.dense_attention(query, key, value)

  monkeypatch.setitem(masking.MASKING_SCHEMES, 'random', scheme)
  model = initial_model(TINY)
  frames = jax.random.normal(jax.random.key(1), (BATCH, 2, 16, 16, 3))
  masking_keys, asad_keys = jax.random.split(jax.random.key(2), (2, BATCH))

  @jax.jit
  def keys_used(frames, masking_keys, asad_keys):
    mae.pretraining_loss(
      model, frames, masking_keys=masking_keys, asad_keys=asad_keys,
      objective=Objective(attention_dropout=0.3),
      implementations=attention.Implementations(dense_attention, asad_attention),
    )  # fmt: skip
    return draws['masks'], draws['drops']

  masks, drops = keys_used(frames, masking_keys, asad_keys)
  draws |= {'masks': words(jnp.concatenate(masks)), 'drops': [words(keys) for keys in drops]}
  return draws, masking_keys, asad_keys


def test_masks_have_their_keys_and_every_decoder_block_its_own(used):
  draws, masking_keys, asad_keys = used
  assert draws['masks'] == words(masking_keys)
  assert draws['rates'] == [0.3] * TINY.decoder_depth
  assert draws['dense'] == TINY.depth
  by_block = [
    words(jax.vmap(lambda key, n=n: jax.random.fold_in(key, n))(asad_keys))
    for n in range(TINY.decoder_depth)
  ]
  assert draws['drops'] == by_block


def test_the_loss_drops_by_the_rule_of_its_objective(monkeypatch):
  rates = []

  def rule(keys, logits, *, drop_rate):
    rates.append(drop_rate)
    return jnp.zeros(logits.own.shape, bool)

  monkeypatch.setitem(asad.ATTENTION_DROPOUTS, 'mine', rule)
  keys = jax.random.split(jax.random.key(2), BATCH)
  loss = partial(
    mae.pretraining_loss, initial_model(TINY), masking_keys=keys, asad_keys=keys,
    objective=Objective(attention_dropout=0.3, dropout_rule='mine'),
  )  # fmt: skip
  jax.eval_shape(loss, jnp.zeros((BATCH, 2, 16, 16, 3)))
  assert rates == [0.3] * TINY.decoder_depth
