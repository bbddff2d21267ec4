"""Reads a config: a file of configs/, with fields set on the command line, as checked options."""

import argparse
import dataclasses
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import typing
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from dropmae_jax.config import Architecture, Config, range_of
from dropmae_jax.data import augment
from dropmae_jax.kernels import implementations
from dropmae_jax.model import asad, mae, masking, vit
from dropmae_jax.runtime import paths
from dropmae_jax.runtime.errors import UserError, check_name, did_you_mean, first_line

PRESETS = pathlib.Path(__file__).parent / 'configs'
PREFIX = 'config.'
# Whose 0 may be written as 'auto'.
AUTO = ('accumulation_steps',)
# A length in steps or in epochs: setting one on the command line takes the place of the other.
LENGTHS = {
  'num_steps': 'num_epochs',
  'num_epochs': 'num_steps',
  'optimizer.warmup_steps': 'optimizer.warmup_epochs',
  'optimizer.warmup_epochs': 'optimizer.warmup_steps',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds --config, and one --config.FIELD for every field, in groups."""
  parser.add_argument(
    '--config',
    required=True,
    metavar='NAME|FILE',
    help='a Python file with get_config(), config.json of a workdir, or one of:'
    f' {", ".join(presets())}; what follows a colon is its argument, as in'
    ' kinetics400_vit_b16:24gb',
  )
  groups: dict[str, Any] = {}
  for name, kind in field_types().items():
    group = name.rpartition('.')[0]
    if group not in groups:
      title = f'fields of the config: {group}' if group else 'fields of the config'
      groups[group] = parser.add_argument_group(title)
    groups[group].add_argument(
      f'--{PREFIX}{name}',
      type=_boolean if kind is bool else _number_or_auto if name in AUTO else kind,
      metavar=kind.__name__.upper(),
      default=argparse.SUPPRESS,
      help=_help(name).replace('%', '%%'),
    )


def from_arguments(arguments: argparse.Namespace) -> Config:
  """Reads the config that a command line names, with the fields that it sets.

  Raises:
    UserError: it cannot be read, or a field is unknown, missing, or out of its range.
  """
  config = load(arguments.config)
  fields = {
    name.removeprefix(PREFIX): value
    for name, value in vars(arguments).items()
    if name.startswith(PREFIX)
  }
  replaced = {LENGTHS[name]: 0 for name in fields if name in LENGTHS}
  if 'model.size' in fields and arguments.config.endswith('.json'):
    # It has the numbers of another size.
    replaced |= {f'model.{name}': x for name, x in _row(fields['model.size']).items()}
  with config.unlocked(), config.ignore_type():
    for name, value in (replaced | fields).items():
      _set(config, name, value)
  return from_dict(config.to_dict())


def presets() -> list[str]:
  """Lists the names of the configs that come with the package."""
  return sorted(path.stem for path in PRESETS.glob('*.py') if 'def get_config(' in path.read_text())


def load(name: str) -> ConfigDict:
  """Returns what get_config() of a config file returns.

  Args:
    name: of a file, or of one of `presets`. What follows a colon is given to get_config. A file
      whose name ends with .json holds the fields themselves, as config.json of a workdir does.

  Raises:
    UserError: there is no such file, it has no get_config, or does not know the argument.
  """
  argument = ''
  if not os.path.isfile(name):
    name, argument = re.fullmatch(r'((?:\w+:/+)?[^:]*):?(.*)', name, re.DOTALL).groups()
  try:
    path = (paths.user_path if name.endswith('.json') else paths.local_path)(name)
  except UserError as error:
    raise UserError(f'--config={name}: {error}.') from error
  if '/' not in name and path.suffix not in ('.py', '.json'):
    path = PRESETS / f'{name}.py'
  if not path.is_file():
    known = did_you_mean(name, presets())
    raise UserError(f'--config={name} is neither a file nor the name of a config; {known}')
  if path.suffix not in ('.py', '.json'):
    raise UserError(f'--config={name} is not a Python file; give one, or a config.json of a run.')
  if path.suffix == '.json':
    if argument:
      raise UserError(
        f'--config={name}:{argument}: a .json has no arguments; leave out :{argument}.'
      )
    return _load_json(path)
  allow_imports_from_here()
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (OSError, SyntaxError) as error:
    raise UserError(f'--config={name} cannot be read ({error}); configs/ has examples.') from error
  if not hasattr(module, 'get_config'):
    raise UserError(f'--config={name} defines no get_config(); configs/ has examples.')
  given = [argument] if argument else []
  full_name = ':'.join([name, *given])
  try:
    inspect.signature(module.get_config).bind(*given)
  except TypeError as error:
    reason = (
      f'has no arguments; leave out :{argument}'
      if given
      else f'needs an argument; give one, as in --config={name}:ARGUMENT'
    )
    raise UserError(f'--config={full_name}: {name} {reason}.') from error
  try:
    return module.get_config(*given)
  except UserError as error:
    text = str(error)
    raise UserError(f'--config={full_name}: {text}{"" if text.endswith("?") else "."}') from error


def _load_json(path: paths.Path) -> ConfigDict:
  try:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
      raise ValueError('it holds no fields')
    return ConfigDict(values)
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(
      f'--config={path} is not the config of a run ({first_line(error)}); give config.json of a'
      ' workdir.'
    ) from error


def allow_imports_from_here() -> None:
  """Lets Python import from the working directory, as `python -m` does and entry points do not."""
  here = os.getcwd()
  if not {'', here} & set(sys.path):
    sys.path.insert(0, here)


def _set(config: ConfigDict, name: str, value: Any) -> None:
  *groups, leaf = name.split('.')
  for group in groups:
    if group not in config:
      config[group] = ConfigDict()
    config = config[group]
    if not isinstance(config, ConfigDict):
      raise UserError(f'config.{group}={config!r} should be a group of fields.')
  config[leaf] = value


def field_types() -> dict[str, type]:
  """Returns the type of every config field by its dotted name."""
  types = {}
  for name, kind in typing.get_type_hints(Config).items():
    if dataclasses.is_dataclass(kind):
      hints = ({'size': str} if kind is Architecture else {}) | typing.get_type_hints(kind)
      types |= {f'{name}.{field}': hint for field, hint in hints.items()}
    else:
      types[name] = kind
  return dict(sorted(types.items(), key=lambda item: item[0].rpartition('.')[0]))  # By group.


def _help(name: str) -> str:
  """Returns the meaning, the range and the default of a field."""
  if name == 'model.size':
    return f'sets the numbers of encoder and decoder: {", ".join(vit.SIZES)} (B)'
  cls = Config
  *groups, leaf = name.split('.')
  for group in groups:
    cls = typing.get_type_hints(cls)[group]
  field = next(field for field in dataclasses.fields(cls) if field.name == leaf)
  parts = [range_of(field)]
  if cls is Architecture and leaf in vit.Size._fields:
    parts.append('by default as the size has it')
  elif field.default is not dataclasses.MISSING:
    parts.append(f'default {field.default!r}')
  notes = '; '.join(part for part in parts if part)
  return field.metadata['help'] + (f' ({notes})' if notes else '')


def _number_or_auto(text: str) -> int:
  return 0 if text == 'auto' else int(text)


def _boolean(text: str) -> bool:
  if text.lower() not in ('true', 'false'):
    raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false')
  return text.lower() == 'true'


def unknown_field(name: str) -> UserError:
  """Returns the refusal of a dotted config name, with the name that was probably meant."""
  return UserError(f'config has no field {name!r}; {did_you_mean(name, field_types())}')


def from_dict(values: dict[str, Any]) -> Config:
  """Checks the fields of a config and returns them as typed options.

  Args:
    values: fields by name, groups of them in dicts of their own: `ConfigDict.to_dict()`.

  Raises:
    UserError: a field is unknown, missing, of a wrong type, or out of its range.
  """
  config = _options(Config, values, '')
  config = dataclasses.replace(config, init_from=_path(config, 'init_from', paths.user_path))
  # What a dataset class of the user's own makes of its data_dir is its business.
  if ':' not in config.dataset:
    config = dataclasses.replace(config, data_dir=_path(config, 'data_dir', paths.local_path))
  check_name('config.objective.masking', config.objective.masking, masking.MASKING_SCHEMES)
  rule = config.objective.dropout_rule
  check_name('config.objective.dropout_rule', rule, asad.ATTENTION_DROPOUTS)
  check_name('config.data.resize', config.data.resize, augment.RESIZES)
  check_name('config.attention', config.attention, implementations.KINDS)
  check_name('config.remat', config.remat, mae.REMATERIALISATIONS)
  try:
    masking.num_visible(config.model.num_tokens, config.objective.mask_ratio)
  except ValueError as error:
    raise UserError(f'config.objective.{error}') from error
  return config


def _path(config: Config, name: str, read: Callable[[str], paths.Path]) -> str:
  """Returns a path of the config, with `~` expanded; an empty one names nothing."""
  text = getattr(config, name)
  try:
    return text and str(read(text))
  except UserError as error:
    raise UserError(f'config.{name}: {error}.') from error


def _options(cls: type, values: dict[str, Any], prefix: str) -> Any:
  """Fills an options dataclass from the part of a config below `prefix`."""
  kinds = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    required = field.default is field.default_factory is dataclasses.MISSING
    if required and field.name not in values:
      raise UserError(f'config lacks the field {prefix + field.name!r}, which has no default.')
  if cls is Architecture:
    kinds['size'] = str
    values = _row(values.get('size', 'B')) | values
  arguments = {}
  for name, value in values.items():
    if name not in kinds:
      raise unknown_field(prefix + name)
    if not dataclasses.is_dataclass(kinds[name]):
      arguments[name] = _typed(value, kinds[name], prefix + name)
    elif isinstance(value, dict):
      arguments[name] = _options(kinds[name], value, f'{name}.')
    else:
      raise UserError(f'config.{name}={value!r} should be a group of fields.')
  if cls is Architecture:
    arguments.pop('size', None)
  try:
    return cls(**arguments)
  except ValueError as error:
    raise UserError(f'config.{prefix}{error}') from error


def _row(size: Any) -> dict[str, int]:
  check_name('config.model.size', size, vit.SIZES)
  return vit.SIZES[size]._asdict()


def _typed(value: Any, kind: type, name: str) -> Any:
  if name in AUTO and value == 'auto':
    return 0
  fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
  if not fits or (isinstance(value, bool) and kind is not bool):
    raise UserError(f'config.{name}={value!r} is not of type {kind.__name__}.')
  return kind(value)
