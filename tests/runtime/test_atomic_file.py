"""Where files may be written, and what happens to earlier files."""

import hashlib
import json
import os
import pathlib
import shutil
import types

import pytest

from dropmae_jax.runtime import atomic_file
from dropmae_jax.runtime.errors import UserError


def write(path, text='new'):
  with atomic_file.staged(path, num_bytes=1) as partial:
    partial.write_text(text)
    atomic_file.write_card(partial, {})


def test_links_stay_and_what_they_point_to_is_written(tmp_path):
  folder = tmp_path / 'elsewhere'
  folder.mkdir()
  link = tmp_path / 'link.pth'
  link.symlink_to(folder / 'real.pth')
  for text in ('first', 'second'):
    write(link, text)
    assert link.is_symlink()
    assert (folder / 'real.pth').read_text() == text
    assert json.loads((folder / 'real.pth.json').read_text())['file'] == 'real.pth'
  assert [path.name for path in tmp_path.iterdir() if path != folder] == ['link.pth']


def test_without_a_card_files_of_its_names_are_left_alone(tmp_path):
  for ending in ('sha256', 'json'):
    (tmp_path / f'out.png.{ending}').write_text('private')
  with atomic_file.staged(tmp_path / 'out.png', num_bytes=1, has_card=False) as partial:
    partial.write_text('new')
  content = {path.name: path.read_text() for path in tmp_path.iterdir()}
  assert content == {'out.png': 'new', 'out.png.sha256': 'private', 'out.png.json': 'private'}


@pytest.mark.parametrize('name', ['out.pth', 'out.pth.sha256', 'out.pth.json'])
@pytest.mark.parametrize('make', [os.mkfifo, lambda path: path.symlink_to(path)])
def test_special_files_are_not_replaced(tmp_path, name, make):
  make(tmp_path / name)
  with pytest.raises(UserError, match=f'{name} is not a regular file; give another name'):
    write(tmp_path / 'out.pth')
  assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize('content', ['{"private": 1}', '[1]', 'no json', '{"file": "x"}'])
def test_only_cards_are_replaced(tmp_path, content):
  other = tmp_path / 'out.pth.json'
  other.write_text(content)
  with pytest.raises(UserError, match=r'out.pth.json is not the card of a weight file'):
    write(tmp_path / 'out.pth')
  assert other.read_text() == content
  other.unlink()
  write(tmp_path / 'out.pth')
  write(tmp_path / 'out.pth', 'again')
  assert (tmp_path / 'out.pth').read_text() == 'again'


def test_the_place_is_looked_at_again_before_it_is_taken(tmp_path):
  with (
    pytest.raises(UserError, match='is not a regular file'),
    atomic_file.staged(tmp_path / 'out.pth', num_bytes=1) as partial,
  ):
    partial.write_text('new')
    os.mkfifo(tmp_path / 'out.pth')
  assert os.listdir(tmp_path) == ['out.pth']


@pytest.mark.parametrize('name', ['.', '/', ''])
def test_a_file_needs_a_name(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match='does not name a file; give the path of one'):
    atomic_file.check_file(pathlib.Path(name))


def test_the_longest_names_fit(tmp_path):
  write(tmp_path / ('n' * (255 - len('.sha256'))))
  for name in ('n' * (256 - len('.sha256')), 'n' * 300):
    with pytest.raises(UserError, match=r'cannot be written \(File name too long\)'):
      atomic_file.check_file(tmp_path / name)
  with pytest.raises(UserError, match=r'cannot be written \(File name too long\)'):
    atomic_file.check_folder(tmp_path / ('n' * 300))


@pytest.mark.parametrize('moved', [0, 1, 2])
def test_whenever_it_is_cut_off_no_sum_lies_beside_another_file(tmp_path, monkeypatch, moved):
  path = tmp_path / 'out.pth'
  write(path, 'first')
  real, calls = pathlib.Path.replace, iter(range(9))

  def replace(self, target):
    if next(calls) == moved:
      raise OSError('cut off')
    return real(self, target)

  monkeypatch.setattr(pathlib.Path, 'replace', replace)
  with pytest.raises(UserError, match='cut off'):
    write(path, 'second')
  assert path.read_text() == ('second' if moved else 'first')
  listed = atomic_file.sha256_path(path)
  if listed.exists():
    assert listed.read_text().split()[0] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path, monkeypatch):
  free = types.SimpleNamespace(free=5_000_000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda folder: free)
  with atomic_file.staged(tmp_path / 'out.pth', num_bytes=5_000_000) as partial:
    # On the same file system, where it can be moved from in one go.
    assert partial.parent.parent == tmp_path
    partial.touch()
  too_much = atomic_file.staged(tmp_path / 'out.pth', num_bytes=6_000_000)
  with pytest.raises(UserError, match='needs 6 MB and 5 MB are free in'), too_much:
    pass
  assert os.listdir(tmp_path) == ['out.pth']
