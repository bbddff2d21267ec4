"""Features for evaluations: recorded numbers, and what the readouts stand for."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from dropmae_jax.config import Architecture
from dropmae_jax.evaluation import features, label_propagation, readouts
from dropmae_jax.evaluation.datasets import measures
from dropmae_jax.evaluation.features import Encoder
from dropmae_jax.evaluation.protocols import PROTOCOLS, Geometry
from dropmae_jax.evaluation.readouts import Readout
from dropmae_jax.model import mae, patches, position_embedding
from dropmae_jax.model.attention import dense_attention
from dropmae_jax.model.masking import Masking
from dropmae_jax.pytorch import import_model, layouts, weight_files
from dropmae_jax.runtime.errors import UserError

GOLDEN = ROOT / 'tests' / 'golden' / 'evaluation'
TINY = Architecture(
  width=32, depth=2, num_heads=4, patch_size=16, image_size=224,
  decoder_width=32, decoder_depth=1, decoder_num_heads=2,
)  # fmt: skip
GEOMETRY = Geometry(pixels=(96, 160), grid=(6, 10))


def test_position_tables_are_those_of_the_published_evaluators():
  golden = np.load(GOLDEN / 'position_tables.npz')
  for name in ('random', 'sincos'):
    table = golden[f'{name}/table']
    for grid in ((30, 55), (28, 55), (20, 20), (30, 52), (6, 10), (14, 14)):
      resampled = position_embedding.interpolate_table(table, grid)
      expected = golden[f'{name}/{grid[0]}x{grid[1]}']
      np.testing.assert_allclose(resampled[0, 1:].reshape(expected.shape), expected, atol=1e-5)
      np.testing.assert_array_equal(resampled[:, 0], table[:, 0])


@pytest.fixture(scope='module')
def tiny_file(tmp_path_factory):
  """The recorded encoder as a file; it has a class token and no decoder."""
  golden = np.load(GOLDEN / 'end_to_end_state.npz')
  path = tmp_path_factory.mktemp('tiny') / 'tiny.safetensors'
  entries = {'args': {'architecture': dataclasses.asdict(TINY)}}
  tensors = {name: golden[name].astype(np.float32) for name in golden.files}
  weight_files.write(path, tensors, file_format='safetensors', entries=entries)
  return path


@pytest.mark.parametrize('run', ['default', 'n2_r3_k3', 'default_no_class_token'])
def test_a_clip_through_everything_is_as_recorded(tiny_file, run):
  golden = np.load(GOLDEN / 'end_to_end.npz')
  frames, truth = golden['frames'], golden['labels']
  encoder = features.load(tiny_file, class_token='none' if 'no_class' in run else 'file')
  assert (encoder.class_token is None) == ('no_class' in run)
  protocol = PROTOCOLS['cropmae']
  propagation = protocol.propagation
  if run == 'n2_r3_k3':
    propagation = dataclasses.replace(propagation, num_previous=2, radius=3, top_k=3)

  def read(number):
    return protocol.network_input(frames[number], GEOMETRY.pixels)

  np.testing.assert_allclose(
    np.moveaxis(read(0)[28:44], -1, 0), golden['network_input_frame0_rows'], atol=1e-6
  )
  params = features.at_grid(encoder, GEOMETRY.grid)
  expected = golden[f'{"default" if run == "n2_r3_k3" else run}/features']
  inputs = np.stack([read(number) for number in range(len(expected))])
  encoded = features.encode_frames(params, inputs, architecture=encoder.architecture)
  np.testing.assert_allclose(encoded.reshape(expected.shape), expected, atol=2e-5)

  labels, ids = protocol.encode(truth[0], GEOMETRY)
  np.testing.assert_allclose(labels, golden['first_label_soft'], atol=1e-6)
  affinities = readouts.model_affinities(
    encoder, Readout(), propagation, [], read, len(frames), GEOMETRY.grid
  )
  soft = list(label_propagation.propagate(affinities, len(frames), labels, propagation))
  np.testing.assert_allclose(soft, golden[f'{run}/soft'], atol=2e-6)
  size = truth.shape[1:]
  decode = protocol.decode
  predicted = np.stack([decode(each, ids, GEOMETRY, size, 'davis') for each in soft])
  assert (predicted != golden[f'{run}/found']).sum() <= golden[f'{run}/unsure_pixels']
  scored = measures.object_measures(list(truth), list(predicted))
  # A pixel that may be of either class moves a measure by less than this.
  tolerance = 1e-12 + 1e-2 * (predicted != golden[f'{run}/found']).sum()
  per_object = {}
  for name, values in (('J', scored.region), ('F', scored.boundary)):
    statistics = per_object[name] = [measures.statistics(each) for each in values]
    np.testing.assert_allclose(statistics, golden[f'{run}/{name}_per_object'], atol=tolerance)
  summary = measures.summarise_objects(np.array(per_object['J']), np.array(per_object['F']))
  np.testing.assert_allclose(summary['J&F'], golden[f'{run}/J_and_F'], rtol=0, atol=tolerance)


SMALL = Architecture(
  width=32, depth=2, num_heads=2, patch_size=8, image_size=32,
  decoder_width=32, decoder_depth=2, decoder_num_heads=2,
)  # fmt: skip
SIZE = (16, 24)


@pytest.fixture(scope='module')
def encoder():
  params = mae.init_params(jax.random.key(0), SMALL)
  source = {'path': 'random'}
  return Encoder(
    params, SMALL, None, has_identities=True, has_decoder=True, tensors=[], unused=[], source=source
  )


@pytest.fixture(scope='module')
def frames():
  return np.random.default_rng(0).normal(size=(5, *SIZE, 3)).astype(np.float32)


def propagate(encoder, frames, *, statistics=None, **readout):
  labels = np.random.default_rng(1).random((2, 3, 3)).astype(np.float32)
  propagation = dataclasses.replace(PROTOCOLS['cropmae'].propagation, num_previous=2, top_k=3)
  affinities = readouts.model_affinities(
    encoder, Readout(**readout), propagation, [] if statistics is None else statistics,
    lambda number: frames[number], len(frames), (2, 3),
  )  # fmt: skip
  return np.stack(list(label_propagation.propagate(affinities, len(frames), labels, propagation)))


def test_a_pair_is_encoded_and_decoded_as_in_training(encoder):
  """Against the model's own functions, which only take square frames."""
  pair = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  params = features.at_grid(encoder, (4, 4))
  model = nnx.merge(mae.abstract_model(SMALL)[0], encoder.params)
  everything = jnp.arange(32)[None]
  masked = Masking(visible=everything, masked=everything[:, :0])
  latents = model.encode(patches.patchify(jnp.asarray(pair)[None], 8), masked)
  ours = features.encode_pair(params, pair, architecture=SMALL)
  np.testing.assert_allclose(ours.reshape(latents.shape), latents, atol=1e-5)
  shares = []

  def attend(query, key, value):
    logits = jnp.einsum('bime,bjme->bmij', query, key) * query.shape[-1] ** -0.5
    shares.append(jax.nn.softmax(logits).mean(axis=1)[0])
    return dense_attention(query, key, value)

  model.decode(latents, masked, [attend, attend])
  for block in range(2):
    attention = features.decoder_attention(params, pair, architecture=SMALL, block=block)
    np.testing.assert_allclose(attention, shares[block][16:, :16], atol=1e-6)


def test_identities_and_blocks_change_what_is_encoded(encoder, frames):
  params = features.at_grid(encoder, (2, 3))
  encode = functools.partial(features.encode_frames, params, frames[:1], architecture=SMALL)
  variants = [encode(), encode(identity='x'), encode(identity='z'), encode(num_blocks=1)]
  for first, second in itertools.combinations(variants, 2):
    assert np.abs(first - second).max() > 1e-3
  np.testing.assert_array_equal(encode(num_blocks=2), variants[0])


def test_roles_encode_earlier_frames_as_x_and_later_ones_as_z(encoder, frames):
  """With equal identities they are the readout of single frames with that identity."""
  equal = encoder.params | {'temporal_pos_embed_z': encoder.params['temporal_pos_embed_x']}
  same = dataclasses.replace(encoder, params=equal)
  np.testing.assert_array_equal(
    propagate(same, frames, kind='roles'), propagate(encoder, frames, identity='x')
  )
  assert np.abs(
    propagate(encoder, frames, kind='roles') - propagate(encoder, frames, identity='x')
  ).max() > 1e-3  # fmt: skip


def test_centring_takes_away_what_all_tokens_have_in_common(encoder, frames):
  """Features of the last block are moved by the bias of the norm; centred ones are not."""
  moved = encoder.params | {'norm': encoder.params['norm'] | {'bias': 5 * jnp.arange(32.0)}}
  moved = dataclasses.replace(encoder, params=moved)
  for readout in ({}, {'kind': 'joint'}):
    plain = [propagate(each, frames, **readout) for each in (encoder, moved)]
    centred = [propagate(each, frames, is_centred=True, **readout) for each in (encoder, moved)]
    assert np.abs(plain[0] - plain[1]).max() > 1e-3
    np.testing.assert_allclose(*centred, atol=1e-4)


def test_attention_is_read_out_with_its_own_values_as_weights(encoder, frames):
  """The second frame of a clip looks only at the first: its labels are computed here by hand."""
  statistics = []
  propagated = propagate(encoder, frames[:2], kind='attention', statistics=statistics)
  params = features.at_grid(encoder, (2, 3))
  shares = features.decoder_attention(params, frames[:2], architecture=SMALL, block=1)
  # Three entries of the context, all of them the first frame; k = 3 takes the favourite thrice.
  favourites = np.asarray(shares).argmax(axis=1)
  np.testing.assert_allclose(
    propagated[1].reshape(6, 3), propagated[0].reshape(6, 3)[favourites], atol=1e-5
  )
  (pair,) = statistics
  assert pair.crossing == pytest.approx(float(shares.sum(axis=1).mean()), abs=1e-6)
  assert pair.favourites == pytest.approx(len(set(favourites)) / 6)
  assert pair.own_place == pytest.approx((favourites == np.arange(6)).mean())


@pytest.mark.parametrize(
  ('readout', 'change', 'message'),
  [
    ({'kind': 'joined'}, {}, "--readout='joined' is unknown; did you mean 'joint'"),
    ({'identity': 'x'}, {'has_identities': False}, '--identity=x needs the identities'),
    ({'kind': 'roles'}, {'has_identities': False}, '--readout=roles needs the identities'),
    ({'kind': 'roles', 'identity': 'x'}, {}, '--identity=x goes with --readout=single'),
    ({'kind': 'joint'}, {'class_token': np.zeros(32)}, 'add --class_token=none'),
    ({'kind': 'attention'}, {'has_decoder': False}, 'needs a decoder, and random has none'),
    ({'block': 3}, {}, '--block=3 is not in 1..2'),
  ],
)
def test_readouts_that_a_model_does_not_have_are_refused(encoder, readout, change, message):
  with pytest.raises(UserError) as error:
    Readout(**readout).check(dataclasses.replace(encoder, **change))
  assert message in str(error.value)


@pytest.mark.parametrize('kind', ['siamese', 'dropmae'])
def test_a_decoder_of_another_method_is_not_used(tmp_path, encoder, kind):
  """SiamMAE's, CropMAE's and RSP's blocks have cross-attention beside self-attention."""
  state = layouts.to_torch(encoder.params, SMALL)
  if kind == 'siamese':
    # A width that our decoder could not have, as its heads do not divide it.
    state['decoder_embed.weight'] = np.zeros((33, 32), np.float32)
    state['decoder_blocks.0.cross_attn.q.weight'] = np.zeros((32, 32), np.float32)
  state['cls_token'] = np.ones((1, 1, 32), np.float32)
  state['extra.weight'] = np.ones(3, np.float32)
  path = tmp_path / 'weights.safetensors'
  entries = {'args': {'architecture': dataclasses.asdict(SMALL)}}
  weight_files.write(path, state, file_format='safetensors', entries=entries)
  loaded = features.load(path)
  assert loaded.has_decoder == (kind == 'dropmae')
  assert loaded.has_identities
  np.testing.assert_array_equal(loaded.class_token, np.ones(32))
  decoder = {name for name in state if layouts.is_of_decoder(name)}
  assert set(loaded.unused) == {'extra.weight'} | (decoder if kind == 'siamese' else set())
  assert features.load(path, class_token='none').class_token is None
  assert 'cls_token' in features.load(path, class_token='none').unused
  zero = features.load(path, class_token='zero')
  assert not zero.class_token.any()
  assert 'cls_token' in zero.unused
  if kind == 'siamese':
    with pytest.raises(UserError, match='cross_attn'):
      import_model.read_model(weight_files.read(path))
