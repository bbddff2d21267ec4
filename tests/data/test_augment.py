"""Crops against their distribution, resizes against PIL, flips against dm-pix."""

import itertools

import cv2
import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dropmae_jax.data import augment
from dropmae_jax.data.augment import Box
from dropmae_jax.model import pixels


def picture(seed, height, width):
  """Smooth noise, which resizes like a photograph."""
  small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
  return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 400), st.integers(1, 400))
def test_crops_lie_inside_the_frame(seed, height, width):
  box = augment.random_resized_crop_box(np.random.default_rng(seed).random, height, width)
  assert box.height > 0
  assert box.width > 0
  assert 0 <= box.top <= height - box.height
  assert 0 <= box.left <= width - box.width


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), *[st.integers(1, 400)] * 4)
def test_the_same_place_of_another_frame_lies_inside_it(seed, height, width, tall, wide):
  box = augment.random_resized_crop_box(np.random.default_rng(seed).random, height, width)
  assert augment.same_place(box, (height, width), (height, width)) == box
  top, left, crop_height, crop_width = augment.same_place(box, (height, width), (tall, wide))
  assert 0 <= top < top + crop_height <= tall
  assert 0 <= left < left + crop_width <= wide
  assert abs(top / tall - box.top / height) < 1 / tall
  assert abs((left + crop_width) / wide - (box.left + box.width) / width) < 1 / wide


def test_the_distribution_of_crops():
  """In a huge frame no crop of up to half the area is rejected: area and log ratio are uniform."""
  rng = np.random.default_rng(0)
  boxes = [augment.random_resized_crop_box(rng.random, 20_000, 20_000) for _ in range(100_000)]
  kept = [b for b in boxes if b.height * b.width <= 0.5 * 20_000**2]
  area = np.array([b.height * b.width for b in kept]) / 20_000**2
  ratio = np.log([b.width / b.height for b in kept])
  place = np.array([(b.top / (20_000 - b.height), b.left / (20_000 - b.width)) for b in kept])
  low, high = np.log(3 / 4), np.log(4 / 3)
  for sample, start, width in (
    (area, 0.2, 0.3),
    (ratio, low, high - low),
    (place[:, 0], 0, 1),
    (place[:, 1], 0, 1),
  ):
    assert scipy.stats.kstest(sample, 'uniform', (start, width)).pvalue > 1e-3


def simulated_boxes(rng, height, width, count):
  """A vectorised second implementation: top, left, height, width, and the share of fallbacks."""
  shape = (count, augment.CROP_ATTEMPTS)
  area = height * width * rng.uniform(0.2, 1, shape)
  ratio = np.exp(rng.uniform(-np.log(4 / 3), np.log(4 / 3), shape))
  widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
  fits = (widths <= width) & (heights <= height)
  take = np.arange(count), fits.argmax(axis=1)
  size = np.stack([heights[take], widths[take]], axis=1)
  corner = np.floor(rng.random((count, 2)) * (np.array([height, width]) - size + 1))
  return np.concatenate([corner, size], axis=1)[fits.any(axis=1)], 1 - fits.any(axis=1).mean()


@pytest.mark.parametrize(('height', 'width'), [(256, 340), (340, 256), (256, 800)])
def test_crops_are_those_of_a_simulation(height, width):
  count = 40_000
  rng = np.random.default_rng(3)
  drawn = [augment.random_resized_crop_box(rng.random, height, width) for _ in range(count)]
  ours = np.array([box for box in drawn if box != augment.centre_box(height, width)])
  theirs, fallback = simulated_boxes(np.random.default_rng(4), height, width, count)
  assert 1 - len(ours) / count == pytest.approx(fallback, abs=0.007)

  def features(boxes):
    top, left, tall, wide = boxes.T
    yield from (top, left, tall, wide, tall * wide, tall / wide, top + tall / 2, left + wide / 2)

  for sample, other in zip(features(ours), features(theirs), strict=True):
    assert scipy.stats.ks_2samp(sample, other).pvalue > 1e-3


@pytest.mark.parametrize(
  ('height', 'width', 'first_try', 'fallback'),
  [(256, 340, 0.71, 1e-5), (360, 640, 0.47, 0.002), (256, 800, 0.16, 0.18)],
)
def test_acceptance_rates_are_those_of_the_published_code(height, width, first_try, fallback):
  rng, first, centred = np.random.default_rng(1), 0, 0
  centre = augment.centre_box(height, width)
  for _ in range(4000):
    calls = itertools.count()

    def uniform(calls=calls):
      next(calls)
      return rng.random()

    box = augment.random_resized_crop_box(uniform, height, width)
    count = next(calls)
    assert count <= augment.CROP_DRAWS
    first += count == 4  # One attempt, and the position.
    centred += count == 2 * augment.CROP_ATTEMPTS and box == centre
  assert first / 4000 == pytest.approx(first_try, abs=0.03)
  assert centred / 4000 == pytest.approx(fallback, abs=0.02)


@pytest.mark.parametrize(
  ('size', 'expected'),
  [
    ((100, 100), Box(0, 0, 100, 100)),
    ((100, 120), Box(0, 0, 100, 120)),
    ((100, 134), Box(0, 0, 100, 133)),
    ((134, 100), Box(0, 0, 133, 100)),
    ((90, 300), Box(0, 90, 90, 120)),
    ((300, 90), Box(90, 0, 120, 90)),
  ],
)
def test_fallback_is_the_largest_centred_crop_of_a_ratio_in_range(size, expected):
  assert augment.centre_box(*size) == expected


@pytest.mark.parametrize('box', [Box(0, 0, 256, 340), Box(10, 31, 190, 150), Box(100, 200, 60, 80)])
def test_the_exact_resize_is_that_of_pil(box):
  frame = picture(0, 256, 340)
  expected = Image.fromarray(frame).crop(
    (box.left, box.top, box.left + box.width, box.top + box.height)
  )
  expected = np.asarray(expected.resize((224, 224), Image.Resampling.BICUBIC))
  ours = augment.crop_and_resize(frame, box, 224, resize='exact')
  np.testing.assert_array_equal(ours, expected)
  fast = augment.crop_and_resize(frame, box, 224, resize='fast').astype(np.float64)
  noise = 10 * np.log10(255**2 / np.square(fast - expected).mean())
  assert 35 < noise < 90


@pytest.mark.parametrize('resize', list(augment.RESIZES))
@pytest.mark.parametrize('box', [Box(0, 0, 256, 340), Box(10, 31, 190, 150), Box(16, 58, 224, 224)])
def test_a_crop_into_a_given_array_is_the_crop_of_a_copy(resize, box):
  frame = picture(0, 256, 340)
  before = frame.copy()
  pair = np.full((2, 224, 224, 3), 77, np.uint8)
  returned = augment.crop_and_resize(frame, box, 224, resize=resize, out=pair[1])
  copy = frame[box.top : box.top + box.height, box.left : box.left + box.width].copy()
  if resize == 'fast':
    expected = cv2.resize(copy, (224, 224), interpolation=cv2.INTER_CUBIC)
  else:
    expected = Image.fromarray(copy).resize((224, 224), Image.Resampling.BICUBIC)
  assert np.shares_memory(returned, pair)
  np.testing.assert_array_equal(pair[1], expected)
  assert (pair[0] == 77).all()
  np.testing.assert_array_equal(frame, before)


def test_the_boxes_of_a_seed_are_the_recorded_ones():
  """A change here changes the training stream of every seed."""
  rng = np.random.default_rng(3)
  boxes = [augment.random_resized_crop_box(rng.random, 256, 340) for _ in range(400)]
  expected = [(73, 115, 165, 142), (107, 10, 142, 124), (29, 41, 212, 209), (4, 2, 227, 284)]
  assert [tuple(box) for box in boxes[::100]] == expected


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_exact_resize_is_that_of_pil_for_any_box(drawn):
  """Also for very thin crops, where PIL's rounding between its two passes matters most."""
  height, width = drawn.draw(st.integers(1, 300)), drawn.draw(st.integers(1, 300))
  tall, wide = drawn.draw(st.integers(1, height)), drawn.draw(st.integers(1, width))
  top = drawn.draw(st.integers(0, height - tall))
  left = drawn.draw(st.integers(0, width - wide))
  frame = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
  size = drawn.draw(st.sampled_from([16, 224]))
  image = Image.fromarray(frame).crop((left, top, left + wide, top + tall))
  expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.int16)
  ours = augment.crop_and_resize(frame, Box(top, left, tall, wide), size, resize='exact')
  assert np.abs(ours - expected).max() <= 1


def test_normalise_is_that_of_imagenet_and_has_an_inverse():
  frames = np.arange(256 * 3, dtype=np.uint8).reshape(1, 1, 16, 16, 3)
  normal = pixels.normalise(jnp.asarray(frames))
  expected = (frames / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(normal, expected, atol=1e-6)
  np.testing.assert_array_equal(pixels.denormalise(normal), frames)


@pytest.mark.parametrize('shared', [True, False])
def test_flips(shared):
  """Each frame by its own key, or both by the key of the pair."""
  frames = np.random.default_rng(0).integers(0, 256, (400, 2, 4, 6, 3), np.uint8)
  keys = jax.random.split(jax.random.key(0), 400)
  flipped = pixels.flip_and_normalise(keys, jnp.asarray(frames), shared=shared)
  frame_keys = jnp.stack([keys, keys], 1) if shared else jax.vmap(jax.random.split)(keys)
  flip = jax.vmap(jax.vmap(dm_pix.random_flip_left_right))
  np.testing.assert_array_equal(flipped, pixels.normalise(flip(frame_keys, jnp.asarray(frames))))
  is_flipped = (np.asarray(flipped) != pixels.normalise(jnp.asarray(frames))).any((2, 3, 4))
  assert 0.4 < is_flipped.mean() < 0.6
  together = (is_flipped[:, 0] == is_flipped[:, 1]).mean()
  assert together == 1 if shared else 0.4 < together < 0.6
