"""TAP-Vid: positions measured as recorded from the published code; pickles that run nothing."""

import json
import pickle
import struct

import numpy as np
import pytest

from dropmae_jax.evaluation.datasets import tapvid
from dropmae_jax.evaluation.datasets.tapvid import TapVid
from dropmae_jax.evaluation.protocols import PROTOCOLS, Geometry
from dropmae_jax.runtime.errors import UserError

GEOMETRY = Geometry((480, 480), (30, 30))
NAMES = [f'pts_within_{threshold}' for threshold in (1, 2, 4, 8, 16)]


def video(occluded, seed=0):
  """A video of [p, t] points."""
  rng = np.random.default_rng(seed)
  occluded = np.asarray(occluded, bool)
  return {
    'video': rng.integers(0, 256, (occluded.shape[1], 24, 32, 3), np.uint8),
    'points': rng.random((*occluded.shape, 2), np.float32),
    'occluded': occluded,
  }


def save(folder, content, protocol=4):
  path = folder / 'tapvid_davis.pkl'
  path.write_bytes(pickle.dumps(content, protocol))
  return path


def test_accuracy_is_as_recorded(golden, tmp_path):
  """Both by itself for both kinds of queries, and through clips, results and their summary."""
  recorded = golden('evaluation/tapvid')
  query_frames = recorded['query_points'][..., 0].astype(int)
  is_visible, frames = ~recorded['gt_occluded'], np.arange(recorded['gt_occluded'].shape[2])
  measured = {
    'first': frames > query_frames[..., None],
    'strided': frames != query_frames[..., None],
  }
  for mode, is_measured in measured.items():
    for number in range(3):
      arrays = (recorded[key][number] for key in ('pred_tracks', 'gt_tracks'))
      counts = tapvid.position_counts(*arrays, is_visible[number] & is_measured[number])
      accuracies = [counts['within'][each.rpartition('_')[2]] / counts['visible'] for each in NAMES]
      expected = [recorded[f'{mode}/{each}'][number] for each in NAMES]
      np.testing.assert_allclose(accuracies, expected, rtol=0, atol=1e-12)
      expected = recorded[f'{mode}/average_pts_within_thresh'][number]
      np.testing.assert_allclose(np.mean(accuracies), expected, rtol=0, atol=1e-12)

  # Points are first seen in their query frames, as the recorded measure has it.
  occluded = recorded['gt_occluded'] | (frames < query_frames[..., None])
  occluded &= frames != query_frames[..., None]
  videos = {
    f'v{number}': {
      'video': np.zeros((len(frames), 4, 4, 3), np.uint8),
      'points': (recorded['gt_tracks'][number] / 256).astype(np.float32),
      'occluded': occluded[number],
    }
    for number in range(3)
  }
  benchmark, scores = TapVid(save(tmp_path, videos)), {}
  assert len(benchmark.names) > 10
  for name in benchmark.names:
    clip, number = benchmark.open(name), int(name[1])
    tracks = recorded['pred_tracks'][number, clip.truth.points, clip.truth.query_frame :]
    results = list(np.moveaxis(tracks.astype(np.float32), 1, 0))
    scores[name] = json.loads(json.dumps(benchmark.score(clip, results)))
  summary = benchmark.summarise(scores)
  assert list(summary) == [*NAMES, 'average_pts_within_thresh']
  expected = [100 * recorded[f'first/{each}'].mean() for each in summary]
  np.testing.assert_allclose(list(summary.values()), expected, rtol=0, atol=1e-10)


def test_a_clip_starts_where_its_points_are_first_seen(tmp_path):
  content = {
    'bmx-trees': video(
      [
        [0, 0, 0, 1, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 1, 1, 1],  # Never seen.
        [0, 1, 1, 0, 1],
        [1, 1, 1, 1, 0],  # First seen in the last frame.
        [0, 1, 1, 1, 1],  # Never seen again.
      ]
    ),
    'unseen': video([[1, 1]]),
    'last': video([[0, 0]]),
  }
  benchmark = TapVid(save(tmp_path, content))
  assert benchmark.names == ['bmx-trees@0000', 'bmx-trees@0002', 'last@0000']
  whole, clip = benchmark.open(benchmark.names[0]), benchmark.open(benchmark.names[1])
  assert whole.truth.points.tolist() == [0, 3]
  assert (clip.num_frames, clip.size, clip.truth.points.tolist()) == (3, (24, 32), [1])
  np.testing.assert_array_equal(clip.frame(1), content['bmx-trees']['video'][3])
  np.testing.assert_array_equal(
    clip.truth.positions[0], 256 * content['bmx-trees']['points'][1, 2:].astype(np.float64)
  )
  assert clip.truth.is_visible.tolist() == [[True, False, True]]
  assert benchmark.input_size(clip, PROTOCOLS['dinov3'], 16) == (960, 960)
  assert benchmark.input_size(clip, PROTOCOLS['cropmae'], 16) == (480, 480)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_all_protocols_and_layouts_are_read(tmp_path, protocol):
  content = [video([[0, 0, 1]], seed) for seed in range(3)]
  content[0]['video'] = np.asfortranarray(content[0]['video'])
  content[1]['points'] = content[1]['points'].astype('>f4')
  content[2]['extra'] = np.float64(25)
  videos = tapvid.read_videos(save(tmp_path, content, protocol))
  assert list(videos) == ['0000', '0001', '0002']
  for loaded, expected in zip(videos.values(), content, strict=True):
    np.testing.assert_array_equal(loaded.frames, expected['video'])
    np.testing.assert_array_equal(loaded.points, expected['points'])
    np.testing.assert_array_equal(loaded.is_visible, ~expected['occluded'])


def test_files_of_numpy_1_are_read(tmp_path):
  path = save(tmp_path, [video([[0, 0]])], protocol=2)
  written = path.read_bytes()
  assert b'numpy._core.multiarray' in written
  path.write_bytes(written.replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
  assert TapVid(tmp_path).names == ['0000@0000']


@pytest.mark.parametrize('grid', [(30, 30), (7, 12)])
def test_a_point_is_the_centroid_of_its_label(tmp_path, grid):
  benchmark = TapVid(save(tmp_path, [video(np.zeros((9, 3)))]))
  clip = benchmark.open('0000@0000')
  # The outer half of the border's cells is nearer to no other centre.
  clip.truth.positions[:] = 18.3 + 219 * clip.truth.positions / 256
  geometry = Geometry((480, 480), grid)
  labels = benchmark.labels(clip, geometry, PROTOCOLS['cropmae'])
  np.testing.assert_allclose(labels[..., 1:].sum(axis=(0, 1)), 1, rtol=1e-6)
  assert (labels[..., 1:] > 0).sum(axis=(0, 1)).max() <= 4
  np.testing.assert_allclose(labels[..., 0], np.maximum(1 - labels[..., 1:].sum(-1), 0), atol=1e-6)
  positions = benchmark.read_out(clip, 1, labels, geometry, PROTOCOLS['cropmae'])
  np.testing.assert_allclose(positions, clip.truth.positions[:, 0], atol=1e-3)


def test_points_at_the_border_stay_in_the_border_cells():
  labels = tapvid.splat(np.array([[0.0, 0.0], [1.0, 0.5], [0.999, 1.0]]), (2, 4))
  expected = np.zeros((2, 4, 3))
  expected[0, 0, 0] = expected[1, 3, 2] = 1
  expected[:, 3, 1] = 0.5
  np.testing.assert_allclose(labels[..., 1:], expected, atol=1e-6)


def test_a_point_without_label_stays_at_its_query(tmp_path):
  benchmark = TapVid(save(tmp_path, [video(np.zeros((2, 3)))]))
  clip = benchmark.open('0000@0000')
  labels = np.zeros((4, 8, 3), np.float32)
  labels[1, 5, 2] = 0.1
  geometry = Geometry((64, 128), (4, 8))
  query = clip.truth.positions[:, 0].astype(np.float32)
  positions = benchmark.read_out(clip, 2, labels, geometry, PROTOCOLS['cropmae'])
  np.testing.assert_array_equal(positions, [query[0], (5.5 * 32, 1.5 * 64)])
  # The first frame's positions are given.
  positions = benchmark.read_out(clip, 0, labels, geometry, PROTOCOLS['cropmae'])
  np.testing.assert_array_equal(positions, query)


def test_results_are_read_back(tmp_path):
  benchmark = TapVid(save(tmp_path, [video([[0, 0, 0], [1, 0, 0], [0, 1, 0]])]))
  first, second = (benchmark.open(name) for name in benchmark.names)
  results = [np.full((2, 2), number, np.float32) for number in range(3)]
  benchmark.write(first, results, tmp_path)
  np.testing.assert_array_equal(benchmark.read(first, tmp_path), results)
  with np.load(tmp_path / 'tracks.npz') as arrays:
    assert arrays['tracks'].shape == (2, 3, 2)
    assert (arrays['points'].tolist(), arrays['query_frame']) == ([0, 2], 0)
  with pytest.raises(UserError, match='is of other points or frames than 0000@0001; remove'):
    benchmark.read(second, tmp_path)
  (tmp_path / 'tracks.npz').write_bytes(b'PK')
  with pytest.raises(UserError, match=r'cannot be read .*; remove'):
    benchmark.read(first, tmp_path)


def test_the_threshold_itself_is_not_within():
  truth = np.full((1, 3, 2), 9.0)
  predicted = truth + np.array([[0, 0], [0, 4], [0, 0]])
  counts = tapvid.position_counts(predicted, truth, np.array([[False, True, True]]))
  assert counts == {'visible': 2, 'within': {'1': 1, '2': 1, '4': 1, '8': 2, '16': 2}}


def test_clips_of_a_video_count_by_their_points(tmp_path):
  benchmark = TapVid(save(tmp_path, {'a@b': video([[0, 0, 0], [1, 0, 0]]), 'c': video([[0, 0]])}))
  counts = [(2, 2), (1, 0), (1, 0)]
  scores = {
    name: {'visible': visible, 'within': {str(each): within for each in tapvid.THRESHOLDS}}
    for name, (visible, within) in zip(benchmark.names, counts, strict=True)
  }
  assert benchmark.summarise(scores)['pts_within_4'] == pytest.approx((200 / 3 + 0) / 2)
  assert [row['pts_within_4'] for row in benchmark.table(scores).values()] == [100, 0, 0]


class Calls:
  """Pickles as a call of a function."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


# Operations: 'numpy' 'dtype' are named, and called with the argument.
DTYPE = b'cnumpy\ndtype\n(X\x02\x00\x00\x00%sI0\nI1\ntR'
HOSTILE = {
  'a call': (pickle.dumps(Calls(print, 'run')), r'names builtins\.print'),
  'a name': (b'cos\nsystem\n.', r'names os\.system'),
  'a name by text': (b'\x80\x04\x8c\x02os\x8c\x06system\x93.', r'names os\.system'),
  'an instance': (b'(ios\nsystem\n.', r'names os\.system'),
  'an attribute': (b'\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.', r'names numpy\.ndarray\.d'),
  'a part of numpy': (b'cnumpy\nload\n.', r'names numpy\.load'),
  'an array of objects': (DTYPE % b'O8' + b'.', 'has an array of O8'),
  'a dtype of bytes': (
    DTYPE % b'f4' + b'(I3\nX\x02\x00\x00\x00O,NNNI-1\nI-1\nI0\ntb.',
    "byte order 'O,'",
  ),
  'a changed stand-in': (b'c_codecs\nencode\n(N}X\x01\x00\x00\x00aI1\nstb.', r'cannot be read'),
  'another codec': (
    b'c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.',
    "has text in 'hex'",
  ),
  'an extension': (b'\x80\x02\x82\x01.', 'cannot be read'),
  'a persistent object': (b'\x80\x02X\x01\x00\x00\x00aQ.', 'cannot be read'),
  'a huge memo': (b'\x80\x02Nr' + struct.pack('<I', 2**32 - 1) + b'.', 'has no 4294967295 objects'),
  'huge bytes': (b'\x80\x04\x8e' + struct.pack('<Q', 2**62) + b'.', 'cannot be read'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_nothing_of_a_pickle_is_run(tmp_path, case, capsys):
  written, message = HOSTILE[case]
  path = tmp_path / 'tapvid.pkl'
  path.write_bytes(written)
  with pytest.raises(UserError, match=message) as raised:
    TapVid(tmp_path)
  assert str(raised.value).startswith(str(path))
  assert capsys.readouterr().out == ''


def changed(**entries):
  return {'a': {**video([[0, 0, 0]]), **entries}}


BROKEN = {
  'no dict': ('text', 'holds no videos'),
  'no video': ({}, 'holds no videos'),
  'a name': ({'../a': video([[0, 0]])}, "has '../a' as the name of a video"),
  'an entry': ({'a': 1}, "video 'a' has no array 'video'"),
  'a missing array': ({'a': {'video': np.zeros(1, np.uint8)}}, "has no array 'points'"),
  'numbers': (changed(points=[0.5]), "has no array 'points'"),
  'a type': (changed(occluded=np.zeros((1, 3), np.uint8)), "has uint8 as 'occluded'"),
  'grey': (changed(video=np.zeros((3, 24, 32), np.uint8)), 'do not fit together: .*3, 24, 32'),
  'fewer frames': (changed(video=np.zeros((2, 24, 32, 3), np.uint8)), 'do not fit together'),
  'points': (changed(points=np.zeros((2, 3, 2), np.float32)), 'do not fit together'),
  'no number': (changed(points=np.full((1, 3, 2), np.nan)), 'visible points without a position'),
  'no points': (changed(occluded=np.ones((1, 3), bool)), 'has no point that is visible in two'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_broken_files_are_refused_in_one_sentence(tmp_path, case):
  content, message = BROKEN[case]
  path = save(tmp_path, content)
  with pytest.raises(UserError, match=message) as raised:
    TapVid(path)
  assert str(raised.value).startswith(str(path))
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize('keep', [0, 1, 30, 500, -1])
def test_a_damaged_file_is_refused(tmp_path, keep):
  path = save(tmp_path, {'a': video([[0, 0]])})
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match='cannot be read as a file of TAP-Vid'):
    TapVid(path)


def test_a_root_without_one_file_is_refused(tmp_path):
  with pytest.raises(UserError, match=r'^--root=.* holds no \.pkl; give'):
    TapVid(tmp_path)
  for name in ('a.pkl', 'b.pkl'):
    (tmp_path / name).write_bytes(b'')
  with pytest.raises(UserError, match=r'^--root=.* holds several \.pkl \(a\.pkl, b\.pkl\); give'):
    TapVid(tmp_path)
