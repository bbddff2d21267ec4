"""Weight files: every PyTorch can read them; damaged files and other things are refused."""

import argparse
import collections
import hashlib
import json
import pathlib
import pickletools
import sys
import unittest.mock
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import needs_torch, run_python, torch

from dropmae_jax.pytorch import weight_files
from dropmae_jax.runtime import atomic_file, cli
from dropmae_jax.runtime.errors import UserError

TENSORS = {
  'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'a.bias': np.ones(2, np.float32),
}


def write(path, **entries):
  with atomic_file.staged(path, num_bytes=1) as partial:
    weight_files.write(partial, TENSORS, file_format=weight_files.format_of(path), entries=entries)
    atomic_file.write_card(partial, {'step': 3})


def assert_same(actual, expected=TENSORS):
  assert list(actual) == list(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(np.asarray(actual[name]), array)


@needs_torch
def test_a_pth_holds_plain_tensors_in_storages_of_their_own(tmp_path):
  path = tmp_path / 'out.pth'
  write(path, epoch=3, args={'a': {'b': None}, 'c': 1.5})
  content = torch.load(path, weights_only=True)
  assert list(content) == ['model', 'epoch', 'args']
  assert content['args'] == {'a': {'b': None}, 'c': 1.5}
  assert_same(content['model'])
  for tensor in content['model'].values():
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


@needs_torch
def test_a_pth_asks_for_nothing_that_torch_1_9_does_not_know(tmp_path):
  """All names in its pickle, and its protocol, are those of PyTorch since 1.6."""
  path = tmp_path / 'out.pth'
  write(path, epoch=3)
  with zipfile.ZipFile(path) as archive:
    pickled = archive.read('out/data.pkl' if 'out/data.pkl' in archive.namelist() else next(
      name for name in archive.namelist() if name.endswith('data.pkl')
    ))  # fmt: skip
  operations = list(pickletools.genops(pickled))
  named = {argument for code, argument, _ in operations if code.name == 'GLOBAL'}
  assert named == {
    'torch._utils _rebuild_tensor_v2',
    'torch FloatStorage',
    'collections OrderedDict',
  }
  assert max(code.proto for code, _, _ in operations) <= 2


def test_safetensors_keep_metadata_as_json(tmp_path):
  path = tmp_path / 'out.safetensors'
  write(path, args={'step': 7}, layout='encoder')
  assert_same(dict(sorted(safetensors.numpy.load_file(path).items(), reverse=True)))
  read = weight_files.read(path)
  assert read.entries == {'format': 'pt', 'args': {'step': 7}, 'layout': 'encoder'}
  assert read.tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize('name', [pytest.param('out.pth', marks=needs_torch), 'out.safetensors'])
def test_card_and_checksum_lie_beside_the_file(tmp_path, name):
  write(tmp_path / name)
  digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
  assert (tmp_path / f'{name}.sha256').read_text() == f'{digest}  {name}\n'
  card = json.loads((tmp_path / f'{name}.json').read_text())
  assert card == {'file': name, 'sha256': digest, 'step': 3}
  assert {p.name for p in tmp_path.iterdir()} == {name, f'{name}.sha256', f'{name}.json'}
  assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1


@needs_torch
@pytest.mark.parametrize(
  ('wrap', 'key'),
  [
    (lambda tensors: {'model': tensors}, 'model'),
    (lambda tensors: {'net': collections.OrderedDict(tensors)}, 'net'),
    (lambda tensors: {'state_dict': tensors}, 'state_dict'),
    (lambda tensors: {'model_ema': tensors, 'model': None}, 'model_ema'),
    (lambda tensors: {'model_ema': {}, 'net': tensors}, 'net'),
    (lambda tensors: tensors, ''),
  ],
)
def test_tensors_are_found_where_the_field_puts_them(tmp_path, wrap, key):
  tensors = {name: torch.from_numpy(array) for name, array in TENSORS.items()}
  torch.save(wrap(tensors), tmp_path / 'in.pth')
  read = weight_files.read(tmp_path / 'in.pth')
  assert read.key == key
  assert_same(read.tensors)


@needs_torch
@pytest.mark.parametrize('legacy', [False, True])
def test_published_files_with_a_namespace_are_read(tmp_path, legacy):
  """Their `args` is a pickled argparse.Namespace, which torch >= 2.6 refuses by default."""
  tensors = {name: torch.from_numpy(array) for name, array in TENSORS.items()}
  content = {'model': tensors, 'args': argparse.Namespace(blr=1.5e-4, betas=(0.9, 0.95))}
  path = tmp_path / 'published.pth'
  torch.save(content, path, _use_new_zipfile_serialization=not legacy)
  read = weight_files.read(path)
  assert read.entries == {'args': {'blr': 1.5e-4, 'betas': (0.9, 0.95)}}
  assert_same(read.tensors)


@needs_torch
def test_other_dtypes_are_kept(tmp_path):
  import safetensors.torch

  half = {'h': torch.ones(2, dtype=torch.float16), 'b': torch.ones(2, dtype=torch.bfloat16)}
  torch.save({'model': half}, tmp_path / 'half.pth')
  safetensors.torch.save_file(half, tmp_path / 'half.safetensors')
  for name in ('half.pth', 'half.safetensors'):
    read = weight_files.read(tmp_path / name).tensors
    assert read['h'].dtype == np.float16
    assert read['b'].dtype == jnp.bfloat16
    assert read['b'].astype(np.float32).tolist() == [1, 1]


@pytest.mark.parametrize('name', [pytest.param('bad.pth', marks=needs_torch), 'bad.safetensors'])
@pytest.mark.parametrize('share', [0, 0.3, 0.9])
def test_truncated_files_are_refused(tmp_path, name, share):
  path = tmp_path / name
  weight_files.write(path, TENSORS, file_format=weight_files.format_of(path))
  whole = path.read_bytes()
  path.write_bytes(whole[: int(share * len(whole))])
  told = (
    'is empty; download it again' if share == 0 else '(is truncated|cannot be read as safetensors)'
  )
  with pytest.raises(UserError, match=f'{name} {told}'):
    weight_files.read(path)


def flip_a_byte(path, pattern):
  """Changes a value of a tensor, which a reader does not notice."""
  content = bytearray(path.read_bytes())
  content[content.index(pattern) + 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize('name', [pytest.param('out.pth', marks=needs_torch), 'out.safetensors'])
@pytest.mark.parametrize('is_link', [False, True])
def test_a_file_is_held_against_the_sum_beside_it(tmp_path, name, is_link):
  path = tmp_path / 'real' / name
  path.parent.mkdir()
  write(path)
  given = path
  if is_link:
    given = tmp_path / 'link'
    given.symlink_to(path)
  assert weight_files.read(given).integrity == f'intact: its sha256 matches {path}.sha256'
  flip_a_byte(path, TENSORS['a.weight'].tobytes())
  with pytest.raises(UserError, match=r'does not match .*\.sha256; download the file again'):
    weight_files.read(given)


@needs_torch
def test_a_damaged_pth_is_seen_without_a_sum_too(tmp_path):
  path = tmp_path / 'out.pth'
  weight_files.write(path, TENSORS, file_format='pth')
  assert weight_files.read(path).integrity == 'intact: the checksums in it match'
  flip_a_byte(path, TENSORS['a.weight'].tobytes())
  with pytest.raises(UserError, match=r'out.pth is damaged \(in .*/data/0\); download it again'):
    weight_files.read(path)


@needs_torch
@pytest.mark.parametrize('kind', ['no_checksums', 'legacy', 'safetensors'])
def test_where_damage_cannot_be_seen_this_is_said(tmp_path, kind):
  import safetensors.torch

  path = tmp_path / f'out.{"safetensors" if kind == "safetensors" else "pth"}'
  tensors = {name: torch.from_numpy(array) for name, array in TENSORS.items()}
  torch.serialization.set_crc32_options(kind != 'no_checksums')
  if kind == 'safetensors':
    safetensors.torch.save_file(tensors, path)
  else:
    torch.save(tensors, path, _use_new_zipfile_serialization=kind != 'legacy')
  torch.serialization.set_crc32_options(True)
  read = weight_files.read(path)
  assert read.integrity.startswith(f'not checked for damage: {path.name} has no checksums')
  assert read.tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize('name', [pytest.param('in.pth', marks=needs_torch), 'in.safetensors'])
@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'is empty; download it again'),
    (b'\n<!DOCTYPE html><html></html>', 'is a web page and not weights; download the file'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'is a git-lfs pointer and not weights'),
    (b'{"epoch": 1, "model": {}}', 'is json and not weights'),
    (b'\x1f\x8b' + bytes(50), 'is compressed; unpack it'),
    (b'some text\n', 'cannot be read as '),
  ],
)
def test_files_of_other_kinds_are_named(tmp_path, capfd, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(UserError) as caught:
    weight_files.read(path)
  assert f'{path} {message}' in str(caught.value)
  assert 'weights_only' not in str(caught.value)
  assert capfd.readouterr() == ('', '')


@needs_torch
def test_pytorch_programs_are_refused_without_its_advice(tmp_path, capfd, recwarn):
  torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / 'in.pth')
  recwarn.clear()
  with pytest.raises(UserError, match='as a TorchScript archive or a zip of'):
    weight_files.read(tmp_path / 'in.pth')
  assert not recwarn.list
  assert capfd.readouterr() == ('', '')


@needs_torch
def test_the_bytes_tell_the_format_where_the_name_does_not(tmp_path):
  for name in ('in.pth', 'in.weights'):
    weight_files.write(tmp_path / name, TENSORS, file_format='safetensors')
    assert weight_files.read(tmp_path / name).tensors.keys() == TENSORS.keys()
  weight_files.write(tmp_path / 'in.safetensors', TENSORS, file_format='pth')
  with pytest.raises(UserError, match=r'is a PyTorch file with another ending; rename it to .pth'):
    weight_files.read(tmp_path / 'in.safetensors')


@needs_torch
@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (lambda: [1, 2], 'holds a list and not a dict of tensors'),
    (
      lambda: {'epoch': 3},
      'entries that are not named tensors (epoch) at its top level, and no model or net or',
    ),
    (
      lambda: {'model': {'a': 'text'}},
      "entries that are not named tensors (a) under 'model'; give",
    ),
    (lambda: torch.nn.ReLU(), 'holds a torch.nn.modules.activation.ReLU and not a dict'),
    (lambda: {'model': {}}, "holds nothing under 'model'; give"),
    (lambda: {0: torch.ones(2)}, 'entries that are not named tensors (0) at its top level'),
    (
      lambda: {'model': {'a': torch.eye(2).to_sparse()}},
      'named tensors (a (torch._utils._rebuild_sparse_tensor))',
    ),
    (
      lambda: {'model': {'a': torch.ones(2).to(torch.float8_e5m2)}},
      'named tensors (a (torch.float8_e5m2)) under',
    ),
  ],
)
def test_files_of_other_things_are_refused(tmp_path, content, message):
  torch.save(content(), tmp_path / 'odd.pth')
  with pytest.raises(UserError) as caught:
    weight_files.read(tmp_path / 'odd.pth')
  assert message in str(caught.value)
  with pytest.raises(UserError, match=r'none.pth is not a file'):
    weight_files.read(tmp_path / 'none.pth')


FILE_LIMIT = """
import pathlib, resource, signal, sys
import numpy as np
from dropmae_jax.pytorch import weight_files
from dropmae_jax.runtime import atomic_file, cli

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, resource.RLIM_INFINITY))
path = pathlib.Path(sys.argv[1])

def main():
  with atomic_file.staged(path, num_bytes=1) as partial:
    tensors = {name: np.zeros(10**6, np.float32) for name in 'ab'}
    weight_files.write(partial, tensors, file_format=weight_files.format_of(path))

cli.run(main)
"""


@pytest.mark.parametrize('name', [pytest.param('out.pth', marks=needs_torch), 'out.safetensors'])
def test_a_write_that_the_system_refuses_keeps_the_old_file(tmp_path, name):
  """A limit on file sizes stands for a full disk: the same call fails in the same place."""
  path = tmp_path / name
  path.write_bytes(b'old')
  done = run_python('-c', FILE_LIMIT, path)
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith(f'error: --output={path} cannot be written (')
  assert done.stderr.count('\n') == 1
  assert path.read_bytes() == b'old'
  assert [p.name for p in tmp_path.iterdir()] == [name]


class Interrupted(type(pathlib.Path())):
  """A path; a signal arrives while its file is written."""

  def open(self, mode):
    file = super().open(mode, buffering=0)
    several = [len, len, unittest.mock.Mock(side_effect=cli.Terminated), *[len] * 99]
    wrapped = unittest.mock.Mock(wraps=file, write=lambda content: several.pop(0)(content))
    return unittest.mock.MagicMock(__enter__=lambda _: wrapped)


@needs_torch
def test_a_signal_while_writing_stays_a_signal(tmp_path):
  with pytest.raises(cli.Terminated):
    weight_files.write(Interrupted(tmp_path / 'out.pth'), TENSORS, file_format='pth')


def test_what_cannot_fit_is_refused_before_writing(tmp_path):
  path = tmp_path / 'out.pth'
  path.write_bytes(b'old')
  with (
    pytest.raises(UserError, match=r'needs 1000000000000 MB and \d+ MB are free'),
    atomic_file.staged(path, num_bytes=10**18),
  ):
    raise AssertionError
  assert path.read_bytes() == b'old'


def test_an_error_while_writing_leaves_nothing_behind(tmp_path):
  with pytest.raises(ZeroDivisionError), atomic_file.staged(tmp_path / 'o', num_bytes=1) as partial:
    pathlib.Path(partial).write_bytes(b'half')
    raise ZeroDivisionError
  assert list(tmp_path.iterdir()) == []


def test_without_torch_safetensors_work_and_pth_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'torch', None)
  write(tmp_path / 'out.safetensors')
  assert_same(dict(sorted(weight_files.read(tmp_path / 'out.safetensors').tensors.items())[::-1]))
  with pytest.raises(UserError, match=r"pip install 'dropmae_jax\[torch\]', or use .safetensors"):
    write(tmp_path / 'out.pth')
  assert not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize(
  ('name', 'expected'),
  [('a.safetensors', 'safetensors'), *((f'a{end}', 'pth') for end in ('.pth', '.pt', '.tar', ''))],
)
def test_the_format_of_a_name(name, expected):
  assert weight_files.format_of(pathlib.Path(name)) == expected
