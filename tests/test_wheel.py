"""A wheel: what it contains, and that it works without the checkout."""

import configparser
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

COMMANDS = {
  'dropmae-build', 'dropmae-clips', 'dropmae-convert', 'dropmae-evaluate', 'dropmae-figures',
  'dropmae-inspect', 'dropmae-tracker', 'dropmae-train',
}  # fmt: skip


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> pathlib.Path:
  """A wheel of this checkout."""
  for package in ('pip', 'setuptools'):
    # Not imported: setuptools cannot be where distutils has been imported before.
    if importlib.util.find_spec(package) is None:
      pytest.skip(f'building a wheel needs {package}')
  folder = tmp_path_factory.mktemp('wheel')
  # A copy, because setuptools builds in the source folder and leaves its output there.
  source = folder / 'source'
  source.mkdir()
  for name in ('dropmae_jax', 'configs', 'tfds_kinetics'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
  for name in ('setup.py', 'pyproject.toml', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  pip('wheel', '--no-deps', '--no-index', '--no-build-isolation', f'--wheel-dir={folder}', source)
  (path,) = folder.glob('*.whl')
  return path


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> pathlib.Path:
  """A folder that the wheel is installed into."""
  folder = tmp_path_factory.mktemp('installed')
  pip('install', '--no-deps', '--no-index', f'--target={folder}', wheel)
  return folder


def pip(*arguments):
  done = subprocess.run(
    [sys.executable, '-m', 'pip', '--disable-pip-version-check', *map(str, arguments)],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr


def run(installed, cwd, *arguments) -> subprocess.CompletedProcess:
  """Runs a command where the installed package is found before an editable one."""
  environment = {**os.environ, 'PYTHONPATH': str(installed), 'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(
    [*map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
  )


def test_a_wheel_contains_every_module_and_the_configs_inside_the_package(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    (metadata,) = [name for name in names if name.endswith('.dist-info/entry_points.txt')]
    entry_points = configparser.ConfigParser()
    entry_points.read_string(archive.read(metadata).decode())
  assert 'dropmae_jax/configs/quickstart.py' in names
  modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'dropmae_jax').rglob('*.py')}
  assert modules <= set(names)
  top_level = {name.split('/')[0] for name in names if '.dist-info/' not in name}
  assert top_level == {'dropmae_jax', 'tfds_kinetics'}
  assert set(entry_points['console_scripts']) == COMMANDS


@pytest.mark.slow
def test_every_command_runs_from_another_folder(installed, tmp_path):
  imported = run(
    installed, tmp_path, sys.executable, '-c', 'import dropmae_jax; print(dropmae_jax.__file__)'
  )
  assert pathlib.Path(imported.stdout.strip()).is_relative_to(installed), imported
  for name in COMMANDS:
    done = run(installed, tmp_path, installed / 'bin' / name, '--help')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('usage: '), name


@pytest.mark.slow
def test_a_config_is_found_by_its_name(installed, tmp_path):
  done = run(
    installed, tmp_path, installed / 'bin' / 'dropmae-train', '--config=quickstart', '--workdir=w'
  )
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith('error: there is no dataset kinetics_frames/folder in data_dir=')
  assert done.stderr.count('\n') == 1
