"""A .pth is read as data: nothing that it names is imported or called, and no size is believed."""

import argparse
import collections
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
from conftest import needs_torch, torch

from dropmae_jax.pytorch import inspect, pth_file, weight_files
from dropmae_jax.pytorch.pth_file import StandIn
from dropmae_jax.runtime.errors import UserError

NUMBERS = np.arange(6, dtype=np.float32)


def plain(value):
  """The operations of a pickle that put a plain value on the stack."""
  return pickle.dumps(value, protocol=2)[2:-1]


STORAGE = (
  b'(' + plain('storage') + b'ctorch\nFloatStorage\n' + plain('0') + plain('cpu') + b'K\x06tQ'
)


def tensor(size, stride, offset=0):
  """The operations that make a tensor of NUMBERS."""
  arguments = b'(' + STORAGE + plain(offset) + plain(size) + plain(stride) + b'\x89N' + b't'
  return b'ctorch._utils\n_rebuild_tensor_v2\n' + arguments + b'R'


def state(*entries):
  """The operations that make {'net': {name: value, ...}, other: value, ...}, from pairs."""
  pairs = b''.join(plain(name) + operations for name, operations in entries)
  return b'}(' + plain('net') + b'}(' + pairs + b'u' + b'u'


WEIGHTS = ('a', tensor((2, 3), (3, 1)))


@pytest.fixture
def save(tmp_path):
  """Writes operations as a file that PyTorch reads; returns its path."""

  def save(operations, *, is_legacy=False):
    path = tmp_path / 'in.pth'
    pickled = b'\x80\x02' + operations + b'.'
    if is_legacy:
      head = (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True})
      parts = [*(pickle.dumps(each, protocol=2) for each in head), pickled]
      parts += [pickle.dumps(['0'], protocol=2), struct.pack('<q', len(NUMBERS)), NUMBERS.tobytes()]
      path.write_bytes(b''.join(parts))
      return path
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('in/data.pkl', pickled)
      archive.writestr('in/data/0', NUMBERS.tobytes())
    return path

  return save


@pytest.fixture
def trap(tmp_path, monkeypatch):
  """A module that leaves a file when it is imported, and whose members do when they are used."""
  (tmp_path / 'trap.py').write_text(
    f"""
def function(*_):
  open({str(tmp_path / 'run')!r}, 'w').close()
  return Class

class Class:
  __new__ = __setstate__ = append = extend = __setitem__ = __hash__ = function

function()
"""
  )
  monkeypatch.syspath_prepend(tmp_path)
  yield tmp_path / 'run'
  sys.modules.pop('trap', None)


FUNCTION, CLASS = b'ctrap\nfunction\n', b'ctrap\nClass\n'
USES = {
  'named': FUNCTION,
  'named by text': plain('trap') + plain('function') + b'\x93',
  'called': FUNCTION + b')R',
  'result called': FUNCTION + b')R)R',
  'made': CLASS + b')\x81',
  'made with keywords': CLASS + b')}\x92',
  'made as of old': b'(' + CLASS + b'o',
  'named and made': b'(itrap\nClass\n',
  'given a state': CLASS + b')\x81}b',
  'class given a state': CLASS + b'}b',
  'given items': CLASS + b')\x81K\x01a(K\x01e(K\x01K\x02u',
  'a key': b'}' + CLASS + b')\x81K\x01s',
  'of the system': b'cposix\nsystem\n' + plain('touch run') + b'\x85R',
  'an extension': b'\x82\x01',
}


@pytest.mark.parametrize('is_legacy', [False, True])
@pytest.mark.parametrize('use', USES)
def test_nothing_that_a_file_names_is_imported_or_called(save, trap, monkeypatch, use, is_legacy):
  monkeypatch.chdir(trap.parent)
  operations = state(WEIGHTS)[:-1] + plain('settings') + USES[use] + b'u'
  read = weight_files.read(save(operations, is_legacy=is_legacy))
  np.testing.assert_array_equal(read.tensors['a'], NUMBERS.reshape(2, 3))
  assert isinstance(read.entries['settings'], StandIn | dict)
  if use != 'a key':
    assert set(read.objects) <= {'trap.function', 'trap.Class', 'posix.system', 'builtins.object',
                                 'copyreg.extension'}  # fmt: skip
    assert len(read.objects) == 1
  assert not trap.exists()
  assert 'trap' not in sys.modules


def test_the_trap_shuts_on_those_who_run_pickles(trap):
  pickle.loads(b'\x80\x02' + USES['called'] + b'.')
  assert trap.exists()


def nested(levels, first, deeper):
  return first + levels * deeper


TERA = 1 << 40
LIES = {
  'one number for all': state(('a', tensor((TERA,), (0,)))),
  'many of them': state(*((f'a{i}', tensor((1 << 18,), (0,))) for i in range(9))),
  'the same in an entry': b'}' + plain('optimizer') + tensor((TERA, TERA), (0, 0)) + b's',
  'no numbers of a huge shape': state(('a', tensor((0, 1 << 62, 1 << 62), (1, 1, 1)))),
  'beyond the end': state(('a', tensor((7,), (1,)))),
  'beyond the end by its stride': state(('a', tensor((2,), (1 << 61,)))),
  'beyond the end by its offset': state(('a', tensor((1,), (1,), offset=1 << 70))),
  'before the start': state(('a', tensor((2,), (-1,), offset=3))),
  'a negative size': state(('a', tensor((-2, -3), (3, 1)))),
  'no size': state(('a', tensor('ab', (3, 1)))),
  'too many axes': state(('a', tensor((1,) * 500, (1,) * 500))),
  'a long string that is not there': b'\x8e' + struct.pack('<Q', TERA),
  'a list in itself': b']q\x00h\x00a',
  'lists of twice the list before': nested(64, b']', b'q\x00]h\x00ah\x00a'),
  'a list in a list in a list': nested(100_000, b']', b'\x85'),
  'a number of too many digits': b'I' + 10_000 * b'9' + b'\n',
  'a number for a storage': b'ctorch._utils\n_rebuild_tensor_v2\n'
  + plain((1, 0, (1,), (1,)))
  + b'R',
  'a number for a type': b'ctorch._utils\n_rebuild_tensor_v3\n('
  + STORAGE
  + plain(0)
  + plain((1,))
  + plain((1,))
  + b'\x89N'
  + plain(5)
  + b'tR',
  'nothing': b'',
  'a mark without items': b'(e',
  'memory that was not filled': b'h\x07',
}


@pytest.mark.parametrize('is_legacy', [False, True])
@pytest.mark.parametrize('lie', LIES)
def test_sizes_are_checked_before_memory_is_taken(save, lie, is_legacy):
  with pytest.raises(
    UserError, match=r'in\.pth cannot be read as a PyTorch checkpoint \(.+\); give'
  ):
    list(inspect.table(save(LIES[lie], is_legacy=is_legacy)))


def test_a_pickle_of_too_many_operations_is_refused(save, monkeypatch):
  monkeypatch.setattr(pth_file, 'MOST_OPERATIONS', 100)
  with pytest.raises(UserError, match='it has more than 100 operations'):
    weight_files.read(save(50 * b'N0' + state(WEIGHTS)))


def test_keys_are_not_walked_through(save):
  """The hash of a tuple of so many levels ends the process."""
  key = nested(200_000, b')', b'\x85')
  operations = state(WEIGHTS)[:-1] + plain('args') + b'}' + key + b'Ns' + b'u'
  assert weight_files.read(save(operations)).entries == {'args': {StandIn('builtins.tuple'): None}}


def test_a_compressed_record_is_refused_before_it_is_unpacked(save):
  path = save(state(WEIGHTS))
  with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('in/data/1', bytes(1 << 20))
  with pytest.raises(UserError, match='has compressed records, as a TorchScript'):
    weight_files.read(path)


def test_tensors_that_share_numbers_or_have_none_are_read(save):
  path = save(state(WEIGHTS, ('b', tensor((4, 2), (0, 1), 2)), ('c', tensor((0, 3), (3, 1)))))
  tensors = weight_files.read(path).tensors
  assert tensors['b'].tolist() == 4 * [[2, 3]]
  assert tensors['c'].shape == (0, 3)
  assert [line.split()[:2] for line in inspect.table(path)][1:4] == [
    ['a', '2'],
    ['b', '4'],
    ['c', '0'],
  ]


@pytest.fixture
def trackers_package():
  """The package whose objects a tracker pickles; the reader of the file does not have it."""
  module = types.ModuleType('lib.train.admin')
  for name, bases in {
    'Settings': (), 'AverageMeter': (), 'EasyDict': (dict,), 'Names': (list,)
  }.items():  # fmt: skip
    setattr(module, name, type(name, bases, {'__module__': module.__name__}))
  for name in ('lib', 'lib.train', module.__name__):
    sys.modules[name] = module
  yield module
  for name in ('lib', 'lib.train', module.__name__):
    sys.modules.pop(name, None)


@needs_torch
@pytest.mark.parametrize('is_legacy', [False, True])
def test_a_trackers_file_is_read_without_its_package(tmp_path, trackers_package, is_legacy):
  settings = trackers_package.Settings()
  settings.env, settings.device = trackers_package.EasyDict(a=1), torch.device('cpu')
  settings.workdir = pathlib.PurePosixPath('w')
  weights = torch.nn.Linear(3, 2)
  optimizer = torch.optim.AdamW(weights.parameters())
  weights(torch.ones(3)).sum().backward()
  optimizer.step()
  content = {
    'epoch': 300,
    'net_type': 'OSTrack',
    'net': weights.state_dict(),
    'optimizer': optimizer.state_dict(),
    'stats': collections.OrderedDict(train={'loss': trackers_package.AverageMeter()}),
    'settings': settings,
    'names': trackers_package.Names('ab'),
    'best': np.float64(0.5),
    'counts': collections.defaultdict(int, a=1),
    'args': argparse.Namespace(settings=settings, blr=1.5),
    'parameter': weights.weight,
    'ids': {1, 2},
  }
  path = tmp_path / 'OSTrack_ep0300.pth.tar'
  torch.save(content, path, _use_new_zipfile_serialization=not is_legacy)
  for name in ('lib', 'lib.train', 'lib.train.admin'):
    del sys.modules[name]
  read = weight_files.read(path)
  assert read.key == 'net'
  for name, array in weights.state_dict().items():
    np.testing.assert_array_equal(read.tensors[name], array.numpy())
  assert read.entries['epoch'] == 300
  moment = optimizer.state_dict()['state'][0]['exp_avg'].numpy()
  np.testing.assert_array_equal(read.entries['optimizer']['state'][0]['exp_avg'], moment)
  assert read.entries['optimizer']['param_groups'] == optimizer.state_dict()['param_groups']
  assert read.entries['settings'] == StandIn('lib.train.admin.Settings')
  assert read.entries['args'] == {'settings': read.entries['settings'], 'blr': 1.5}
  np.testing.assert_array_equal(read.entries['parameter'], weights.weight.detach().numpy())
  assert {f'lib.train.admin.{name}' for name in ('Settings', 'AverageMeter', 'Names')} <= {
    *read.objects
  }
  lines = list(inspect.table(path))
  assert lines[-1].startswith('Python objects, which are not read or run: ')


@needs_torch
@pytest.mark.parametrize(
  'dtype', 'bool uint8 int16 int64 uint16 float16 bfloat16 float64 complex64'.split()
)
@pytest.mark.parametrize('is_legacy', [False, True])
def test_every_type_and_view_is_that_of_pytorch(tmp_path, dtype, is_legacy):
  whole = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
  views = {'a': whole, 'b': whole[1].T, 'c': whole[:, ::2, 1:3], 'd': whole[0, 0, 3]}
  torch.save(views, tmp_path / 'in.pth', _use_new_zipfile_serialization=not is_legacy)
  tensors = pth_file.read(tmp_path / 'in.pth').value
  for name, view in views.items():
    array = np.asarray(tensors[name])
    assert str(array.dtype) == dtype
    np.testing.assert_array_equal(array.astype(complex), view.to(torch.complex128).numpy())
