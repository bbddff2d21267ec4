"""Configs: all of them build, and what is wrong with one is said by name."""

import dataclasses
import functools
import importlib
import math
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from flax import traverse_util

from dropmae_jax import config_file, optimizer, train
from dropmae_jax.config import Architecture, Objective, OptimizerOptions, may_change
from dropmae_jax.model import mae, vit
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.train_step import init_state

NAMES = config_file.presets()


def config(name='quickstart'):
  return (
    importlib.import_module(f'configs.{name}').get_config().copy_and_resolve_references().to_dict()
  )


@pytest.mark.parametrize('name', NAMES)
def test_every_config_builds_its_state(name):
  made = optimizer.resolve_schedule(config_file.from_dict(config(name)), 241_553)
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


def test_the_published_configs():
  made = optimizer.resolve_schedule(config_file.from_dict(config('kinetics400_vit_b16')), 241_553)
  assert made.peak_learning_rate == pytest.approx(2.4e-3)
  assert (made.num_steps, made.optimizer.warmup_steps) == (23_200, 2_320)
  assert (made.batch_size, made.accumulation_steps, made.dtype) == (4096, 1, 'bfloat16')
  assert made.model == Architecture()
  assert made.objective == Objective(
    mask_ratio=0.75, masking='random', attention_dropout=0.1, dropout_rule='asad',
    normalise_targets=True,
  )  # fmt: skip
  assert made.data.frame_gap == 50
  assert made.optimizer == OptimizerOptions(
    base_learning_rate=1.5e-4, min_learning_rate=0.0, warmup_steps=2_320, weight_decay=0.05,
    beta1=0.9, beta2=0.95,
  )  # fmt: skip
  for num_videos in (526_336, 528_383):
    longer = optimizer.resolve_schedule(
      config_file.from_dict(config('kinetics700_vit_b16')), num_videos
    )
    assert (longer.num_steps, longer.optimizer.warmup_steps) == (102_400, 5_120)
  assert (longer.batch_size, longer.accumulation_steps) == (4096, 2)
  assert (longer.model, longer.objective) == (made.model, made.objective)


def test_defaults_are_the_published_ones_where_there_are_any():
  values = config('kinetics400_vit_b16')
  given = {name: values[name] for name in ('data_dir', 'num_epochs', 'batch_size', 'model')}
  default = dataclasses.asdict(config_file.from_dict(given))
  published = dataclasses.asdict(config_file.from_dict(values))
  differ = {
    name: value
    for name, value in traverse_util.flatten_dict(default, sep='.').items()
    if traverse_util.flatten_dict(published, sep='.')[name] != value
  }
  assert differ == {
    'dataset': 'kinetics_frames/folder',
    'optimizer.warmup_epochs': 0.0,
    'checkpoint.every_steps': 1000,
    'checkpoint.keep_every': 0,
  }


@pytest.mark.parametrize('name', NAMES)
def test_the_dataset_of_a_config_is_the_one_that_its_commands_build(name):
  described = importlib.import_module(f'configs.{name}').__doc__
  build, train = (
    re.search(rf'{command} --config=(\w+)', described)[1]
    for command in ('dropmae-build', 'dropmae-train')
  )
  assert config(name)['dataset'] == f'kinetics_frames/{build}'
  assert train == name


def test_the_quickstart_crops_both_frames_alike():
  """In so few steps the model learns to look at the other frame only if they match."""
  assert config()['data']['shared_augmentation']


def test_the_published_config_is_complete():
  """Its size row stands for the backbone's numbers; everything else is spelled out."""
  backbone = {f'model.{field}' for field in vit.Size._fields}
  values = config('kinetics400_vit_b16')
  for name in set(config_file.field_types()) - backbone:
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
    ('size', 'B', "config has no field 'size'; did you mean 'model.size'?"),
    ('zzz', 1, "config has no field 'zzz'; valid are: accumulation_steps"),
    ('objective.masking', 'tube', "config.objective.masking='tube' is unknown; valid are: random"),
    (
      'objective.dropout_rule',
      'x',
      "config.objective.dropout_rule='x' is unknown; valid are: asad",
    ),
    ('data.resize', 'exacts', "config.data.resize='exacts' is unknown; did you mean 'exact'?"),
    ('remat', 'half', "config.remat='half' is unknown; valid are: dots, full, none"),
    ('objective.mask_ratio', 0.999, 'config.objective.mask_ratio=0.999 leaves 0 of 128 tokens'),
    ('model.image_size', 100, 'config.model.image_size=100 is not a multiple of patch_size=8'),
    ('model.size', 'M', "config.model.size='M' is unknown; valid are: B, H, L, S, XS, XXS"),
    ('dtype', 'float16', "config.dtype='float16' is unknown; use one of float32, bfloat16"),
    ('attention', 'flash', "config.attention='flash' is unknown; valid are: auto, fused, xla"),
    ('num_steps', 10.5, 'config.num_steps=10.5 is not of type int'),
    ('num_steps', True, 'config.num_steps=True is not of type int'),
    ('data', 3, 'config.data=3 should be a group of fields'),
    ('model', 3, 'config.model=3 should be a group of fields'),
    ('optimizer.min_learning_rate', 1.0, 'config.optimizer.min_learning_rate=1.0 is more than'),
  ],
)
def test_what_is_wrong_is_said_by_name(name, value, message):
  values = config()
  *groups, leaf = name.split('.')
  part = values
  for group in groups:
    part = part[group]
  part[leaf] = value
  with pytest.raises(UserError, match=re.escape(message)):
    config_file.from_dict(values)


# Of every number in a config, values that it must not have.
OUT_OF_RANGE = {
  'num_steps': [-1, 2**31],
  'num_epochs': [-1.0, math.nan, math.inf],
  'batch_size': [0],
  'seed': [-1, 2**32],
  'accumulation_steps': [-1],
  'log_every': [0],
  'score_every': [-1],
  'step_stall_seconds': [0.0, math.nan],
  'model.image_size': [0],
  'model.patch_size': [0],
  'model.width': [0],
  'model.depth': [0],
  'model.num_heads': [0],
  'model.decoder_width': [0],
  'model.decoder_depth': [0],
  'model.decoder_num_heads': [0],
  'model.mlp_ratio': [0.0, math.nan, math.inf],
  'objective.mask_ratio': [0.0, 1.0, math.nan],
  'objective.attention_dropout': [-0.1, 1.1, math.nan],
  'data.frame_gap': [1],
  'data.num_threads': [-1],
  'data.stall_seconds': [0.0, math.nan],
  'data.max_damaged_records': [-1],
  'optimizer.base_learning_rate': [0.0, math.nan, math.inf],
  'optimizer.min_learning_rate': [-1e-9, math.nan, math.inf],
  'optimizer.warmup_steps': [-1],
  'optimizer.warmup_epochs': [-1.0, math.nan, math.inf],
  'optimizer.weight_decay': [-1e-9, math.nan, math.inf],
  'optimizer.beta1': [-1e-9, 1.0, math.nan],
  'optimizer.beta2': [-1e-9, 1.0, math.nan],
  'mesh.data': [-1],
  'mesh.fsdp': [0],
  'checkpoint.every_steps': [0],
  'checkpoint.keep_last': [0],
  'checkpoint.keep_every': [-1],
}


def test_every_number_has_a_range():
  numbers = {name for name, kind in config_file.field_types().items() if kind in (int, float)}
  assert set(OUT_OF_RANGE) == numbers


@pytest.mark.parametrize('name', OUT_OF_RANGE)
def test_values_out_of_range_are_refused(name):
  for value in OUT_OF_RANGE[name]:
    values = config()
    *groups, leaf = name.split('.')
    part = functools.reduce(lambda part, group: part[group], groups, values)
    part[leaf] = value
    with pytest.raises(UserError, match=rf'config\.{name}={value} is out of range; use '):
      config_file.from_dict(values)


def test_what_a_run_may_go_on_with_changed():
  """All but what its pairs, its noise and what it learns are made of."""
  may_not = {'dataset', 'split', 'seed', 'batch_size'} | {
    name
    for name in config_file.field_types()
    if name.startswith(('model.', 'objective.'))
    or name in ('data.frame_gap', 'data.resize', 'data.shared_augmentation')
  }
  assert {name for name in config_file.field_types() if not may_change(name)} == may_not
  assert not may_change('data_fingerprint')
  assert not may_change('seed_version')


def test_a_missing_field_is_named():
  values = config()
  del values['batch_size']
  with pytest.raises(UserError, match="config lacks the field 'batch_size'"):
    config_file.from_dict(values)


def test_a_run_has_one_length():
  values = config()
  for both in (
    {'num_epochs': 2.0},
    {'num_steps': 0},
    {'optimizer': {'warmup_epochs': 1.0, 'warmup_steps': 1}},
  ):
    with pytest.raises(UserError, match='set one of them'):
      config_file.from_dict(values | both)


def test_a_length_on_the_command_line_replaces_the_other_one():
  made = config_from_flags('--config=kinetics400_vit_b16', '--config.num_steps=7')
  assert (made.num_steps, made.num_epochs, made.optimizer.warmup_epochs) == (7, 0.0, 40.0)
  made = config_from_flags(
    '--config=quickstart', '--config.num_epochs=1.5', '--config.optimizer.warmup_epochs=0.5'
  )
  resolved = optimizer.resolve_schedule(made, 81)
  assert (resolved.num_steps, resolved.optimizer.warmup_steps) == (15, 5)


def test_epochs_follow_the_batch():
  for batch_size, num_steps in ((4096, 23_200), (1024, 94_000), (512, 188_400)):
    made = config_from_flags('--config=kinetics400_vit_b16', f'--config.batch_size={batch_size}')
    assert optimizer.resolve_schedule(made, 241_553).num_steps == num_steps


def test_more_steps_than_can_be_counted_are_refused():
  made = config_from_flags('--config=kinetics400_vit_b16', '--config.num_epochs=1e9')
  with pytest.raises(UserError, match='with 58 steps per epoch, num_steps=58000000000 is out of'):
    optimizer.resolve_schedule(made, 241_553)


def test_a_size_brings_its_patch_size():
  values = config('kinetics400_vit_b16')
  values['model']['size'] = 'H'
  assert config_file.from_dict(values).model.patch_size == 14


def test_numbers_of_the_backbone_can_be_set():
  values = config()
  values['model'] |= {'width': 96, 'depth': 1}
  made = config_file.from_dict(values)
  assert (made.model.width, made.model.depth, made.model.num_heads) == (96, 1, 3)


def config_from_flags(*arguments):
  parser = cli.Parser()
  config_file.add_arguments(parser)
  return config_file.from_arguments(parser.parse_args(arguments))


def test_a_size_brings_a_decoder_of_its_own():
  for size, decoder in {'XXS': (64, 2, 2), 'XS': (96, 3, 3), 'S': (512, 8, 16)}.items():
    model = config_from_flags('--config=video_folder', f'--config.model.size={size}').model
    assert (model.decoder_width, model.decoder_depth, model.decoder_num_heads) == decoder


def test_the_config_of_a_run_can_be_given_back(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  given = config_from_flags('--config=kinetics400_vit_b16:80gb', '--config.data.frame_gap=9')
  train.write_config(given, tmp_path)
  for name in ('config.json', f'{tmp_path}/config.json', f'file://{tmp_path}/config.json'):
    assert config_from_flags(f'--config={name}') == given
  changed = config_from_flags(
    '--config=config.json', '--config.num_steps=7', '--config.model.size=XS',
    '--config.model.depth=1', '--config.model.image_size=64',
  )  # fmt: skip
  model = vit.architecture_of_size('XS', depth=1, image_size=64)
  assert changed == dataclasses.replace(given, num_steps=7, num_epochs=0.0, model=model)


def test_the_command_line_sets_single_fields():
  made = config_from_flags(
    '--config=quickstart', '--config.data.frame_gap=9',
    '--config.objective.normalise_targets=False', '--config.optimizer.beta1=0.5',
  )  # fmt: skip
  plain = config_file.from_dict(config())
  assert made == dataclasses.replace(
    plain,
    data=dataclasses.replace(plain.data, frame_gap=9),
    objective=dataclasses.replace(plain.objective, normalise_targets=False),
    optimizer=dataclasses.replace(plain.optimizer, beta1=0.5),
  )
  for text, value in (('true', True), ('False', False)):
    shared = config_from_flags('--config=quickstart', f'--config.data.shared_augmentation={text}')
    assert shared.data.shared_augmentation is value
  with pytest.raises(UserError, match="'no' is neither true nor false"):
    config_from_flags('--config=quickstart', '--config.data.shared_augmentation=no')


def test_a_config_of_the_users_imports_from_his_folder_and_has_an_argument(tmp_path, monkeypatch):
  (tmp_path / 'beside_it.py').write_text('STEPS = 7\n')
  (tmp_path / 'mine.py').write_text(
    'import beside_it\n'
    'from dropmae_jax.configs import quickstart\n'
    'def get_config(dtype):\n'
    '  config = quickstart.get_config()\n'
    '  config.num_steps, config.dtype = beside_it.STEPS, dtype\n'
    '  return config\n'
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [path for path in sys.path if path not in ('', str(ROOT))])
  made = config_from_flags('--config=mine.py:bfloat16')
  assert (made.num_steps, made.dtype) == (7, 'bfloat16')


def test_a_name_is_that_of_a_preset_whatever_lies_here(tmp_path, monkeypatch):
  (tmp_path / 'quickstart').mkdir()  # As a folder of runs may be called.
  (tmp_path / 'video_folder').write_text('def get_config(): raise AssertionError')
  monkeypatch.chdir(tmp_path)
  for name in ('quickstart', 'video_folder'):
    assert config_from_flags(f'--config={name}') == config_file.from_dict(config(name))


def test_a_misspelt_config_name_is_corrected():
  with pytest.raises(UserError, match=r"--config=quickstar is .*; did you mean 'quickstart'\?"):
    config_from_flags('--config=quickstar')
