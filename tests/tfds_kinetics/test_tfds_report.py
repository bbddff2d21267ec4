"""The report of a build against what lies in the dataset, and what its fingerprints change with."""

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_tfds_build import job_of, write
from test_tfds_shards import OPTIONS, build_here, stored, textured
from test_tfds_video import write_video

from tfds_kinetics import report, shards
from tfds_kinetics.configs import COLLECTIONS
from tfds_kinetics.tree import Video
from tfds_kinetics.video import FrameOptions, read_jpegs

DEFAULTS = FrameOptions()
A, B, C, D, E = (letter * 11 for letter in 'abcde')
KEPT, BROKEN = '', 'it cannot be opened: .*'
AGAIN = f'the same clip as train/archery/{A}_000001_000011.mp4'
# Forges a row, clears the terminal, and turns text around.
FORGED, SHOWN = 'a\nkept\x1b[2J\x9b\x7f\u202e', r'a\nkept\u001b[2J\u009b\u007f\u202e'
# Of every file of the tree: split, path, class, number of frames, and why it is left out.
FILES = [
  ('', f'elsewhere/{FORGED}.mp4', '', 0, 'it is in the folder of no split'),
  ('', f'elsewhere/{E}.mp4', '', 0, 'it is in the folder of no split'),
  ('test', f'test/{A}.mp4', '', 2, KEPT),
  ('train', 'train/a folder.mp4', '', 0, 'it is a folder'),
  ('train', f'train/archery/{A}_000001_000011.avi', 'archery', 0, AGAIN),
  ('train', f'train/archery/{A}_000001_000011.mkv', 'archery', 0, BROKEN),
  ('train', f'train/archery/{A}_000001_000011.mp4', 'archery', 3, KEPT),
  ('train', f'train/boxing/{B}.mkv', 'boxing', 4, KEPT),
  ('train', f'train/boxing/{B}.mp4', 'boxing', 0, f'the same clip as train/boxing/{B}.mkv'),
  ('train', f'train/{C}_000002_000012.mp4', 'juggling', 5, KEPT),
  ('val', f'val/boxing/{D}_000003_000013.mp4', 'archery', 6, KEPT),
  ('val', f'val/boxing/{E}.mp4', 'boxing', 0, BROKEN),
]
MISSING = {
  'train': [f'{D}_000001_000011', f'{E}_000007_000017'],
  'val': ['\x1b[2J_000000_000010', f'{A}_000000_000010'],
}
ANNOTATIONS = {
  'train.csv': [
    f'archery,{A},1,11',
    f'juggling,{C},2,12',
    f'archery,{E},7,17',
    f'archery,{D},1,11',
  ],
  'val.csv': [f'archery,{D},3,13', f'boxing,{A},0,10', 'boxing,\x1b[2J,0,10'],
}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """The dataset of a tree in which every kind of file is."""
  root = tmp_path_factory.mktemp('report') / 'videos'
  (root / 'annotations').mkdir(parents=True)
  for name, rows in ANNOTATIONS.items():
    text = '\n'.join(['label,youtube_id,time_start,time_end', *rows])
    (root / 'annotations' / name).write_text(text)
  for number, (_, path, _, frames, reason) in enumerate(FILES):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    if frames:
      write_video(root / path, frames=textured(48, 64, frames, number), qp='9')
    elif reason == 'it is a folder':
      (root / path).mkdir()
    else:
      # The broken copy is larger than the good one, and the other one smaller: largest come first.
      (root / path).write_bytes(b'x' * (99_999 if path.endswith('.mkv') else 999))
  with pytest.MonkeyPatch.context() as patch:
    # So that a shard holds several videos, and a video goes on in another file.
    patch.setattr(shards, 'LEAST_SHARDS', 2)
    patch.setattr(shards, 'RECORDS_PER_FILE', 4)
    return build_here(root, root.parent, DEFAULTS, 'kinetics400')


def test_every_file_has_one_row_and_what_it_says_is_there(built):
  made = json.loads((built / report.NAME).read_text())
  rows = made['videos']
  expected = sorted(FILES)
  assert [(row['split'], row['path']) for row in rows] == [each[:2] for each in expected]
  frames = {
    path: jpegs
    for split in ('test', 'train', 'val')
    for path, jpegs in stored(built, split).items()
  }
  for row, (_, path, label, number, reason) in zip(rows, expected, strict=True):
    outcome = 'kept' if number else 'outside' if row['split'] == '' else 'skipped'
    assert (row['outcome'], row['class'], row['frames']) == (outcome, label, number)
    assert re.fullmatch(reason, row['reason']), row
    assert row['bytes'] == sum(map(len, frames.pop(path, [])))
    assert row['seconds'] >= 0
  assert not frames
  assert made['totals']['seconds'] > 0
  assert made['missing'] == MISSING
  assert made['totals'] == {
    'videos': 5,
    'skipped': 5,
    'missing': 4,
    'outside': 2,
    'frames': 20,
    'bytes': sum(path.stat().st_size for path in built.glob('*.array_record*')),
    'seconds': pytest.approx(sum(row['seconds'] for row in rows), abs=1e-3),
    'classes': 3,
    'classes_expected': 400,
  }
  assert made['dataset'] == 'kinetics_frames/kinetics400/2.0.0'
  assert made['options'] == dataclasses.asdict(DEFAULTS)
  for index in built.glob('index-*.npz'):
    with np.load(index) as arrays:
      names = [pathlib.Path(path).name for path in arrays['path']]
      assert arrays['youtube_id'].tolist() == [name[:11] for name in names]
  # Line tools can read it.
  lines = (built / report.NAME).read_text().splitlines()
  assert [json.loads(line.strip(' ,')) for line in lines if '"outcome"' in line] == rows
  assert all(line.isprintable() for line in lines)


def test_the_table_says_what_the_report_does(built):
  made = json.loads((built / report.NAME).read_text())
  text = (built / report.TABLE).read_text().rstrip('\n')
  head, table, *missing = text.split('\n\n')
  size = made['totals']['bytes'] / 1e6
  assert head.splitlines() == [
    f'5 videos, 20 frames, {size:.1f} MB, 3 classes; 5 skipped;'
    f' {made["totals"]["seconds"]:.0f} s of work',
    'note: 4 clips of the annotations are not there',
    'note: 2 videos are in the folder of no split, and left out',
    'note: a complete copy has 400 classes',
  ]
  first_kept = next(i for i, row in enumerate(table.splitlines()[2:]) if row.startswith('kept'))
  assert first_kept == 7  # What was left out stands first.
  rows = sorted(line.split(maxsplit=4) for line in table.splitlines()[2:])
  assert rows == sorted(
    [
      row['outcome'],
      str(row['frames']),
      f'{row["bytes"] / 1e6:.2f}',
      f'{row["seconds"]:.2f}',
      row['path'].replace(FORGED, SHOWN) + f': {row["reason"]}' * bool(row['reason']),
    ]
    for row in made['videos']
  )
  assert missing == [
    '\n'.join([f'annotated in {split}, but not there: {len(names)}', *names]).replace(
      '\x1b', r'\u001b'
    )
    for split, names in MISSING.items()
  ]


@pytest.mark.parametrize('skipped', [0, 10, 12])
def test_the_closing_lines_show_the_first_that_were_skipped(built, tmp_path, skipped):
  made = json.loads((built / report.NAME).read_text())
  row = made['videos'][0] | {'outcome': 'skipped', 'reason': 'no reason'}
  kept = [each for each in made['videos'] if each['outcome'] == 'kept']
  made['videos'] = [row | {'path': f'{number}.mp4'} for number in range(skipped)] + kept
  report.write_report(tmp_path, made)
  first, *lines = report.summary(tmp_path).splitlines()
  head = (built / report.TABLE).read_text().splitlines()[:4]
  assert [first, *lines[:3]] == [f'{tmp_path}: {head[0]}', *head[1:]]
  assert lines[3:] == [
    *(f'  skipped {number}.mp4: no reason' for number in range(min(skipped, 10))),
    *(['  and 2 more'] if skipped == 12 else []),
    f'  report: {tmp_path / report.TABLE}',
  ]


def test_the_metadata_are_of_the_collection(built):
  info = tfds.builder_from_directory(built).info
  collection = COLLECTIONS['kinetics400']
  assert info.description == collection.description
  assert info.citation == collection.citation
  assert info.homepage == collection.homepage
  assert {name: split.num_examples for name, split in info.splits.items()} == {
    'test': 2,
    'train': 12,
    'val': 6,
  }


def raw_video(path, frames):
  """Writes frames of which each takes equally many bytes, whatever it shows."""
  path.parent.mkdir(parents=True, exist_ok=True)
  write_video(path, 'rawvideo', 'bgr24', frames)


def prints(root, data_dir, options=DEFAULTS):
  """The fingerprints of a dataset: of its plan, and of its frames."""
  shutil.rmtree(data_dir, ignore_errors=True)
  folder = build_here(root, data_dir, options)
  made = json.loads((folder / report.NAME).read_text())
  for index in folder.glob('index-*.npz'):
    with np.load(index) as arrays:
      assert str(arrays['fingerprint']) == made['fingerprint']
  return made['plan'], made['fingerprint']


PIXELS = textured(24, 36, 3)


@pytest.fixture
def root(tmp_path):
  for number, name in enumerate(('train/a/1.avi', 'train/b/2.avi', 'val/a/3.avi')):
    raw_video(tmp_path / 'videos' / name, np.roll(PIXELS, 7 * number, axis=1))
  return tmp_path / 'videos'


def change_a_pixel(root):
  pixels = PIXELS.copy()
  pixels[-1, -1, -1] ^= 128
  raw_video(root / 'train/a/1.avi', pixels)


def swap_two(root):
  first, second = root / 'train/a/1.avi', root / 'train/b/2.avi'
  content = first.read_bytes()
  first.write_bytes(second.read_bytes())
  second.write_bytes(content)


@pytest.mark.parametrize(
  ('change', 'changes_plan', 'changes_frames'),
  [
    (change_a_pixel, False, True),
    (swap_two, False, True),
    (lambda root: (root / 'train/a/1.avi').rename(root / 'train/a/0.avi'), True, True),
    (lambda root: (root / 'train/a').rename(root / 'train/c'), True, True),
    (lambda root: (root / 'val').rename(root / 'test'), True, True),
    (lambda root: (root / 'val/a/3.avi').unlink(), True, True),
    (lambda root: raw_video(root / 'val/a/4.avi', PIXELS), True, True),
    (lambda root: (root / 'val/a/4.avi').write_bytes(b'junk'), True, False),
    (lambda root: (root / 'train/a/1.avi').touch(), False, False),
    (lambda root: root.rename(root.with_name('moved')), False, False),
  ],
)
def test_what_videos_do_to_the_fingerprints(root, tmp_path, change, changes_plan, changes_frames):
  before = prints(root, tmp_path / 'data')
  change(root)
  after = prints(root if root.exists() else root.with_name('moved'), tmp_path / 'data')
  assert (before[0] != after[0], before[1] != after[1]) == (changes_plan, changes_frames)


# Those of OPTIONS would cut nothing off videos as small and short as these.
CHANGES = dataclasses.asdict(OPTIONS) | {'short_side': 20, 'max_frames': 2}


@pytest.mark.parametrize('field', CHANGES)
def test_what_options_do_to_the_fingerprints(root, tmp_path, field):
  """Those that alter no frame are of the plan alone."""
  other = dataclasses.replace(DEFAULTS, **{field: CHANGES[field]})
  before, after = prints(root, tmp_path / 'data'), prints(root, tmp_path / 'data', other)
  assert before[0] != after[0]
  assert (before[1] != after[1]) == (field not in ('max_damage', 'time_limit'))


JOB = shards.ShardJob(
  'train', 3, '/root', (Video('a.mp4', 'x', 7, 'id', (Video('b.mp4', 'x', 9, 'id'),)),), OPTIONS
)


def changed_video(**changes):
  return dataclasses.replace(JOB, videos=(dataclasses.replace(JOB.videos[0], **changes),))


@pytest.mark.parametrize(
  'other',
  [
    dataclasses.replace(JOB, split='val'),
    dataclasses.replace(JOB, number=4),
    dataclasses.replace(JOB, videos=JOB.videos * 2),
    changed_video(path='c.mp4'),
    changed_video(label='y'),
    changed_video(size=8),
    changed_video(youtube_id='other'),
    changed_video(copies=()),
    changed_video(copies=(Video('c.mp4', 'x', 9, 'id'),)),
    changed_video(copies=(Video('b.mp4', 'x', 8, 'id'),)),
  ],
)
def test_a_shard_of_another_job_is_not_taken_for_it(tmp_path, other):
  assert dataclasses.replace(JOB, root='/elsewhere').fingerprint == JOB.fingerprint
  assert other.fingerprint != JOB.fingerprint
  table = {'fingerprint': JOB.fingerprint, 'files': [], 'videos': [], 'skipped': []}
  for name in {JOB.name, other.name}:
    (tmp_path / f'{name}.json').write_text(json.dumps(table))
  assert shards.finished_table(JOB, tmp_path) == table
  assert shards.finished_table(other, tmp_path) is None


def test_the_plan_of_a_build_is_the_recorded_one():
  """With the default options: else an unfinished build could not go on after an update.

  The order is that of the stream too, which a seed gives.
  """
  videos = [Video(f'{number}.mp4', 'a', number) for number in range(1000)]
  jobs = shards.shard_jobs(pathlib.Path('/x'), 'train', videos, DEFAULTS)
  assert [job.number for job in jobs] == list(range(42))
  recorded = [864, 870, 891, 188, 332, 379, 173, 624, 506, 158, 639, 459]
  assert [video.size for video in jobs[0].videos[:12]] == recorded
  assert report.plan_fingerprint(jobs).startswith('7c9150b0019873f73c0268be')


def test_the_digest_of_a_video_is_of_all_its_bytes(root, tmp_path):
  (row,) = write(job_of(root, 'val'), tmp_path)['videos']
  jpegs = list(read_jpegs(str(root / row['path']), DEFAULTS))
  assert row['sha256'] == hashlib.sha256(b''.join(jpegs)).hexdigest()
