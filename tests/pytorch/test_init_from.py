"""A run can start from the weights of another run or of a weight file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import run_python, train_arguments
from flax import traverse_util
from test_commands import losses

from dropmae_jax import sharding, train
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.checkpoints.manager import Checkpoints
from dropmae_jax.config import CheckpointOptions, Config, MeshOptions, Objective
from dropmae_jax.model import mae, position_embedding
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.pytorch import convert, init_from
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.train_step import TrainState

TINY = architecture_of_size(
  'XXS', image_size=32, decoder_width=32, decoder_depth=2, decoder_num_heads=2
)


def drawn(architecture, seed):
  return jax.tree.map(np.asarray, mae.init_params(jax.random.key(seed), architecture))


@pytest.fixture(scope='module')
def params():
  return drawn(TINY, 1)


@pytest.fixture(scope='module')
def workdir(params, tmp_path_factory):
  folder = tmp_path_factory.mktemp('run') / 'run'
  saved_weights.save_weights(folder, params, 7, saved_weights.describe(TINY, Objective()))
  return folder


def equal_leaves(params, others):
  one, other = (traverse_util.flatten_dict(tree) for tree in (params, others))
  return {path for path in one if np.array_equal(one[path], other[path])}


def test_a_run_of_ours_is_taken_whole(workdir, params):
  start = init_from.read(workdir, TINY)
  fresh = drawn(TINY, 2)
  assert equal_leaves(init_from.replace(to_devices(fresh), start.params), params) == set(
    traverse_util.flatten_dict(params)
  )
  assert start.report[0].endswith('step 7')
  assert not any('initialised:' in line for line in start.report)


def to_devices(params, *, fsdp=1):
  mesh = sharding.make_mesh(options=MeshOptions(fsdp=fsdp))
  return jax.tree.map(jax.device_put, params, sharding.state_sharding(mesh, params))


def test_what_is_taken_lies_where_the_fresh_did(workdir, params):
  fresh = to_devices(drawn(TINY, 2), fsdp=8)
  taken = init_from.replace(fresh, init_from.read(workdir, TINY).params)
  for one, other in zip(jax.tree.leaves(taken), jax.tree.leaves(fresh), strict=True):
    assert one.sharding == other.sharding
  assert len(equal_leaves(taken, params)) == len(jax.tree.leaves(params))


@pytest.mark.parametrize('layout', ['full', 'encoder', 'mae', 'timm'])
def test_files_of_every_layout(workdir, params, tmp_path, layout):
  path = tmp_path / 'weights.safetensors'
  list(convert.export(workdir, path, convert.ExportOptions(layout=layout, verify=False)))
  start = init_from.read(path, TINY)
  fresh = drawn(TINY, 2)
  merged = init_from.replace(to_devices(fresh), start.params)
  same = {path[0] for path in equal_leaves(merged, params)}
  assert {'patch_embed', 'blocks', 'norm', 'pos_embed'} <= same
  assert ('mask_token' in same) == (layout == 'full')
  assert ('temporal_pos_embed_x' in same) == (layout != 'timm')
  assert any('initialised:' in line for line in start.report) == (layout != 'full')


@pytest.mark.parametrize(
  'changed', [{'decoder_depth': 1}, {'decoder_width': 64}, {'decoder_num_heads': 4}]
)
def test_another_decoder_is_drawn_afresh(workdir, params, changed):
  other = dataclasses.replace(TINY, **changed)
  start = init_from.read(workdir, other)
  assert {path[0] for path in start.params} >= {'blocks', 'norm', 'temporal_pos_embed_x'}
  assert not any('decoder' in str(path[0]) or path[0] == 'mask_token' for path in start.params)
  assert any('initialised:' in line and 'decoder_blocks' in line for line in start.report)


def test_other_heads_are_another_encoder(workdir, tmp_path):
  """Though all shapes are the same."""
  other = dataclasses.replace(TINY, num_heads=2 * TINY.num_heads)
  path = tmp_path / 'weights.safetensors'
  list(convert.export(workdir, path, convert.ExportOptions(verify=False)))
  for source in (workdir, path):
    with pytest.raises(
      UserError, match=f'of {TINY.num_heads} attention heads, and config.model.num'
    ):
      init_from.read(source, other)
  # A file that does not tell: it is the run that decides.
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(tensors, path)
  for name in (path.with_name(f'{path.name}.json'), path.with_name(f'{path.name}.sha256')):
    name.unlink(missing_ok=True)
  told = [
    line for line in init_from.read(path, other).report if 'assumed, as the file does not' in line
  ]
  assert len(told) == 1


def test_processes_begin_with_the_same_weights(workdir, monkeypatch, tmp_path):
  """Of a run that is training, each could find another newest checkpoint; `agree` compares."""
  other = tmp_path / 'other'
  saved_weights.save_weights(other, drawn(TINY, 2), 7, saved_weights.describe(TINY, Objective()))
  told, model = [], train.Model(lambda _: None, None, None)

  def agree(facts, remedy):
    assert 'one step of that run' in remedy
    told.append(facts)
    raise UserError('they differ')

  monkeypatch.setattr(train.multihost, 'agree', agree)
  for source in (workdir, workdir, other):
    begun = Config(data_dir='', num_steps=1, batch_size=1, model=TINY, init_from=str(source))
    checkpoints = Checkpoints(tmp_path / 'run', CheckpointOptions(), {})
    with pytest.raises(UserError, match='they differ'):
      train.first_state(
        begun,
        tmp_path,
        model,
        checkpoints,
        key=jax.random.key(3),
        allow_changes=False,
        initial=None,
      )
  assert told[0] == told[1] != told[2]


def test_tables_of_another_grid_are_resampled(workdir, params):
  other = dataclasses.replace(TINY, image_size=48)
  start = init_from.read(workdir, other)
  np.testing.assert_array_equal(
    start.params['pos_embed',], position_embedding.resample_table(params['pos_embed'], other.grid)
  )
  assert 'position tables: resampled from 32 to 48 pixels' in start.report


def test_the_seed_draws_what_is_not_taken(workdir, params, tmp_path):
  """The file has no decoder, and the run has another resolution."""
  path = tmp_path / 'encoder.safetensors'
  list(convert.export(workdir, path, convert.ExportOptions(layout='encoder', verify=False)))
  other = dataclasses.replace(TINY, image_size=48)
  _, shapes = mae.abstract_model(other)

  def init(key):
    value = np.float32(jax.random.uniform(key))
    leaves = jax.tree.map(lambda leaf: jax.device_put(np.full(leaf.shape, value)), shapes)
    return TrainState(jnp.int32(0), leaves, {})

  begun, notes = train.first_state(
    Config(data_dir='', num_steps=1, batch_size=1, model=other, init_from=str(path)),
    tmp_path,
    train.Model(init, None, None),
    Checkpoints(tmp_path / 'run', CheckpointOptions(), {}),
    key=jax.random.key(3),
    allow_changes=False,
    initial=None,
  )
  drawn, loaded = (
    traverse_util.flatten_dict(each) for each in (init(jax.random.key(3)).params, begun.params)
  )
  taken = traverse_util.flatten_dict(params)
  is_of_decoder = lambda name: 'decoder' in str(name[0]) or name[0] == 'mask_token'
  assert {name for name in loaded if is_of_decoder(name)} == {
    name for name in taken if is_of_decoder(name)
  }
  for name, array in loaded.items():
    expected = drawn[name] if is_of_decoder(name) else taken[name]
    if name == ('pos_embed',):
      expected = position_embedding.resample_table(taken[name], other.grid)
    np.testing.assert_array_equal(array, expected, err_msg=str(name))
  assert 'position tables: resampled from 32 to 48 pixels' in notes


def test_another_encoder_is_refused(workdir):
  other = dataclasses.replace(TINY, depth=3)
  with pytest.raises(UserError, match=r'has another encoder: .* blocks\.2\.norm1\.weight is miss'):
    init_from.read(workdir, other)


def test_weights_that_are_not_finite_are_refused(workdir, params, tmp_path):
  path = tmp_path / 'weights.safetensors'
  list(convert.export(workdir, path, convert.ExportOptions(verify=False)))
  tensors = safetensors.numpy.load_file(path)
  tensors['norm.bias'][0] = np.nan
  other = tmp_path / 'nan.safetensors'
  safetensors.numpy.save_file(tensors, other)
  with pytest.raises(UserError, match=r'values that are not finite, in 1 tensors: norm\.bias'):
    init_from.read(other, TINY)


def test_the_command_begins_with_what_it_is_given(trained, data_dir, tmp_path):
  """It starts at step 0 with a new optimizer state, and later resumes from its own checkpoint."""
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=8', f'--config.init_from={trained}'
  )
  done = run_python(*arguments)
  assert done.returncode == 0, done.stderr
  assert f'init_from {trained}: step 8' in done.stdout
  assert losses(tmp_path)[0][1] < losses(trained)[0][1] - 0.02
  again = run_python(*arguments)
  assert 'step 8 is done' in again.stdout
  assert 'init_from' not in again.stdout
  wrong = run_python(
    *train_arguments(data_dir, tmp_path / 'new', '--config.init_from=/nowhere.safetensors')
  )
  assert wrong.returncode == 2
  assert '/nowhere.safetensors is not a file' in wrong.stderr
