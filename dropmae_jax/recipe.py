"""A config, checked, as typed and immutable options.

The options' dataclasses are the schema: a field that none of them has is refused by name.
"""

import dataclasses
import typing
from typing import Any

from dropmae_jax import attention, command_line, mae, masking
from dropmae_jax.command_line import BadInput
from dropmae_jax.config import CheckpointOptions, DataOptions
from dropmae_jax.mae import Architecture, Objective
from dropmae_jax.optimizer import OptimizerOptions
from dropmae_jax.sharding import MeshOptions

DTYPES = ('float32', 'bfloat16')
# Fields, and groups of them, that a run may go on with changed: they alter neither the pairs that
# it is fed, nor its noise, nor what it learns. Every other one makes it another run.
MAY_CHANGE = frozenset(
  {
    'data_dir',
    'init_from',
    'num_steps',
    'accumulation_steps',
    'dtype',
    'attention',
    'remat',
    'mesh',
    'log_every',
    'step_stall_seconds',
    'data.num_workers',
    'data.num_threads',
    'data.stall_seconds',
    'data.max_damaged_records',
    'optimizer',
    'checkpoint',
  }
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A whole training run.

  Attributes:
    data_dir: what was given to tfds_kinetics as --data_dir.
    dataset: TFDS name and config, such as 'kinetics_frames/folder'; or several with the weights
      that they are mixed by, as 'kinetics_frames/kinetics400=3,kinetics_frames/folder=1'.
    split: of the dataset.
    seed: of everything that is random.
    init_from: a workdir or a PyTorch file whose weights a run begins with; '' draws fresh ones.
    num_steps: optimizer updates in all.
    batch_size: pairs per update, over all devices and micro-batches.
    accumulation_steps: micro-batches that a batch is split into, to save memory.
    dtype: of the matrix products; parameters are float32 always.
    attention: how it is computed: 'xla'; 'fused', by kernels on TPUs and Hopper GPUs, which draw by
      the same law and noise, though of some thousand pairs that are dropped a few may differ;
      'auto' is 'xla', on CPUs and TPUs a few heads at a time, as long as nobody has timed the
      kernels.
    remat: which activations are computed anew for the gradient, to save memory: of 'none', of
      'full' blocks, or of all but the 'dots' (matrix products with parameters).
    log_every: steps between two lines of metrics.
    step_stall_seconds: a run ends, to be started again, when a step takes so long; the first one,
      which compiles, and the writing of a checkpoint may take half an hour in any case.
    model: `size` of the size table, `image_size`, and any other field of `Architecture`.
    objective: see `mae.Objective`.
    data: see `config.DataOptions`.
    optimizer: see `optimizer.OptimizerOptions`.
    mesh: see `sharding.MeshOptions`.
    checkpoint: see `config.CheckpointOptions`.
  """

  data_dir: str
  num_steps: int
  batch_size: int
  model: Architecture
  dataset: str = 'kinetics_frames/folder'
  split: str = 'train'
  seed: int = 0
  init_from: str = ''
  accumulation_steps: int = 1
  dtype: str = 'bfloat16'
  attention: str = 'auto'
  remat: str = 'none'
  log_every: int = 20
  step_stall_seconds: float = 1800.0
  objective: Objective = dataclasses.field(default_factory=Objective)
  data: DataOptions = dataclasses.field(default_factory=DataOptions)
  optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
  mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
  checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)

  def __post_init__(self) -> None:
    for name in ('num_steps', 'batch_size', 'accumulation_steps', 'log_every'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not positive; use 1 or more.')
    if not self.step_stall_seconds > 0:
      raise ValueError(
        f'step_stall_seconds={self.step_stall_seconds} is not positive; use the longest time that a'
        ' step may take.'
      )
    if not 0 <= self.seed < 2**32:
      raise ValueError(f'seed={self.seed} is not in 0..2**32 - 1.')
    for name, known in (
      ('dtype', DTYPES),
      ('attention', attention.KINDS),
      ('remat', mae.REMATERIALISATIONS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f'{name}={getattr(self, name)!r} is unknown; use one of {", ".join(known)}.'
        )
    masking.num_visible(self.model.num_tokens, self.objective.mask_ratio)
    if self.optimizer.warmup_steps < 0:
      raise ValueError(f'optimizer.warmup_steps={self.optimizer.warmup_steps} is negative.')

  @property
  def peak_learning_rate(self) -> float:
    """The base learning rate scaled by batch / 256."""
    return self.optimizer.base_learning_rate * self.batch_size / 256


MODEL_FIELDS = {'size': str, **typing.get_type_hints(Architecture)}


def may_change(name: str) -> bool:
  """Whether a run may go on with another value of this field, by its dotted name."""
  return not MAY_CHANGE.isdisjoint({name, name.partition('.')[0]})


def known_fields() -> list[str]:
  """Lists the dotted names of all config fields."""
  names = []
  for name, kind in typing.get_type_hints(Recipe).items():
    if name == 'model':
      names += [f'model.{field}' for field in MODEL_FIELDS]
    elif dataclasses.is_dataclass(kind):
      names += [f'{name}.{field.name}' for field in dataclasses.fields(kind)]
    else:
      names.append(name)
  return names


def unknown_field(name: str) -> BadInput:
  """Returns the refusal of a dotted config name, with the name that was probably meant."""
  leaf = name.rpartition('.')[2]
  same_leaf = [known for known in known_fields() if known.rpartition('.')[2] == leaf]
  return BadInput(
    f'config has no field {name!r}; {command_line.nearest(name, same_leaf or known_fields())}'
  )


def from_config(values: dict[str, Any]) -> Recipe:
  """Checks a config and returns it as a recipe.

  Args:
    values: of its fields, groups of them in dicts of their own: `ConfigDict.to_dict()`.

  Raises:
    BadInput: a field is unknown, missing, of a wrong type, or of an impossible value.
  """
  try:
    return _options(Recipe, values, '')
  except BadInput:
    raise
  except ValueError as error:
    raise BadInput(f'config: {error}') from error


def _options(cls: type, values: dict[str, Any], prefix: str) -> Any:
  """Fills an options dataclass from the part of a config below `prefix`."""
  kinds = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    required = field.default is field.default_factory is dataclasses.MISSING
    if required and field.name not in values:
      raise BadInput(f'config lacks the field {prefix + field.name!r}, which has no default.')
  arguments = {}
  for name, value in values.items():
    if name not in kinds:
      raise unknown_field(prefix + name)
    if dataclasses.is_dataclass(kinds[name]) and not isinstance(value, dict):
      raise BadInput(f'config.{name}={value!r} should be a group of fields.')
    if kinds[name] is Architecture:
      fields = _typed_fields(value, MODEL_FIELDS, f'{name}.')
      arguments[name] = mae.architecture_of_size(**({'size': 'B'} | fields))
    elif dataclasses.is_dataclass(kinds[name]):
      arguments[name] = _options(kinds[name], value, f'{name}.')
    else:
      arguments[name] = _typed(value, kinds[name], prefix + name)
  return cls(**arguments)


def _typed_fields(values: dict[str, Any], kinds: dict[str, type], prefix: str) -> dict[str, Any]:
  for name in values:
    if name not in kinds:
      raise unknown_field(prefix + name)
  return {name: _typed(value, kinds[name], prefix + name) for name, value in values.items()}


def _typed(value: Any, kind: type, name: str) -> Any:
  fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
  if not fits or (isinstance(value, bool) and kind is not bool):
    raise BadInput(f'config.{name}={value!r} is not of type {kind.__name__}.')
  return kind(value)
