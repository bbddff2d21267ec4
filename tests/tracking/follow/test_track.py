"""Whole sequences are followed as recorded, one at a time and side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded_tracker as recorded
from conftest import GOLDEN
from flax import nnx

from dropmae_jax.model import pixels
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking import crops
from dropmae_jax.tracking.follow import track
from dropmae_jax.tracking.follow.track import Source


@pytest.fixture(scope='module')
def golden():
  return dict(np.load(GOLDEN / 'tracker' / 'tracker_inference.npz'))


@pytest.fixture(scope='module')
def weights():
  """Parameters and running statistics."""
  return recorded.initial_state(lambda name: dict(np.load(GOLDEN / f'{name}.npz')))


@pytest.fixture(scope='module')
def locate(weights):
  return track.make_locate(recorded.ARCHITECTURE, *weights)


def options(golden, name):
  factor = float(golden[f'{name}/search_factor'])
  return crops.CropOptions(32, 64, 2.0, factor, centre_jitter=0, scale_jitter=0)


def frames(golden, name, count=None):
  outer, inner = golden[f'{name}/colour']
  for (x, y, w, h), total in zip(
    golden[f'{name}/square'][:count], golden[f'{name}/frame_sum'], strict=False
  ):
    frame = golden[f'{name}/background'].copy()
    frame[y : y + h, x : x + w] = outer
    frame[y + 3 : y + h - 3, x + 3 : x + w - 3] = inner
    assert frame.sum() == total
    yield frame


def source(golden, name, count=None):
  return Source(name, golden[f'{name}/init_box'], frames(golden, name, count))


@pytest.mark.parametrize('name', ['seq0', 'seq1'])
def test_a_sequence_is_followed_as_recorded(golden, locate, name):
  batches = []

  def seen(templates, searches):
    located = locate(templates, searches)
    batches.append((templates, searches, located))
    return located

  ((_, found),) = track.follow([source(golden, name)], seen, options(golden, name))
  np.testing.assert_allclose(found.boxes[1:], golden[f'{name}/box'], atol=6.4e-5)
  np.testing.assert_array_equal(np.trunc(found.boxes), golden[f'{name}/box_saved'])
  boxes = np.concatenate([located.boxes for *_, located in batches])
  np.testing.assert_allclose(boxes, golden[f'{name}/box_in_crop'], atol=1e-5)
  np.testing.assert_array_equal(batches[0][0][0], golden[f'{name}/template_crop'])
  scores = golden[f'{name}/score_map'].reshape(11, -1)
  expected = scores[np.arange(11), golden[f'{name}/response_argmax']]
  np.testing.assert_allclose(found.scores, [1, *expected], atol=5e-6)
  if name == 'seq0':
    searches = np.concatenate([searches for _, searches, _ in batches])
    np.testing.assert_array_equal(searches, golden['seq0/search_crop'])
  assert found.seconds[0] == 0
  assert (found.seconds[1:] > 0).all()


def test_the_recorded_tokens_are_removed(golden, weights):
  searches = pixels.normalise(jnp.asarray(golden['seq0/search_crop']))
  template = pixels.normalise(jnp.asarray(golden['seq0/template_crop']))
  templates = jnp.broadcast_to(template, (len(searches), *template.shape))

  @jax.jit
  def encode(params):
    tracker = nnx.merge(recorded.GRAPHDEF, params)
    return tracker.encode(templates, searches, kept=recorded.ARCHITECTURE.kept(0.7))

  is_removed = ~np.asarray(encode(weights[0]))[:, 64:].any(axis=-1)
  blocks = [golden[f'seq0/removed_block{block}'] for block in (1, 2, 3)]
  expected = np.sort(np.concatenate(blocks, axis=1), axis=1)
  np.testing.assert_array_equal([np.flatnonzero(row) for row in is_removed], expected)


def test_sequences_side_by_side_are_followed_like_each_alone(golden, locate):
  lengths = {'long': 12, 'single': 1, 'short': 5, 'middle': 8, 'two': 2}
  sources = [source(golden, 'seq0', count)._replace(name=name) for name, count in lengths.items()]
  seen, counted = [], []

  def counting(templates, searches):
    seen.append(len(templates))
    return locate(templates, searches)

  results = list(
    track.follow(
      sources,
      counting,
      options(golden, 'seq0'),
      batch_size=3,
      on_frame=lambda: counted.append(1),
    )
  )
  assert {each.name: len(result.boxes) for each, result in results} == lengths
  assert results[0][0].name == 'single'
  expected = np.concatenate([golden['seq0/init_box'][None], golden['seq0/box']])
  for each, result in results:
    np.testing.assert_allclose(result.boxes, expected[: lengths[each.name]], atol=6.4e-5)
  assert set(seen) == {3}
  assert len(seen) == 11
  assert len(counted) == sum(lengths.values())


def test_the_window_is_as_recorded(golden):
  np.testing.assert_allclose(track.cosine_window(16), golden['window'], atol=1e-7)


def test_what_cannot_be_followed_is_refused(golden, locate):
  empty = source(golden, 'seq0', 0)
  with pytest.raises(UserError, match='seq0 has no frames'):
    list(track.follow([empty], locate, options(golden, 'seq0')))
  huge = source(golden, 'seq0')._replace(first_box=np.array([0, 0, 1e9, 1e9]))
  with pytest.raises(UserError, match='twice as large as the frame of 128 x 96 pixels'):
    list(track.follow([huge], locate, options(golden, 'seq0')))
