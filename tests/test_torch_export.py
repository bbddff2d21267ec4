"""The PyTorch layout: key lists, round trips, and faults that must not pass."""

import argparse
import json
import sys

import jax
import numpy as np
import pytest
import torch
from conftest import GOLDEN, run_python

from dropmae_jax import mae, position, torch_export
from dropmae_jax.command_line import BadInput

TINY = mae.architecture_of_size(
  'XXS', image_size=32, decoder_width=32, decoder_depth=1, decoder_num_heads=2
)


def shapes(architecture):
  _, params = mae.abstract_model(architecture)
  zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), params)
  return {name: array.shape for name, array in torch_export.to_torch(zeros, architecture).items()}


def random_state(architecture, seed=0):
  rng = np.random.default_rng(seed)
  return {
    name: rng.standard_normal(shape, np.float32) for name, shape in shapes(architecture).items()
  }


def test_vit_b_has_the_published_names_shapes_and_order():
  recorded = json.loads((GOLDEN / 'vit_b_state_dict.json').read_text())
  expected = [(row['name'], tuple(row['shape'])) for row in recorded]
  assert list(shapes(mae.architecture_of_size('B')).items()) == expected


@pytest.mark.parametrize(('size', 'count'), [('S', 257), ('L', 401), ('H', 497)])
def test_other_sizes_have_as_many_tensors_as_published(size, count):
  assert len(torch_export.tensor_names(mae.architecture_of_size(size))) == count


@pytest.mark.parametrize('size', ['XXS', 'XS', 'S'])
def test_round_trip_is_bit_identical(size):
  architecture = mae.architecture_of_size(size, decoder_depth=2)
  state = random_state(architecture)
  back = torch_export.to_torch(torch_export.from_torch(state, architecture), architecture)
  assert list(back) == list(state)
  for name, array in state.items():
    np.testing.assert_array_equal(back[name], array)
    assert back[name].flags.c_contiguous
    assert back[name].base is None


def test_a_file_holds_plain_tensors_in_storages_of_their_own(tmp_path):
  state = random_state(TINY)
  path = tmp_path / 'out.pth'
  torch_export.write_pth(str(path), state, epoch=3, args={'a': {'b': None}, 'c': 1.5})
  content = torch.load(path, weights_only=True)
  assert list(content) == ['model', 'epoch', 'args']
  assert list(content['model']) == torch_export.tensor_names(TINY)
  for name, tensor in content['model'].items():
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    np.testing.assert_array_equal(tensor.numpy(), state[name])
  assert [p.name for p in tmp_path.iterdir()] == ['out.pth']


def test_published_files_with_a_namespace_are_read(tmp_path):
  """Their `args` is a pickled argparse.Namespace, which torch >= 2.6 refuses by default."""
  state = random_state(TINY)
  tensors = {name: torch.from_numpy(array) for name, array in state.items()}
  path = tmp_path / 'published.pth'
  torch.save({'model': tensors, 'epoch': 1, 'args': argparse.Namespace(lr=2.4e-3)}, path)
  read, args = torch_export.read_pth(str(path))
  assert args == {'lr': 2.4e-3}
  for name, array in state.items():
    np.testing.assert_array_equal(read[name], array)


class Evil:
  def __reduce__(self):
    return (print, ('ran code',))


def test_code_in_a_file_is_refused_and_not_run(tmp_path, capsys):
  path = tmp_path / 'evil.pth'
  torch.save({'model': {}, 'args': Evil()}, path)
  with pytest.raises(BadInput, match='cannot be read as a PyTorch checkpoint'):
    torch_export.read_pth(str(path))
  assert 'ran code' not in capsys.readouterr().out


@pytest.mark.parametrize('content', [b'', b'junk', b'PK\x03\x04'])
def test_damaged_files_are_refused(tmp_path, content):
  path = tmp_path / 'bad.pth'
  path.write_bytes(content)
  with pytest.raises(BadInput, match=r'bad.pth cannot be read as a PyTorch checkpoint'):
    torch_export.read_pth(str(path))
  with pytest.raises(BadInput, match='is not a file'):
    torch_export.read_pth(str(tmp_path / 'none.pth'))


def test_architectures_are_read_off_the_shapes():
  for size in ('S', 'B'):
    architecture = mae.architecture_of_size(size, decoder_depth=2)
    state = {k: np.broadcast_to(np.float32(0), s) for k, s in shapes(architecture).items()}
    assert torch_export.infer_architecture(state) == architecture


def test_another_resolution_is_written_with_the_published_tables():
  trained = mae.architecture_of_size('S', image_size=256, depth=1, decoder_depth=1)
  published = mae.architecture_of_size('S', depth=1, decoder_depth=1)
  params = jax.jit(mae.init_params, static_argnums=1)(jax.random.key(0), trained)
  changed, architecture = torch_export.at_published_resolution(params, trained)
  assert architecture == published
  state = torch_export.to_torch(changed, architecture)
  assert {k: v.shape for k, v in state.items()} == shapes(published)
  np.testing.assert_array_equal(state['pos_embed'], position.sincos_table(14, 384))
  np.testing.assert_array_equal(state['norm.weight'], params['norm']['scale'])


def test_a_file_says_who_can_read_it():
  assert 'DropTrack, OSTrack and DropSeg' in torch_export.readers(mae.architecture_of_size('B'))
  assert 'OSTrack loads it' in torch_export.readers(mae.architecture_of_size('L'))
  for other in ('S', 'H'):
    assert 'no tracker' in torch_export.readers(mae.architecture_of_size(other))


def test_another_architecture_is_refused_with_the_first_mismatches():
  state = random_state(TINY)
  del state['norm.bias']
  state['cls_token'] = np.zeros((1, 1, 64), np.float32)
  state['decoder_pred.bias'] = np.zeros(7, np.float32)
  with pytest.raises(BadInput) as caught:
    torch_export.from_torch(state, TINY)
  for part in ('norm.bias is missing', 'cls_token is not part', 'decoder_pred.bias is (7,)'):
    assert part in str(caught.value)
  with pytest.raises(BadInput, match='holds no DropMAE model with its decoder'):
    torch_export.infer_architecture({'pos_embed': np.zeros((1, 197, 768))})
  odd = {k: np.zeros(s) for k, s in shapes(mae.architecture_of_size('XXS', width=72)).items()}
  with pytest.raises(BadInput, match='width=72 is not in the size table'):
    torch_export.infer_architecture(odd)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'out.pth'
  torch_export.write_pth(str(path), random_state(TINY), epoch=0, args={})
  before = path.read_bytes()

  def fail(*_):
    raise OSError('No space left on device')

  monkeypatch.setattr(torch, 'save', fail)
  with pytest.raises(OSError, match='No space'):
    torch_export.write_pth(str(path), random_state(TINY, 1), epoch=0, args={})
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ['out.pth']


def test_without_torch_one_sentence_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(BadInput, match=r"pip install 'dropmae_jax\[torch\]'"):
    torch_export.write_pth(str(tmp_path / 'x.pth'), {}, epoch=0, args={})


def test_training_does_not_import_torch():
  program = 'import sys, dropmae_jax.train, dropmae_jax.figures; print("torch" in sys.modules)'
  assert run_python('-c', program).stdout.strip() == 'False'
