"""The PyTorch network equals the JAX one, and verification finds planted faults."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layouts import TINY

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Objective
from dropmae_jax.model import mae, vit
from dropmae_jax.pytorch import convert, layouts
from dropmae_jax.runtime.errors import UserError

reference = pytest.importorskip('dropmae_jax.pytorch.reference', reason='PyTorch is not installed')


@pytest.fixture(scope='module')
def params():
  drawn = mae.init_params(jax.random.key(0), TINY)
  return jax.tree.map(np.asarray, drawn)


@pytest.mark.parametrize('layout', layouts.LAYOUTS)
def test_the_two_networks_agree(params, layout):
  state = layouts.in_layout(layouts.to_torch(params, TINY), layout)
  difference = reference.largest_difference(state, params, TINY)
  assert 0 < difference < reference.TOLERANCE / 4


def test_the_images_are_fixed_and_differ():
  first, second = reference.fixed_images(32), reference.fixed_images(32)
  np.testing.assert_array_equal(first, second)
  assert first.shape == (2, 32, 32, 3)
  assert np.abs(first[0] - first[1]).mean() > 0.3
  assert 0.5 < first.std() < 2


def reorder_qkv(state):
  for name in state:
    if 'attn.qkv' in name:
      query, key, value = np.split(state[name], 3)
      state[name] = np.concatenate([key, query, value])


def interleave_heads(state):
  """[q | k | v] inside each head rather than heads inside q, k and v."""
  for name in state:
    if name.startswith('blocks') and 'attn.qkv' in name:
      array = state[name]
      split = array.reshape(3, TINY.num_heads, -1, *array.shape[1:])
      state[name] = np.ascontiguousarray(split.swapaxes(0, 1)).reshape(array.shape)


def transpose_square(state):
  for name in ('blocks.0.attn.proj.weight', 'decoder_blocks.0.attn.proj.weight'):
    state[name] = np.ascontiguousarray(state[name].T)


def transpose_square_of_decoder(state):
  name = 'decoder_blocks.0.attn.proj.weight'
  state[name] = np.ascontiguousarray(state[name].T)


def swap_frames(state):
  x, z = 'temporal_pos_embed_x', 'temporal_pos_embed_z'
  state[x], state[z] = state[z], state[x]


def swap_frames_of_decoder(state):
  x, z = 'decoder_temporal_pos_embed_x', 'decoder_temporal_pos_embed_z'
  state[x], state[z] = state[z], state[x]


def swap_colours(state):
  name = 'patch_embed.proj.weight'
  state[name] = np.ascontiguousarray(state[name][:, ::-1])


def shift_positions(state):
  state['pos_embed'] = np.roll(state['pos_embed'], 1, axis=1)


def lose_decoder(state):
  for name in list(state):
    if layouts.is_of_decoder(name):
      del state[name]


def lose_mask_token(state):
  state['mask_token'] = np.zeros_like(state['mask_token'])


FAULTS = {
  reorder_qkv: 'differ by',
  interleave_heads: 'differ by',
  transpose_square: 'differ by',
  transpose_square_of_decoder: 'differ by',
  swap_frames: 'differ by',
  swap_frames_of_decoder: 'differ by',
  swap_colours: 'differ by',
  shift_positions: 'differ by',
  lose_mask_token: 'differ by',
  lose_decoder: 'mask_token is missing',
}


@pytest.fixture(scope='module')
def run(params, tmp_path_factory):
  """The parameters as a checkpoint of 32 pixels."""
  folder = tmp_path_factory.mktemp('run') / 'run'
  saved_weights.save_weights(folder, params, 1, saved_weights.describe(TINY, Objective()))
  return folder


# Large logits amplify rounding, and they grow with width and depth.
WIDE = dataclasses.replace(TINY, width=384, num_heads=6, depth=12)


def normal_weights():
  """Weights that training does not produce: they amplify float32 rounding a thousand times."""
  rng = np.random.default_rng(0)
  shapes = layouts.tensor_shapes(WIDE)
  state = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  return state, layouts.from_torch(state, WIDE)


@pytest.mark.slow
def test_weights_that_amplify_rounding_are_no_fault(tmp_path):
  state, params = normal_weights()
  difference = reference.largest_difference(state, params, WIDE)
  rounding = reference.rounding(state, WIDE)
  assert reference.TOLERANCE < rounding < 1e-2
  assert rounding / 10 < difference < reference.tolerance_of(rounding) < 0.1
  assert reference.tolerance_of(1.0) < 1
  saved_weights.save_weights(tmp_path / 'run', params, 1, saved_weights.describe(WIDE, Objective()))
  path = tmp_path / 'out.pth'
  lines = list(convert.export(tmp_path / 'run', path, convert.ExportOptions()))
  assert 'rounding alone makes' in lines[0]
  assert path.exists()


@pytest.mark.parametrize('fault', [f for f, message in FAULTS.items() if message == 'differ by'])
def test_faults_differ_by_more_than_rounding(fault):
  state, params = normal_weights()
  rounding = reference.rounding(state, WIDE)
  fault(state)
  difference = reference.largest_difference(state, params, WIDE)
  assert difference > reference.tolerance_of(rounding)


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.__name__)
def test_an_export_with_a_fault_is_not_put_in_place(run, tmp_path, monkeypatch, fault):
  path = tmp_path / 'out.pth'
  path.write_bytes(b'old')

  def faulty(state):
    state = dict(state)
    # Not where `tensor_shapes` makes the list of expected tensors from arrays without memory.
    if any(array.strides != (0,) * array.ndim for array in state.values()):
      fault(state)
    return state

  monkeypatch.setitem(layouts.LAYOUTS, 'full', faulty)
  with pytest.raises(UserError) as caught:
    list(convert.export(run, path, convert.ExportOptions()))
  assert FAULTS[fault] in str(caught.value)
  assert path.read_bytes() == b'old'
  assert [p.name for p in tmp_path.iterdir()] == ['out.pth']


def test_a_tanh_gelu_is_caught(run, tmp_path, monkeypatch):
  gelu = reference.functional.gelu
  monkeypatch.setattr(reference.functional, 'gelu', lambda x: gelu(x, approximate='tanh'))
  with pytest.raises(UserError, match='differ by'):
    list(convert.export(run, tmp_path / 'out.pth', convert.ExportOptions()))
  assert list(tmp_path.iterdir()) == []


def test_a_tanh_gelu_of_ours_is_caught(run, tmp_path, monkeypatch):
  gelu = jax.nn.gelu
  monkeypatch.setattr(vit.jax.nn, 'gelu', lambda x, approximate: gelu(x, approximate=True))
  with pytest.raises(UserError, match='differ by'):
    list(convert.export(run, tmp_path / 'out.pth', convert.ExportOptions()))
  assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_never_passes(params):
  state = layouts.to_torch(params, TINY)
  state['norm.bias'][0] = np.nan
  difference = reference.largest_difference(state, params, TINY)
  assert not difference <= reference.TOLERANCE


def test_the_reference_takes_other_resolutions(params):
  state = layouts.to_torch(params, TINY)
  state, other = layouts.at_resolution(state, TINY, 48)
  assert other == dataclasses.replace(TINY, image_size=48)
  resampled = params | {name: jnp.asarray(state[name]) for name in layouts.POSITION_TABLES}
  difference = reference.largest_difference(state, resampled, other)
  assert difference < reference.TOLERANCE
