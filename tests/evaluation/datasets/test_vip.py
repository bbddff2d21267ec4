"""VIP: its layout, sizes, results and mIoU."""

import functools
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from dropmae_jax.evaluation.datasets.benchmark import Clip
from dropmae_jax.evaluation.datasets.mask_benchmark import MaskTruth
from dropmae_jax.evaluation.datasets.vip import Vip
from dropmae_jax.evaluation.protocols import PROTOCOLS, Geometry
from dropmae_jax.runtime.errors import UserError

SIZE = (27, 45)
FRAMES = ('000000000001', '000000000026', '000000000051')


def classes():
  """Masks of three frames; 20 and 255 are no classes of VIP."""
  truths = np.random.default_rng(0).choice(np.array([0, 2, 5, 13, 20, 255], np.uint8), (3, *SIZE))
  truths[0, :, :20] = 13
  return truths


@pytest.fixture
def root(tmp_path):
  images, annotations = tmp_path / 'Images', tmp_path / 'Annotations' / 'Category_ids'
  for name in ('videos8', 'videos12'):
    (images / name).mkdir(parents=True)
    (annotations / name).mkdir(parents=True)
    for frame, truth in zip(FRAMES, classes(), strict=True):
      Image.new('RGB', SIZE[::-1], (200, 100, 50)).save(images / name / f'{frame}.jpg')
      Image.fromarray(truth).save(annotations / name / f'{frame}.png')
      # CropMAE's evaluation caches arrays here.
      (annotations / name / f'{frame}_onehot.npy').touch()
  (tmp_path / 'lists').mkdir()
  (tmp_path / 'lists' / 'val_videos.txt').write_text('videos8\nvideos12')
  return tmp_path


def test_the_layout_is_read(root):
  vip = Vip(root)
  assert vip.names == ['videos8', 'videos12']
  assert {name: row.top_k.get('vip') for name, row in PROTOCOLS.items()} == {
    'cropmae': 10, 'dino': None, 'dinov3': None,
  }  # fmt: skip
  clip = vip.open('videos12')
  assert (clip.num_frames, clip.size, clip.truth.frames) == (3, SIZE, FRAMES)
  assert clip.frame(2).shape == (*SIZE, 3)
  np.testing.assert_array_equal(clip.truth.mask(1), classes()[1])


def test_the_score_is_that_of_the_published_evaluation(root, golden):
  """With results of other sizes, and true classes that do not count."""
  recorded = golden('evaluation/vip_miou')
  frames = int(recorded['frames'])
  truth = MaskTruth(
    frames=tuple(str(number) for number in range(frames)),
    mask=lambda number: recorded[f'{number}/truth'],
    encode=lambda geometry, protocol: None,
  )
  clip = Clip('one', frames, (27, 44), lambda number: None, truth)
  vip, predicted = Vip(root), [recorded[f'{number}/found'] for number in range(frames)]
  score = vip.score(clip, predicted)
  np.testing.assert_array_equal(score['confusion'], recorded['confusion'])
  summary = vip.summarise({'one': score})
  assert summary.pop('mIoU') == pytest.approx(100 * recorded['miou'], abs=1e-10)
  expected = {
    f'IoU_{number}': 100 * iou
    for number, iou in enumerate(recorded['iou_per_class'])
    if not np.isnan(iou)
  }
  assert summary == pytest.approx(expected, abs=1e-10)


def test_the_data_set_is_no_mean_over_videos(root):
  """Confusion matrices are summed: here 3 of 4 pixels of class 1, and no others, are right."""
  confusions = np.zeros((2, 20, 20), int)
  confusions[0, 1, 1] = 3
  confusions[1, 1, 0] = 1
  scores = {str(n): {'confusion': confusion.tolist()} for n, confusion in enumerate(confusions)}
  vip = Vip(root)
  assert vip.table(scores) == {'0': {'mIoU': 100}, '1': {'mIoU': 0}}
  assert vip.summarise(scores) == {'mIoU': 37.5, 'IoU_0': 0, 'IoU_1': 75}


def test_results_are_grey_pngs_that_any_reader_understands(root):
  vip = Vip(root)
  clip, folder = vip.open('videos8'), root / 'results'
  results = [np.where(truth > 19, 0, truth).astype(np.uint8) for truth in classes()]
  folder.mkdir()
  vip.write(clip, results, folder)
  assert sorted(path.name for path in folder.iterdir()) == [f'{frame}.png' for frame in FRAMES]
  np.testing.assert_array_equal(cv2.imread(str(folder / f'{FRAMES[1]}.png'))[..., -1], results[1])
  read = vip.read(clip, folder)
  np.testing.assert_array_equal(read, results)
  summary = vip.summarise({'videos8': vip.score(clip, read)})
  assert summary == {'mIoU': 100, 'IoU_0': 100, 'IoU_2': 100, 'IoU_5': 100, 'IoU_13': 100}


def test_what_is_no_class_is_background_in_the_first_mask(root):
  geometry = Geometry(pixels=(24, 40), grid=(3, 5))
  vip = Vip(root)
  clip = vip.open('videos8')
  assert vip.labels(clip, geometry, PROTOCOLS['cropmae']).shape == (3, 5, 4)
  first = vip.read_out(clip, 0, np.zeros((3, 5, 14), np.float32), geometry, PROTOCOLS['dino'])
  assert np.unique(first).tolist() == [0, 2, 5, 13]


def test_masks_of_cropmae_are_resized_to_the_frame_by_pillow(root):
  geometry = Geometry(pixels=(64, 96), grid=(8, 12))
  vip = Vip(root)
  clip = vip.open('videos8')
  labels = np.random.default_rng(1).random((8, 12, 4), np.float32)
  ids = np.array([0, 2, 5, 13], np.uint8)
  decode = functools.partial(PROTOCOLS['cropmae'].decode, labels, ids, geometry, benchmark='davis')
  pillow = Image.fromarray(decode(size=geometry.pixels)).resize(SIZE[::-1], Image.NEAREST)
  for number in (0, 2):
    mask = vip.read_out(clip, number, labels, geometry, PROTOCOLS['cropmae'])
    np.testing.assert_array_equal(mask, pillow)
  assert (decode(size=SIZE) != np.asarray(pillow)).any()


@pytest.mark.parametrize(
  ('size', 'protocol', 'expected'),
  [
    ((720, 1280), 'cropmae', (448, 880)),
    ((1280, 720), 'cropmae', (880, 448)),
    ((480, 640), 'cropmae', (640, 880)),
    ((720, 1280), 'dino', (480, 832)),
  ],
)
def test_the_size_of_the_input(root, size, protocol, expected):
  clip = Clip('one', 2, size, lambda number: None, None)
  assert Vip(root).input_size(clip, PROTOCOLS[protocol], 16) == expected


@pytest.mark.parametrize(
  ('breaks', 'message'),
  [
    (shutil.rmtree, '--root={root} has no lists/val_videos.txt; give the folder that holds'),
    (
      lambda root: shutil.rmtree(root / 'Annotations/Category_ids/videos8'),
      '{root}/Annotations/Category_ids/videos8 does not exist; complete',
    ),
    (
      lambda root: [
        each.unlink() for frame in FRAMES[1:] for each in root.rglob(f'videos8/{frame}.*')
      ],
      '{root}/Images/videos8 holds fewer than 2 frames, too few to score; complete',
    ),
  ],
)
def test_a_broken_tree_is_one_sentence(root, breaks, message):
  breaks(root)
  with pytest.raises(UserError) as caught:
    Vip(root).open('videos8')
  assert message.format(root=root) in str(caught.value)


def test_a_result_of_no_class_is_not_scored(root):
  vip = Vip(root)
  results = [np.full(SIZE, value, np.uint8) for value in (0, 20, 0)]
  with pytest.raises(UserError, match=f'frame {FRAMES[1]} of .* has the class 20, but VIP has'):
    vip.score(vip.open('videos8'), results)
