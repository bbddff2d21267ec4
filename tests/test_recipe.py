"""Configs: all of them build, and what is wrong with one is said by name."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from dropmae_jax import mae, optimizer, recipe, vit
from dropmae_jax.command_line import BadInput
from dropmae_jax.train_step import init_state

NAMES = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem != '__init__')


def config(name='quickstart'):
  return (
    importlib.import_module(f'configs.{name}').get_config().copy_and_resolve_references().to_dict()
  )


@pytest.mark.parametrize('name', NAMES)
def test_every_config_builds_its_state(name):
  made = recipe.from_config(config(name))
  schedule = optimizer.learning_rate(
    peak=made.peak_learning_rate,
    floor=made.optimizer.min_learning_rate,
    warmup_steps=made.optimizer.warmup_steps,
    num_steps=made.num_steps,
  )
  tx = optimizer.adamw(schedule, made.optimizer)
  state = jax.eval_shape(
    lambda key: init_state(key, architecture=made.model, tx=tx), jax.random.key(0)
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}
  assert mae.num_parameters(state.params) > 1e5


def test_the_published_recipe():
  made = recipe.from_config(config('kinetics400_vit_b16'))
  assert made.peak_learning_rate == pytest.approx(2.4e-3)
  assert (made.num_steps, made.optimizer.warmup_steps) == (23_200, 2_320)
  assert made.model == mae.Architecture()
  assert made.objective == mae.Objective(0.75, 'random', 0.1, True)
  assert made.data.frame_gap == 50


def test_the_published_recipe_is_complete():
  """Its size row stands for the backbone's numbers; everything else is spelled out."""
  backbone = {f'model.{field}' for field in vit.Size._fields}
  values = config('kinetics400_vit_b16')
  for name in set(recipe.known_fields()) - backbone:
    part = values
    for key in name.split('.'):
      assert key in part, name
      part = part[key]


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('sede', 1, "config has no field 'sede'; did you mean 'seed'?"),
    ('model.sizes', 'B', "config has no field 'model.sizes'; did you mean 'model.size'?"),
    ('mask_ratio', 0.5, "no field 'mask_ratio'; did you mean 'objective.mask_ratio'?"),
    ('zzz', 1, "config has no field 'zzz'; valid are: accumulation_steps"),
    ('objective.mask_ratio', 1.0, r'mask_ratio=1.0 is not between 0 and 1'),
    ('objective.attention_dropout', 2.0, r'attention_dropout=2.0 is not between 0 and 1'),
    ('objective.masking', 'tube', "masking='tube' is unknown; choose one of random"),
    ('model.image_size', 100, 'image_size=100 is not a multiple of patch_size=8'),
    ('model.decoder_num_heads', 0, 'decoder_num_heads=0 is not positive'),
    ('model.size', 'M', "size='M' is not in the size table"),
    ('dtype', 'float16', "dtype='float16' is unknown; use one of float32, bfloat16"),
    ('attention', 'flash', "attention='flash' is unknown; use one of auto, xla, fused"),
    ('num_steps', 0, 'num_steps=0 is not positive'),
    ('num_steps', 10.5, 'config.num_steps=10.5 is not of type int'),
    ('num_steps', True, 'config.num_steps=True is not of type int'),
    ('seed', -1, 'seed=-1 is not in 0'),
    ('data', 3, 'config.data=3 should be a group of fields'),
    ('model', 3, 'config.model=3 should be a group of fields'),
    ('optimizer.warmup_steps', -1, 'optimizer.warmup_steps=-1 is negative'),
    ('checkpoint.keep_last', 0, 'checkpoint.keep_last=0 is not positive'),
    ('checkpoint.keep_best', -1, 'checkpoint.keep_best=-1 is negative; 0 keeps none'),
    ('step_stall_seconds', 0, 'step_stall_seconds=0.0 is not positive; use the longest time'),
    ('data.frame_gap', 1, 'frame_gap=1 leaves no second frame'),
  ],
)
def test_what_is_wrong_is_said_by_name(name, value, message):
  values = config()
  *groups, leaf = name.split('.')
  part = values
  for group in groups:
    part = part[group]
  part[leaf] = value
  with pytest.raises(BadInput, match=message.replace('?', r'\?')):
    recipe.from_config(values)


def test_what_a_run_may_go_on_with_changed():
  """All but what its pairs, its noise and what it learns are made of."""
  may_not = {'dataset', 'split', 'seed', 'batch_size'} | {
    name
    for name in recipe.known_fields()
    if name.startswith(('model.', 'objective.'))
    or name in ('data.frame_gap', 'data.resize', 'data.shared_augmentation')
  }
  assert {name for name in recipe.known_fields() if not recipe.may_change(name)} == may_not
  assert not recipe.may_change('data_fingerprint')
  assert not recipe.may_change('seed_version')


def test_a_missing_field_is_named():
  values = config()
  del values['num_steps']
  with pytest.raises(BadInput, match="config lacks the field 'num_steps'"):
    recipe.from_config(values)


def test_a_size_brings_its_patch_size():
  values = config('kinetics400_vit_b16')
  values['model']['size'] = 'H'
  assert recipe.from_config(values).model.patch_size == 14


def test_numbers_of_the_backbone_can_be_set():
  values = config()
  values['model'] |= {'width': 96, 'depth': 1}
  made = recipe.from_config(values)
  assert (made.model.width, made.model.depth, made.model.num_heads) == (96, 1, 3)
