"""Converts AdamW's moments to the `torch.optim.AdamW.state_dict()` of the published code, and back.

The published code groups parameters as timm does: group 0 without weight decay (1-D tensors and
biases), group 1 with it. The fixed position tables are in neither. Integer ids run over group 0 in
the order of the state dict, then over group 1. PyTorch does not check shapes when it loads such a
state. A moment that was not transposed fails at the first update, or never if it is square, so
shapes are checked here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dropmae_jax.config import Architecture, OptimizerOptions
from dropmae_jax.optimizer import Moments
from dropmae_jax.pytorch import file_metadata, layouts
from dropmae_jax.runtime.errors import UserError

MOMENTS = {'exp_avg': 'mean', 'exp_avg_sq': 'square'}


class TorchAdamW(NamedTuple):
  """The optimizer state of a file; `groups` are the options of both groups, without ids."""

  moments: Moments
  groups: tuple[dict[str, Any], dict[str, Any]]


def parameter_groups(architecture: Architecture) -> tuple[list[str], list[str]]:
  """Returns the names of the tensors without and with weight decay, in the order of their ids."""
  trained = [t for t in layouts.tensors(architecture) if t.name not in layouts.POSITION_TABLES]
  without_decay = [t.name for t in trained if len(t.shape) == 1]
  return without_decay, [t.name for t in trained if len(t.shape) > 1]


def group_options(
  learning_rate: float, options: OptimizerOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the options of both groups; every PyTorch since 1.9 knows all of them."""
  shared = {'lr': learning_rate, 'betas': (options.beta1, options.beta2), 'eps': 1e-8}
  decays = 0.0, options.weight_decay
  return tuple(shared | {'weight_decay': decay, 'amsgrad': False} for decay in decays)


def to_torch(adamw: TorchAdamW, architecture: Architecture) -> dict[str, Any]:
  """Returns the optimizer's state dict, with numpy arrays instead of tensors."""
  groups = parameter_groups(architecture)
  named = {
    key: layouts.to_torch(getattr(adamw.moments, field), architecture)
    for key, field in MOMENTS.items()
  }
  states, param_groups = {}, []
  for names, options in zip(groups, adamw.groups, strict=True):
    ids = range(len(states), len(states) + len(names))
    param_groups.append({**options, 'betas': tuple(options['betas']), 'params': list(ids)})
    for identity, name in zip(ids, names, strict=True):
      # One array per tensor: PyTorch increments it in place, and a shared one once per tensor.
      step = np.array(adamw.moments.count, np.float32)
      states[identity] = {'step': step, **{key: arrays[name] for key, arrays in named.items()}}
  return {'state': states, 'param_groups': param_groups}


def from_torch(optimizer: Mapping[str, Any], architecture: Architecture) -> TorchAdamW:
  """Returns the moments of an optimizer's state dict; inverse of `to_torch`.

  The fixed tables get zero moments. All tensors must have the same number of updates, because our
  optimizer has one count.

  Raises:
    UserError: ids, groups, shapes or counts are not those of the published code.
  """
  groups = parameter_groups(architecture)
  names = [name for group in groups for name in group]
  try:
    param_groups, states = optimizer['param_groups'], optimizer['state']
    listed = [list(group['params']) for group in param_groups]
    options = tuple(
      {k: v.item() if isinstance(v, np.ndarray) else v for k, v in group.items() if k != 'params'}
      for group in param_groups
    )
    ids = [identity for group in listed for identity in group]
    arrays = {
      name: {key: np.asarray(states[i][key]) for key in MOMENTS}
      for i, name in zip(ids, names, strict=True)
    }
    counts = {int(states[i]['step']) for i in ids}
    for each in options:
      _check_options(each)
  except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
    raise UserError(
      f'the optimizer state is not that of AdamW for the {len(names)} trained tensors of'
      f' {architecture} ({type(error).__name__}: {error}); leave --with_optimizer out.'
    ) from error
  shapes = layouts.tensor_shapes(architecture)
  problems, sizes = [], [len(group) for group in groups]
  if [len(group) for group in listed] != sizes or ids != list(range(len(names))):
    problems.append(f'its groups do not have {sizes[0]} and {sizes[1]} tensors with ids in order')
  problems += [
    f'{key} of id {i} is {array.shape}, but {name} is {shapes[name]}'
    for i, (name, pair) in zip(ids, arrays.items(), strict=True)
    for key, array in pair.items()
    if array.shape != shapes[name]
  ]
  if len(counts) != 1 or not 0 <= min(counts) < 2**31:
    problems.append(f'its tensors have had {min(counts)} to {max(counts)} updates')
  if problems:
    raise UserError(
      f'the optimizer state does not fit {architecture}: {"; ".join(problems[:3])};'
      ' leave --with_optimizer out.'
    )
  fixed = {name: np.zeros(shapes[name], np.float32) for name in layouts.POSITION_TABLES}
  trees = {}
  for key, field in MOMENTS.items():
    moment = layouts.as_float32({name: pair[key] for name, pair in arrays.items()})
    trees[field] = layouts.from_torch(moment | fixed, architecture)
  return TorchAdamW(Moments(count=counts.pop(), **trees), options)


def _check_options(options: Mapping[str, Any]) -> None:
  """Raises an error if a group's options cannot be stored in json and written out again."""
  beta1, beta2 = options['betas']
  numbers = (options['lr'], options['weight_decay'], beta1, beta2)
  if not (all(isinstance(x, int | float) for x in numbers) and file_metadata.is_plain(options)):
    raise ValueError('the options of a group are not plain values')
