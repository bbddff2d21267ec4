"""AdamW as published: what decays, and the learning rate of every update."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
import optax

from dropmae_jax.config import Config, OptimizerOptions
from dropmae_jax.runtime.errors import UserError

# Position tables get no gradient and must not decay; AdamW then never moves them.
FIXED = ('pos_embed', 'decoder_pos_embed')


def learning_rate(
  *, peak: float, floor: float, warmup_steps: float, num_steps: float
) -> optax.Schedule:
  """Returns the schedule: linear from 0 to the peak, then half a cosine down to the floor.

  Args:
    peak: largest learning rate.
    floor: learning rate at `num_steps`.
    warmup_steps: in the schedule's own unit, which may be fractional epochs.
    num_steps: in the same unit, warm-up included; a run that is shorter ends while warming up.
  """
  # Optax's own join lets the cosine begin at the peak's step, as the published formula does.
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=peak,
    warmup_steps=warmup_steps,
    decay_steps=max(num_steps, warmup_steps + 1),
    end_value=floor,
  )


def steps_per_epoch(config: Config, num_videos: int) -> int:
  """Returns how many batches all videos make; at least 1."""
  return max(num_videos // config.batch_size, 1)


def resolve_schedule(config: Config, num_videos: int) -> Config:
  """Returns the config with its epochs turned into steps, in which all that follows counts.

  Raises:
    UserError: these are more steps than can be counted.
  """
  per_epoch = steps_per_epoch(config, num_videos)
  options = config.optimizer
  warmup_steps = options.warmup_steps or round(options.warmup_epochs * per_epoch)
  num_steps = config.num_steps or max(round(config.num_epochs * per_epoch), 1)
  try:
    return dataclasses.replace(
      config,
      num_steps=num_steps,
      num_epochs=0.0,
      optimizer=dataclasses.replace(options, warmup_steps=warmup_steps, warmup_epochs=0.0),
    )
  except ValueError as error:
    raise UserError(f'config: with {per_epoch} steps per epoch, {error}') from error


def describe_schedule(config: Config, num_videos: int) -> str:
  """Describes the length of a run whose schedule is resolved."""
  per_epoch = steps_per_epoch(config, num_videos)
  warmup_steps = config.optimizer.warmup_steps
  return (
    f'{config.num_steps} steps ({config.num_steps / per_epoch:.4g} epochs), the first'
    f' {warmup_steps} ({warmup_steps / per_epoch:.3g} epochs) of them warm-up'
  )


def schedule_of(config: Mapping[str, Any]) -> optax.Schedule:
  """Returns the schedule of a config as a dict, such as a checkpoint holds; in steps."""
  options = config['optimizer']
  return learning_rate(
    peak=options['base_learning_rate'] * config['batch_size'] / 256,
    floor=options['min_learning_rate'],
    warmup_steps=options['warmup_steps'],
    num_steps=config['num_steps'],
  )


def warnings_of_schedule(config: Config, stored: Mapping[str, Any], step: int) -> list[str]:
  """Returns what a user may not expect of the learning rate after a step.

  Args:
    config: of the run.
    stored: the config of its last checkpoint; {} if there is none, or it does not tell.
    step: of that checkpoint.
  """
  lines, warmup_steps = [], config.optimizer.warmup_steps
  if warmup_steps >= config.num_steps:
    lines.append(
      f'config.optimizer.warmup_steps={warmup_steps} is not below config.num_steps='
      f'{config.num_steps}, so the learning rate never reaches its peak'
    )
  with contextlib.suppress(KeyError, TypeError):  # Of other code.
    before, now = (float(schedule_of(each)(step)) for each in (stored, dataclasses.asdict(config)))
    if not math.isclose(before, now, rel_tol=1e-5):
      lines.append(
        f'the learning rate of step {step + 1} is {now:.3g}; with the config of that checkpoint it'
        f' would be {before:.3g}'
      )
  return lines


def is_decayed(params: dict) -> dict:
  """Marks what decays: every tensor of two or more dimensions but the fixed position tables.

  The [1, 1, d] mask token and temporal embeddings are 3-D and do decay, as published.
  """
  return jax.tree.map_with_path(
    lambda path, leaf: leaf.ndim > 1 and path[-1].key not in FIXED, params
  )


def adamw(schedule: optax.Schedule, options: OptimizerOptions) -> optax.GradientTransformation:
  """Returns AdamW with the published betas, epsilon and decay rule."""
  return optax.adamw(
    schedule,
    b1=options.beta1,
    b2=options.beta2,
    eps=1e-8,
    weight_decay=options.weight_decay,
    mask=is_decayed,
  )


@flax.struct.dataclass
class TrainState:
  """All that an update reads and writes: arrays, or their shapes in an abstract state.

  Attributes:
    step: int32 [], the number of updates made.
    params: a pure dict, float32.
    opt_state: optax's; holds both moments.
  """

  step: Any
  params: dict
  opt_state: Any


class Moments(NamedTuple):
  """What AdamW remembers, apart from how optax nests it.

  Attributes:
    count: updates taken.
    mean: of the gradients (Adam's first moment), shaped like the parameters.
    square: of the squared gradients (the second moment), likewise.
  """

  count: int
  mean: dict
  square: dict


def moments_of(opt_state: Any) -> Moments:
  """Reads the moments off a state of `adamw`."""
  adam = opt_state[0]
  return Moments(count=int(adam.count), mean=adam.mu, square=adam.nu)


def state_of(moments: Moments) -> Any:
  """Returns the state of `adamw` that has these moments."""
  fresh = abstract_state(moments.mean)
  count = np.asarray(moments.count, np.int32)
  return optax.tree.set(fresh, count=count, mu=moments.mean, nu=moments.square)


def abstract_state(params: dict) -> Any:
  """Returns the shapes of the state of `adamw`, which no option of it changes."""
  tx = adamw(optax.constant_schedule(0.0), OptimizerOptions())
  return jax.eval_shape(tx.init, params)
