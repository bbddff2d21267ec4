"""Opening datasets and classes of the user's own; each fault is one sentence."""

import errno
import io
import os
import re
import shutil
import sys
import threading
import time
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from conftest import run_python
from sources import NumberedVideos
from tensorflow_datasets.proto import tf_example_pb2

from benchmarks import loader_memory
from dropmae_jax.config import DataOptions
from dropmae_jax.data import frame_pairs, mixture, shards, video_source
from dropmae_jax.runtime.errors import PROGRAM_ERRORS, UserError

DATASET = 'kinetics_frames/folder'


def version_folder(data_dir):
  (folder,) = (info.parent for info in (data_dir / DATASET).glob('*/dataset_info.json'))
  return folder


@pytest.fixture
def damaged(data_dir, tmp_path):
  """A copy of the dataset, to be damaged: its data_dir and its folder."""
  shutil.copytree(data_dir / DATASET, tmp_path / DATASET)
  return tmp_path, version_folder(tmp_path)


def assert_refused(data_dir, *parts):
  with pytest.raises(UserError) as refusal:
    video_source.open_dataset(str(data_dir), DATASET)
  text = str(refusal.value)
  assert '\n' not in text
  for part in (*parts, str(version_folder(data_dir))):
    assert part in text


def test_a_dataset_is_found_by_its_root_or_its_own_folder(data_dir):
  folder = version_folder(data_dir)
  by_root = video_source.open_dataset(str(data_dir), 'kinetics_frames/folder')
  by_folder = video_source.open_dataset(str(folder), 'anything')
  assert len(by_root) == len(by_folder) == 6
  np.testing.assert_array_equal(by_root.frame(3, 2), by_folder.frame(3, 2))


@pytest.mark.parametrize('split', ['train', 'val'])
def test_frames_are_those_of_the_records(data_dir, split):
  folder = version_folder(data_dir)
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  records = tfds.builder_from_directory(folder).as_data_source(split, deserialize_method=raw)
  features = [tf_example_pb2.Example.FromString(each).features.feature for each in records]
  jpegs = [each['jpeg'].bytes_list.value[0] for each in features]
  with np.load(folder / f'index-{split}.npz') as index:
    paths = index['path'].tolist()
  for path in (data_dir, folder):
    dataset = video_source.open_dataset(str(path), DATASET, split)
    assert dataset.paths().tolist() == paths
    assert len(dataset) * 8 == len(jpegs)
    for video in range(len(dataset)):
      assert dataset.num_frames(video) == 8
      for number in range(8):
        image = simplejpeg.decode_jpeg(jpegs[8 * video + number], 'RGB')
        np.testing.assert_array_equal(dataset.frame(video, number), image)


def test_only_folders_named_as_versions_are_opened(data_dir, tmp_path):
  real = version_folder(data_dir)
  for name in (real.name, '0.9.12', f'{real.name}.staging', f'{real.name}.bak'):
    folder = tmp_path / 'kinetics_frames' / 'folder' / name
    folder.mkdir(parents=True)
    if name == real.name:
      folder.rmdir()
      folder.symlink_to(real)
    else:
      (folder / 'dataset_info.json').write_text('broken')
  assert len(video_source.open_dataset(str(tmp_path), 'kinetics_frames/folder')) == 6
  for name in ('2.9.0', '2.10.0'):
    (tmp_path / DATASET / name).symlink_to(real)
  assert video_source.open_dataset(str(tmp_path), DATASET).folder.name == '2.10.0'


def test_a_missing_dataset_names_the_command_that_builds_it(tmp_path, data_dir):
  command = 'python -m tfds_kinetics --config=kinetics400 --videos=VIDEOS --data_dir='
  with pytest.raises(UserError, match=re.escape(command)):
    video_source.open_dataset(str(tmp_path), 'kinetics_frames/kinetics400')
  with pytest.raises(UserError, match=r"no split 'tset' .* there are: (train, val|val, train)"):
    video_source.open_dataset(str(data_dir), 'kinetics_frames/folder', 'tset')


@pytest.mark.parametrize('version', ['0.3.0', '3.0.0'])
def test_another_format_is_refused_before_it_is_parsed(damaged, version):
  data_dir, folder = damaged
  folder.rename(folder.with_name(version))
  (folder.with_name(version) / 'dataset_info.json').write_text('of another format')
  assert_refused(data_dir, f'format version {version}, and this code reads', 'build it again')


def test_a_version_folder_given_directly_is_checked_for_its_format(damaged):
  _, folder = damaged
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace(f'"version": "{folder.name}"', '"version": "7.0.0"'))
  with pytest.raises(UserError, match=r'is of format version 7\.0\.0, and this code reads'):
    video_source.open_dataset(str(folder), DATASET)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('dataset_info.json', b'{"na', 'dataset_info.json'),
    ('dataset_info.json', b'{}', 'dataset_info.json'),
    ('dataset_info.json', (b'{SPLIT}', b'{SPLIP}'), 'dataset_info.json'),
    ('index-train.npz', None, 'index-train.npz: FileNotFoundError'),
    ('index-train.npz', b'', 'index-train.npz: BadZipFile'),
    ('index-train.npz', b'PK\3\4 cut short', 'index-train.npz: BadZipFile'),
  ],
)
def test_damaged_metadata_are_refused(damaged, name, content, message):
  data_dir, folder = damaged
  if content is None:
    (folder / name).unlink()
  elif isinstance(content, tuple):
    before = (folder / name).read_bytes()
    assert content[0] in before
    (folder / name).write_bytes(before.replace(*content))
  else:
    (folder / name).write_bytes(content)
  assert_refused(data_dir, message, 'build it again with python -m tfds_kinetics')


def test_metadata_name_no_code_that_is_imported(damaged, monkeypatch):
  data_dir, folder = damaged
  (data_dir / 'planted.py').write_text('')
  monkeypatch.syspath_prepend(data_dir)
  changed = 0
  for path in folder.glob('*.json'):
    text, count = re.subn(r'"\w+(\.\w+)*\.[A-Z]\w*"', '"planted.Feature"', path.read_text())
    path.write_text(text)
    changed += count
  assert changed >= 4
  assert len(video_source.open_dataset(str(data_dir), DATASET)) == 6
  assert 'planted' not in sys.modules


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    ({'first': [0, 8]}, 'index-train.npz: KeyError'),
    ({'first': [0, 8], 'frames': [8]}, 'does not list videos: (2,), (1,)'),
    ({'first': [0.0], 'frames': [8.0]}, 'does not list videos'),
    ({'first': [], 'frames': []}, 'does not list videos'),
    ({'first': [0, 41], 'frames': [8, 8]}, 'outside of the 48 records'),
    ({'first': [-1], 'frames': [8]}, 'outside of the 48 records'),
    ({'first': [3], 'frames': [0]}, 'outside of the 48 records'),
  ],
)
def test_an_inconsistent_index_is_refused(damaged, arrays, message):
  data_dir, folder = damaged
  np.savez(folder / 'index-train.npz', fingerprint='of nothing', **arrays)
  assert_refused(data_dir, message)


def test_an_index_that_states_more_than_it_holds_takes_no_memory(damaged):
  data_dir, folder = damaged
  stated = io.BytesIO()
  header = {'descr': '<i8', 'fortran_order': False, 'shape': (6_000_000_000,)}
  np.lib.format.write_array_header_1_0(stated, header)
  with zipfile.ZipFile(folder / 'index-train.npz', 'w') as archive:
    archive.writestr('first.npy', stated.getvalue() + bytes(48))
  assert_refused(data_dir, 'index-train.npz: ValueError: first is stated to be of')


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda shard: shard.unlink(), '1 of 6 shards missing or empty'),
    (lambda shard: os.truncate(shard, 0), '1 of 6 shards missing or empty'),
    (lambda shard: os.truncate(shard, shard.stat().st_size // 2), 'that were written'),
  ],
)
def test_shards_that_are_not_whole_are_refused(damaged, damage, message):
  data_dir, folder = damaged
  shard = sorted(folder.glob('*train.array_record*'))[2]
  damage(shard)
  assert_refused(data_dir, message, shard.name if 'missing' in message else 'shards of train')
  assert len(video_source.open_dataset(str(data_dir), DATASET, 'val')) == 2


def test_an_os_error_is_one_sentence(damaged, monkeypatch):
  data_dir, folder = damaged
  with pytest.raises(
    UserError, match=r'^/x+/dataset_info.json cannot be opened \(File name too long\); give'
  ):
    mixture.open_mixture('/' + 300 * 'x', DATASET)
  shard = sorted(folder.glob('*train.array_record*'))[2]
  shard.rename(folder / 'elsewhere')
  shard.symlink_to(folder / 'nowhere')
  assert_refused(data_dir, f'{shard} cannot be opened (No such file or directory)', 'links')

  def scandir(path):
    raise PermissionError(errno.EACCES, 'Permission denied', str(path))

  monkeypatch.setattr(os, 'scandir', scandir)  # Tests may run as root, which may read everything.
  with pytest.raises(UserError, match=rf'^{folder} cannot be opened \(Permission denied\); .* fix'):
    video_source.open_dataset(str(folder), DATASET)


def test_a_damaged_record_is_named_when_it_is_read(damaged):
  data_dir, folder = damaged
  dataset = video_source.open_dataset(str(data_dir), DATASET)
  shards = sorted(folder.glob('*train.array_record*'))
  for shard in shards:
    with shard.open('r+b') as file:  # The first record of the shard, and no other.
      file.seek(500)
      file.write(b'damage')
  shard, path = shards[3], str(dataset.paths()[3])
  assert path.endswith('.mp4')
  message = re.escape(f'video 3 ({path}) cannot be read: record 24 of split train, in {shard}')
  with pytest.raises(UserError, match=message):
    dataset.frame(3, 0)
  assert dataset.frame(3, 1).shape == (48, 64, 3)
  stream = frame_pairs.pair_batches(
    dataset,
    DataOptions(num_threads=1, max_damaged_records=0),
    image_size=16,
    batch_size=6,
    seed=0,
  )
  with pytest.raises(UserError, match=r'video \d .* is damaged .*; copy .* again, or'):
    for _ in range(20):
      next(stream)
  stream.close()


def test_a_frame_that_states_more_pixels_than_it_holds_takes_no_memory(data_dir, monkeypatch):
  dataset = video_source.open_dataset(str(data_dir), DATASET)
  monkeypatch.setattr(video_source, 'RETRY_SECONDS', ())
  frame = np.zeros((256, 256, 3), np.uint8)  # No frame takes fewer bytes.
  jpeg = simplejpeg.encode_jpeg(frame, quality=1, colorspace='RGB', colorsubsampling='420')
  example = tf_example_pb2.Example()
  stored = example.features.feature['jpeg'].bytes_list.value
  stored.append(jpeg)
  monkeypatch.setattr(shards.Shards, '__getitem__', lambda *_: example.SerializeToString())
  assert dataset.frame(0, 0).shape == (256, 256, 3)
  start = jpeg.index(b'\xff\xc0') + 5
  stored[0] = jpeg[:start] + 2 * (65000).to_bytes(2, 'big') + jpeg[start + 4 :]
  with pytest.raises(video_source.DamagedRecord, match='bytes cannot hold the 65000 x 65000 pixel'):
    dataset.frame(0, 0)


def test_an_io_error_is_not_damage(data_dir, monkeypatch):
  """A record is read up to three times; then the run ends, as the record may be whole."""
  monkeypatch.setattr(video_source, 'RETRY_SECONDS', (0.0, 0.0))
  dataset = video_source.open_dataset(str(data_dir), DATASET)
  expected, records, faults = dataset.frame(2, 1), dataset._records, []

  class Failing:
    file_of, check = records.file_of, records.check

    def __getitem__(self, record):
      if faults:
        raise faults.pop()
      return records[record]

  dataset._records = Failing()
  faults += 2 * [OSError(errno.EIO, 'Input/output error')]
  np.testing.assert_array_equal(dataset.frame(2, 1), expected)
  faults += 3 * [OSError(errno.ESTALE, 'Stale file handle')]
  with pytest.raises(UserError, match=r'cannot be read \(.*Stale file handle\); mount') as raised:
    dataset.frame(2, 1)
  assert not isinstance(raised.value, video_source.DamagedRecord)
  for fault, remedy in (
    (RuntimeError('open() failed: Too many open files; reading a.array_record'), 'ulimit -n'),
    (ValueError('Insufficient memory (case 4)'), 'free memory'),
  ):
    faults += 3 * [fault]
    with pytest.raises(UserError, match=rf'cannot be read \(.*{remedy}.*again') as raised:
      dataset.frame(2, 1)
    assert not isinstance(raised.value, video_source.DamagedRecord)
  faults += 3 * [RuntimeError('pread() failed: Bad file descriptor; reading a.array_record')]
  with pytest.raises(UserError, match=r'cannot be read \(pread.*check its storage'):
    dataset.frame(2, 1)
  faults += 3 * [RuntimeError('DATA_LOSS')]
  with pytest.raises(video_source.DamagedRecord, match=r'video 2 .* is damaged'):
    dataset.frame(2, 1)


def planted(error):
  def failing(*_, **__):
    raise error

  return failing


@pytest.mark.parametrize('error', PROGRAM_ERRORS)
def test_bugs_are_not_damage(data_dir, monkeypatch, error):
  """They are raised at once, without reading again."""
  dataset = video_source.open_dataset(str(data_dir), DATASET)
  monkeypatch.setattr(video_source, 'RETRY_SECONDS', (1e6,))
  with monkeypatch.context() as patch, pytest.raises(error, match='planted'):
    patch.setattr(video_source.simplejpeg, 'decode_jpeg', planted(error('planted')))
    dataset.frame(2, 1)
  for module, name in ((tfds.core, 'ShardedFileTemplate'), (video_source, 'read_arrays')):
    with monkeypatch.context() as patch, pytest.raises(error, match='planted'):
      patch.setattr(module, name, planted(error('planted')))
      video_source.open_dataset(str(data_dir), DATASET)


def test_a_mixture_opens_its_datasets(data_dir, tmp_path):
  (tmp_path / 'kinetics_frames').mkdir()
  for name in ('folder', 'other'):
    (tmp_path / 'kinetics_frames' / name).symlink_to(data_dir / DATASET)
  one = mixture.open_mixture(str(tmp_path), DATASET)
  assert (len(one), one.weights) == (6, (1,))
  assert one.fingerprint == video_source.open_dataset(str(tmp_path), DATASET).fingerprint
  text = f'{DATASET}=0.3, kinetics_frames/other=1/10'
  two = mixture.open_mixture(str(tmp_path), text)
  assert (len(two), two.weights) == (12, (Fraction(3, 10), Fraction(1, 10)))
  prints = {
    mixture.open_mixture(str(tmp_path), f'{DATASET}={weights}').fingerprint
    for weights in ('3,kinetics_frames/other=1', '6,kinetics_frames/other=2')
  }
  assert prints == {two.fingerprint}
  assert mixture.open_mixture(str(tmp_path), text.replace('0.3', '0.4')).fingerprint not in prints
  turned = mixture.open_mixture(str(tmp_path), f'kinetics_frames/other=1,{DATASET}=3')
  assert [each.folder.parent.name for each in turned.datasets] == ['other', 'folder']
  assert turned.weights == (1, 3)
  with pytest.raises(
    UserError, match=r'is the folder of one dataset, and .* names 2; give the fold'
  ):
    mixture.open_mixture(str(version_folder(data_dir)), text)


def test_the_fingerprint_of_a_mixture_depends_on_its_datasets_and_shares():
  def fingerprint(names, weights):
    datasets = []
    for name in names:
      datasets.append(NumberedVideos([3]))
      datasets[-1].fingerprint = name
    return mixture.Mixture(tuple(datasets), tuple(map(Fraction, weights))).fingerprint

  mixtures = [('ab', (1, 2)), ('ac', (1, 2)), ('cb', (1, 2)), ('ba', (1, 2)), ('ab', (2, 1))]
  assert len({fingerprint(*each) for each in mixtures}) == len(mixtures)
  assert fingerprint('ab', (2, 4)) == fingerprint('ab', (1, 2))


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    ('a,b', "'a'"),
    ('a=1,b', "'b'"),
    ('a=0,b=1', "'a=0'"),
    ('a=-1', "'a=-1'"),
    ('a=nan,b=1', "'a=nan'"),
    ('a=inf', "'a=inf'"),
    ('a=1/0', "'a=1/0'"),
    ('a=much', "'a=much'"),
    ('a=1,', "''"),
    ('=1', "'=1'"),
    ('a=1,a=2', "'a=2'"),
  ],
)
def test_a_mixture_that_cannot_be_parsed_is_refused(data_dir, text, part):
  with pytest.raises(UserError, match=re.escape(f'dataset={text!r} is not understood at {part};')):
    mixture.open_mixture(str(data_dir), text)


# A module of a user: three datasets, and a class that lacks a method.
MODULE = """
import numpy as np

class Clips:
  def __init__(self, data_dir, split):
    self.lengths = [3, 5] if split == 'train' else []
    self.data_dir = data_dir
  def __len__(self):
    return len(self.lengths)
  def num_frames(self, video):
    return self.lengths[video]
  def frame(self, video, number):
    return np.full((6, 8, 3), 10 * video + number, np.uint8)

class Marked(Clips):
  fingerprint = 'own'

class Longer(Clips):
  def num_frames(self, video):
    return 9

class NoSplit(Clips):
  def __init__(self, data_dir): pass

class NoFrames:
  def __init__(self, data_dir, split): pass
  def __len__(self): return 1
  def num_frames(self, video): return 1
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
  """The name of a module in the working directory, which nothing has imported."""
  monkeypatch.setattr(sys, 'path', list(sys.path))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'my_clips.py').write_text(MODULE)
  (tmp_path / 'my_broken.py').write_text('import no_such_package')
  yield 'my_clips'
  sys.modules.pop('my_clips', None)


def test_a_class_of_the_user_is_opened_and_read(module):
  dataset = video_source.open_dataset('/x', f'{module}:Clips')
  assert dataset.data_dir == '/x'
  batches = frame_pairs.pair_batches(
    dataset, DataOptions(num_threads=1), image_size=4, batch_size=6, seed=0
  )
  batch = next(batches)
  expected = 10 * batch['video'][:, None] + batch['frame_numbers']
  assert (batch['frames'] == expected[..., None, None, None]).all()
  batches.close()


def test_the_fingerprint_of_a_class_is_its_own_or_of_its_numbers_of_frames(module):
  prints = {}
  for name in ('Clips', 'Longer', 'Marked'):
    dataset = video_source.open_dataset('/x', f'{module}:{name}')
    prints[name] = video_source.fingerprint(dataset)
    assert mixture.open_mixture('/x', f'{module}:{name}').fingerprint == prints[name]
  assert prints['Marked'] == 'own'
  assert len(set(prints.values())) == 3
  dataset = video_source.open_dataset('/y', f'{module}:Clips')
  assert video_source.fingerprint(dataset) == prints['Clips']
  dataset.lengths = [3, 6]
  assert video_source.fingerprint(dataset) != prints['Clips']


@pytest.mark.parametrize(
  ('dataset', 'split', 'message'),
  [
    ('my_clps:Clips', 'train', "cannot be imported (No module named 'my_clps'); give MODULE:CLASS"),
    ('my_broken:Clips', 'train', "cannot be imported (No module named 'no_such_package')"),
    ('my_clips:Clip', 'train', "cannot be imported (module 'my_clips' has no attribute 'Clip')"),
    (':Clips', 'train', 'cannot be imported (Empty module name)'),
    ('my_clips:NoFrames', 'train', 'has no method frame; add it.'),
    ('my_clips:NoSplit', 'train', 'is not made by NoSplit(data_dir, split): too many positional'),
    ('my_clips:Clips', 'val', "has no videos in data_dir='/x'; give another."),
  ],
)
def test_a_class_that_cannot_be_used_is_refused(module, dataset, split, message):
  with pytest.raises(UserError) as refusal:
    video_source.open_dataset('/x', dataset, split)
  assert str(refusal.value).startswith(f'dataset={dataset!r} ')
  assert message in str(refusal.value)


def test_a_mixture_may_contain_a_class(module, data_dir):
  both = mixture.open_mixture(str(data_dir), f'{module}:Clips=3, {DATASET}=1/2')
  assert [len(each) for each in both.datasets] == [2, 6]
  assert both.weights == (3, Fraction(1, 2))


# All videos are read under a low limit of open files.
LIMITED = """
import os, resource, sys
from dropmae_jax.data import video_source
from dropmae_jax.runtime import cli
soft = len(os.listdir('/proc/self/fd')) + 2
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, 50))
dataset = video_source.open_dataset(sys.argv[1], 'kinetics_frames/folder')
print(resource.getrlimit(resource.RLIMIT_NOFILE))
cli.run(lambda: [dataset.frame(video, 0) for video in range(6)] and None)
"""


def test_under_a_low_limit_of_open_files_all_is_read(data_dir):
  done = run_python('-c', LIMITED, data_dir)
  assert (done.returncode, done.stdout) == (0, '(50, 50)\n'), done.stderr


@pytest.mark.parametrize(
  ('hard', 'num_datasets', 'most'),
  [(50, 1, 1), (300, 1, 44), (300, 2, 22), (100_000, 1, 4096), (100_000, 4, 1024)],
)
def test_as_many_shards_are_open_as_may_be(monkeypatch, hard, num_datasets, most):
  limits = []
  monkeypatch.setattr(shards.resource, 'getrlimit', lambda _: (10, hard))
  monkeypatch.setattr(shards.resource, 'setrlimit', lambda _, limit: limits.append(limit))
  assert shards.allow_open_shards(num_datasets) == most
  assert limits == [(hard, hard)]


def test_the_shards_that_were_read_last_stay_open(data_dir, monkeypatch):
  monkeypatch.setattr(shards, 'MAX_OPEN', 2)
  dataset = video_source.open_dataset(str(data_dir), DATASET)
  expected = [dataset.frame(video, 7) for video in range(3)]
  real, opened = shards.ArrayRecordReader, []

  def reader(name, **options):
    opened.append(int(name.partition('array_record-')[2][:5]))
    return real(name, **options)

  monkeypatch.setattr(shards, 'ArrayRecordReader', reader)
  dataset = video_source.open_dataset(str(data_dir), DATASET)
  before = len(os.listdir('/proc/self/fd'))
  for video in (0, 1, 0, 2, 0, 1):  # Each in a shard of its own.
    np.testing.assert_array_equal(dataset.frame(video, 7), expected[video])
  assert opened == [0, 1, 2, 1]
  assert len(os.listdir('/proc/self/fd')) == before + 2


def test_a_dataset_of_the_size_of_kinetics_opens_fast_and_is_small(tmp_path):
  """Shards are opened only when they are read."""
  loader_memory.write_dataset(tmp_path, num_videos=240_000, num_frames=300)
  began = time.monotonic()
  dataset = video_source.open_dataset(str(tmp_path), loader_memory.DATASET)
  assert time.monotonic() - began < 10
  assert len(dataset) == 240_000
  before = len(os.listdir('/proc/self/fd'))
  assert dataset.frame(239_999, 299).shape == dataset.frame(0, 0).shape == (256, 340, 3)
  assert len(os.listdir('/proc/self/fd')) <= before + 2
  result = loader_memory.measure(tmp_path, num_batches=8)
  assert result['seconds_to_first_batch'] < 10
  memory = result['memory']
  assert memory['8 batches']['rss_mb'] - memory['before']['rss_mb'] < 400
  assert not [each for each in threading.enumerate() if each.name.startswith('loader')]
