"""Where videos are found, and what names and annotations say of them."""

import os
import re
import shutil

import numpy as np
import pytest
from conftest import run_python
from test_tfds_shards import run_here

from tfds_kinetics import build, tree
from tfds_kinetics.configs import COLLECTIONS
from tfds_kinetics.messages import BadInput
from tfds_kinetics.video import FrameOptions

FOLDER, KINETICS = COLLECTIONS['folder'], COLLECTIONS['kinetics400']
IDS = [f'{letter}' * 11 for letter in 'abcdef']


@pytest.fixture
def touch(tmp_path):
  """Makes files that are called like videos."""

  def make(*names):
    for name in names:
      path = tmp_path / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(b'x')

  return make


def paths(listing):
  return {split: [video.path for video in videos] for split, videos in listing.videos.items()}


def test_splits_and_classes(tmp_path, touch):
  touch('a/1.MP4', 'a/deep/2.mkv', '3.webm', 'a/notes.txt', 'test/4.mp4')
  listing = tree.list_videos(FOLDER, tmp_path)
  assert {v.path: v.label for v in listing.videos.pop('train')} == {
    'a/1.MP4': 'a',
    'a/deep/2.mkv': 'a',
    '3.webm': '',
    'test/4.mp4': 'test',
  }
  assert not listing.videos
  assert not listing.outside
  touch('train/b/5.mp4', 'validate/b/6.mp4', 'val/b/7.mp4')
  (tmp_path / 'train' / 'linked').symlink_to(tmp_path / 'a' / 'deep')
  (tmp_path / 'train' / 'loop').symlink_to(tmp_path / 'train')
  (tmp_path / 'train' / 'snake.mp4').symlink_to('snake.mp4')
  listing = tree.list_videos(FOLDER, tmp_path)
  assert paths(listing) == {
    'test': ['test/4.mp4'],
    'train': ['train/b/5.mp4', 'train/linked/2.mkv', 'train/snake.mp4'],
    'val': ['val/b/7.mp4', 'validate/b/6.mp4'],
  }
  assert [video.path for video in listing.outside] == ['3.webm', 'a/1.MP4', 'a/deep/2.mkv']


@pytest.mark.parametrize('form', ['{}', '{}_256', 'videos_{}'])
def test_split_folders_of_the_public_mirrors(tmp_path, touch, form):
  train, val = form.format('train'), form.format('val')
  touch(f'{train}/riding a bike/{IDS[0]}_000001_000011.mp4', f'{val}/juggling/{IDS[1]}.mkv')
  listing = tree.list_videos(KINETICS, tmp_path)
  (first,), (second,) = listing.videos['train'], listing.videos['val']
  assert (first.label, first.youtube_id) == ('riding a bike', IDS[0])
  assert (second.label, second.youtube_id) == ('juggling', IDS[1])


def test_folders_called_like_videos_and_folders_that_cannot_be_listed(tmp_path, touch, monkeypatch):
  touch('clips.mp4/1.mp4', 'locked/2.mp4')
  walk = tree.os.walk

  def refusing(folder, *, onerror, **options):
    onerror(PermissionError(13, 'Permission denied', str(tmp_path / 'locked')))
    return walk(folder, onerror=onerror, **options)

  monkeypatch.setattr(tree.os, 'walk', refusing)
  listing = tree.list_videos(FOLDER, tmp_path)
  assert ('train', 'clips.mp4', 'it is a folder') in listing.left_out
  reason = 'the folder cannot be listed: Permission denied'
  assert ('train', 'locked', reason) in listing.left_out
  assert 'clips.mp4/1.mp4' in paths(listing)['train']


@pytest.mark.parametrize(
  ('name', 'key'),
  [
    ('train/a/-_abcdefghi_000012_000022.mp4', ('-_abcdefghi', 12, 22)),
    ('abcdefghijk.webm', ('abcdefghijk', None, None)),
    ('abcdefghijk_5_15.mp4', ('abcdefghijk', 5, 15)),
    ('holiday.mp4', None),
    ('abcdefghijk_000012.mp4', None),
  ],
)
def test_names_of_clips(name, key):
  assert tree.clip_key(name) == key


def write_csv(path, rows, header='label,youtube_id,time_start,time_end,split'):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join([header, *rows]) + '\n')


@pytest.mark.parametrize('place', ['annotations/train.csv', 'kinetics400_train.csv'])
def test_flat_clips_get_their_class_from_the_annotations(tmp_path, touch, place):
  write_csv(
    tmp_path / place,
    [
      f'"juggling balls, fast",{IDS[0]},1,11,train',
      f'archery,{IDS[1]},2.0,12.0,train',
      f'archery,{IDS[2]},3,13,train',
      f'archery,{IDS[3]},3,13,train',
    ],
  )
  touch(
    f'train/{IDS[0]}_000001_000011.mp4',
    f'train/part_1/{IDS[1]}_000002_000012.mp4',
    f'train/{IDS[2]}.mp4',
    f'train/{IDS[4]}_000000_000010.mp4',
  )
  listing = tree.list_videos(KINETICS, tmp_path)
  assert {v.youtube_id: v.label for v in listing.videos['train']} == {
    IDS[0]: 'juggling balls, fast',
    IDS[1]: 'archery',
    IDS[2]: 'archery',
    IDS[4]: '',
  }
  assert listing.missing == {'train': [f'{IDS[3]}_000003_000013']}


@pytest.mark.parametrize(
  ('better', 'worse'),
  [
    ('train.csv', 'missing_train.csv'),
    ('train.txt', 'kinetics600_holdout_train.csv'),
    ('train.csv', 'annotations_train_of_another.csv'),
    ('kinetics_train.csv', 'kinetics_train_without_some.csv'),
    ('train.csv', 'deepmind_top-up/kinetics700_2020_delta/train.csv'),
    ('deepmind/kinetics700_2020/train.csv', 'deepmind/kinetics700_2020/train_delta.csv'),
    ('deepmind/kinetics700_2020/train.csv', '../train.csv'),
  ],
)
def test_which_annotations_are_taken(tmp_path, better, worse):
  for name in (better, worse):
    write_csv(tmp_path / 'annotations' / name, ['archery,aaaaaaaaaaa,1,11,train'])
  for name in ('AVA-Kinetics/countix_train.csv', 'train_list.txt'):
    write_csv(tmp_path / 'annotations' / name, ['a,b'], 'video_id,class')
  files = tree.annotation_files(tmp_path)
  assert files == {'train': tmp_path / 'annotations' / better}
  assert tree.annotation_files(tmp_path, tmp_path / 'annotations') == files


def test_lists_of_other_projects_are_no_annotations(tmp_path):
  (tmp_path / 'kinetics400_train_list_videos.txt').write_text('archery/a.mp4 0\n')
  assert not tree.annotation_files(tmp_path)


@pytest.mark.parametrize('folder', ['riding_a_bike', 'Riding a Bike'])
def test_a_class_is_one_however_its_folder_is_spelled(tmp_path, touch, folder):
  write_csv(tmp_path / 'train.csv', [f'riding a bike,{IDS[0]},1,11,train'])
  touch(f'train/{folder}/{IDS[0]}_000001_000011.mp4', f'train/{folder}/{IDS[1]}.mp4')
  touch(f'val/{folder}/{IDS[2]}.mp4', f'val/riding_a_horse/{IDS[3]}.mp4')
  listing = tree.list_videos(KINETICS, tmp_path)
  assert [video.label for video in listing.videos['train']] == ['riding a bike'] * 2
  assert [video.label for video in listing.videos['val']] == ['riding a bike', 'riding_a_horse']


def test_replacements_of_corrupted_clips_are_taken_for_them(tmp_path, touch):
  write_csv(tmp_path / 'annotations' / 'train.csv', [f'archery,{IDS[0]},1,11,train'])
  touch(f'train/{IDS[0]}_000001_000011.mp4', f'train/{IDS[1]}_000001_000011.mp4')
  folder = 'replacement/replacement_for_corrupted_k400'
  touch(f'{folder}/{IDS[0]}_000001_000011.mp4', f'{folder}/{IDS[2]}.mp4')
  listing = tree.list_videos(KINETICS, tmp_path)
  first, second = listing.videos['train']
  assert first.path == f'{folder}/{IDS[0]}_000001_000011.mp4'
  assert [copy.path for copy in first.copies] == [f'train/{IDS[0]}_000001_000011.mp4']
  assert (first.label, first.youtube_id) == ('archery', IDS[0])
  assert not second.copies
  assert [video.path for video in listing.outside] == [f'{folder}/{IDS[2]}.mp4']


def test_a_clip_that_is_there_twice_is_taken_once(tmp_path, touch):
  name = f'{IDS[0]}_000001_000011'
  touch(f'train/a/{name}.mp4', f'train/b/{name}.mkv', f'train/a/{IDS[0]}_000002_000012.mp4')
  touch(f'val/a/{name}.mp4', 'train/a/odd name.mp4', 'train/b/odd name.mp4')
  listing = tree.list_videos(KINETICS, tmp_path)
  (clip,) = (video for video in listing.videos['train'] if video.copies)
  assert clip.path == f'train/a/{name}.mp4'
  assert [copy.path for copy in clip.copies] == [f'train/b/{name}.mkv']
  assert list(map(len, paths(listing).values())) == [4, 1]
  assert len(tree.list_videos(FOLDER, tmp_path).videos['train']) == 5


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('a,b\n1,2\n', 'lacks the columns time_end, time_start, youtube_id (it has a, b)'),
    ('', 'lacks the columns time_end, time_start, youtube_id (it has none)'),
    ('youtube_id,time_start,time_end\nx,soon,later\n', 'cannot be read as annotations (could not'),
    ('youtube_id,time_start,time_end\nx\n', 'cannot be read as annotations'),
    ('youtube_id,time_start,time_end\nx,0,inf\n', 'cannot be read as annotations'),
  ],
)
def test_annotations_that_are_none(tmp_path, touch, content, message):
  touch('train/a/1.mp4')
  (tmp_path / 'train.csv').write_text(content)
  with pytest.raises(BadInput, match=re.escape(message)):
    tree.list_videos(KINETICS, tmp_path)
  tree.list_videos(FOLDER, tmp_path)


def test_an_annotations_folder_that_is_none(tmp_path, touch, monkeypatch):
  """It is told before the videos are listed, which may take long."""
  touch('train/a/1.mp4')
  monkeypatch.setattr(tree, '_walk', None)
  for place, message in (('none', 'is not a folder'), ('train', 'holds no train.csv')):
    with pytest.raises(BadInput, match=message):
      tree.list_videos(KINETICS, tmp_path, tmp_path / place)


def test_the_annotations_of_another_folder_are_taken(clips, tmp_path, monkeypatch, capsys):
  video = sorted(clips.glob('train/*/*_*.mp4'))[0]
  root = tmp_path / 'videos'
  (root / 'train').mkdir(parents=True)
  shutil.copy(video, root / 'train' / f'{IDS[0]}_000001_000011.mp4')
  write_csv(root / 'train.csv', [f'boxing,{IDS[0]},1,11,train'])
  write_csv(
    tmp_path / 'csv' / 'train.csv', [f'archery,{IDS[0]},1,11,train', f'boxing,{IDS[1]},1,11,train']
  )
  run_here(
    monkeypatch, '--config=kinetics700', f'--videos={root}', f'--data_dir={tmp_path}',
    f'--annotations={tmp_path}/csv', '--workers=1',
  )  # fmt: skip
  assert 'note: 1 clips of the annotations are not there' in capsys.readouterr().out
  index = tmp_path / 'kinetics_frames' / 'kinetics700' / '2.0.0' / 'index-train.npz'
  with np.load(index) as arrays:
    assert arrays['classes'].tolist() == ['archery']


def test_a_folder_behind_two_names_is_taken_by_the_first(tmp_path, touch, monkeypatch):
  touch('b/1.mp4')
  (tmp_path / 'a').symlink_to(tmp_path / 'b')
  (tmp_path / 'c').symlink_to(tmp_path / 'b')
  real = tree.os.walk

  def backwards(*arguments, **options):
    for place, folders, names in real(*arguments, **options):
      folders.sort(reverse=True)
      yield place, folders, names

  monkeypatch.setattr(tree.os, 'walk', backwards)
  listing = tree.list_videos(FOLDER, tmp_path)
  assert paths(listing) == {'train': ['a/1.mp4']}
  reason = 'the same folder as another, by a link'
  assert [row[1:] for row in listing.left_out] == [('b', reason), ('c', reason)]


def test_names_that_are_not_text_reach_the_report(clips, tmp_path):
  root = tmp_path / 'videos'
  folder = os.fsencode(root) + b'/train/caf\xe9'
  os.makedirs(folder)
  (root / 'train' / 'good').mkdir()
  content = next(clips.glob('val/*/*.mp4')).read_bytes()
  for name in (b'.mp4', b'.mkv'):
    with open(folder + b'/' + IDS[0].encode() + name, 'wb') as file:
      file.write(content)
  (root / 'train' / 'good' / f'{IDS[1]}.mp4').write_bytes(content)
  done = run_python(
    '-m', 'tfds_kinetics', '--config=kinetics400', f'--videos={root}', f'--data_dir={tmp_path}'
  )
  assert done.returncode == 0, done.stderr
  table = next(tmp_path.rglob('build_report.txt')).read_text()
  for name in ('.mp4', '.mkv'):
    assert f'train/caf\\xe9/{IDS[0]}{name}: its name is not valid UTF-8; rename it' in table


def test_validation_clips_do_not_become_training_data(tmp_path, touch):
  touch('kinetics400_train/a/1.mp4', 'kinetics400_val/a/2.mp4')
  with pytest.raises(BadInput, match='has no train folder'):
    build.plan(KINETICS, tmp_path, tmp_path, FrameOptions())
  touch('val/a/3.mp4')
  (tmp_path / 'train').mkdir()
  with pytest.raises(BadInput, match='has no video in its train folder, which --config=kinetics4'):
    build.plan(KINETICS, tmp_path, tmp_path, FrameOptions())
