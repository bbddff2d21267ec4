"""The contact sheet shows the training stream, and its boxes are where they say."""

import numpy as np
import pytest
from conftest import run_python
from PIL import Image

from dropmae_jax import augment, data, inspect_data
from dropmae_jax.data import DataOptions
from dropmae_jax.inspect_data import BOX_COLOUR, CAPTION, CHART, MARGIN
from dropmae_jax.mixture import open_mixture
from dropmae_jax.train_step import derive_seeds
from dropmae_jax.videos import open_dataset

SIZE = 40


def sheet_of(data_dir, output, *more):
  command = ['-m', 'dropmae_jax.inspect_data', f'--data_dir={data_dir}', f'--output={output}']
  done = run_python(*command, '--seed=5', '--pairs=6', f'--image_size={SIZE}', *more)
  assert done.returncode == 0, done.stderr
  return np.asarray(Image.open(output)), done.stdout


@pytest.mark.parametrize('shared', [False, True])
def test_the_sheet_shows_the_training_stream(data_dir, tmp_path, shared):
  more = ['--shared_augmentation'] if shared else []
  sheet, told = sheet_of(data_dir, tmp_path / 'sheet.png', '--frame_gap=4', *more)
  videos = open_dataset(str(data_dir), 'kinetics_frames/folder')
  options = DataOptions(frame_gap=4, num_threads=0, shared_augmentation=shared)
  stream = data.pair_batches(
    videos, options, image_size=SIZE, batch_size=6, seed=derive_seeds(5).data
  )
  batch = next(stream)
  stream.close()
  wide, high = 64, 48  # The clips' frames; higher than the crops.
  columns = [MARGIN, 2 * MARGIN + wide, 3 * MARGIN + 2 * wide, 4 * MARGIN + 2 * wide + SIZE]
  assert sheet.shape == (
    MARGIN + 6 * (CAPTION + high + MARGIN) + CHART,
    columns[3] + SIZE + MARGIN,
    3,
  )
  for row in range(6):
    top, boxes = MARGIN + row * (CAPTION + high + MARGIN) + CAPTION, []
    for frame in range(2):
      crop = sheet[top : top + SIZE, columns[2 + frame] :][:, :SIZE]
      np.testing.assert_array_equal(crop, batch['frames'][row, frame])
      whole = videos.frame(int(batch['video'][row]), int(batch['frame_numbers'][row, frame]))
      panel = sheet[top : top + high, columns[frame] :][:, :wide]
      changed = np.argwhere((panel != whole).any(axis=-1))
      assert (panel[tuple(changed.T)] == BOX_COLOUR).all()
      (y, x), (bottom, right) = changed.min(axis=0).tolist(), changed.max(axis=0).tolist()
      box = augment.Box(y, x, bottom - y + 1, right - x + 1)
      # What the drawn box holds is what was fed.
      np.testing.assert_array_equal(augment.crop_and_resize(whole, box, SIZE, resize='fast'), crop)
      assert (panel[y, x : right + 1] == BOX_COLOUR).all()
      assert (panel[y : bottom + 1, right] == BOX_COLOUR).all()
      boxes.append(box)
    assert not shared or boxes[0] == boxes[1]
  assert 'clips             6\n' in told
  assert 'frames            48\n' in told
  assert 'least 8, median 8, most 8' in told
  assert 'classes           4\n' in told
  report = (videos.folder / 'build_report.json').read_text()
  size = sum(p.stat().st_size for p in videos.folder.glob('*train.array_record*'))
  assert f'bytes on disk     {size} ({size / 48:.0f} per frame)' in told
  assert '"frames": 64' in report  # The other sixteen are of the split val.


def test_a_mixture_is_shown_as_training_is_fed_it(data_dir, tmp_path, monkeypatch):
  name, twin = 'kinetics_frames/folder', 'kinetics_frames/twin'
  (tmp_path / 'kinetics_frames').mkdir()
  for each in (name, twin):
    (tmp_path / each).symlink_to(data_dir / name)
  text, drawn = f'{name}=1,{twin}=2', []
  real = inspect_data.contact_sheet
  monkeypatch.setattr(inspect_data, 'contact_sheet', lambda *a: drawn.append(a) or real(*a))
  command = f'x --data_dir={tmp_path} --output={tmp_path}/o.png --seed=5 --pairs=6 --image_size=40'
  monkeypatch.setattr('sys.argv', [*command.split(), f'--dataset={text}'])
  inspect_data.main()
  ((pairs, indices, counts),) = drawn
  stream = data.pair_batches(
    open_mixture(str(tmp_path), text), DataOptions(num_threads=0), image_size=SIZE, batch_size=6,
    seed=derive_seeds(5).data,
  )  # fmt: skip
  batch = next(stream)
  assert [pair.dataset for pair in pairs] == batch['dataset'].tolist()
  np.testing.assert_array_equal([pair.crops for pair in pairs], batch['frames'])
  assert sorted(set(batch['dataset'])) == [0, 1]
  assert [index.dataset for index in indices] == [name, twin]
  assert counts.sum() == inspect_data.GAP_DRAWS


def test_gaps_follow_the_law_and_bars_hold_all():
  frames = np.array([1, 8, 60])
  counts = inspect_data.gap_counts(frames, 50, seed=0, draws=3000)
  assert len(counts) == 50
  assert counts.sum() == 3000
  assert counts[0] == pytest.approx(1000, abs=100)  # Clips of one frame.
  assert counts[8:].sum() == pytest.approx(720, abs=100)
  gathered = inspect_data.bars(counts)
  assert gathered[0] == ('0', counts[0])
  assert gathered[1] == ('1-2', counts[1] + counts[2])
  assert gathered[-1] == ('49', counts[49])
  assert sum(count for _, count in gathered) == 3000
  assert inspect_data.bars(np.array([0, 7])) == [('1', 7)]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ('--data_dir={tmp} --output={tmp}/o.png', 'build it with: python -m tfds_kinetics'),
    ('--data_dir={data} --output={tmp}/o.png --split=tset', "has no split 'tset'"),
    ('--data_dir={data} --output={tmp} --image_size=16', 'is a folder; give the name of a file'),
    ('--data_dir={data} --output={tmp}/no/o.png --image_size=16', 'does not exist; make it first'),
    ('--data_dir={data} --output={tmp}/o.png --dataset=a=1,a=2', 'is not understood at'),
    ('--data_dir={data} --output={tmp}/o.png --pairs=0', '--pairs=0 is not in 1..100'),
    ('--data_dir={data} --output={tmp}/o.png --frame_gap=1', '--frame_gap=1 is not in 2..'),
    ('--data_dir={data} --output={tmp}/o.png --seed=-1', '--seed=-1 is not in 0..'),
    ('--data_dir={data} --output={tmp}/o.png --resize=fats', "did you mean 'fast'?"),
    ('--data_dir={data}', 'the following arguments are required: --output'),
  ],
)
def test_bad_input(data_dir, tmp_path, monkeypatch, capsys, flags, message):
  arguments = flags.format(tmp=tmp_path, data=data_dir).split()
  monkeypatch.setattr('sys.argv', ['inspect_data', *arguments])
  with pytest.raises(SystemExit) as ended:
    inspect_data.command_line.run(inspect_data.main)
  assert ended.value.code == 2
  errors = capsys.readouterr().err.splitlines()
  assert len(errors) == 1
  assert errors[0].startswith('error: ')
  assert message in errors[0]
  assert not list(tmp_path.iterdir())
