"""The tracker against recorded numbers of the published one, and what it must hold beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded_tracker as recorded
from flax import nnx, traverse_util
from recorded_tracker import ARCHITECTURE, GRAPHDEF, channels_last

from dropmae_jax.model import mae, position_embedding
from dropmae_jax.tracking import elimination, head, model

RATES = {'r100': 1.0, 'r085': 0.85, 'r070': 0.7}


@pytest.fixture(scope='module')
def forward(golden):
  return golden('tracker/tracker_forward')


@pytest.fixture(scope='module')
def state(golden):
  """Parameters and running statistics."""
  return recorded.initial_state(golden)


@pytest.fixture(scope='module')
def images(forward):
  return channels_last(forward['template']), channels_last(forward['search'])


class Recorder:
  """The scores of every elimination, and the tokens before and after it."""

  def __init__(self, monkeypatch):
    self.seen, self.eliminate = [], elimination.eliminate
    monkeypatch.setattr(elimination, 'eliminate', self)

  def __call__(self, search, standing, scores, count):
    result = self.eliminate(search, standing, scores, count)
    self.seen.append((standing, scores, result[1]))
    return result


@pytest.fixture(scope='module')
def outputs(state, images):
  """Maps, tokens and eliminations of every keep rate in both forms."""
  seen = {}

  def run(params, statistics, template, search, kept):
    with pytest.MonkeyPatch.context() as patch:
      recorder = Recorder(patch)
      tracker = nnx.merge(GRAPHDEF, params)
      tokens = tracker.encode(template, search, kept=kept)
      side = ARCHITECTURE.search_grid
      features = tokens[:, -(side**2) :].reshape(-1, side, side, ARCHITECTURE.width)
      maps, _ = tracker.box_head(features, statistics['box_head'])
      return maps, tokens, recorder.seen

  masked = jax.jit(run)
  gathered = jax.jit(run, static_argnames='kept')
  for tag, rate in RATES.items():
    kept = ARCHITECTURE.kept(rate)
    seen['masked', tag] = masked(*state, *images, jnp.asarray(kept))
    seen['gathered', tag] = gathered(*state, *images, kept=kept)
  return seen


def assert_maps(maps, forward, tag, *, score, size, offset):
  np.testing.assert_allclose(maps.score, forward[f'{tag}/score_map'][:, 0], rtol=0, atol=score)
  for name, atol in (('size', size), ('offset', offset)):
    expected = channels_last(forward[f'{tag}/{name}_map'])
    np.testing.assert_allclose(getattr(maps, name), expected, rtol=0, atol=atol)
  np.testing.assert_array_equal(head.best_cell(maps.score), forward[f'{tag}/argmax'])


@pytest.mark.parametrize('form', ['masked', 'gathered'])
@pytest.mark.parametrize('tag', RATES)
def test_maps_and_boxes(outputs, forward, form, tag):
  maps, tokens, _ = outputs[form, tag]
  assert_maps(maps, forward, tag, score=2.8e-6, size=1.6e-6, offset=8e-6)
  boxes = head.decode(maps)
  np.testing.assert_allclose(boxes, forward[f'{tag}/pred_boxes'][:, 0], rtol=0, atol=5.2e-7)
  if tag == 'r070':
    np.testing.assert_allclose(tokens, forward['r070/backbone'], rtol=0, atol=8.4e-6)


@pytest.mark.parametrize('form', ['masked', 'gathered'])
@pytest.mark.parametrize('tag', ['r085', 'r070'])
def test_removed_tokens(outputs, forward, form, tag):
  order = np.tile(np.arange(256), (2, 1))
  for block, (before, scores, after) in zip((1, 2, 3), outputs[form, tag][2], strict=True):
    kept, removed = (forward[f'{tag}/block{block}_{which}'] for which in ('kept', 'removed'))
    were, are = recorded.places_of(before), recorded.places_of(after)
    for sample in range(2):
      assert set(were[sample]) - set(are[sample]) == set(removed[sample])
      assert set(are[sample]) == set(kept[sample])
      ours = dict(zip(before.places[sample].tolist(), scores[sample].tolist(), strict=True))
      # Recorded in the order that the last elimination left.
      theirs = forward[f'{tag}/block{block}_score'][sample]
      np.testing.assert_allclose([ours[i] for i in order[sample]], theirs, rtol=2e-5)
    order = kept


def test_what_goes_into_the_blocks_and_the_order_of_the_identities(state, images, forward):
  tracker = nnx.merge(GRAPHDEF, state[0])
  tokens = tracker.embed(*images)
  np.testing.assert_allclose(tokens, forward['tokens_in'], rtol=0, atol=4e-6)
  swapped = model.TrackerArchitecture(**{**vars(ARCHITECTURE), 'identity_order': 'xz'})
  other = nnx.merge(model.abstract_tracker(swapped)[0], state[0]).embed(*images)
  identities = (state[0]['backbone'][f'temporal_pos_embed_{frame}'] for frame in 'xz')
  change = jnp.subtract(*identities)
  expected = tokens + jnp.where(jnp.arange(320)[:, None] < 64, change, -change)
  np.testing.assert_allclose(other, expected, rtol=0, atol=4e-6)


@pytest.fixture(scope='module')
def trained(state, images):
  """A forward pass with batch statistics, at any keep rate."""

  @functools.partial(jax.jit, static_argnames='group_size')
  def run(template, search, kept, group_size):
    tracker = nnx.merge(GRAPHDEF, state[0])
    return tracker(template, search, state[1], kept=kept, group_size=group_size)

  return run


@pytest.mark.parametrize('tag', ['train_r100', 'train_r085'])
def test_batch_statistics(trained, images, forward, tag):
  kept = ARCHITECTURE.kept(RATES[tag.removeprefix('train_')])
  maps, after = trained(*images, jnp.asarray(kept), 2)
  assert_maps(maps, forward, tag, score=6e-6, size=4.8e-6, offset=2.8e-5)
  boxes = head.decode(maps)
  np.testing.assert_allclose(boxes, forward[f'{tag}/pred_boxes'][:, 0], rtol=0, atol=3.6e-6)
  if tag == 'train_r085':
    for name, ours in recorded.tensors_of(after).items():
      theirs = forward[f'{tag}/after/{name}']
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=4e-7, err_msg=name)


def test_mixed_precision_is_near(trained, state, images):
  """In training mode, where nothing is removed."""
  kept = ARCHITECTURE.kept(1.0)
  graphdef, _ = model.abstract_tracker(ARCHITECTURE, dtype=jnp.bfloat16)
  low, _ = jax.jit(
    lambda params: nnx.merge(graphdef, params)(*images, state[1], kept=kept, group_size=2)
  )(state[0])
  high, _ = trained(*images, jnp.asarray(kept), 2)
  for one, other in zip(low, high, strict=True):
    assert one.dtype == jnp.float32
    error = float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
    assert 1e-4 < error < 5e-2


def test_position_tables_are_resampled_as_published(golden):
  positions = golden('tracker/tracker_positions')
  for grid in (8, 12, 16, 24):
    table = position_embedding.resample_table(positions['pos_embed'], grid)
    np.testing.assert_allclose(table[:, 1:], positions[f'grid{grid}'], rtol=0, atol=1.6e-5)


@pytest.mark.parametrize(('sizes', 'trained'), [((128, 256), 92_368_005), ((192, 384), 92_675_205)])
def test_vit_b_has_the_published_number_of_parameters(sizes, trained):
  architecture = model.tracker_of_size('B', template_size=sizes[0], search_size=sizes[1])
  _, params = model.abstract_tracker(architecture)
  is_trained = traverse_util.flatten_dict(model.is_trained(params))
  leaves = traverse_util.flatten_dict(params)
  assert sum(leaf.size for path, leaf in leaves.items() if is_trained[path]) == trained
  assert mae.num_parameters(params) == trained + 768 * (1 + 197)
  statistics = jax.eval_shape(functools.partial(model.init_statistics, architecture))
  assert len(leaves) + len(jax.tree.leaves(statistics)) == 244


@pytest.mark.parametrize(
  ('size', 'kept', 'grid'), [('XS', (717, 502, 352), 32), ('S', (180, 126, 89), 16),
                             ('L', (180, 126, 89), 16)]
)  # fmt: skip
def test_other_sizes_make_maps(size, kept, grid):
  architecture = model.tracker_of_size(size)
  assert architecture.kept(0.7) == kept
  graphdef, params = model.abstract_tracker(architecture, dtype=jnp.bfloat16, remat='full')

  def run(params, template, search):
    statistics = model.init_statistics(architecture)
    return nnx.merge(graphdef, params)(template, search, statistics, kept=kept)[0]

  images = (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32) for side in (128, 256))
  maps = jax.eval_shape(run, params, *images)
  assert maps.score.shape == (1, grid, grid)
  assert {each.dtype for each in maps} == {jnp.dtype('float32')}


def test_initial_tables_are_those_of_pre_training_resampled():
  params = model.init_params(jax.random.key(0), ARCHITECTURE)['backbone']
  table = np.asarray(params['pos_embed'])
  np.testing.assert_array_equal(table, position_embedding.sincos_table(14, 24))
  for name, grid in (('pos_embed_z', 8), ('pos_embed_x', 16)):
    expected = position_embedding.resample_table(table, grid)[:, 1:]
    np.testing.assert_allclose(params[name], expected, atol=1e-6)


def test_drop_path_has_the_stated_rates_and_mean_one():
  keys = jax.random.split(jax.random.key(0), 20_000)
  scales = np.asarray(model.draw_residual_scales(keys, depth=3, rate=0.2))
  rates = np.array([0, 0.1, 0.2])[:, None]
  dropped = scales == 0
  # Four deviations.
  assert (np.abs(dropped.mean(-1) - rates) <= 4 * np.sqrt(rates * (1 - rates) / 20_000)).all()
  np.testing.assert_allclose(scales.max(-1), 1 / (1 - rates) * np.ones(2), rtol=1e-6)
  assert np.unique(scales[2]).size == 2
  # Both residuals of a block are drawn on their own.
  assert abs(np.corrcoef(dropped[2])[0, 1]) < 0.03


def test_a_dropped_residual_is_not_added(state, images):
  """Without all of them, tokens are what went in."""
  tracker = nnx.merge(GRAPHDEF, state[0])
  encode = jax.jit(functools.partial(tracker.encode, kept=ARCHITECTURE.kept(1.0)))
  scales = jnp.ones((4, 2, 2)).at[:, :, 1].set(0.0)
  tokens = encode(*images, residual_scales=scales)
  none = tracker.backbone.norm(tracker.embed(*images))
  np.testing.assert_allclose(tokens[1], none[1], atol=1e-5)
  assert np.abs(tokens[0] - none[0]).max() > 0.1


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'search_size': 250}, 'search_size=250 is not a multiple of patch_size=16.*search_size=256'),
    ({'num_heads': 7}, 'width=768 must be a multiple of 4 and of num_heads=7'),
    ({'head_channels': 12}, 'head_channels=12 must be a multiple of 8'),
    ({'elimination_blocks': (3, 12)}, r'elimination_blocks=\(3, 12\) must rise .* 0 to 11'),
    ({'elimination_blocks': (6, 3)}, r'elimination_blocks=\(6, 3\) must rise'),
    ({'identity_order': 'xx'}, "identity_order='xx' is unknown"),
    ({'width': 0}, 'width=0 is out of range'),
  ],
)
def test_impossible_trackers_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    model.tracker_of_size('B', **fields)
