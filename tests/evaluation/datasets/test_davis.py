"""DAVIS-2017: its layout, what is wrong with it, sizes, results and scores."""

import shutil

import numpy as np
import pytest
from PIL import Image

from dropmae_jax.data import synthetic_clips
from dropmae_jax.evaluation.datasets import masks, measures
from dropmae_jax.evaluation.datasets.davis import Davis
from dropmae_jax.evaluation.protocols import PROTOCOLS, Geometry
from dropmae_jax.runtime.errors import UserError

SIZE = (24, 40)
GEOMETRY = Geometry(pixels=SIZE, grid=(3, 5))


def write_sequence(root, name, truths):
  """Writes masks and black frames as DAVIS has them."""
  frames, annotations = root / 'JPEGImages/480p' / name, root / 'Annotations/480p' / name
  for folder in (frames, annotations):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
  for number, truth in enumerate(truths):
    Image.new('RGB', truth.shape[::-1]).save(frames / f'{number:05d}.jpg')
    masks.write_png(annotations / f'{number:05d}.png', truth)


def write_list(root, text, split='val'):
  lists = root / 'ImageSets' / '2017'
  lists.mkdir(parents=True, exist_ok=True)
  (lists / f'{split}.txt').write_text(text)


def moving_objects(frames=5, size=SIZE):
  """Object 1 moves to the right by 8 pixels a frame, object 2 stays; both fill cells of 8."""
  truths = np.zeros((frames, *size), np.uint8)
  truths[:, 16:24] = 2
  for number in range(frames):
    truths[number, 8:16, 8 * number : 8 * number + 8] = 1
  return truths


@pytest.fixture
def root(tmp_path):
  """Two sequences, and a list as people edit them."""
  for name in ('swan', 'car-turn'):
    write_sequence(tmp_path, name, moving_objects())
  write_list(tmp_path, 'swan\n\n  car-turn')
  return tmp_path


def test_the_layout_is_read(root):
  davis = Davis(root)
  assert davis.names == ['swan', 'car-turn']
  frame = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
  path = root / 'JPEGImages/480p/car-turn/00002.jpg'
  Image.fromarray(frame).save(path)
  # As macOS leaves behind.
  path.with_name('._00002.jpg').write_bytes(b'no image')
  clip = davis.open('car-turn')
  assert (clip.name, clip.num_frames, clip.size) == ('car-turn', 5, SIZE)
  np.testing.assert_array_equal(clip.frame(2), np.asarray(Image.open(path)))
  np.testing.assert_array_equal(clip.truth.mask(2), moving_objects()[2])
  write_list(root, 'car-turn\r\n', split='test-dev')
  assert Davis(root, split='test-dev').names == ['car-turn']


def test_generated_clips_have_the_layout(tmp_path):
  options = synthetic_clips.ClipOptions(train=0, val=1, frames=3, height=24, width=40)
  synthetic_clips.write_clips(tmp_path / 'clips', options)
  davis = Davis(tmp_path / 'clips' / 'davis')
  clip = davis.open(davis.names[0])
  assert (clip.num_frames, clip.size) == (3, SIZE)


def test_frames_are_in_the_order_of_their_numbers(root):
  for kind, suffix in (('JPEGImages', 'jpg'), ('Annotations', 'png')):
    folder = root / kind / '480p' / 'swan'
    for number in range(5):
      (folder / f'{number:05d}.{suffix}').rename(folder / f'{number + 8}.{suffix}')
  assert Davis(root).open('swan').truth.frames == ('8', '9', '10', '11', '12')


@pytest.mark.parametrize('protocol', ['cropmae', 'dino', 'dinov3'])
def test_a_mask_of_whole_cells_survives_its_labels(root, protocol):
  davis = Davis(root)
  clip, truth = davis.open('swan'), moving_objects()[0]
  labels = davis.labels(clip, GEOMETRY, PROTOCOLS[protocol])
  assert labels.shape == (3, 5, 3)
  hard = np.eye(3, dtype=np.float32)[truth[4::8, 4::8]]
  mask = davis.read_out(clip, 3, hard, GEOMETRY, PROTOCOLS[protocol])
  np.testing.assert_array_equal(mask[4::8, 4::8], truth[4::8, 4::8])
  # Only cropmae reads frame 0 out of its labels.
  mask = davis.read_out(clip, 0, hard[::-1], GEOMETRY, PROTOCOLS[protocol])
  expected = truth[::-1] if protocol == 'cropmae' else truth
  np.testing.assert_array_equal(mask[4::8, 4::8], expected[4::8, 4::8])


@pytest.mark.parametrize(
  ('size', 'protocol', 'expected'),
  [
    ((480, 854), 'cropmae', (480, 880)),
    ((480, 854), 'dino', (480, 832)),
    ((480, 880), 'dino', (480, 832)),
    ((480, 910), 'dino', (480, 896)),
    ((1280, 720), 'dino', (832, 480)),
    ((480, 854), 'dinov3', (960, 1708)),
    ((1281, 720), 'dinov3', (1708, 960)),
  ],
)
def test_the_size_of_the_input(size, protocol, expected):
  assert PROTOCOLS[protocol].input_size['davis'](size, 16) == expected


def test_scores_are_those_of_the_official_evaluation(tmp_path, golden):
  """Through files: recorded truths and results, with void pixels and objects never found."""
  recorded = golden('evaluation/davis_measures')
  names = recorded['seq_names'].tolist()
  write_list(tmp_path, '\n'.join(names))
  for name in names:
    write_sequence(tmp_path, name, recorded[f'seq/{name}/truth'])
  davis, scores = Davis(tmp_path), {}
  for name in names:
    clip, folder = davis.open(name), tmp_path / 'results' / name
    folder.mkdir(parents=True)
    davis.write(clip, list(recorded[f'seq/{name}/found']), folder)
    assert [path.name for path in sorted(folder.iterdir())] == [
      f'{number:05d}.png' for number in range(clip.num_frames)
    ]
    scores[name] = davis.score(clip, davis.read(clip, folder))
    for letter in 'JF':
      expected = recorded[f'seq/{name}/{letter}_statistics']
      np.testing.assert_allclose(scores[name][letter], expected, rtol=0, atol=1e-12)
  objects = [f'{name}_{i + 1}' for name in names for i in range(len(scores[name]['J']))]
  assert objects == recorded['all/objects'].tolist()
  summary = list(davis.summarise(scores).values())
  np.testing.assert_allclose(summary, 100 * recorded['all/global'], rtol=0, atol=1e-10)
  row = davis.table(scores)[names[1]]
  region, boundary = (recorded[f'seq/{names[1]}/{key}'].mean() * 100 for key in 'JF')
  assert row == pytest.approx({'J&F': (region + boundary) / 2, 'J': region, 'F': boundary})


def test_results_are_palette_pngs_in_the_colours_of_davis(root):
  davis = Davis(root)
  clip, folder = davis.open('swan'), root / 'results'
  folder.mkdir()
  davis.write(clip, list(moving_objects()), folder)
  image = Image.open(folder / '00001.png')
  assert image.mode == 'P'
  np.testing.assert_array_equal(np.asarray(image), moving_objects()[1])
  assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]


def test_void_is_background(root):
  truths = moving_objects()
  truths[:, :8] = measures.VOID
  write_sequence(root, 'swan', truths)
  davis = Davis(root)
  clip = davis.open('swan')
  assert davis.labels(clip, GEOMETRY, PROTOCOLS['cropmae']).shape == (3, 5, 3)
  first = davis.read_out(clip, 0, np.zeros((3, 5, 3), np.float32), GEOMETRY, PROTOCOLS['dino'])
  np.testing.assert_array_equal(first, moving_objects()[0])
  assert davis.score(clip, list(moving_objects()))['J'] == [[1, 1, 0], [1, 1, 0]]


def test_at_480x880_frames_and_masks_are_resized_before(tmp_path):
  """Where boundaries 9 pixels apart still match; at the native size it is 8."""
  truths = np.zeros((3, 480, 854), np.uint8)
  truths[:, 100:300, 200:400] = 1
  write_sequence(tmp_path, 'swan', truths)
  write_list(tmp_path, 'swan')
  scores = {}
  for scale, size in (('native', (480, 854)), ('480x880', (480, 880))):
    davis = Davis(tmp_path, scale=scale)
    clip = davis.open('swan')
    assert clip.size == clip.frame(1).shape[:2] == clip.truth.mask(1).shape == size
    shifted = [np.roll(clip.truth.mask(number), 9, axis=0) for number in range(3)]
    scores[scale] = davis.score(clip, shifted)['F'][0][0]
  # What is lost are the rows at the top and the bottom, but for their corners.
  assert scores['480x880'] == 1
  assert 0.4 < scores['native'] < 0.8
  with pytest.raises(UserError, match="--scale='480p' is unknown"):
    Davis(tmp_path, scale='480p')


def replace_mask(root, mask, mode):
  path = root / 'Annotations/480p/swan/00002.png'
  Image.fromarray(mask).convert(mode).save(path)


WRONG = {
  'empty root': (shutil.rmtree, '--root={root} has no ImageSets/2017/val.txt; give the folder'),
  'empty list': (lambda root: write_list(root, '\n \n'), 'val.txt names no clip; download'),
  'twice': (lambda root: write_list(root, 'swan\nswan\n'), "names 'swan' twice; remove one"),
  'sequence missing': (
    lambda root: write_list(root, 'swan\ncow'),
    "{root}/JPEGImages/480p/cow does not exist; complete the data set, or remove 'cow' from",
  ),
  'no folder of masks': (
    lambda root: shutil.rmtree(root / 'Annotations/480p/swan'),
    '{root}/Annotations/480p/swan does not exist; complete',
  ),
  'no masks': (
    lambda root: [path.unlink() for path in (root / 'Annotations/480p/swan').iterdir()],
    "{root}/Annotations/480p/swan holds no masks; complete the data set, or remove 'swan' from",
  ),
  'only the first mask': (
    lambda root: [(root / f'Annotations/480p/swan/0000{n}.png').unlink() for n in range(1, 5)],
    'Annotations/480p/swan lacks the mask of 4 of 5 files, such as 00001; complete',
  ),
  'a frame missing': (
    lambda root: (root / 'JPEGImages/480p/swan/00004.jpg').unlink(),
    'JPEGImages/480p/swan lacks the frame of 1 of 5 files, such as 00004; complete',
  ),
  'two frames': (
    lambda root: [
      (root / kind / f'480p/swan/0000{number}{suffix}').unlink()
      for kind, suffix in (('JPEGImages', '.jpg'), ('Annotations', '.png'))
      for number in (1, 2, 3)
    ],
    'JPEGImages/480p/swan holds fewer than 3 frames, too few to score; complete',
  ),
  'another size of mask': (
    lambda root: replace_mask(root, np.zeros((24, 41), np.uint8), 'P'),
    '00002.png has 41 x 24 pixels, but {root}/Annotations/480p/swan/00000.png has 40 x 24; give',
  ),
  'another size of frame': (
    lambda root: Image.new('RGB', (40, 25)).save(root / 'JPEGImages/480p/swan/00003.jpg'),
    '00003.jpg has 40 x 25 pixels, but {root}/Annotations/480p/swan/00000.png has 40 x 24; give',
  ),
  'colours': (
    lambda root: replace_mask(root, np.zeros(SIZE, np.uint8), 'RGB'),
    '00002.png is an image of the mode RGB; give object numbers up to 255',
  ),
  'ids beyond 255': (
    lambda root: replace_mask(root, np.full(SIZE, 256, np.uint16), 'I;16'),
    '00002.png is an image of the mode I;16; give object numbers up to 255',
  ),
  'no object': (
    lambda root: write_sequence(root, 'swan', np.full((3, *SIZE), measures.VOID, np.uint8)),
    "00000.png shows no object to follow; remove 'swan' from {root}/ImageSets",
  ),
  'damaged mask': (
    lambda root: (root / 'Annotations/480p/swan/00001.png').write_bytes(b'no image'),
    '{root}/Annotations/480p/swan/00001.png cannot be read (',
  ),
  'damaged frame': (
    lambda root: (root / 'JPEGImages/480p/swan/00001.jpg').write_bytes(b'no image'),
    '{root}/JPEGImages/480p/swan/00001.jpg cannot be read (',
  ),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_broken_tree_is_one_sentence(root, case):
  breaks, message = WRONG[case]
  breaks(root)
  with pytest.raises(UserError) as caught:
    Davis(root).open('swan')
  assert message.format(root=root) in str(caught.value)
  assert str(caught.value).endswith('.')


def test_a_frame_cut_short_is_an_error(root):
  path = root / 'JPEGImages/480p/swan/00001.jpg'
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(UserError, match=r'00001.jpg cannot be read .*; download it again\.'):
    Davis(root).open('swan').frame(1)


@pytest.mark.parametrize(
  ('result', 'message'),
  [
    (np.full(SIZE, 3, np.uint8), 'objects up to 3, but the truth (24, 40) and 2; remove'),
    (np.zeros((24, 41), np.uint8), 'has the shape (24, 41) and'),
  ],
)
def test_results_of_another_truth_are_not_scored(root, result, message):
  davis = Davis(root)
  clip, results = davis.open('swan'), list(moving_objects())
  results[2] = result
  with pytest.raises(UserError) as caught:
    davis.score(clip, results)
  assert message in str(caught.value)
  assert "the result of frame 00002 of 'swan'" in str(caught.value)
