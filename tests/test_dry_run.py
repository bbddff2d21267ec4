"""What --dry_run says of a run, before it starts."""

import json

import jax
import pytest
from conftest import ROOT, TINY, run_python

from dropmae_jax import config_file, dry_run, main, memory, memory_estimate, optimizer
from dropmae_jax.runtime import targets
from dropmae_jax.runtime.errors import UserError

# What the compilers need of each device, in bytes: of dropmae-train --dry_run=compile with these
# flags and jax 0.10.2, libtpu 0.0.42.1, less the two batches that it adds.
RECORDED = dict(json.loads((ROOT / 'tests' / 'recorded_compiles.json').read_text()))


@pytest.fixture
def said(monkeypatch, capsys):
  """Runs dropmae-train with --dry_run here, and returns what it says by the name of the line."""

  def run(*arguments):
    monkeypatch.setattr('sys.argv', ['dropmae-train', '--dry_run', *arguments])
    assert main.main() == 0
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

  return run


def test_a_published_run_on_devices_that_are_not_here(said, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  lines = said(
    '--config=kinetics400_vit_b16:8x80gb', '--target=8xh100', '--local_processes=8',
    '--workdir=runs/k400', '--pairs_per_second=8000',
  )  # fmt: skip
  assert lines['parameters'].startswith('111,909,632: ')
  assert lines['FLOPs'].startswith('117.5 GFLOP a pair')
  assert lines['devices'] == '8 x device of --target=8xh100'
  assert lines['batch'].startswith('4096 pairs: 4 micro-batches of 128 on each device')
  assert 'fits: a program gets 60.0 GB' in lines['memory']
  assert 'the published run had 241,553 videos' in lines['dataset']
  assert lines['schedule'].startswith('23200 steps (400 epochs), the first 2320 (40 epochs)')
  # 111,909,632 parameters with two moments of four bytes each; three, and four at 5,000 steps.
  assert lines['checkpoints'] == '1.34 GB each, at most 7 are kept: 9.4 GB'
  assert lines['time'] == '3.3 hours, at 8,000 pairs/s (--pairs_per_second)'
  assert not list(tmp_path.iterdir())


def test_a_run_that_was_begun(said, trained, data_dir, tmp_path):
  before = {path: path.read_bytes() for path in trained.rglob('*') if path.is_file()}
  lines = said(
    '--config=quickstart', f'--config.data_dir={data_dir}', f'--workdir={trained}', *TINY,
    '--config.num_steps=1808', '--config.batch_size=8',
  )  # fmt: skip
  assert lines['devices'] == f'8 x {jax.devices()[0].device_kind}'
  assert lines['memory'].startswith('not estimated, as it is for GPUs')
  fingerprint = json.loads(next(data_dir.rglob('build_report.json')).read_text())['fingerprint']
  assert lines['dataset'].endswith(f', 6 videos, fingerprint {fingerprint}')
  rows = [json.loads(line) for line in (trained / 'metrics.jsonl').read_text().splitlines()]
  speed = sorted(row['pairs_per_second'] for row in rows)
  hours = 1800 * 8 / ((speed[3] + speed[4]) / 2) / 3600
  assert lines['time'].startswith(f'{hours:.4g} hours after step 8, at ')
  assert before == {path: path.read_bytes() for path in trained.rglob('*') if path.is_file()}


def test_without_a_dataset_epochs_need_its_size(said, tmp_path):
  name = f'--config.data_dir={tmp_path}', '--config=video_folder', '--config.num_epochs=3'
  assert said(*name)['schedule'] == '3 epochs; give --num_videos=N to count the steps'
  lines = said(*name, '--num_videos=640')
  assert lines['schedule'].startswith('30 steps (3 epochs), the first 100')


def test_the_compiler_is_asked(said):
  lines = said('--config=quickstart', *TINY, '--dry_run=compile', '--target=2xcpu')
  assert ' GB on each device, by the compiler; fits: a program gets 16.0 GB' in lines['memory']


def test_automatic_micro_batches_are_those_that_fit_by_the_estimate(said):
  lines = said(
    '--config=kinetics400_vit_b16', '--config.accumulation_steps=auto', '--target=rtx4090'
  )
  # 64 would take 29 GB, and 18 are there; a preset has 128.
  assert lines['batch'].startswith('4096 pairs: 128 micro-batches of 32')
  assert 'estimated; fits: a program gets 18.0 GB' in lines['memory']


@pytest.mark.parametrize('flags', RECORDED)
def test_the_estimate_is_within_7_percent_of_the_compiler(flags):
  arguments = main._parser().parse_args(flags.split())
  kind, number = targets.parse(arguments.target)
  config = optimizer.resolve_schedule(config_file.from_arguments(arguments), 241_553)
  if kind.platform == 'gpu':
    assert memory_estimate.estimate(config, number) == pytest.approx(RECORDED[flags], rel=0.07)
  if 'vit_b16:' in flags:  # A preset.
    needed = RECORDED[flags] + memory.prefetched(config, number)
    assert needed < kind.usable_memory - 1e9


@pytest.mark.slow
@pytest.mark.parametrize('name', config_file.presets())
def test_of_every_config_in_less_than_a_minute(name, tmp_path):
  done = run_python(
    '-m', 'dropmae_jax.main', f'--config={name}', '--dry_run', '--target=h100', timeout=60
  )
  assert done.returncode == 0, done.stderr
  assert 'GB on each device, estimated' in done.stdout


def test_a_batch_that_does_not_fit_the_number_of_devices():
  config = config_file.from_dict(config_file.load('quickstart').to_dict())
  with pytest.raises(UserError, match='batch_size=8 is not divisible by 3 devices'):
    list(dry_run.lines(config, target='3xh100'))


@pytest.mark.slow
@pytest.mark.parametrize('size', ['S', 'B'])
def test_flops_are_those_of_the_compiler(size):
  values = config_file.load(f'kinetics400_vit_{size.lower()}16').to_dict() | {'batch_size': 2}
  config = config_file.from_dict(values | {'attention': 'xla'})
  lowered = memory.lower_step(config, jax.devices()[:1])
  counted = lowered.cost_analysis()['flops'] / 2
  formula = dry_run.flops.step(config.model, config.objective.mask_ratio)
  assert formula == pytest.approx(counted, rel=0.05)
