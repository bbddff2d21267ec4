"""JHMDB: labels, coordinates and PCK as recorded from the published code; the official layout."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.io
from PIL import Image

from dropmae_jax.evaluation.datasets import jhmdb
from dropmae_jax.evaluation.datasets.jhmdb import Jhmdb
from dropmae_jax.evaluation.protocols import PROTOCOLS, Geometry
from dropmae_jax.runtime.errors import UserError

GEOMETRY = Geometry((320, 320), (20, 20))
NAMES = ['catch/ball_0', 'catch/ball_1', 'shoot_bow/arrow_(2)']


@pytest.fixture
def recorded(golden):
  return golden('evaluation/jhmdb_pck')


@pytest.fixture
def root(tmp_path, recorded):
  """A tree of the three recorded clips; the second has a frame without positions at its end."""
  (tmp_path / 'splits').mkdir()
  lists = {'catch': 'train_me.avi 1\nball_0.avi 2\n\nball_1.avi 2\nunused.avi 0\n',
           'shoot_bow': 'arrow_(2).avi 2\n'}  # fmt: skip
  for action, lines in lists.items():
    (tmp_path / 'splits' / f'{action}_test_split1.txt').write_text(lines)
    (tmp_path / 'splits' / f'{action}_test_split2.txt').write_text('other.avi 2\n')
  (tmp_path / 'splits' / '._catch_test_split1.txt').write_bytes(b'\x00\x05\x16\x07')
  for number, name in enumerate(NAMES):
    save_positions(tmp_path, name, recorded[f'{number}/pos_img'])
    frames = tmp_path / 'Rename_Images' / name
    frames.mkdir(parents=True)
    for frame in range(recorded[f'{number}/pos_img'].shape[2] + (number == 1)):
      save_frame(frames, frame + 1, recorded[f'{number}/size'], 10 * frame)
  return tmp_path


def save_positions(root, name, positions):
  path = root / 'joint_positions' / name / 'joint_positions.mat'
  path.parent.mkdir(parents=True, exist_ok=True)
  scipy.io.savemat(path, {'pos_img': positions, 'pos_world': positions / 100})
  return path


def save_frame(folder, number, size, colour=0):
  image = np.full((*size, 3), (colour, 0, 200), np.uint8)
  Image.fromarray(image).save(folder / f'{number:05d}.png')


def recorded_results(recorded, number):
  """The positions found for a clip, in pixels."""
  cells = recorded[f'{number}/found_cells']
  cells = np.where(cells < 0, np.nan, cells)
  size = tuple(recorded[f'{number}/size'].tolist())
  return list(np.moveaxis(jhmdb.to_pixels(cells, size, GEOMETRY.grid), -1, 0))


def test_clips_are_those_of_the_split(root, recorded):
  benchmark = Jhmdb(root)
  assert benchmark.names == NAMES
  clip = benchmark.open(NAMES[1])
  assert clip.num_frames == recorded['1/pos_img'].shape[2]
  assert clip.size == tuple(recorded['1/size'])
  np.testing.assert_array_equal(clip.frame(3)[5, 7], (30, 0, 200))
  assert benchmark.input_size(clip, PROTOCOLS['cropmae'], 16) == (320, 320)


def test_labels_are_as_recorded(root, recorded):
  benchmark = Jhmdb(root)
  for name, expected in zip(NAMES, recorded['label_maps'], strict=True):
    labels = benchmark.labels(benchmark.open(name), GEOMETRY, PROTOCOLS['cropmae'])
    np.testing.assert_allclose(labels, expected, atol=1e-6)


def test_spots_at_and_beyond_the_border_are_as_recorded(recorded):
  """Truncation cuts those at the upper and the left border to three cells."""
  labels = jhmdb.draw(recorded['draw/points'].T * 16 + 1, (320, 320), GEOMETRY)
  np.testing.assert_allclose(np.moveaxis(labels[..., 1:], -1, 0), recorded['draw/maps'], atol=1e-6)


def test_positions_are_read_as_recorded(root, recorded):
  benchmark = Jhmdb(root)
  clip = benchmark.open(NAMES[0])
  positions = benchmark.read_out(clip, 1, recorded['read/soft'], GEOMETRY, PROTOCOLS['cropmae'])
  expected = recorded['read/coordinates'].astype(np.float64)
  expected[expected < 0] = np.nan
  height, width = clip.size
  expected = expected / 20 * [[width], [height]] + 1
  np.testing.assert_allclose(positions, expected, atol=1e-5 * width / 20)


def test_pck_of_written_results_is_as_recorded(root, recorded, tmp_path):
  benchmark, scores = Jhmdb(root), {}
  for number, name in enumerate(NAMES):
    clip, results = benchmark.open(name), recorded_results(recorded, number)
    folder = tmp_path / 'results' / name
    folder.mkdir(parents=True)
    benchmark.write(clip, results, folder)
    reread = benchmark.read(clip, folder)
    np.testing.assert_array_equal(reread, results)
    scores[name] = json.loads(json.dumps(benchmark.score(clip, reread)))
  summary = benchmark.summarise(scores)
  assert list(summary) == [f'PCK@{threshold}' for threshold in recorded['thresholds']]
  np.testing.assert_allclose(list(summary.values()), recorded['pck'], rtol=0, atol=1e-9)
  table = benchmark.table(scores)
  assert list(table) == NAMES
  assert table[NAMES[2]] == benchmark.summarise({NAMES[2]: scores[NAMES[2]]})


@pytest.mark.parametrize(
  'geometry', [GEOMETRY, Geometry((320, 480), (40, 60)), Geometry((322, 322), (23, 23))]
)
def test_true_positions_come_back_on_any_grid(root, recorded, geometry):
  """Within half a cell: what labels are drawn off by is left out on the way back."""
  benchmark = Jhmdb(root)
  clip = benchmark.open(NAMES[0])
  truth = np.full((2, 15), 100.0)
  truth[0] += np.arange(15)
  clip.truth[:, :, 0] = truth
  labels = benchmark.labels(clip, geometry, PROTOCOLS['dino'])
  assert labels.shape == (*geometry.grid, 16)
  off = benchmark.read_out(clip, 0, labels, geometry, PROTOCOLS['dino']) - truth
  cell = np.array(clip.size)[::-1, None] / np.array(geometry.grid)[::-1, None]
  assert (np.abs(off) < 0.51 * cell).all()


def test_the_truth_scores_100_and_what_is_not_found_does_not_count(root):
  benchmark = Jhmdb(root)
  clip = benchmark.open(NAMES[0])
  results = list(np.moveaxis(clip.truth.copy(), -1, 0))
  for result in results:
    result[:, 4] = np.nan
  score = benchmark.score(clip, results)
  assert score['found'] == [0 if joint == 4 else clip.num_frames - 1 for joint in range(15)]
  assert set(benchmark.summarise({clip.name: score}).values()) == {100.0}
  nowhere = benchmark.score(clip, [np.full((2, 15), np.nan)] * clip.num_frames)
  assert set(benchmark.summarise({clip.name: nowhere}).values()) == {0.0}


def test_distances_are_relative_to_the_person(root):
  """The box of what was found; left of the frame it goes on to the border, as it is published."""
  truth, predicted = np.ones((2, 15, 2)), np.full((2, 15, 2), np.nan)
  truth[:, 0], truth[:, 1], truth[:, 2] = [[31], [41]], [[1], [1]], [[900], [900]]
  predicted[:, :2] = truth[:, :2]
  predicted[0, 1] += 6
  distances = jhmdb.relative_distances(predicted, truth)
  np.testing.assert_allclose(distances[:3, 0], [0, 6 / (0.6 * 50), np.nan], rtol=1e-12)
  benchmark = Jhmdb(root)
  clip = dataclasses.replace(benchmark.open(NAMES[0]), truth=truth)
  score = benchmark.score(clip, list(np.moveaxis(predicted, -1, 0)))
  # The threshold itself is within.
  assert [score['within'][each][1] for each in ('0.1', '0.2', '0.3')] == [0, 1, 1]
  predicted[:, 0] = np.nan  # A single joint has a box without size.
  np.testing.assert_array_equal(jhmdb.relative_distances(predicted, truth)[:2, 0], [np.nan, np.inf])
  truth = np.ones((2, 15, 2))
  truth[0] = np.linspace(-51, -31, 15)[:, None]
  predicted = truth.copy()
  predicted[0] += 3
  distances = jhmdb.relative_distances(predicted, truth)
  np.testing.assert_allclose(distances, 3 / (0.6 * 51), rtol=1e-12)


def remove(path):
  path.unlink()


def cut(path):
  path.write_bytes(path.read_bytes()[:200])


POSITIONS = f'joint_positions/{NAMES[0]}/joint_positions.mat'
FRAME = f'Rename_Images/{NAMES[0]}/00003.png'
LIST = 'splits/shoot_bow_test_split1.txt'
BROKEN = {
  'no positions': (POSITIONS, remove, 'does not exist; download it again'),
  'damaged positions': (POSITIONS, cut, 'cannot be read'),
  'an empty file': (POSITIONS, lambda path: path.write_bytes(b''), 'cannot be read'),
  'no pos_img': (
    POSITIONS,
    lambda path: scipy.io.savemat(path, {'x': 1}),
    'has no numbers under pos_img',
  ),
  'text': (
    POSITIONS,
    lambda path: scipy.io.savemat(path, {'pos_img': 'text'}),
    'has no numbers under pos_img',
  ),
  'joints': (
    POSITIONS,
    lambda path: scipy.io.savemat(path, {'pos_img': np.zeros((2, 14, 7))}),
    r'the shape \(2, 14, 7\), not \(2, 15',
  ),
  'one frame': (
    POSITIONS,
    lambda path: scipy.io.savemat(path, {'pos_img': np.zeros((2, 15, 1))}),
    r'not \(2, 15, 2 frames or more\)',
  ),
  'no number': (
    POSITIONS,
    lambda path: scipy.io.savemat(path, {'pos_img': np.full((2, 15, 7), np.nan)}),
    'has positions that are not numbers',
  ),
  'a missing frame': (FRAME, remove, '00003.png does not exist, and .* for 7 frames'),
  'a damaged frame': (FRAME, cut, '00003.png cannot be read'),
  'no image': (FRAME, lambda path: path.write_text('<html>'), '00003.png cannot be read'),
  'another size': (
    FRAME,
    lambda path: save_frame(path.parent, 3, (24, 32)),
    '00003.png has 32 x 24 pixels, and the first frame',
  ),
  'a line': (LIST, lambda path: path.write_text('arrow_0.avi\n'), "has the line 'arrow_0.avi'"),
  'a path': (LIST, lambda path: path.write_text('../../x.avi 2\n'), 'has the line'),
  'bytes': (LIST, lambda path: path.write_bytes(b'\xff\xfe\x00'), 'has the line'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_broken_trees_are_refused_in_one_sentence(root, case):
  path, break_it, message = BROKEN[case]
  break_it(root / path)
  with pytest.raises(UserError, match=message) as raised:
    Jhmdb(root).open(NAMES[0]).frame(2)
  assert path in str(raised.value)
  assert '\n' not in str(raised.value)


def test_a_root_without_clips_is_refused(root, tmp_path):
  with pytest.raises(UserError, match=r'^--root=.* has no splits/\*_test_split1.txt; give'):
    Jhmdb(tmp_path / 'splits')
  with pytest.raises(UserError, match=r'^--root=.* has no splits/\*_test_split3.txt; give'):
    Jhmdb(root, split='3')
  for path in root.glob('splits/*'):
    path.write_text('a.avi 1\n')
  with pytest.raises(
    UserError, match=r'^--root=.*: no line of splits/\*_test_split1.txt has the 2'
  ):
    Jhmdb(root)


def test_results_of_another_clip_are_refused(root, recorded, tmp_path):
  benchmark = Jhmdb(root)
  benchmark.write(benchmark.open(NAMES[1]), recorded_results(recorded, 1), tmp_path)
  with pytest.raises(UserError, match='has positions for 5 frames, and the clip has 7; remove'):
    benchmark.read(benchmark.open(NAMES[0]), tmp_path)
  cut(tmp_path / 'joint_positions.mat')
  with pytest.raises(UserError, match=r'cannot be read .*; remove'):
    benchmark.read(benchmark.open(NAMES[1]), tmp_path)
