"""The recipes of docs/launch.md are at least what a shell and a cluster can parse; the tests that
docs/reliability.md names are there."""

import re
import subprocess

import pytest
import yaml
from conftest import ROOT

from dropmae_jax import config_file

TEXT = (ROOT / 'docs' / 'launch.md').read_text()
SHELL = re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL)
YAML = re.findall(r'```yaml\n(.*?)```', TEXT, re.DOTALL)


@pytest.mark.parametrize('script', SHELL)
def test_shell(script):
  done = subprocess.run(['bash', '-n'], input=script, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (0, '')


def test_every_recipe_is_found():
  assert len(SHELL) == 4
  assert len(YAML) == 1


def test_the_job_set_runs_the_command():
  (found,) = map(yaml.safe_load, YAML)
  template = found['spec']['replicatedJobs'][0]['template']['spec']
  assert template['parallelism'] == template['completions']
  (container,) = template['template']['spec']['containers']
  assert container['command'][:4] == ['python', '-m', 'dropmae_jax.main', '--distributed']


def test_fields_and_configs_that_are_named_exist():
  fields = set(re.findall(r'--config\.([a-z_.]+)=', TEXT)) | set(
    re.findall(r'`((?:mesh|data|checkpoint)\.[a-z_]+)`', TEXT)
  )
  assert fields <= set(config_file.field_types())
  for path in re.findall(r'configs/\w+\.py', TEXT):
    assert (ROOT / path).exists()


def test_every_fault_has_the_test_that_is_named():
  rows = re.findall(r'^\|.*\|$', (ROOT / 'docs' / 'reliability.md').read_text(), re.MULTILINE)[2:]
  assert len(rows) > 10
  tests = ''.join(path.read_text() for path in (ROOT / 'tests').glob('test_*.py'))
  for row in rows:
    (name,) = re.findall(r'`(test_\w+)`', row)
    assert f'def {name}(' in tests
