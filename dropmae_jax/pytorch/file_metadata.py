"""What a file says of itself, in `args` and beside it: checked before anything is made of it.

Ours say everything: the architecture, the objective, the step and the description of the run. The
published code's arguments tell the objective; those of other programs mean other things.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dropmae_jax.config import Architecture, Objective
from dropmae_jax.runtime.errors import UserError

# Of the published code's arguments, those that say what the model was trained to do.
PUBLISHED_OBJECTIVE = {
  'mask_ratio': 'mask_ratio',
  'P': 'attention_dropout',
  'norm_pix_loss': 'normalise_targets',
}


class Arguments(NamedTuple):
  """What is known of the model in a file, as plain values.

  Attributes:
    is_ours: this program wrote them.
    architecture: None where the file does not tell it.
    objective: all fields of an `Objective`; None where the file does not tell one.
    step: updates that were made; 0 where the file does not tell it.
    kept: what a checkpoint's description keeps through a file and back.
  """

  is_ours: bool
  architecture: Architecture | None
  objective: dict[str, Any]
  step: int
  kept: dict[str, Any]


class _Law(NamedTuple):
  """What a value must be, and how this is told."""

  holds: Callable[[Any], bool]
  says: str


def _whole_from(lowest: int) -> _Law:
  return _Law(lambda value: _is_a(value, int) and value >= lowest, f'a whole number from {lowest}')


def _is_a(value: Any, kind: type) -> bool:
  """As isinstance, but that no bool is a number, whole ones are floats, and all have 32 bits."""
  if kind not in (int, float):
    return isinstance(value, kind)
  is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
  return is_number and abs(value) < 2**31


def is_plain(value: Any) -> bool:
  """Whether json can keep a value."""
  try:
    json.dumps(value)
  except (TypeError, ValueError, RecursionError):
    return False
  return True


def _is_source(value: Any) -> bool:
  fresh = value.get('fresh', []) if isinstance(value, dict) else None
  return isinstance(fresh, list) and all(isinstance(name, str) for name in fresh)


_STEP = _whole_from(0)
_KEPT = {
  'frame_gap': _whole_from(2),
  'steps_per_epoch': _whole_from(1),
  'epoch': _whole_from(-1),
  'config': _Law(lambda value: isinstance(value, dict), 'a dict of plain values'),
  'data_fingerprint': _Law(lambda value: value is None or isinstance(value, str), 'a text'),
  'source': _Law(_is_source, 'a dict with a list of names under "fresh"'),
  'seed_version': _whole_from(1),
}


def read(entries: Mapping[str, Any]) -> Arguments:
  """Reads what a file has beside its tensors.

  Raises:
    UserError: a value is not what its name stands for; names the first.
  """
  said = entries.get('args')
  said = said if isinstance(said, dict) else {}
  if 'architecture' not in said:
    known = {name: said[theirs] for theirs, name in PUBLISHED_OBJECTIVE.items() if theirs in said}
    kept = {'epoch': entries['epoch']} if _KEPT['epoch'].holds(entries.get('epoch')) else {}
    return Arguments(False, None, _objective(known), 0, kept)
  for name, law in {'step': _STEP, **_KEPT}.items():
    if name in said and not (law.holds(said[name]) and is_plain(said[name])):
      raise _refused(f'{name}={_shown(said[name])} and not {law.says}')
  return Arguments(
    is_ours=True,
    architecture=Architecture(**_fields(Architecture, said['architecture'])),
    objective=_objective(said.get('objective', {})),
    step=said.get('step', 0),
    kept={name: said[name] for name in _KEPT if name in said},
  )


def _objective(said: Any) -> dict[str, Any]:
  if isinstance(said, dict):
    said = {name: value for name, value in said.items() if value is not None}
  unknown = dict.fromkeys(field.name for field in dataclasses.fields(Objective))
  return unknown | _fields(Objective, said)


def _fields(kind: type, said: Any) -> dict[str, Any]:
  """Returns values for fields of a dataclass, all of which have defaults of their type."""
  what = kind.__name__.lower()
  if not isinstance(said, dict):
    raise _refused(f'{what}={_shown(said)} and not a dict')
  defaults = {field.name: field.default for field in dataclasses.fields(kind)}
  for name, value in said.items():
    if name not in defaults:
      raise _refused(f'{_shown(name)} in its {what}, which has no such field')
    if not _is_a(value, type(defaults[name])):
      raise _refused(f'{name}={_shown(value)} in its {what}, where {defaults[name]} is usual')
  try:
    kind(**said)
  except ValueError as error:
    raise _refused(str(error).rstrip('.')) from error
  return said


def _shown(value: Any) -> str:
  return ' '.join(repr(value).split())[:60]


def _refused(what: str) -> UserError:
  return UserError(f'the file says {what}; save it without "args", or correct them.')
