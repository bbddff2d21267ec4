"""Crops, refusals and boxes against what published code made of the same images and draws."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking import crops
from dropmae_jax.tracking.crops import Augmentation, CropOptions

NO_AUGMENTATION = Augmentation(False, False, (0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (False, False))


@pytest.fixture(scope='module')
def recorded(golden):
  arrays = golden('tracker/tracker_crops')
  arrays['images'] = [arrays[f'image{number}'] for number in range(3)]
  return arrays


def unpack(bits, size):
  return np.unpackbits(bits, axis=-1, count=size).astype(bool)


def test_crops_of_tracking(recorded):
  rows = {
    **{row: ('32', index) for index, row in enumerate(recorded['crop/rows32'])},
    **{row: (f'_row{row}', ...) for row in (42, 43, 44)},
  }
  assert sorted(rows) == list(range(len(recorded['crop/box'])))
  for row, (name, index) in rows.items():
    image = recorded['images'][recorded['crop/image'][row]]
    box, factor, size = (recorded[f'crop/{each}'][row] for each in ('box', 'factor', 'out'))
    square = crops.square_around(box, factor)
    assert square.side == recorded['crop/side'][row]
    real = [
      crops.inside(start, square.side, length)
      for start, length in zip((square.top, square.left), image.shape, strict=False)
    ]
    np.testing.assert_array_equal(np.ravel(real), recorded['crop/real_edges'][row])
    whole = crops.cut(image, square).astype(np.int64)
    weight = np.arange(1, square.side + 1)
    sums = [whole, whole * weight[:, None, None], whole * weight[:, None]]
    np.testing.assert_array_equal(
      np.stack([each.sum((0, 1)) for each in sums], axis=-1), recorded['crop/checksum'][row]
    )
    pixels, resize_factor = crops.crop(image, box, factor, int(size))
    assert resize_factor == recorded['crop/resize_factor'][row]
    np.testing.assert_array_equal(pixels, recorded[f'crop/pixels{name}'][index])
    np.testing.assert_array_equal(
      crops.padding(square, *image.shape[:2], int(size)),
      unpack(recorded[f'crop/padding{name}'][index], size),
    )


def test_jittered_crops(recorded):
  for row, number in enumerate(recorded['jitter/image']):
    image = recorded['images'][number]
    box, normals, uniforms, factor = (
      recorded[f'jitter/{each}'][row] for each in ('box', 'normals', 'uniforms', 'factor')
    )
    jittered = crops.jitter(
      box,
      normals,
      uniforms,
      centre_jitter=float(recorded['jitter/centre_factor'][row]),
      scale_jitter=float(recorded['jitter/scale_factor'][row]),
    )
    np.testing.assert_allclose(jittered, recorded['jitter/jittered'][row], rtol=0, atol=1.6e-5)
    pixels, resize_factor = crops.crop(image, jittered, factor, 32)
    np.testing.assert_array_equal(pixels, recorded['jitter/pixels'][row])
    square = crops.square_around(jittered, factor)
    np.testing.assert_array_equal(
      crops.padding(square, *image.shape[:2], 32), unpack(recorded['jitter/padding'][row], 32)
    )
    target = crops.box_in_crop(box, recorded['jitter/jittered'][row], resize_factor, 32)
    np.testing.assert_array_equal(target, recorded['jitter/box_in_crop'][row])


def test_training_pairs(recorded):
  options = CropOptions(32, 48, 2.0, 4.0, centre_jitter=3.0, scale_jitter=0.25)
  names = ('grey', 'frame_flip', 'search_normals', 'search_uniforms', 'brightness', 'crop_flip')
  for row in range(6):
    made = crops.training_pair(
      recorded['images'][recorded['full/template_image'][row]],
      recorded['images'][recorded['full/search_image'][row]],
      recorded['full/template_box'][row],
      recorded['full/search_box'][row],
      Augmentation(*(recorded[f'full/{name}'][row].tolist() for name in names)),
      options,
    )
    for index, each in enumerate(('template', 'search')):
      pixels = crops.brighten_and_normalise(
        jnp.asarray(getattr(made, each))[None], jnp.asarray(made.brightness[index : index + 1])
      )
      expected = recorded[f'full/{each}'][row].transpose(1, 2, 0)
      np.testing.assert_allclose(pixels[0], expected, rtol=0, atol=1.6e-6)
      np.testing.assert_allclose(
        getattr(made, f'{each}_box'), recorded[f'full/{each}_target'][row], rtol=0, atol=4e-7
      )


def test_refused_crops(recorded):
  for row, box in enumerate(recorded['refuse/box']):
    image = recorded['images'][recorded['refuse/image'][row]]
    if row == 14:
      continue  # Wholly left of the image: accepted by an accident of slices, and never drawn.
    factor, size = float(recorded['refuse/factor'][row]), int(recorded['refuse/out'][row])
    options = CropOptions(size, size, factor, factor, centre_jitter=0.0, scale_jitter=0.0)
    for is_flipped, accepted in zip((False, True), recorded['refuse/accepted'][row], strict=True):
      augmentation = NO_AUGMENTATION._replace(crop_is_flipped=(is_flipped,) * 2)
      made = crops.training_pair(image, image, box, box, augmentation, options)
      assert (made is not None) == accepted, (row, is_flipped)


@pytest.mark.parametrize('box', [(5, 5, 0, 3), (5, 5, -2, -2), (5, 5, np.nan, 3)])
def test_a_box_without_area_is_no_target(recorded, box):
  with pytest.raises(UserError, match='has no area'):
    crops.crop(recorded['image0'], np.array(box, np.float64), 4.0, 32)
  options = crops.CROP_OPTIONS[256]
  box = np.array(box, np.float32)
  image = recorded['image0']
  assert crops.training_pair(image, image, box, box, NO_AUGMENTATION, options) is None


@pytest.mark.parametrize('corner', [(-500, 10), (500, 10), (10, -500), (10, 500)])
def test_a_crop_outside_of_the_image_is_black(recorded, corner):
  pixels, _ = crops.crop(recorded['image0'], np.array([*corner, 9.0, 9.0]), 2.0, 32)
  assert not pixels.any()


def frames_of(recorded, name):
  """The frames of a recorded sequence."""
  frames = []
  for x, y, width, height in recorded[f'{name}/square']:
    frame = recorded[f'{name}/background'].copy()
    frame[y : y + height, x : x + width] = recorded[f'{name}/colour'][0]
    frame[y + 3 : y + height - 3, x + 3 : x + width - 3] = recorded[f'{name}/colour'][1]
    frames.append(frame)
  np.testing.assert_array_equal([each.sum() for each in frames], recorded[f'{name}/frame_sum'])
  return frames


@pytest.mark.parametrize('name', ['seq0', 'seq1'])
def test_crops_and_boxes_of_a_tracked_sequence(golden, name):
  recorded = golden('tracker/tracker_inference')
  frames, box = frames_of(recorded, name), recorded[f'{name}/init_box']
  pixels, resize_factor = crops.crop(frames[0], box, 2.0, 32)
  np.testing.assert_array_equal(pixels, recorded[f'{name}/template_crop'])
  assert resize_factor == recorded[f'{name}/template_resize_factor']
  for step, frame in enumerate(frames[1:]):
    pixels, resize_factor = crops.crop(frame, box, float(recorded[f'{name}/search_factor']), 64)
    assert resize_factor == recorded[f'{name}/resize_factor'][step]
    if name == 'seq0':
      np.testing.assert_array_equal(pixels, recorded['seq0/search_crop'][step])
    predicted = recorded[f'{name}/box_in_crop'][step]
    box = crops.box_in_image(predicted, box, resize_factor, 64)
    box = crops.clip_box(box, *frame.shape[:2])
    np.testing.assert_allclose(box, recorded[f'{name}/box'][step], rtol=0, atol=6e-5)


def test_clipped_boxes(golden):
  recorded = golden('tracker/tracker_inference')
  size = recorded['clip/size_hw'].tolist()
  for box, expected in zip(recorded['clip/box'], recorded['clip/result'], strict=True):
    np.testing.assert_array_equal(crops.clip_box(box, *size), expected)


def test_the_distribution_of_augmentation():
  random = np.random.default_rng(0).random
  drawn = [crops.draw_augmentation(random, is_training=True) for _ in range(2000)]
  for rate, drawn_true in (
    (0.05, [each.is_grey for each in drawn]),
    (0.5, [each.is_flipped for each in drawn]),
    (0.5, [each.crop_is_flipped[0] for each in drawn]),
    # Template and search are flipped independently.
    (0.5, [each.crop_is_flipped[0] == each.crop_is_flipped[1] for each in drawn]),
  ):
    assert scipy.stats.binomtest(sum(drawn_true), len(drawn), rate).pvalue > 1e-3
  for name, distribution in (
    ('normals', scipy.stats.norm()),
    ('uniforms', scipy.stats.uniform()),
    ('brightness', scipy.stats.uniform(0.8, 0.4)),
  ):
    values = np.array([getattr(each, name) for each in drawn])
    assert scipy.stats.kstest(values.ravel(), distribution.cdf).pvalue > 1e-3, name
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.1, name


def test_validation_does_not_augment_single_crops():
  random = np.random.default_rng(0).random
  drawn = [crops.draw_augmentation(random, is_training=False) for _ in range(100)]
  assert {each.crop_is_flipped for each in drawn} == {(False, False)}
  assert {each.brightness for each in drawn} == {(1.0, 1.0)}
  assert {each.is_flipped for each in drawn} == {False, True}
