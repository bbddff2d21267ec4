"""The commands, options and names in docs/data.md exist; its scripts are valid shell."""

import re
import shlex
import subprocess

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT

from tfds_kinetics import __main__ as builder
from tfds_kinetics import shards
from tfds_kinetics.configs import COLLECTIONS

TEXT = (ROOT / 'docs' / 'data.md').read_text()
SCRIPTS = re.findall(r'```bash\n(.*?)```', TEXT, flags=re.DOTALL)


def commands(name):
  """The argument lists of a command, from all documents."""
  argument_lists = []
  for path in (ROOT / 'docs' / 'data.md', ROOT / 'README.md'):
    for script in re.findall(r'```bash\n(.*?)```', path.read_text(), flags=re.DOTALL):
      for line in script.replace('\\\n', ' ').splitlines():
        if line.startswith(f'{name} '):
          argument_lists.append(shlex.split(line, comments=True)[1:])
  return argument_lists


@pytest.mark.parametrize('script', SCRIPTS, ids=range(len(SCRIPTS)))
def test_the_shell_understands(script):
  subprocess.run(['bash', '-n'], input=script, text=True, check=True)


def test_the_builder_understands(monkeypatch):
  builds = commands('dropmae-build')
  assert len(builds) >= 5
  for arguments in builds:
    arguments = [each.replace('$SLURM_CPUS_PER_TASK', '2') for each in arguments]
    monkeypatch.setattr('sys.argv', ['dropmae-build', *arguments])
    parsed = builder._arguments()
    assert parsed.config in COLLECTIONS


def test_every_option_is_explained():
  for name in [*builder.OPTION_HELP, 'workers', 'annotations', 'shard_range', 'finalise', 'verify']:
    assert f'`--{name}`' in TEXT


def test_features_and_index_are_those_that_are_listed(data_dir):
  folder = data_dir / 'kinetics_frames' / 'folder' / shards.VERSION
  assert f"'data/kinetics_frames/folder/{shards.VERSION}'" in TEXT
  features = tfds.builder_from_directory(folder).info.features
  with np.load(folder / 'index-train.npz') as index:
    for name in [*features, *index]:
      assert f'`{name}`' in TEXT, name
