"""Presets change how the published batch is computed, nothing else, and fit their devices."""

import importlib.util
import json

import pytest
from conftest import run_python
from flax import traverse_util

from dropmae_jax import config_file
from dropmae_jax.configs import devices
from dropmae_jax.runtime import targets
from dropmae_jax.runtime.errors import UserError

CONFIGS = {
  config_file.load(name).model.size: name
  for name in config_file.presets()
  if name.startswith('kinetics400')
}
ROWS = [(name, size) for name, preset in devices.PRESETS.items() for size in preset.fields]


def fields_of(name):
  values = config_file.load(name).to_dict()
  config_file.from_dict(values)
  return traverse_util.flatten_dict(values, sep='.')


@pytest.mark.parametrize(('name', 'size'), ROWS)
def test_a_preset_changes_how_the_batch_is_computed_and_nothing_else(name, size):
  published, made = fields_of(CONFIGS[size]), fields_of(f'{CONFIGS[size]}:{name}')
  changed = {field: value for field, value in made.items() if value != published[field]}
  assert changed == devices.PRESETS[name].fields[size]
  assert set(changed) <= {'accumulation_steps', 'remat', 'mesh.fsdp'}
  _, number = targets.parse(devices.PRESETS[name].target)
  assert made['batch_size'] % (number * made['accumulation_steps']) == 0
  assert number % made['mesh.fsdp'] == 0


def test_arguments_are_joined_by_commas():
  made = fields_of('kinetics700_vit_b16:80gb,1600epochs')
  assert (made['num_epochs'], made['optimizer.warmup_epochs'], made['batch_size']) == (
    1600, 40, 4096,
  )  # fmt: skip
  assert made['accumulation_steps'] == devices.PRESETS['80gb'].fields['B']['accumulation_steps']
  assert made['dataset'] == 'kinetics_frames/kinetics700'


@pytest.mark.parametrize(
  ('argument', 'remedy'),
  [
    ('v5e-1', "'v5e-1' is no preset; did you mean 'v5e-16'"),
    ('80gb,epochs', "'epochs' is no preset; did you mean '800epochs'"),
    ('80gb,24gb', '80gb and 24gb are two presets'),
    (',', "'' is no preset; valid are"),
  ],
)
def test_an_argument_that_is_unknown_is_named(argument, remedy):
  with pytest.raises(UserError, match=f'--config=kinetics400_vit_b16:{argument}: {remedy}'):
    config_file.load(f'kinetics400_vit_b16:{argument}')


def test_a_config_without_arguments_refuses_one():
  with pytest.raises(UserError, match='quickstart has no arguments; leave out :80gb'):
    config_file.load('quickstart:80gb')


COMPILE = """
import json
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
from dropmae_jax import config_file, memory, optimizer
from dropmae_jax.runtime import targets
name, target = sys.argv[1:]
config = config_file.from_dict(config_file.load(name).to_dict())
config = optimizer.resolve_schedule(config, 241_553)
options = targets.GPU_OPTIONS if targets.parse(target)[0].gpu else None
compiled = memory.lower_step(config, targets.devices(target)).compile(options)
print(json.dumps(memory.memory_of(compiled)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'size'), ROWS)
def test_a_preset_fits_its_devices(name, size):
  """Compiles for them: minutes each."""
  target, number = targets.parse(devices.PRESETS[name].target)
  compiler, remedy = (
    ('jax_cuda12_plugin', targets.GPU_COMPILER) if target.gpu else ('libtpu', targets.TPU_COMPILER)
  )
  if not importlib.util.find_spec(compiler):
    pytest.skip(f'needs {remedy}')
  arguments = f'{CONFIGS[size]}:{name}', devices.PRESETS[name].target
  done = run_python('-c', COMPILE, *arguments, timeout=1800)
  assert done.returncode == 0, done.stderr
  needed = json.loads(done.stdout.splitlines()[-1])['total']
  side = config_file.load(CONFIGS[size]).model.image_size
  prefetched = 2 * 4096 * 2 * side**2 * 3 / number
  assert needed + prefetched < target.memory * (0.75 if target.gpu else 1)
