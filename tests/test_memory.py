"""What does not fit the memory of the devices is said before the first step, with what does."""

import dataclasses
import json

import jax
import pytest
from conftest import TINY

from dropmae_jax import main, memory
from dropmae_jax.config import Config
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.runtime.errors import RunFailed, UserError

DEVICES = jax.devices()[:2]
CONFIG = Config(
  data_dir='', num_steps=1, batch_size=48, model=architecture_of_size('XXS', image_size=32)
)


@pytest.fixture
def needs(monkeypatch):
  """Instead of the compiler: 1 GB for the state, and 1 GB a sample, less with other flags."""
  compiled = []

  def compile_step(config, devices):
    samples = config.batch_size / len(devices) / config.accumulation_steps
    state = 1e9 / config.mesh.fsdp
    need = state + samples * (1e8 if config.remat == 'full' else 1e9)
    compiled.append(config.accumulation_steps)
    return memory.Fit(
      config, None if need > 20e9 else 'step', float('inf') if need > 20e9 else need
    )

  monkeypatch.setattr(memory, 'compile_step', compile_step)
  return compiled


@pytest.mark.parametrize(
  ('given', 'limit', 'number', 'most'),
  [
    # A device has 24 samples: divisors 1, 2, 3, 4, 6, 8, 12, 24.
    (0, None, 1, 1), (0, 13e9, 2, 4), (0, 7e9, 4, 4), (0, 6.9e9, 6, 4),
    (0, 2e9, 24, 4), (3, 9e9, 3, 1),
  ],
)  # fmt: skip
def test_the_fewest_micro_batches_that_fit_are_found(needs, given, limit, number, most):
  config = dataclasses.replace(CONFIG, accumulation_steps=given)
  fit = memory.fitting_step(config, DEVICES, limit)
  assert fit.config == dataclasses.replace(CONFIG, accumulation_steps=number)
  assert len(needs) <= most
  needs.clear()
  assert memory.fitting_step(config, DEVICES, limit, stored=number).config == fit.config
  assert needs == [number]


@pytest.mark.parametrize(
  ('limit', 'said'),
  [
    (13e9, 'accumulation_steps=1 needs more of each device, and a program gets 13.00 GB; give'
     ' --config.accumulation_steps=2, which computes the same, or --config.batch_size=24 or less.'),
    (1.5e9, 'with which no batch fits; give --config.accumulation_steps=24 --config.remat=full.'),
    (1.05e9, 'no batch fits; give --config.accumulation_steps=24 --config.remat=full'
     ' --config.mesh.data=1 --config.mesh.fsdp=2.'),
    (1e8, 'with which no batch fits; use devices with more memory, or more of them.'),
  ],
)  # fmt: skip
def test_too_much_is_refused_with_flags_that_fit(needs, limit, said):
  with pytest.raises(UserError) as error:
    memory.fitting_step(CONFIG, DEVICES, limit)
  assert said in str(error.value)


def test_exhaustion_in_a_step_says_what_would_help():
  fit = memory.Fit(dataclasses.replace(CONFIG, accumulation_steps=4), None, 3e9)
  with (
    pytest.raises(RunFailed, match=r'give --config.accumulation_steps=6, which computes'),
    memory.exhaustion_as_failure(fit, 2),
  ):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.')
  with pytest.raises(jax.errors.JaxRuntimeError), memory.exhaustion_as_failure(fit, 2):
    raise jax.errors.JaxRuntimeError('INTERNAL: of another kind')


@pytest.mark.slow
def test_a_planted_limit_gives_flags_that_train(monkeypatch, capsys, data_dir, tmp_path):
  """And automatic micro-batches have the losses of fixed ones."""

  def run(name, *flags):
    command = ['--config=quickstart', f'--config.data_dir={data_dir}', *TINY]
    command += ['--config.num_steps=3', '--config.batch_size=64', f'--workdir={tmp_path / name}']
    command += flags
    monkeypatch.setattr('sys.argv', ['dropmae-train', *command])
    return main.main()

  assert run('whole') == 0
  log = (tmp_path / 'whole' / 'log.txt').read_text()
  assert 'compiling the training step' in log
  limit = 5 * 10**6
  monkeypatch.setattr(memory, 'device_limit', lambda device: limit)
  with pytest.raises(UserError) as error:
    run('refused')
  flags = str(error.value).split('give ')[1].split(', which')[0]
  assert flags.startswith('--config.accumulation_steps=')
  assert run('fixed', flags) == 0
  assert run('auto', '--config.accumulation_steps=auto') == 0

  def losses(name):
    lines = (tmp_path / name / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line)['loss'] for line in lines]

  assert losses('auto') == losses('fixed') == pytest.approx(losses('whole'), rel=1e-5)
  # It goes on with the same number; on other devices it would be chosen anew.
  assert run('auto', '--config.accumulation_steps=auto', '--config.num_steps=4') == 0
  number = int(flags.rpartition('=')[2])
  log = (tmp_path / 'auto' / 'log.txt').read_text()
  assert log.count(f'accumulation_steps=auto is {number} on 8 x cpu\n') == 2
