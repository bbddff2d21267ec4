"""Files of a dataset that are replaced, before a start or during a run, are not taken."""

import os
import shutil

import numpy as np
import pytest
from test_train_loop import CONFIG, fakes  # noqa: F401, a fixture
from test_video_source import DATASET, version_folder

from dropmae_jax import train
from dropmae_jax.data import shards, video_source
from dropmae_jax.data.shards import ChangedDataset
from dropmae_jax.runtime.errors import UserError
from tfds_kinetics import publish
from tfds_kinetics.messages import BadInput


@pytest.fixture
def data(data_dir, tmp_path, monkeypatch):
  """A copy of the dataset, of which one shard is open at a time: its data_dir."""
  shutil.copytree(data_dir / DATASET, tmp_path / 'data' / DATASET)
  monkeypatch.setattr(shards, 'MAX_OPEN', 1)
  return tmp_path / 'data'


def opened(data):
  return video_source.open_dataset(str(data), DATASET)


def files_of(data, split='train'):
  return sorted(version_folder(data).glob(f'*{split}.array_record*'))


def swap(one, other):
  aside = one.with_name('aside')
  one.rename(aside)
  other.rename(one)
  aside.rename(other)


def without_digests(data):
  """Makes it a dataset of a builder that wrote none."""
  for path in version_folder(data).glob('index-*.npz'):
    with np.load(path) as index:
      arrays = {name: array for name, array in index.items() if not name.startswith('shard_')}
    np.savez(path, **arrays)


def test_swapped_shards_and_another_video_of_the_same_size_are_refused(data):
  first, second, *_ = files_of(data)
  (other, *_) = files_of(data, 'val')
  assert first.stat().st_size == second.stat().st_size == other.stat().st_size
  swap(first, second)
  with pytest.raises(UserError, match=f'damaged: {first.name} is another file than the one that w'):
    opened(data)
  swap(first, second)
  assert len(opened(data)) == 6
  shutil.copy(other, second)
  with pytest.raises(UserError, match=f'damaged: {second.name} is another file than .*copy .* aga'):
    opened(data)


@pytest.mark.parametrize('is_older', [False, True])
def test_a_shard_that_is_opened_again_is_checked_again(data, caplog, is_older):
  if is_older:
    without_digests(data)
  videos, (first, second, *_) = opened(data), files_of(data)
  assert is_older == ('was built before datasets had digests' in caplog.text)
  expected = videos.frame(0, 1)
  videos.frame(2, 0)  # Closes the shard of video 0.
  swap(first, second)
  for video in (0, 1):
    with pytest.raises(ChangedDataset, match=r'was replaced while it was in use; .* Put the'):
      videos.frame(video, 1)
  swap(first, second)
  np.testing.assert_array_equal(videos.frame(0, 1), expected)


@pytest.mark.parametrize('is_written_to', [False, True])
def test_a_record_is_not_damaged_if_its_file_was_written_to(data, monkeypatch, is_written_to):
  monkeypatch.setattr(video_source, 'RETRY_SECONDS', ())
  videos, (first, *_) = opened(data), files_of(data)
  videos.frame(0, 1)
  times = first.stat().st_atime_ns, first.stat().st_mtime_ns
  with first.open('r+b') as file:
    file.seek(500)
    file.write(b'damage')
  if not is_written_to:  # By a program, that is: a disk may fail.
    os.utime(first, ns=times)
  error = ChangedDataset if is_written_to else video_source.DamagedRecord
  with pytest.raises(error):
    videos.frame(0, 0)


def test_names_of_another_dataset_are_not_taken(data):
  videos = opened(data)
  assert len(videos.paths()) == 6
  shutil.copy(version_folder(data) / 'index-val.npz', version_folder(data) / 'index-train.npz')
  assert len(videos.paths()) == 2  # Of the same dataset.
  with np.load(version_folder(data) / 'index-val.npz') as index:
    np.savez(version_folder(data) / 'index-train.npz', **{**index, 'fingerprint': 'another'})
  with pytest.raises(ChangedDataset, match='was replaced by another dataset while it was in use'):
    videos.paths()


def test_a_run_ends_when_its_data_are_replaced_and_goes_on_when_they_are_put_back(
  data,
  tmp_path,
  fakes,  # noqa: F811
):
  def start(workdir):
    fakes.videos, fakes.fed = opened(data), {}
    assert train.train(CONFIG, tmp_path / workdir)
    return fakes.fed

  def assert_as_undisturbed(fed):
    for step, frames in fed.items():
      np.testing.assert_array_equal(frames, undisturbed[step])

  undisturbed = start('undisturbed')
  fakes.at[2] = lambda: swap(*files_of(data)[:2])
  with pytest.raises(ChangedDataset, match='was replaced while it was in use'):
    start('replaced')
  assert 2 <= max(fakes.fed) < CONFIG.num_steps
  assert_as_undisturbed(fakes.fed)
  with pytest.raises(UserError, match='is another file than the one that was built'):
    start('replaced')
  swap(*files_of(data)[:2])
  fakes.at = {}
  fed = start('replaced')
  assert max(fed) == CONFIG.num_steps
  assert_as_undisturbed(fed)


def test_verify_reads_what_opening_does_not(data):
  folder, (first, *_) = version_folder(data), files_of(data)
  assert publish.verify(folder, 2).endswith('MB) are as they were written')
  with first.open('r+b') as file:
    file.seek(500)
    file.write(b'damage')
  assert len(opened(data)) == 6
  with pytest.raises(BadInput, match=f'1 shards are missing or not those .*, as {first.name}'):
    publish.verify(folder, 2)
  first.unlink()
  with pytest.raises(BadInput, match=f'1 shards are missing or not those .*, as {first.name}'):
    publish.verify(folder, 2)
  (folder / 'index-val.npz').rename(folder / 'val')  # Now nothing says what its shards should be.
  with pytest.raises(BadInput, match='3 shards are missing'):
    publish.verify(folder, 2)
  (folder / 'index-val.npz').write_bytes(b'no index')
  with pytest.raises(BadInput, match=r'is damaged \(index-val.npz: '):
    publish.verify(folder, 2)
  (folder / 'index-val.npz').unlink()
  without_digests(data)
  with pytest.raises(BadInput, match='was built before datasets had digests'):
    publish.verify(folder, 2)
