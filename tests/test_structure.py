"""Rules of the code base that a reader relies on."""

import ast
import functools
import importlib
import inspect
import re
import unittest.mock

import pytest
from conftest import ROOT
from test_wheel import COMMANDS

from dropmae_jax import main

PACKAGE = ROOT / 'dropmae_jax'
# Packages, and modules beside them: an import points to the right only.
ORDER = (
  'main api config_file dry_run train memory memory_estimate tracking evaluation pytorch'
  ' checkpoints data train_step optimizer sharding kernels model runtime config'
).split()
MOST_MODULES = 12  # Of a package.
LONGEST_PACKAGE_CHAIN, LONGEST_MODULE_CHAIN = 7, 11

FILES = {
  '.'.join(path.relative_to(ROOT).with_suffix('').parts): path
  for path in sorted(PACKAGE.rglob('*.py'))
  if path.name != '__init__.py' and 'configs' not in path.parts
}
SOURCES = [
  *FILES.values(),
  *sorted((ROOT / 'tfds_kinetics').glob('*.py')),
  *sorted((ROOT / 'benchmarks').rglob('*.py')),
  ROOT / 'convert_to_torch.py',
]


def part_of(module):
  return module.split('.')[1]


@functools.cache
def imports_of(module):
  """The modules of the package that one imports, wherever in it."""
  imported = set()
  for node in ast.walk(ast.parse(FILES[module].read_text())):
    if isinstance(node, ast.Import):
      imported |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      imported |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
  return imported & FILES.keys()


def longest_chain(nodes, edges):
  """The longest path through a graph without circles."""

  @functools.cache
  def chain(node):
    return max(((node, *chain(each)) for each in edges(node)), key=len, default=(node,))

  return max(map(chain, nodes), key=len)


def test_every_part_has_its_place():
  assert {part_of(module) for module in FILES} == set(ORDER)


@pytest.mark.parametrize('module', FILES)
def test_imports_point_to_the_right(module):
  part = part_of(module)
  wrong = {
    each
    for each in imports_of(module)
    if part_of(each) != part and ORDER.index(part_of(each)) <= ORDER.index(part)
  }
  assert not wrong


def test_chains_of_imports_are_short():
  def parts_of(part):
    mine = [module for module in FILES if part_of(module) == part]
    return {part_of(each) for module in mine for each in imports_of(module)} - {part}

  assert len(longest_chain(ORDER, parts_of)) <= LONGEST_PACKAGE_CHAIN
  # A circle would be a RecursionError.
  assert len(longest_chain(FILES, imports_of)) <= LONGEST_MODULE_CHAIN


def test_packages_can_be_taken_in_at_a_glance():
  folders = [ROOT / 'tfds_kinetics', *(each for each in PACKAGE.rglob('*') if each.is_dir())]
  sizes = {each.name: len(list(each.glob('[!_]*.py'))) for each in folders}
  assert {name: size for name, size in sizes.items() if size > MOST_MODULES} == {}


def test_the_dataset_builder_stands_alone():
  for path in (ROOT / 'tfds_kinetics').glob('*.py'):
    assert 'dropmae_jax' not in re.sub(r'""".*?"""', '', path.read_text(), flags=re.DOTALL), path


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('__init__.py')))
def test_importing_a_package_is_light(path):
  tree = ast.parse(path.read_text())
  assert all(isinstance(node, ast.Expr) for node in tree.body)


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_are_documented_and_annotated(path):
  tree = ast.parse(path.read_text())
  classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
  for node in [tree, *tree.body, *(member for each in classes for member in each.body)]:
    name = getattr(node, 'name', '')
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and not name.startswith('_'):
      assert ast.get_docstring(node), f'{path.name}: {name}'
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef):
      for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
        assert argument.annotation or argument.arg in ('self', 'cls'), (
          f'{node.name}: {argument.arg}'
        )


@pytest.mark.parametrize(
  'module', [*(each for each in FILES if part_of(each) == 'model'), 'dropmae_jax.train_step']
)
def test_random_functions_do_not_make_keys_optional(module):
  is_function = lambda each: inspect.isfunction(inspect.unwrap(each))  # Jitted ones too.
  for _, function in inspect.getmembers(importlib.import_module(module), is_function):
    for name, parameter in inspect.signature(function).parameters.items():
      if 'key' in name:
        assert parameter.default is inspect.Parameter.empty


def test_what_is_printed_is_escaped():
  """Names of files and tensors, labels and messages of libraries are in it."""
  for path in SOURCES:
    if path.is_relative_to(ROOT / 'benchmarks'):
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func) == 'print':
        text = node.args[0]
        assert isinstance(text, ast.Constant) or ast.unparse(text).startswith('one_line('), path


ENTRY_POINTS = dict(re.findall(r"'(dropmae-\w+) = ([\w.]+:\w+)'", (ROOT / 'setup.py').read_text()))


def test_every_command_has_an_entry_point():
  assert ENTRY_POINTS.keys() == COMMANDS


@pytest.mark.parametrize('name', ENTRY_POINTS)
def test_an_entry_point_is_the_command_of_that_name(name, run_here, monkeypatch):
  monkeypatch.setattr(main, 'Watchdog', unittest.mock.Mock())  # This process goes on.
  module, function = ENTRY_POINTS[name].split(':')
  done = run_here(getattr(importlib.import_module(module), function), '--help')
  assert done.returncode == 0
  assert done.stdout.startswith(f'usage: {name} ')
