"""Rules of the code base that a reader relies on."""

import ast
import inspect
import pathlib
import re

import pytest
from conftest import ROOT

PACKAGE = ROOT / 'dropmae_jax'

# An import points to a lower layer only.
LAYERS = [
  {
    'asad_gpu_tile',
    'command_line',
    'config',
    'masking',
    'on_each_device',
    'patches',
    'pixels',
    'position',
    'sampling',
  },
  {'asad_tpu_search', 'groups', 'loader_process', 'retention', 'stalls', 'videos'},
  {'asad'},
  {'asad_gpu_backward', 'asad_gpu_forward', 'asad_tpu_kernels'},
  {'asad_gpu', 'asad_tpu'},
  {
    'attention',
    'vit',
    'augment',
    'blocks',
    'synthetic_clips',
    'mixture',
    'damaged_records',
    'destination',
  },
  {'mae', 'stream'},
  {
    'data',
    'hosts',
    'optimizer',
    'sharding',
    'train_step',
    'torch_export',
    'file_checks',
    'torch_arguments',
  },
  {
    'checkpoint',
    'feed',
    'report',
    'torch_adamw',
    'torch_clients',
    'torch_files',
    'torch_reference',
  },
  {'run_checkpoints', 'torch_import'},
  {'convert', 'torch_inspect', 'warm_start'},
  {'figures', 'recipe'},
  {'bad_batch', 'program'},
  {'run', 'inspect_data'},
  {'train'},
  {'main'},
]
SOURCES = sorted(
  [
    *PACKAGE.glob('*.py'),
    *(ROOT / 'tfds_kinetics').glob('*.py'),
    *(ROOT / 'benchmarks').glob('*.py'),
    ROOT / 'convert_to_torch.py',
  ]
)


def imported_modules(path: pathlib.Path) -> set[str]:
  """The modules of this package that a file imports, wherever in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
  return {name.split('.')[1] for name in found if name.startswith('dropmae_jax.')} & {
    module for layer in LAYERS for module in layer
  }


def test_every_module_has_a_layer():
  modules = {p.stem for p in PACKAGE.glob('*.py')} - {'__init__'}
  assert modules == set().union(*LAYERS)


@pytest.mark.parametrize('number', range(len(LAYERS)))
def test_imports_point_downwards(number):
  below = set().union(*LAYERS[:number])
  # Attention lists the attentions that vit uses; both are the transformer's layer.
  below |= {'attention'} if 'vit' in LAYERS[number] else set()
  for module in LAYERS[number]:
    assert imported_modules(PACKAGE / f'{module}.py') - {module} <= below, module


def test_the_dataset_builder_stands_alone():
  for path in (ROOT / 'tfds_kinetics').glob('*.py'):
    assert 'dropmae_jax' not in re.sub(r'""".*?"""', '', path.read_text(), flags=re.DOTALL), path


def test_importing_the_package_is_light():
  tree = ast.parse((PACKAGE / '__init__.py').read_text())
  assert all(isinstance(node, ast.Expr) for node in tree.body)


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: path.stem)
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


def test_files_stay_small():
  assert {
    p.name: len(p.read_text().splitlines())
    for p in SOURCES
    if len(p.read_text().splitlines()) > 300
  } == {}


def test_random_functions_do_not_make_keys_optional():
  from dropmae_jax import train_step
  from dropmae_jax.model import attention, fast_asad, mae, masking, pixels

  for module in (fast_asad, attention, pixels, mae, masking, train_step):
    for _, function in inspect.getmembers(module, inspect.isfunction):
      for name, parameter in inspect.signature(function).parameters.items():
        if 'key' in name:
          assert parameter.default is inspect.Parameter.empty
