"""Every option of a run: its type, its default, its range and what it means.

Names (of a size, a masking scheme, an attention and the like) are checked where a config is read
(`config_file`), by the tables that own them. Nothing heavy is imported here.
"""

import dataclasses
import math
from typing import Any

# Of a number without a limit of its own: steps are counted in 32 bits.
LARGEST = 2**31 - 1
# Numbers in a position table, half a GiB; a ViT-H/16 of 4096 pixels has 84 million.
LARGEST_TABLE = 1 << 27


def option(
  default: Any = dataclasses.MISSING,
  *,
  help: str,
  least: float | None = None,
  above: float | None = None,
  most: float = LARGEST,
  below: float | None = None,
) -> Any:
  """Returns a dataclass field with a meaning and a range, which `Options` checks.

  Args:
    default: value where the config does not set it; a field without one has to be set.
    help: what it means; shown by --help.
    least: smallest value allowed.
    above: every value allowed is larger.
    most: largest value allowed.
    below: every value allowed is smaller.
  """
  metadata = {'help': help, 'least': least, 'above': above, 'most': most, 'below': below}
  return dataclasses.field(default=default, metadata=metadata)


def range_of(field: dataclasses.Field) -> str:
  """Says in words which numbers a field may have; '' for a field without a range."""
  limits = field.metadata
  words = {'least': 'at least', 'above': 'more than', 'below': 'less than'}
  parts = [f'{words[name]} {limits[name]:g}' for name in words if limits.get(name) is not None]
  if parts and math.isfinite(limits['most']) and limits['most'] != LARGEST:
    parts.append(f'at most {limits["most"]:.10g}')
  return ' and '.join(parts)


def _is_in_range(value: float, field: dataclasses.Field) -> bool:
  limits = field.metadata
  # Written so that nan, which compares to nothing, is out of every range.
  return (
    (limits['least'] is None or value >= limits['least'])
    and (limits['above'] is None or value > limits['above'])
    and (limits['below'] is None or value < limits['below'])
    and value <= limits['most']
  )


class Options:
  """A group of options. Making one checks the range of every field.

  Raises:
    ValueError: names the first field out of its range, and the range.
  """

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value, allowed = getattr(self, field.name), range_of(field)
      if allowed and not _is_in_range(value, field):
        if value > field.metadata['most']:
          allowed = f'at most {field.metadata["most"]:.10g}'
        default = field.default
        usual = '' if default is dataclasses.MISSING else f' (the default is {default})'
        raise ValueError(f'{field.name}={value} is out of range; use {allowed}{usual}.')


@dataclasses.dataclass(frozen=True)
class Architecture(Options):
  """Every number that shapes the parameters; the defaults are ViT-B/16 at 224 pixels.

  Files and checkpoints say their architecture, so that its limits protect who reads them too.
  """

  image_size: int = option(224, least=1, most=16384, help='side of a frame in pixels')
  patch_size: int = option(16, least=1, most=1024, help='side of a patch in pixels')
  width: int = option(768, least=1, most=16384, help='of a token in the encoder')
  depth: int = option(12, least=1, most=256, help='blocks of the encoder')
  num_heads: int = option(12, least=1, most=1024, help='attention heads of the encoder')
  decoder_width: int = option(512, least=1, most=16384, help='of a token in the decoder')
  decoder_depth: int = option(8, least=1, most=256, help='blocks of the decoder')
  decoder_num_heads: int = option(16, least=1, most=1024, help='attention heads of the decoder')
  mlp_ratio: float = option(
    4.0, above=0, most=64, help='hidden width of an MLP over the width of a token'
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.image_size < self.patch_size or self.image_size % self.patch_size:
      down = max(self.image_size // self.patch_size, 1) * self.patch_size
      raise ValueError(
        f'image_size={self.image_size} is not a multiple of patch_size={self.patch_size};'
        f' choose for example image_size={down}.'
      )
    for part in ('', 'decoder_'):
      width, heads = getattr(self, f'{part}width'), getattr(self, f'{part}num_heads')
      if width % heads or width % 4:
        raise ValueError(
          f'{part}width={width} must be a multiple of 4 and of {part}num_heads={heads}.'
        )
      if width * self.tokens_per_frame > LARGEST_TABLE:
        raise ValueError(
          f'image_size={self.image_size} and patch_size={self.patch_size} make a position table of'
          f' {self.tokens_per_frame} tokens of {part}width={width}, and {LARGEST_TABLE} numbers are'
          ' the most; choose a smaller image_size.'
        )

  @property
  def grid(self) -> int:
    """Patches along one side of a frame."""
    return self.image_size // self.patch_size

  @property
  def tokens_per_frame(self) -> int:
    """The n of the shapes."""
    return self.grid**2

  @property
  def num_tokens(self) -> int:
    """The l of the shapes: the tokens of both frames."""
    return 2 * self.tokens_per_frame

  @property
  def patch_values(self) -> int:
    """The p of the shapes."""
    return self.patch_size**2 * 3


@dataclasses.dataclass(frozen=True)
class Objective(Options):
  """What the model is trained to do; the defaults are the published ones."""

  mask_ratio: float = option(
    0.75, above=0, below=1, help='share of the tokens of both frames that is masked'
  )
  masking: str = option('random', help='a scheme of model/masking.MASKING_SCHEMES')
  attention_dropout: float = option(
    0.1, least=0, most=1, help='P: share of the within-frame pairs that the decoder drops; 0: off'
  )
  dropout_rule: str = option('asad', help='a rule of model/asad.ATTENTION_DROPOUTS')
  normalise_targets: bool = option(
    True, help='predict pixels normalised per patch rather than pixels'
  )


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
  """How pairs are drawn and loaded; the defaults are published, but for the fast resize."""

  frame_gap: int = option(50, least=2, help='the frames of a pair are 1 to frame_gap - 1 apart')
  resize: str = option(
    'fast', help='fast (OpenCV bicubic) or exact (PIL bicubic, as published): data/augment.RESIZES'
  )
  shared_augmentation: bool = option(False, help='crop and flip both frames of a pair alike')
  num_threads: int = option(
    0,
    least=0,
    most=64,  # The stacks of a crash show up to 100.
    help='threads that decode and crop; 0: one for each core of this process, at most 32',
  )
  stall_seconds: float = option(
    300.0, above=0, most=math.inf, help='the run ends with an error when no batch came for so long'
  )
  max_damaged_records: int = option(
    10, least=0, help='unreadable records that other videos stand in for; more end the run'
  )


@dataclasses.dataclass(frozen=True)
class OptimizerOptions(Options):
  """AdamW; the defaults are the published ones, but for `warmup_epochs`, 40 there."""

  base_learning_rate: float = option(1.5e-4, above=0, help='peak, per 256 pairs of a batch')
  min_learning_rate: float = option(0.0, least=0, help='at the last step; at most the peak')
  warmup_steps: int = option(0, least=0, help='updates of linear warm-up; the first one has rate 0')
  warmup_epochs: float = option(0.0, least=0, help='the same in epochs; give one of the two')
  weight_decay: float = option(
    0.05, least=0, help='of everything that is neither 1-D nor a position table'
  )
  beta1: float = option(0.9, least=0, below=1, help='decay of the first moment')
  beta2: float = option(0.95, least=0, below=1, help='decay of the second moment')

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.warmup_steps and self.warmup_epochs:
      raise ValueError(
        f'warmup_steps={self.warmup_steps} and warmup_epochs={self.warmup_epochs} are two lengths'
        ' of the warm-up; set one of them to 0.'
      )


@dataclasses.dataclass(frozen=True)
class MeshOptions(Options):
  """How many devices do what; their product is the number of devices."""

  data: int = option(0, least=0, help='groups of devices with a whole state each; 0: what is left')
  fsdp: int = option(1, least=1, help='devices of a group, which share one state (ZeRO-3)')


@dataclasses.dataclass(frozen=True)
class CheckpointOptions(Options):
  """When checkpoints are written and which are kept."""

  every_steps: int = option(1000, least=1, help='updates between two; one is written at the end')
  keep_last: int = option(3, least=1, help='how many of the newest to keep')
  keep_every: int = option(
    0, least=0, help='keep those at multiples of this many steps for good; 0: none of them'
  )


@dataclasses.dataclass(frozen=True)
class Config(Options):
  """A whole pre-training run."""

  data_dir: str = option(help='what was given to tfds_kinetics as --data_dir')
  batch_size: int = option(least=1, help='pairs per update, over all devices and micro-batches')
  model: Architecture = dataclasses.field()
  num_steps: int = option(0, least=0, help='optimizer updates in all; or give num_epochs')
  num_epochs: float = option(
    0.0, least=0, help='passes over the dataset; steps follow from its size and batch_size'
  )
  dataset: str = option(
    'kinetics_frames/folder',
    help='TFDS name and config, or MODULE:CLASS; several with weights as NAME=3,NAME=1',
  )
  split: str = option('train', help='of the dataset')
  seed: int = option(0, least=0, most=2**32 - 1, help='of everything that is random')
  init_from: str = option(
    '', help='a workdir or file (also gs://, s3://) whose weights it starts from'
  )
  accumulation_steps: int = option(
    1, least=0, help='micro-batches of a batch, to save memory; auto (0): the fewest that fit'
  )
  dtype: str = option('bfloat16', help='of the matrix products; parameters are float32 always')
  attention: str = option(
    'auto', help='xla; fused (kernels of TPUs and Hopper GPUs); auto: see docs/performance.md'
  )
  remat: str = option(
    'none',
    help='what the backward pass recomputes to save memory: none, full (blocks), or dots'
    ' (all but the products with parameters)',
  )
  log_every: int = option(20, least=1, help='steps between two lines of metrics')
  score_every: int = option(
    0, least=0, help='steps between two scores; there is one of the last step too; 0: no scores'
  )
  scores: str = option(
    'held_out', help='entries of evaluation/scores.SCORES, with commas between them'
  )
  step_stall_seconds: float = option(
    1800.0,
    above=0,
    most=math.inf,
    help='the run ends, to be started again, when a step takes so'
    ' long; the first step and checkpoints may take half an hour in any case',
  )
  objective: Objective = dataclasses.field(default_factory=Objective)
  data: DataOptions = dataclasses.field(default_factory=DataOptions)
  optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
  mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
  checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.dtype not in DTYPES:
      raise ValueError(f'dtype={self.dtype!r} is unknown; use one of {", ".join(DTYPES)}.')
    if bool(self.num_steps) == bool(self.num_epochs):
      raise ValueError(
        f'num_steps={self.num_steps} and num_epochs={self.num_epochs:g} are two lengths of the run;'
        ' set one of them to 0.'
        if self.num_steps
        else 'num_steps=0 and num_epochs=0 leave the run without a length; set one of them.'
      )
    if self.optimizer.min_learning_rate > self.peak_learning_rate:
      raise ValueError(
        f'optimizer.min_learning_rate={self.optimizer.min_learning_rate} is more than the peak,'
        f' {self.peak_learning_rate:g} (base_learning_rate x batch_size / 256); lower it.'
      )

  @property
  def peak_learning_rate(self) -> float:
    """The base learning rate scaled by batch / 256."""
    return self.optimizer.base_learning_rate * self.batch_size / 256


DTYPES = ('float32', 'bfloat16')

# Fields, and groups of them, that a run may resume with changed: they alter neither its pairs, nor
# its noise, nor what it learns. Every other one makes it another run.
MAY_CHANGE = frozenset(
  {
    'data_dir',
    'init_from',
    'num_steps',
    'num_epochs',
    'accumulation_steps',
    'dtype',
    'attention',
    'remat',
    'mesh',
    'log_every',
    'score_every',
    'scores',
    'step_stall_seconds',
    'data.num_threads',
    'data.stall_seconds',
    'data.max_damaged_records',
    'optimizer',
    'checkpoint',
  }
)


def may_change(name: str) -> bool:
  """Whether a run may resume with another value of this field, by its dotted name."""
  return not MAY_CHANGE.isdisjoint({name, name.partition('.')[0]})
