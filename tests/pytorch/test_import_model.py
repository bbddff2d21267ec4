"""Import of every kind of file: which tensors are taken, dropped and initialised."""

import dataclasses

import numpy as np
import pytest
from test_layouts import TINY, random_state

from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.pytorch import import_model, layouts
from dropmae_jax.pytorch.weight_files import WeightFile
from dropmae_jax.runtime.errors import UserError

# Published decoder heads, so that shapes tell all.
ARCHITECTURE = dataclasses.replace(TINY, decoder_num_heads=16)
FULL = random_state(ARCHITECTURE)
ENCODER = layouts.in_layout(FULL, 'encoder')
IDENTITIES = ['temporal_pos_embed_x', 'temporal_pos_embed_z']
DECODER = [name for name in FULL if layouts.is_of_decoder(name)]
CLASS_TOKEN = {'cls_token': np.ones((1, 1, 64), np.float32)}


def without(state, names):
  return {name: array for name, array in state.items() if name not in names}


def read(tensors, key='model', size=None, **entries):
  return import_model.read_model(WeightFile(key, tensors, entries), size=size)


MAE_FULL = CLASS_TOKEN | without(
  FULL, {*IDENTITIES, 'decoder_temporal_pos_embed_x', 'decoder_temporal_pos_embed_z'}
)
TRACKER = {
  **{f'backbone.{name}': array for name, array in (ENCODER | CLASS_TOKEN).items()},
  'backbone.pos_embed_z': np.zeros((1, 4, 64), np.float32),
  'backbone.pos_embed_x': np.zeros((1, 9, 64), np.float32),
  'box_head.conv1.weight': np.zeros((3, 3), np.float32),
  'box_head.conv1.num_batches': np.zeros((), np.int64),
}


@pytest.mark.parametrize(
  ('tensors', 'fresh', 'dropped'),
  [
    (FULL, [], None),
    (ENCODER, DECODER, None),
    (layouts.in_layout(FULL, 'mae'), DECODER, '1 tensors: cls_token'),
    (MAE_FULL, [n for n in FULL if 'temporal' in n], '1 tensors: cls_token'),
    (CLASS_TOKEN | without(ENCODER, IDENTITIES), IDENTITIES + DECODER, '1 tensors: cls_token'),
    (
      TRACKER,
      DECODER,
      '5 tensors: box_head.* (2), cls_token, pos_embed_z, pos_embed_x',
    ),
    (without(ENCODER, IDENTITIES) | {'head.bias': np.zeros(3)}, IDENTITIES + DECODER, 'head.bias'),
    (layouts.in_layout(FULL, 'timm'), IDENTITIES + DECODER, None),
    # What DropTrack leaves of a full file.
    (ENCODER | {'mask_token': FULL['mask_token']}, DECODER, '1 tensors: mask_token'),
  ],
  ids=['full', 'encoder', 'mae', 'mae_full', 'mae_encoder', 'tracker', 'vit', 'timm', 'mask_token'],
)
def test_files_of_the_field_are_completed(tensors, fresh, dropped):
  model = read(tensors)
  # A file without a decoder gets that of its size.
  has_decoder = not set(fresh) >= set(DECODER)
  decoder = {} if has_decoder else {'decoder_width': 64, 'decoder_depth': 2, 'decoder_num_heads': 2}
  assert model.architecture == dataclasses.replace(ARCHITECTURE, **decoder)
  if has_decoder:
    assert sorted(model.fresh) == sorted(fresh)
  else:
    made = {name for name in model.fresh if not layouts.is_of_decoder(name)}
    assert made == set(fresh) - set(DECODER)
    assert set(DECODER) <= set(model.fresh)
  shapes = {name: array.shape for name, array in model.state.items()}
  assert list(shapes.items()) == list(layouts.tensor_shapes(model.architecture).items())
  for name, array in model.state.items():
    assert array.dtype == np.float32
    if name == 'pos_embed' and tensors.get(name, FULL[name]).shape != FULL[name].shape:
      assert not array[:, 0].any()
      np.testing.assert_array_equal(array[:, 1:], FULL[name][:, 1:])
    elif name not in model.fresh:
      np.testing.assert_array_equal(array, FULL[name])
  text = '\n'.join([*model.report, *model.changes])
  assert f'taken: {len(FULL) - len([n for n in FULL if n in fresh])} tensors' in text
  assert (dropped in text) if dropped else ('dropped' not in text)
  assert ('DropMAE has no class token' in text) == any('cls_token' in name for name in tensors)
  assert ('initialised (seed 0)' in text) == bool(fresh)


@pytest.mark.parametrize(
  'prefix', ['module.', '_orig_mod.', 'model.', 'module.backbone.', 'model.backbone._orig_mod.']
)
def test_what_wraps_a_model_is_taken_off_its_names_and_said(prefix):
  wrapped = {f'{prefix}{name}': array for name, array in FULL.items()}
  model = read(wrapped | {'module.head.bias': np.zeros(3)}, 'net', model_ema={}, epoch=3)
  for name, array in FULL.items():
    np.testing.assert_array_equal(model.state[name], array)
  assert model.report[:3] == [
    "found under 'net'",
    "not taken, though it may hold weights too: 'model_ema'",
    f'prefix {prefix!r}: removed from the names',
  ]
  assert model.changes[-1].startswith('dropped: 1 tensors: ')


def test_objects_that_were_not_read_are_named():
  file = WeightFile('net', FULL, {}, objects=('lib.Settings', 'a\x1b[0m'))
  told = "not read, and nothing of them is run: Python objects, 'lib.Settings', 'a\\x1b[0m'"
  assert told in import_model.read_model(file).report


def test_fresh_tensors_follow_the_published_rules_and_the_seed():
  first, second = (read(ENCODER).state for _ in range(2))
  for name, array in first.items():
    np.testing.assert_array_equal(array, second[name])
  assert abs(first['mask_token'].std() - 0.02) < 0.002
  assert abs(first['decoder_temporal_pos_embed_x'].std() - 1) < 0.1
  assert not first['decoder_blocks.0.attn.qkv.bias'].any()


def test_half_precision_is_converted_and_said():
  half = {name: array.astype(np.float16) for name, array in FULL.items()}
  model = read(half)
  assert f'converted to float32: {len(FULL)} of float16' in model.report
  np.testing.assert_array_equal(model.state['norm.bias'], half['norm.bias'].astype(np.float32))


def test_what_a_file_says_of_itself_comes_before_its_shapes():
  stored = dataclasses.asdict(dataclasses.replace(ARCHITECTURE, num_heads=4))
  assert read(FULL, args={'architecture': stored}).architecture.num_heads == 4
  assert read(FULL).architecture.num_heads == 2
  with pytest.raises(UserError, match=r"'tokens' in its architecture, which has no such field"):
    read(FULL, args={'architecture': stored | {'tokens': 3}})


@pytest.mark.parametrize('size', ['S', 'B', 'L', pytest.param('H', marks=pytest.mark.slow)])
def test_architectures_are_read_off_the_shapes(size):
  architecture = architecture_of_size(size)
  zero = np.zeros((), np.float32)
  shapes = layouts.tensor_shapes(architecture)
  state = {name: np.broadcast_to(zero, shape) for name, shape in shapes.items()}
  for given in (None, size):
    assert import_model._architecture(state, given) == architecture


@pytest.mark.parametrize('dtype', ['int8', 'int64', 'bool', 'complex64'])
def test_what_is_no_floating_point_is_no_weight(dtype):
  with pytest.raises(UserError) as caught:
    read(FULL | {'norm.bias': FULL['norm.bias'].astype(dtype)})
  assert f'but norm.bias is {dtype} (1 such tensors in all); give the file from before' in str(
    caught.value
  )
  # What is dropped may be of any type.
  read(FULL | {'cls_token': np.ones((1, 1, 64), dtype)})


def test_what_float32_cannot_hold_becomes_infinite_without_a_word(recwarn):
  state = read(FULL | {'norm.bias': np.full(64, 1e300)}).state
  assert np.isinf(state['norm.bias']).all()
  assert not recwarn.list


@pytest.mark.parametrize(
  ('tensors', 'size', 'message'),
  [
    (without(FULL, ['norm.bias']), None, 'norm.bias is missing'),
    (without(FULL, ['decoder_norm.bias']), None, 'decoder_norm.bias is missing'),
    (FULL | {'blocks.0.ls1.gamma': np.ones(64)}, None, 'blocks.0.ls1.gamma is not part of this'),
    (FULL | {'norm_pre.weight': np.ones(64)}, None, 'norm_pre.weight is not part of this model'),
    (
      {name.replace('blocks.1.', 'blocks.2.'): array for name, array in FULL.items()} | FULL,
      'XXS',
      'blocks.2.norm1.weight is not part of this model',
    ),
    (FULL | {'decoder_embed.weight': np.zeros(())}, None, 'is missing or has a wrong shape'),
    # Without numbers.
    (FULL | {'pos_embed': np.zeros((1, 0, 64))}, None, "('pos_embed' is missing"),
    (FULL | {'patch_embed.proj.weight': np.zeros((0, 3, 8, 8))}, None, 'patch_embed.proj.weight'),
    (FULL | {'blocks.0.mlp.fc1.weight': np.zeros((0, 64))}, None, 'blocks.0.mlp.fc1.weight'),
    (FULL, 'Q', '--model=Q is not in the size table; choose one of XXS, XS, S, B, L, H'),
    (FULL, 'XS', 'temporal_pos_embed_x is (1, 1, 64) and not (1, 1, 96)'),
    (
      without(FULL, ['pos_embed']),
      None,
      "does not hold a vision transformer ('pos_embed' is missing",
    ),
    ({'conv1.weight': np.zeros((3, 3))}, None, 'it holds 1 tensors: conv1.weight'),
    (
      FULL | {'patch_embed.proj.weight': np.zeros((72, 3, 8, 8))},
      None,
      'no row of the size table has width 72 (widths are XXS: 64, XS: 96',
    ),
    (
      FULL | {'pos_embed': np.zeros((1, 18, 64)), 'decoder_pos_embed': np.zeros((1, 18, 32))},
      None,
      'pos_embed is (1, 18, 64) and not (1, 17, 64)',
    ),
  ],
)
def test_what_fits_no_model_is_refused(tensors, size, message):
  with pytest.raises(UserError) as caught:
    read(tensors, size=size)
  assert message in str(caught.value)


def test_a_decoder_that_a_file_says_and_does_not_have_takes_no_memory():
  stored = dataclasses.asdict(ARCHITECTURE) | {'decoder_width': 16384, 'decoder_num_heads': 1}
  with pytest.raises(
    UserError, match=r'does not have \d{10} numbers of it, in 22 tensors: mask_tok'
  ):
    read(ENCODER, args={'architecture': stored})
