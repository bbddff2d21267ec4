"""Readers of tracking benchmarks: the official layouts, and what is wrong with damaged ones."""

import shutil

import numpy as np
import pytest
import tracking_trees as trees

from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking.sequences import lasot
from dropmae_jax.tracking.sequences.benchmarks import BENCHMARKS, open_sequences

VAL = 'val/GOT-10k_Val_000001'


def refusal(benchmark, root, split=None):
  """The sentence with which a data set is refused."""
  with pytest.raises(UserError) as raised:
    open_sequences(benchmark, root, split)
  message = str(raised.value)
  assert message.endswith('.') and '\n' not in message and '; ' in message, message
  return message


@pytest.mark.parametrize('benchmark', BENCHMARKS)
def test_sequences_are_read(tmp_path, benchmark):
  names = trees.TREES[benchmark](tmp_path)
  sequences = open_sequences(benchmark, tmp_path, trees.SPLITS.get(benchmark))
  assert [sequence.name for sequence in sequences] == names
  for index, sequence in enumerate(sequences):
    assert sequence.num_frames == trees.FRAMES
    np.testing.assert_array_equal(sequence.boxes, trees.boxes(shift=index))
    np.testing.assert_array_equal(sequence.first_box, trees.boxes(shift=index)[0])
    assert not sequence.is_withheld
    for number in range(trees.FRAMES):
      frame = sequence.frame(number)
      assert frame.shape == (trees.SIZE[1], trees.SIZE[0], 3)
      assert abs(int(frame[0, 0, 0]) - 20 * number) <= 2


@pytest.mark.parametrize('benchmark', ['got10k', 'lasot', 'trackingnet'])
def test_visible_frames_follow_labels_and_boxes(tmp_path, benchmark):
  trees.TREES[benchmark](tmp_path)
  truth = trees.boxes()
  truth[1, 3] = 0
  truth_file = {
    'got10k': f'{VAL}/groundtruth.txt',
    'lasot': 'airplane/airplane-1/groundtruth.txt',
    'trackingnet': 'TEST/anno/-LqClgHw3Ys_0.txt',
  }[benchmark]
  trees.save_boxes(tmp_path / truth_file, truth)
  first = open_sequences(benchmark, tmp_path, trees.SPLITS.get(benchmark))[0]
  hidden = [] if benchmark == 'trackingnet' else [2, 3]
  assert [n for n in range(trees.FRAMES) if not first.is_visible[n]] == [1, *hidden]


def test_withheld_truth(tmp_path):
  trees.got10k(tmp_path / 'got10k', 'test', ['GOT-10k_Test_000001'])
  trees.trackingnet(tmp_path / 'trackingnet', is_withheld=True)
  for benchmark in ('got10k', 'trackingnet'):
    for sequence in open_sequences(benchmark, tmp_path / benchmark):
      assert sequence.is_withheld
      assert sequence.num_frames == trees.FRAMES
      assert sequence.first_box[1] == 8


@pytest.mark.parametrize(('benchmark', 'split'), [('got10k', 'val'), ('trackingnet', 'TRAIN_3')])
def test_the_folder_of_a_split_is_a_root_too(tmp_path, benchmark, split):
  names = trees.TREES[benchmark](tmp_path, split)
  sequences = open_sequences(benchmark, tmp_path / split)
  assert [sequence.name for sequence in sequences] == names
  assert [sequence.name for sequence in open_sequences(benchmark, tmp_path, split)] == names


def test_the_testing_set_of_lasot(tmp_path):
  names = lasot.test_names()
  assert len(names) == len(set(names)) == 280
  assert {'airplane-1', 'rubicCube-19', 'zebra-17'} <= set(names)
  trees.lasot(tmp_path, has_list=False)
  assert 'lacks 278 of the 280' in refusal('lasot', tmp_path)
  train = open_sequences('lasot', tmp_path, 'train')
  assert [sequence.name for sequence in train] == ['tree-frog-2']
  assert len(open_sequences('lasot', tmp_path, 'all')) == 3


def test_a_frame_more_than_boxes_is_left_out_of_lasot(tmp_path):
  trees.lasot(tmp_path)
  trees.save_frames(tmp_path / 'airplane/airplane-1/img', ['00000006.jpg'])
  assert open_sequences('lasot', tmp_path)[0].num_frames == trees.FRAMES


def test_targets_and_annotated_parts_of_otb(tmp_path):
  trees.otb(tmp_path, ['Jogging.1', 'Jogging.2', 'Human4.2'])
  # As it is distributed: an empty file beside the real one.
  (tmp_path / 'Human4' / 'groundtruth_rect.1.txt').write_text('\n')
  trees.save_boxes(tmp_path / 'Freeman4' / 'groundtruth_rect.txt', trees.boxes(283))
  (tmp_path / 'Freeman4' / 'img').mkdir()
  for number in range(1, 298):
    (tmp_path / f'Freeman4/img/{number:04d}.jpg').touch()
  trees.save_frames(tmp_path / 'Tiger1' / 'img', [f'{number:04d}.jpg' for number in range(1, 8)])
  trees.save_boxes(tmp_path / 'Tiger1' / 'groundtruth_rect.txt', trees.boxes(7))
  by_name = {sequence.name: sequence for sequence in open_sequences('otb', tmp_path)}
  assert list(by_name) == ['Freeman4', 'Human4', 'Jogging.1', 'Jogging.2', 'Tiger1']
  assert by_name['Freeman4'].frames[-1] == '0283.jpg'
  assert by_name['Tiger1'].frames == ('0006.jpg', '0007.jpg')
  np.testing.assert_array_equal(by_name['Tiger1'].boxes, trees.boxes(7)[5:])
  # What the published tracker's analysis and OTB's own call the results.
  assert {'Human4_2', 'Human4-2'} <= set(by_name['Human4'].aliases)
  assert by_name['Jogging.2'].aliases == ('Jogging_2', 'Jogging-2')


def test_a_folder_may_be_one_video_and_have_one_box(tmp_path):
  trees.folder(tmp_path)
  video = tmp_path / 'mine'
  trees.save_boxes(video / 'groundtruth.txt', trees.boxes(1), '\t')
  (sequence,) = open_sequences('folder', video)
  assert sequence.name == 'mine'
  assert sequence.is_withheld
  # frame8, frame9, frame10, ...
  assert list(sequence.frames) == [f'frame{number}.png' for number in range(8, 13)]


def write(path, text):
  return lambda root: (root / path).write_text(text)


def remove(path):
  return lambda root: (
    shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()
  )


ZERO = '0,0,0,0\n' * trees.FRAMES
LASOT = 'airplane/airplane-1'
BROKEN = {
  'labels too few': ('got10k', write(f'{VAL}/absence.label', '0\n' * 4), 'absence.label has 4'),
  'no labels': ('got10k', remove(f'{VAL}/cover.label'), 'cover.label cannot be read'),
  'words as labels': ('got10k', write(f'{VAL}/cover.label', 'x\n' * 5), "'x' as a label"),
  'infinite labels': ('got10k', write(f'{VAL}/cover.label', 'inf\n' * 5), "'inf' as a label"),
  'no size': ('got10k', write(f'{VAL}/meta_info.ini', '[METAINFO]\n'), 'resolution'),
  'first box empty': ('got10k', write(f'{VAL}/groundtruth.txt', ZERO), 'is 0,0,0,0'),
  'boxes too few': ('got10k', write(f'{VAL}/groundtruth.txt', '1,2,3,4\n' * 4), '5 frames and 4'),
  'absent frame': ('got10k', remove(f'{VAL}/00000003.jpg'), '00000003.jpg does not exist'),
  'absent sequence': ('got10k', remove(VAL), 'groundtruth.txt cannot be read'),
  'no list': ('got10k', remove('val/list.txt'), 'list.txt does not exist'),
  'empty list': ('got10k', write('val/list.txt', '\n\n'), 'names no sequence'),
  'list names twice': ('got10k', write('val/list.txt', 'a\nb\na\n'), "names 'a' twice"),
  'list leads out': ('got10k', write('val/list.txt', '../a\n'), "'../a'"),
  'words': ('lasot', write(f'{LASOT}/groundtruth.txt', '1,2,3,4\n1,2,x,4\n'), 'line 2'),
  'five numbers': ('lasot', write(f'{LASOT}/groundtruth.txt', '1,2,3,4,5\n'), '5 numbers a line'),
  'infinite box': ('lasot', write(f'{LASOT}/groundtruth.txt', '1,2,3,inf\n'), 'infinite'),
  'no boxes': ('lasot', write(f'{LASOT}/groundtruth.txt', ''), 'holds no box'),
  'no occlusion': ('lasot', remove(f'{LASOT}/full_occlusion.txt'), 'full_occlusion.txt'),
  'view too short': ('lasot', write(f'{LASOT}/out_of_view.txt', '0,0'), 'has 2 labels'),
  'frame of lasot': ('lasot', remove(f'{LASOT}/img/00000002.jpg'), '00000002.jpg does not exist'),
  'no images': ('lasot', remove(f'{LASOT}/img'), 'img cannot be read'),
  'listed is absent': ('lasot', remove(LASOT), 'lacks 1 of the 3'),
  'not text': (
    'lasot',
    lambda root: (root / LASOT / 'groundtruth.txt').write_bytes(b'\xff\xd8\xff'),
    'is not a text file',
  ),
  'frame of trackingnet': ('trackingnet', remove('TEST/frames/2xL/0.jpg'), '0.jpg'),
  'frames of trackingnet': ('trackingnet', remove('TEST/frames/2xL'), '2xL cannot be read'),
  'no anno': ('trackingnet', remove('TEST/anno'), 'anno does not exist'),
  'anno too short': (
    'trackingnet', write('TEST/anno/2xL.txt', '1,2,3,4\n' * 3), '5 frames, and there are 3',
  ),
  'frame of otb': ('otb', remove('Subway/img/0005.jpg'), '4 frames'),
  'nan in otb': ('otb', write('Subway/groundtruth_rect.txt', 'nan,1,2,3\n' * 5), 'is nan,1,2,3'),
  'images of a folder': ('folder', remove('mine/frame9.png'), '4 images'),
}  # fmt: skip


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_data_set_is_refused_in_a_sentence(tmp_path, name):
  benchmark, damage, expected = BROKEN[name]
  trees.TREES[benchmark](tmp_path)
  damage(tmp_path)
  assert expected in refusal(benchmark, tmp_path, trees.SPLITS.get(benchmark))


@pytest.mark.parametrize('benchmark', BENCHMARKS)
def test_an_empty_or_missing_root_is_refused(tmp_path, benchmark):
  (tmp_path / 'empty').mkdir()
  assert f'{tmp_path}/empty' in refusal(benchmark, tmp_path / 'empty')
  assert f'{tmp_path}/none is no folder' in refusal(benchmark, tmp_path / 'none')


@pytest.mark.parametrize('benchmark', BENCHMARKS)
def test_an_unknown_split_is_refused(tmp_path, benchmark):
  trees.TREES[benchmark](tmp_path)
  assert 'other' in refusal(benchmark, tmp_path, 'other')


def test_a_missing_or_damaged_frame_is_reported_when_it_is_read(tmp_path):
  trees.folder(tmp_path)
  sequence = open_sequences('folder', tmp_path)[0]
  (tmp_path / 'mine/frame9.png').write_bytes(b'\xff\xd8 no image')
  with pytest.raises(UserError, match='frame9'):
    sequence.frame(1)
