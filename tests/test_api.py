"""The encoder as notebooks use it."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dropmae_jax.api import load_encoder
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.model import mae, patches, pixels, position_embedding
from dropmae_jax.model.masking import Masking
from dropmae_jax.pytorch import convert, layouts, weight_files
from dropmae_jax.runtime.errors import UserError


@pytest.fixture(scope='module')
def encoder(trained):
  return load_encoder(trained)


@pytest.fixture(scope='module')
def pair():
  return np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), np.uint8)


def test_a_pair_is_encoded_jointly(encoder, trained, pair):
  weights = saved_weights.load_weights(trained)
  graphdef, _ = mae.abstract_model(weights.architecture)
  images = [Image.fromarray(frame).resize((32, 32), Image.Resampling.BICUBIC) for frame in pair]
  vectors = patches.patchify(pixels.normalise(jnp.asarray(np.stack(images)))[None], 8)
  all_tokens = jnp.arange(32)[None]
  model = nnx.merge(graphdef, weights.params)
  expected = model.encode(vectors, Masking(all_tokens, all_tokens[:, :0]))
  features = encoder.encode(pair)
  assert features.dtype == np.float32
  np.testing.assert_allclose(features, expected.reshape(2, 4, 4, 64), atol=1e-4)
  other = encoder.encode(np.stack([pair[0], 255 - pair[1]]))
  assert np.abs(other[0] - features[0]).max() > 1e-3


def test_an_address_is_refused():
  with pytest.raises(UserError, match=r'gs:/bucket/run names no bucket; give'):
    load_encoder('gs:/bucket/run')


def test_a_frame_alone_has_no_identity(encoder, pair):
  features = encoder.encode(pair[0])
  assert features.shape == (4, 4, 64)
  zeros = {name: np.zeros((1, 1, 64)) for name in ('temporal_pos_embed_x', 'temporal_pos_embed_z')}
  anonymous = type(encoder)(encoder.params | zeros, encoder.architecture)
  np.testing.assert_allclose(anonymous.encode(pair[0]), features, atol=1e-6)
  assert np.abs(features - encoder.encode(pair)[0]).max() > 1e-3


def test_another_size_resamples_the_positions(encoder, pair):
  features = encoder.encode(pair, size=48)
  assert features.shape == (2, 6, 6, 64)
  table = position_embedding.resample_table(np.asarray(encoder.params['pos_embed']), 6)
  architecture = type(encoder.architecture)(**{**vars(encoder.architecture), 'image_size': 48})
  resampled = type(encoder)(encoder.params | {'pos_embed': table}, architecture)
  np.testing.assert_allclose(resampled.encode(pair), features, atol=1e-5)


def test_a_file_gives_what_its_checkpoint_does(encoder, trained, pair, tmp_path):
  path = tmp_path / 'encoder.safetensors'
  options = convert.ExportOptions(layout='encoder', verify=False, image_size=32)
  list(convert.export(trained, path, options))
  np.testing.assert_allclose(load_encoder(path).encode(pair), encoder.encode(pair), atol=1e-6)


def test_a_step_of_a_workdir_in_the_home_folder_is_chosen(encoder, trained, monkeypatch):
  monkeypatch.setenv('HOME', str(trained.parent))
  earlier = load_encoder(f'~/{trained.name}', step=4)
  expected = saved_weights.load_weights(trained, step=4).params['mask_token']
  np.testing.assert_array_equal(earlier.params['mask_token'], expected)
  assert (encoder.params['mask_token'] != expected).any()


def test_what_cannot_be_encoded_is_said(encoder, pair, tmp_path):
  for frames, options, message in (
    (pair.astype(np.float32), {}, r'frames are float32 \[2, 40, 50, 3\]; give uint8'),
    (np.concatenate([pair, pair]), {}, r'frames are uint8 \[4, 40'),
    (pair, {'size': 50}, 'size=50 does not fit: image_size=50 is not a multiple of patch_size=8'),
  ):
    with pytest.raises(UserError, match=message):
      encoder.encode(frames, **options)
  with pytest.raises(UserError, match='holds no checkpoint'):
    load_encoder(tmp_path)
  path = tmp_path / 'encoder.safetensors'
  with pytest.raises(UserError, match='is not a file'):
    load_encoder(path)
  state = layouts.to_torch(encoder.params, encoder.architecture)
  weight_files.write(path, state, file_format='safetensors')
  with pytest.raises(UserError, match=r'step=4 goes with a workdir, and .* is none; leave it out'):
    load_encoder(path, step=4)
  state['norm.bias'] = np.full_like(state['norm.bias'], np.nan)
  weight_files.write(path, state, file_format='safetensors')
  with pytest.raises(UserError, match=r'norm\.bias'):
    load_encoder(path)
