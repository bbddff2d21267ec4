"""Reads and checks the metadata of a weight file: its entries `args` and `epoch`.

Files written by this project hold the architecture, the objective, the step and the description of
the run. Files of the published code hold the objective. Arguments of other programs are ignored.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dropmae_jax.config import Architecture, Objective
from dropmae_jax.runtime.errors import UserError

# Arguments of the published code to fields of `Objective`.
PUBLISHED_OBJECTIVE = {
  'mask_ratio': 'mask_ratio',
  'P': 'attention_dropout',
  'norm_pix_loss': 'normalise_targets',
}


class Metadata(NamedTuple):
  """What a file tells about its model, as plain values.

  Attributes:
    is_ours: whether this project wrote the file.
    architecture: None if the file does not tell it.
    objective: the fields of `Objective`; the value is None if the file does not tell it.
    step: number of updates; 0 if the file does not tell it.
    description: the entries of a checkpoint's description that an export and an import preserve.
  """

  is_ours: bool
  architecture: Architecture | None
  objective: dict[str, Any]
  step: int
  description: dict[str, Any]


class _Check(NamedTuple):
  """What a value must be: a predicate, and its wording in an error message."""

  accepts: Callable[[Any], bool]
  wording: str


def _integer_from(least: int) -> _Check:
  return _Check(lambda value: _is_a(value, int) and value >= least, f'an integer from {least}')


def _is_a(value: Any, kind: type) -> bool:
  """Like isinstance, but a bool is no number, an int is a float, and numbers are below 2**31."""
  if kind not in (int, float):
    return isinstance(value, kind)
  is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
  return is_number and abs(value) < 2**31


def is_plain(value: Any) -> bool:
  """Returns whether json can store a value."""
  try:
    json.dumps(value)
  except (TypeError, ValueError, RecursionError):
    return False
  return True


def _is_source(value: Any) -> bool:
  fresh = value.get('fresh', []) if isinstance(value, dict) else None
  return isinstance(fresh, list) and all(isinstance(name, str) for name in fresh)


def _is_step_and_epochs(value: Any) -> bool:
  is_pair = isinstance(value, list | tuple) and len(value) == 2
  return is_pair and _is_a(value[0], int) and _is_a(value[1], float) and min(value) >= 0


_STEP = _integer_from(0)
# Older files have a score too, which is not read.
_DESCRIPTION = {
  'frame_gap': _integer_from(2),
  'steps_per_epoch': _integer_from(1),
  'epochs_before': _Check(_is_step_and_epochs, 'a step and a number of epochs'),
  'epoch': _integer_from(-1),
  'config': _Check(lambda value: isinstance(value, dict), 'a dict of plain values'),
  'data_fingerprint': _Check(lambda value: value is None or isinstance(value, str), 'a string'),
  'source': _Check(_is_source, 'a dict with a list of names under "fresh"'),
  'seed_version': _integer_from(1),
}


def read(entries: Mapping[str, Any]) -> Metadata:
  """Returns the metadata of a file, from its top-level entries other than tensors.

  Raises:
    UserError: a value is of the wrong type or out of its range; names the first.
  """
  args = entries.get('args')
  args = args if isinstance(args, dict) else {}
  if 'architecture' not in args:
    objective = {
      name: args[published] for published, name in PUBLISHED_OBJECTIVE.items() if published in args
    }
    epoch = entries.get('epoch')
    description = {'epoch': epoch} if _DESCRIPTION['epoch'].accepts(epoch) else {}
    return Metadata(False, None, _objective(objective), 0, description)
  for name, check in {'step': _STEP, **_DESCRIPTION}.items():
    if name in args and not (check.accepts(args[name]) and is_plain(args[name])):
      raise _invalid(f'{name}={_short_repr(args[name])}, which is not {check.wording}')
  return Metadata(
    is_ours=True,
    architecture=Architecture(**_fields(Architecture, args['architecture'])),
    objective=_objective(args.get('objective', {})),
    step=args.get('step', 0),
    description={name: args[name] for name in _DESCRIPTION if name in args},
  )


def _objective(values: Any) -> dict[str, Any]:
  if isinstance(values, dict):
    values = {name: value for name, value in values.items() if value is not None}
  unknown = dict.fromkeys(field.name for field in dataclasses.fields(Objective))
  return unknown | _fields(Objective, values)


def _fields(kind: type, values: Any) -> dict[str, Any]:
  """Returns `values` if they are fields of a dataclass; every field has a default of its type."""
  what = kind.__name__.lower()
  if not isinstance(values, dict):
    raise _invalid(f'{what}={_short_repr(values)}, which is not a dict')
  defaults = {field.name: field.default for field in dataclasses.fields(kind)}
  for name, value in values.items():
    if name not in defaults:
      raise _invalid(f'{_short_repr(name)} in its {what}, which has no such field')
    if not _is_a(value, type(defaults[name])):
      raise _invalid(f'{name}={_short_repr(value)} in its {what} (the default: {defaults[name]})')
  try:
    kind(**values)
  except ValueError as error:
    raise _invalid(str(error).rstrip('.')) from error
  return values


def _short_repr(value: Any) -> str:
  return ' '.join(repr(value).split())[:60]


def _invalid(what: str) -> UserError:
  return UserError(f'the file says {what}; correct its "args", or save it without them.')
