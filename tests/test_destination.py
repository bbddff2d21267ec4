"""Where files may be put, and what stays of what was there."""

import json
import os
import pathlib

import pytest

from dropmae_jax import destination
from dropmae_jax.command_line import BadInput


def write(path, text='new'):
  with destination.staged(path, num_bytes=1) as partial:
    partial.write_text(text)
    destination.write_card(partial, {})


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


@pytest.mark.parametrize('name', ['out.pth', 'out.pth.sha256', 'out.pth.json'])
@pytest.mark.parametrize('make', [os.mkfifo, lambda path: path.symlink_to(path)])
def test_special_files_are_not_replaced(tmp_path, name, make):
  make(tmp_path / name)
  with pytest.raises(BadInput, match=f'{name} is no regular file; give another name'):
    write(tmp_path / 'out.pth')
  assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize('content', ['{"private": 1}', '[1]', 'no json', '{"file": "x"}'])
def test_only_cards_are_replaced(tmp_path, content):
  other = tmp_path / 'out.pth.json'
  other.write_text(content)
  with pytest.raises(BadInput, match=r'out.pth.json is not the card of a file of weights'):
    write(tmp_path / 'out.pth')
  assert other.read_text() == content
  other.unlink()
  write(tmp_path / 'out.pth')
  write(tmp_path / 'out.pth', 'again')
  assert (tmp_path / 'out.pth').read_text() == 'again'


def test_the_place_is_looked_at_again_before_it_is_taken(tmp_path):
  with (
    pytest.raises(BadInput, match='is no regular file'),
    destination.staged(tmp_path / 'out.pth', num_bytes=1) as partial,
  ):
    partial.write_text('new')
    os.mkfifo(tmp_path / 'out.pth')
  assert os.listdir(tmp_path) == ['out.pth']


@pytest.mark.parametrize('name', ['.', '/', ''])
def test_a_file_needs_a_name(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(BadInput, match='names no file; give the path of one'):
    destination.check_file(pathlib.Path(name))


def test_the_longest_names_fit(tmp_path):
  write(tmp_path / ('n' * (255 - len('.sha256'))))
  for name in ('n' * (256 - len('.sha256')), 'n' * 300):
    with pytest.raises(BadInput, match=r'cannot be written \(File name too long\)'):
      destination.check_file(tmp_path / name)
  with pytest.raises(BadInput, match=r'cannot be written \(File name too long\)'):
    destination.check_folder(tmp_path / ('n' * 300))
