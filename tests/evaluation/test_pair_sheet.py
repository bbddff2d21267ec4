"""The sheet shows the training stream, with boxes where the crops are."""

import itertools
import shutil
from typing import NamedTuple

import numpy as np
import pytest
from conftest import assert_one_sentence
from PIL import Image, ImageDraw, ImageFont
from sources import NumberedVideos

from dropmae_jax.config import DataOptions
from dropmae_jax.data import augment, frame_pairs, video_source
from dropmae_jax.data.mixture import open_mixture
from dropmae_jax.data.video_source import open_dataset
from dropmae_jax.evaluation import pair_sheet
from dropmae_jax.evaluation.pair_sheet import BOX_COLOUR, CAPTION, CHART, MARGIN
from dropmae_jax.train_step import derive_seeds

SIZE = 40


def draw_sheet(monkeypatch, capsys, output, *arguments):
  """Runs the command in this process; returns the sheet and what it printed."""
  monkeypatch.setattr('sys.argv', ['inspect_data', f'--output={output}', *arguments])
  pair_sheet.main()
  return np.asarray(Image.open(output)), capsys.readouterr().out


def drawn_text(text, width, height):
  image = Image.new('RGB', (width, height), 'white')
  ImageDraw.Draw(image).text((MARGIN, 3), text, fill='black')
  return np.asarray(image)


class Options(NamedTuple):
  split: str
  seed: int
  pairs: int
  frame_gap: int
  resize: str
  shared_augmentation: bool


@pytest.mark.parametrize(
  'chosen', [Options('train', 5, 6, 4, 'fast', False), Options('val', 9, 3, 3, 'exact', True)]
)
def test_the_sheet_shows_the_training_stream(data_dir, tmp_path, monkeypatch, capsys, chosen):
  flags = [f'--{name}={getattr(chosen, name)}' for name in chosen._fields[:-1]]
  flags += ['--shared_augmentation'] * chosen.shared_augmentation
  flags += [f'--data_dir={data_dir}', f'--image_size={SIZE}']
  sheet, printed = draw_sheet(monkeypatch, capsys, tmp_path / 'a.png', *flags)
  dataset = open_dataset(str(data_dir), 'kinetics_frames/folder', chosen.split)
  how = chosen._asdict()
  options = DataOptions(
    num_threads=1, **{name: how[name] for name in ('frame_gap', 'resize', 'shared_augmentation')}
  )
  stream = frame_pairs.pair_batches(
    dataset, options, image_size=SIZE, batch_size=chosen.pairs, seed=derive_seeds(chosen.seed).data
  )
  batch = next(stream)
  stream.close()
  with np.load(dataset.folder / f'index-{chosen.split}.npz') as index:
    paths, classes = index['path'], index['classes'][index['label']]
  wide, high = 64, 48  # The clips' frames; higher than the crops.
  columns = [MARGIN, 2 * MARGIN + wide, 3 * MARGIN + 2 * wide, 4 * MARGIN + 2 * wide + SIZE]
  bottom = MARGIN + chosen.pairs * (CAPTION + high + MARGIN)
  assert sheet.shape == (bottom + CHART, columns[3] + SIZE + MARGIN, 3)
  for row in range(chosen.pairs):
    top, boxes = MARGIN + row * (CAPTION + high + MARGIN) + CAPTION, []
    video, numbers = int(batch['video'][row]), batch['frame_numbers'][row].tolist()
    caption = (
      f'kinetics_frames/folder   {paths[video]}   class {classes[video]}'
      f'   frames {numbers[0]} and {numbers[1]} of 8   gap {numbers[1] - numbers[0]}'
    )
    np.testing.assert_array_equal(
      sheet[top - CAPTION : top], drawn_text(caption, sheet.shape[1], CAPTION)
    )
    for frame in range(2):
      crop = sheet[top : top + SIZE, columns[2 + frame] :][:, :SIZE]
      np.testing.assert_array_equal(crop, batch['frames'][row, frame])
      whole = dataset.frame(video, numbers[frame])
      panel = sheet[top : top + high, columns[frame] :][:, :wide]
      changed = np.argwhere((panel != whole).any(axis=-1))
      assert (panel[tuple(changed.T)] == BOX_COLOUR).all()
      (y, x), (low, right) = changed.min(axis=0).tolist(), changed.max(axis=0).tolist()
      box = augment.Box(y, x, low - y + 1, right - x + 1)
      # The content of the drawn box is the crop.
      np.testing.assert_array_equal(
        augment.crop_and_resize(whole, box, SIZE, resize=chosen.resize), crop
      )
      assert (panel[y, x : right + 1] == BOX_COLOUR).all()
      assert (panel[y : low + 1, right] == BOX_COLOUR).all()
      boxes.append(box)
    assert (boxes[0] == boxes[1]) == chosen.shared_augmentation
  counts = pair_sheet.gap_counts(
    np.full(len(dataset), 8), chosen.frame_gap, seed=chosen.seed, draws=pair_sheet.GAP_DRAWS
  )
  bars = (sheet[bottom:] == (70, 110, 180)).all(axis=-1).sum(axis=0)
  ends = np.linspace(MARGIN, sheet.shape[1] - MARGIN, len(counts[1:]) + 1).astype(int)
  heights = [bars[left:right].max() for left, right in itertools.pairwise(ends)]
  np.testing.assert_allclose(heights, (CHART - 2 * CAPTION) * counts[1:] / counts.max() + 1, atol=1)
  size = sum(p.stat().st_size for p in dataset.folder.glob(f'*{chosen.split}.array_record*'))
  index = pair_sheet.Index(
    'kinetics_frames/folder', np.full(len(dataset), 8), None, None, np.unique(classes), size
  )
  assert printed == (
    f'{pair_sheet.statistics(index, counts)}\n'
    f'{tmp_path / "a.png"}: the first {chosen.pairs} pairs of seed {chosen.seed}\n'
  )


def test_the_statistics_are_those_of_the_index():
  index = pair_sheet.Index(
    'a/b', np.array([3, 9, 4]), np.array([1, 0, 1]), np.array(['x', 'y', 'z']),
    np.array(['', 'a']), 1_600,
  )  # fmt: skip
  assert pair_sheet.statistics(index, np.array([10, 30, 60])).splitlines() == [
    'dataset           a/b',
    'clips             3',
    'frames            16',
    'frames per clip   least 3, median 4, most 9',
    'classes           1',
    'bytes on disk     1600 (100 per frame)',
    'frames between the two of a pair, 100 pairs:',
    f'        0  10.0% {8 * "#"}',
    f'        1  30.0% {25 * "#"}',
    f'        2  60.0% {50 * "#"}',
  ]
  assert [pair_sheet.class_name(index, video) for video in range(3)] == ['a', '-', 'a']


class Clips(NumberedVideos):
  """A dataset of a user, without classes, paths and a size in bytes."""

  def __init__(self, data_dir, split):
    assert (data_dir, split) == ('here', 'all')
    super().__init__([2, 7])


class NamedClips(Clips):
  def paths(self):
    return ['first', 'second']


@pytest.mark.parametrize('kind', [Clips, NamedClips])
def test_a_class_of_the_user_is_shown(tmp_path, monkeypatch, capsys, kind):
  name, drawn = f'{__name__}:{kind.__name__}', []
  real = pair_sheet.contact_sheet
  monkeypatch.setattr(pair_sheet, 'contact_sheet', lambda *a: drawn.append(a) or real(*a))
  flags = f'--data_dir=here --split=all --dataset={name} --pairs=1 --image_size={SIZE}'
  sheet, printed = draw_sheet(monkeypatch, capsys, tmp_path / 'a.png', *flags.split())
  assert printed.splitlines()[:6] == [
    f'dataset           {name}',
    'clips             2',
    'frames            9',
    'frames per clip   least 2, median 4.5, most 7',
    'classes           -',
    'bytes on disk     -',
  ]
  (((pair,), _, _),) = drawn
  video, (earlier, later) = pair.drawn.video, pair.drawn.frame_numbers
  path = '-' if kind is Clips else ('first', 'second')[video]
  caption = (
    f'{name}   {path}   class -'
    f'   frames {earlier} and {later} of {(2, 7)[video]}   gap {later - earlier}'
  )
  top, width = MARGIN, sheet.shape[1]
  np.testing.assert_array_equal(sheet[top : top + CAPTION], drawn_text(caption, width, CAPTION))


class OddClips(NumberedVideos):
  """A clip of very wide frames, and one of very high ones."""

  def __init__(self, *_):
    super().__init__([2, 2])

  def frame(self, video, number):
    shape = ((30, 16_000, 3), (4_096, 64, 3))[video]
    return np.full(shape, (100 * (video + 1), 0, 7), np.uint8)


def test_frames_of_extreme_sizes_make_no_larger_sheet(tmp_path, monkeypatch, capsys):
  flags = f'--data_dir=x --dataset={__name__}:OddClips --pairs=4 --image_size=1000'
  sheet, _ = draw_sheet(monkeypatch, capsys, tmp_path / 'a.png', *flags.split())
  side = pair_sheet.PANEL
  assert sheet.shape[1] == 5 * MARGIN + 4 * side
  assert sheet.shape[0] == MARGIN + 4 * (CAPTION + side + MARGIN) + CHART
  flags = flags.replace('1000', '16')
  low, _ = draw_sheet(monkeypatch, capsys, tmp_path / 'b.png', *flags.split())
  # Two rows are as high as the high clip, and two as the crops; each clip is met twice.
  assert low.shape[0] == MARGIN + 4 * (CAPTION + MARGIN) + 2 * (side + 16) + CHART
  frames = low[:, : 2 * MARGIN + side]
  assert (frames == (200, 0, 7)).all(axis=-1).any()
  assert (frames == BOX_COLOUR).all(axis=-1).any()


def test_a_mixture_is_shown_as_training_reads_it(data_dir, tmp_path, monkeypatch, capsys):
  name, twin = 'kinetics_frames/folder', 'kinetics_frames/twin'
  (tmp_path / 'kinetics_frames').mkdir()
  for each in (name, twin):
    (tmp_path / each).symlink_to(data_dir / name)
  text, drawn = f'{name}=1,{twin}=2', []
  real = pair_sheet.contact_sheet
  monkeypatch.setattr(pair_sheet, 'contact_sheet', lambda *a: drawn.append(a) or real(*a))
  flags = f'--data_dir={tmp_path} --dataset={text} --seed=5 --pairs=6 --image_size={SIZE}'
  sheet, printed = draw_sheet(monkeypatch, capsys, tmp_path / 'o.png', *flags.split())
  ((pairs, indices, counts),) = drawn
  stream = frame_pairs.pair_batches(
    open_mixture(str(tmp_path), text), DataOptions(num_threads=1), image_size=SIZE, batch_size=6,
    seed=derive_seeds(5).data,
  )  # fmt: skip
  batch = next(stream)
  assert [pair.dataset for pair in pairs] == batch['dataset'].tolist()
  np.testing.assert_array_equal([pair.crops for pair in pairs], batch['frames'])
  assert sorted(set(batch['dataset'])) == [0, 1]
  assert [index.dataset for index in indices] == [name, twin]
  assert counts.sum() == pair_sheet.GAP_DRAWS
  # A third and two thirds of the draws, by the weights.
  assert [line for line in printed.splitlines() if 'frames between' in line] == [
    f'frames between the two of a pair, {draws} pairs:' for draws in (3333, 6667)
  ]
  for row, pair in enumerate(pairs):
    top = MARGIN + row * (CAPTION + 48 + MARGIN)
    shown = (name, twin)[pair.dataset]
    width = MARGIN + int(ImageFont.load_default().getlength(shown))
    expected = drawn_text(shown, width, CAPTION)
    np.testing.assert_array_equal(sheet[top : top + CAPTION, :width], expected)


def test_damaged_records_are_reported_once_each(data_dir, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(video_source, 'RETRY_SECONDS', ())
  shutil.copytree(data_dir, tmp_path / 'data')
  for shard in (tmp_path / 'data').glob('**/*-train.array_record*'):
    with shard.open('r+b') as file:  # The first record of the shard.
      file.seek(500)
      file.write(b'damage')
  flags = f'--data_dir={tmp_path}/data --image_size={SIZE} --pairs=30 --seed=5'
  _, printed = draw_sheet(monkeypatch, capsys, tmp_path / 'a.png', *flags.split())
  stream = frame_pairs.pair_batches(
    open_dataset(f'{tmp_path}/data', 'kinetics_frames/folder'), DataOptions(num_threads=1),
    image_size=SIZE, batch_size=30, seed=derive_seeds(5).data,
    move=lambda batch: list(batch.damaged),
  )  # fmt: skip
  met = [message for messages in next(stream) for message in messages]
  stream.close()
  assert len(met) > len(set(met)) > 2
  notes = [line for line in printed.splitlines() if line.startswith('note: ')]
  assert notes == [f'note: {each} Another video is taken instead.' for each in dict.fromkeys(met)]


def test_gaps_follow_the_distribution_and_bars_contain_all():
  frames = np.array([1, 8, 60])
  counts = pair_sheet.gap_counts(frames, 50, seed=0, draws=3000)
  assert len(counts) == 50
  assert counts.sum() == 3000
  assert counts[0] == pytest.approx(1000, abs=100)  # Clips of one frame.
  assert counts[8:].sum() == pytest.approx(720, abs=100)
  gathered = pair_sheet.bars(counts)
  assert gathered[0] == ('0', counts[0])
  assert gathered[1] == ('1-2', counts[1] + counts[2])
  assert gathered[-1] == ('49', counts[49])
  assert sum(count for _, count in gathered) == 3000
  assert pair_sheet.bars(np.array([0, 7])) == [('1', 7)]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ('--data_dir={tmp} --output={tmp}/o.png', 'build it with: python -m tfds_kinetics'),
    ('--data_dir={data} --output={tmp}/o.png --split=tset', "has no split 'tset'"),
    ('--data_dir={tmp} --output={tmp}', 'is a folder; give the name of a file'),  # Seen first.
    ('--data_dir={data} --output={tmp}/no/o.png --image_size=16', 'does not exist; make it first'),
    ('--data_dir={data} --output={tmp}/o.png --dataset=a=1,a=2', 'is not understood at'),
    ('--data_dir={data} --output={tmp}/o.png --pairs=0', '--pairs=0 is not in 1..100'),
    ('--data_dir={data} --output={tmp}/o.png --frame_gap=1', '--frame_gap=1 is not in 2..'),
    ('--data_dir={data} --output={tmp}/o.png --seed=-1', '--seed=-1 is not in 0..'),
    ('--data_dir={data} --output={tmp}/o.png --resize=fats', "did you mean 'fast'?"),
    ('--data_dir={data}', 'the following arguments are required: --output'),
  ],
)
def test_bad_input(data_dir, tmp_path, run_here, flags, message):
  arguments = flags.format(tmp=tmp_path, data=data_dir).split()
  done = run_here(pair_sheet.main, *arguments)
  assert_one_sentence(done, message)
  assert done.stderr.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_an_earlier_sheet_outlives_a_full_disk(data_dir, tmp_path, run_here, full_disk):
  output = tmp_path / 'out.png'
  output.write_bytes(b'earlier')
  arguments = (f'--data_dir={data_dir}', f'--output={output}', '--image_size=16', '--pairs=1')
  done = run_here(pair_sheet.main, *arguments)
  assert_one_sentence(done, 'No space left on device')
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {output: b'earlier'}
