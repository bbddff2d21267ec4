"""The scripts of docs/launch.md parse, their commands train the published run, and the tests that
docs/reliability.md names exist."""

import dataclasses
import re
import subprocess

import pytest
import yaml
from conftest import ROOT

from dropmae_jax import config_file, main, optimizer
from dropmae_jax.configs import devices
from dropmae_jax.runtime.errors import ExitStatus

TEXT = (ROOT / 'docs' / 'launch.md').read_text()
SHELL = re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL)
YAML = re.findall(r'```yaml\n(.*?)```', TEXT, re.DOTALL)


@pytest.mark.parametrize('script', SHELL)
def test_shell(script):
  done = subprocess.run(['bash', '-n'], input=script, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (0, '')


def test_every_script_is_found():
  assert len(SHELL) == 4
  assert len(YAML) == 1


def test_the_job_set_runs_the_command():
  (job_set,) = map(yaml.safe_load, YAML)
  template = job_set['spec']['replicatedJobs'][0]['template']['spec']
  assert template['parallelism'] == template['completions']
  (container,) = template['template']['spec']['containers']
  assert container['command'][:2] == ['dropmae-train', '--distributed']


def train_commands():
  """The arguments of every dropmae-train in a script, with numbers for what a user fills in."""
  (job_set,) = map(yaml.safe_load, YAML)
  spec = job_set['spec']['replicatedJobs'][0]['template']['spec']
  (container,) = spec['template']['spec']['containers']
  found = [container['command'][1:]]
  for script in SHELL:
    one_line = script.replace('\\\n', ' ')
    found += map(str.split, re.findall(r"dropmae-train ([^\n;']*)", one_line))
  # Buckets need gcsfs, which not everybody has.
  filled = lambda each: re.sub(r'=[NI]$', '=2', each).replace('=gs://', '=/')
  return [[filled(each) for each in arguments] for arguments in found]


def test_every_command_trains_the_published_run():
  published = config_file.from_dict(config_file.load('kinetics400_vit_b16').to_dict())
  commands = train_commands()
  assert len(commands) == len(SHELL) + len(YAML)
  for arguments in commands:
    config = config_file.from_arguments(main._parser().parse_args(arguments))
    differ = {
      field.name
      for field in dataclasses.fields(config)
      if getattr(config, field.name) != getattr(published, field.name)
    }
    assert differ <= {'data_dir', 'accumulation_steps', 'remat', 'mesh'}, arguments
    resolved = optimizer.resolve_schedule(config, 241_553)
    assert (config.num_epochs, resolved.num_steps) == (400, 23_200), arguments


def test_fields_and_configs_that_are_named_exist():
  fields = set(re.findall(r'--config\.([a-z_.]+)=', TEXT)) | set(
    re.findall(r'`((?:mesh|data|checkpoint)\.[a-z_]+)`', TEXT)
  )
  assert fields <= set(config_file.field_types())
  named = set(re.findall(r'\bkinetics[47]00_\w+(?::[\w,-]+)?', TEXT))
  assert {f'kinetics400_vit_b16:{name}' for name in devices.PRESETS} <= named
  for name in named:
    config_file.load(name)


def test_the_exit_statuses_are_those_of_the_code():
  text = (ROOT / 'README.md').read_text()
  (table,) = re.findall(r'^\| exit status .*\n\|[-|]+\n((?:\|.*\n)+)', text, re.MULTILINE)
  remedies = {}
  for row in table.splitlines():
    _, statuses, _, remedy, _ = (cell.strip() for cell in row.split('|'))
    remedies |= {int(number): remedy for number in re.findall(r'\d+', statuses)}
  for status in ExitStatus:
    helps = status > ExitStatus.BAD_INPUT
    assert (remedies.pop(status) == 'run the same command again') == helps, status
  assert set(remedies) == {130, 143, 141}  # Of the other commands.
  # The scripts restart by the same rule.
  (job_set,) = map(yaml.safe_load, YAML)
  (rule,) = job_set['spec']['replicatedJobs'][0]['template']['spec']['podFailurePolicy']['rules']
  assert rule['action'] == 'FailJob'
  assert rule['onExitCodes']['values'] == [1, 2]
  assert sum('if [ $status -gt 2 ]; then' in script for script in SHELL) == 1
  assert sum('case $? in 1|2|75|130|143) break' in script for script in SHELL) == 1


def test_every_fault_has_the_test_that_is_named():
  text = (ROOT / 'docs' / 'reliability.md').read_text()
  tables = re.findall(r'^\| fault \|.*\n\|[-|]+\n((?:\|.*\n)+)', text, re.MULTILINE)
  rows = ''.join(tables).splitlines()
  assert len(rows) > 25
  tests = ''.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))
  for row in rows:
    (name,) = re.findall(r'`(test_\w+)`', row)
    assert f'def {name}(' in tests
