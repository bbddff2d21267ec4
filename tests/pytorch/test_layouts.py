"""State dicts: key lists of every layout, round trips, resolutions."""

import json

import jax
import numpy as np
import pytest
from conftest import GOLDEN, run_python

from dropmae_jax.model import mae, position_embedding
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.pytorch import layouts
from dropmae_jax.runtime.errors import UserError

TINY = architecture_of_size(
  'XXS', image_size=32, decoder_width=32, decoder_depth=1, decoder_num_heads=2
)
PUBLISHED = {
  row['name']: tuple(row['shape'])
  for row in json.loads((GOLDEN / 'vit_b_state_dict.json').read_text())
}


def random_state(architecture, seed=0):
  rng = np.random.default_rng(seed)
  return {
    name: rng.random(shape, np.float32)
    for name, shape in layouts.tensor_shapes(architecture).items()
  }


def published_layout(layout):
  """The tensors of a layout of ViT-B, spelled out from the published list."""
  if layout == 'full':
    return PUBLISHED
  encoder = {
    name: shape
    for name, shape in PUBLISHED.items()
    if not name.startswith('decoder_') and name != 'mask_token'
  }
  if layout == 'mae':
    return encoder | {'cls_token': (1, 1, 768)}
  if layout == 'timm':
    timm = encoder | {'pos_embed': (1, 196, 768)}
    del timm['temporal_pos_embed_x'], timm['temporal_pos_embed_z']
    return timm
  return encoder


@pytest.mark.parametrize(
  ('layout', 'count'), [('full', 257), ('encoder', 151), ('mae', 152), ('timm', 149)]
)
def test_vit_b_has_the_published_names_and_shapes(layout, count):
  shapes = layouts.tensor_shapes(architecture_of_size('B'), layout)
  assert shapes == published_layout(layout)
  assert len(shapes) == count


def test_vit_b_has_the_published_order():
  assert list(layouts.tensor_shapes(architecture_of_size('B'))) == list(PUBLISHED)


@pytest.mark.parametrize(('size', 'count'), [('S', 257), ('L', 401), ('H', 497)])
def test_other_sizes_have_as_many_tensors_as_published(size, count):
  assert len(layouts.tensors(architecture_of_size(size))) == count


@pytest.mark.parametrize(
  'size', ['XXS', 'XS', 'S', *(pytest.param(size, marks=pytest.mark.slow) for size in 'BLH')]
)
def test_round_trip_is_bit_identical(size):
  architecture = architecture_of_size(size)
  state = random_state(architecture)
  back = layouts.to_torch(layouts.from_torch(state, architecture), architecture)
  assert list(back) == list(state)
  for name, array in state.items():
    np.testing.assert_array_equal(back[name], array)
    assert back[name].flags.c_contiguous
    assert back[name].base is None


def test_layouts_hold_the_same_values():
  state = random_state(TINY)
  for layout in layouts.LAYOUTS:
    for name, array in layouts.in_layout(state, layout).items():
      if name == 'cls_token':
        assert not array.any()
      elif (layout, name) == ('timm', 'pos_embed'):
        np.testing.assert_array_equal(array, state[name][:, 1:])
        assert array.flags.c_contiguous
      else:
        np.testing.assert_array_equal(array, state[name])
  with pytest.raises(UserError, match="layout='onnx' is unknown; valid are: encoder, full"):
    layouts.in_layout(state, 'onnx')


def test_another_resolution_is_written_with_the_published_tables():
  trained = architecture_of_size('S', image_size=256, depth=1, decoder_depth=1)
  published = architecture_of_size('S', depth=1, decoder_depth=1)
  params = mae.init_params(jax.random.key(0), trained)
  state = layouts.to_torch(params, trained)
  changed, architecture = layouts.at_published_resolution(state, trained)
  assert architecture == published
  shapes = {name: array.shape for name, array in changed.items()}
  assert shapes == layouts.tensor_shapes(published)
  np.testing.assert_array_equal(changed['pos_embed'], position_embedding.sincos_table(14, 384))
  np.testing.assert_array_equal(changed['norm.weight'], params['norm']['scale'])


def test_learned_tables_are_resampled_only_where_asked():
  trained = architecture_of_size('S', image_size=256, depth=1, decoder_depth=1)
  state = random_state(trained)
  with pytest.raises(UserError, match=r'not the sine-cosine table.*add --image_size=224'):
    layouts.at_published_resolution(state, trained)
  changed, architecture = layouts.at_resolution(state, trained, 224)
  assert architecture == architecture_of_size('S', depth=1, decoder_depth=1)
  expected = position_embedding.resample_table(state['pos_embed'], 14)
  np.testing.assert_array_equal(changed['pos_embed'], expected)


def test_another_architecture_is_refused_with_the_first_three_mismatches():
  state = random_state(TINY)
  del state['norm.bias']
  state['cls_token'] = np.zeros((1, 1, 64), np.float32)
  state['decoder_pred.bias'] = np.zeros(7, np.float32)
  state['head.bias'] = np.zeros(7, np.float32)
  with pytest.raises(UserError) as caught:
    layouts.from_torch(state, TINY)
  message = str(caught.value)
  for part in ('norm.bias is missing', 'decoder_pred.bias is (7,) and not (192,)', 'cls_token is'):
    assert part in message
  assert 'head.bias' not in message
  assert '4 mismatches in all' in message


def test_training_does_not_import_torch():
  program = (
    'import sys, dropmae_jax.train, dropmae_jax.evaluation.reconstruction,'
    ' dropmae_jax.pytorch.convert; print("torch" in sys.modules)'
  )
  assert run_python('-c', program).stdout.strip() == 'False'
