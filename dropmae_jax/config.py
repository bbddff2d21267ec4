"""Options of what feeds a run and of what it keeps, checked when they are made.

Nothing heavy is imported: a training step needs neither the loader's libraries nor orbax.
"""

import dataclasses

# The ways to resize a crop: the names of `augment.RESIZES`.
RESIZES = ('fast', 'exact')


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """How pairs are drawn and fed; the defaults are the published recipe, but for the fast resize.

  Attributes:
    frame_gap: the frames of a pair are 1 to frame_gap - 1 apart.
    resize: 'fast' (OpenCV bicubic) or 'exact' (PIL bicubic, as published).
    shared_augmentation: both frames get the same crop and flip.
    num_workers: processes that decode and crop; 0 does it in threads of this one.
    num_threads: threads of a process without workers; 0 works only when a batch is asked for.
    stall_seconds: a run ends with an error when no batch came for so long.
    max_damaged_records: a run ends with an error when more records than these cannot be read, or
      when no readable video is found for a pair in a hundred tries; until then other videos take
      the place of those that they are of.
  """

  frame_gap: int = 50
  resize: str = 'fast'
  shared_augmentation: bool = False
  num_workers: int = 0
  num_threads: int = 2
  stall_seconds: float = 300.0
  max_damaged_records: int = 10

  def __post_init__(self) -> None:
    if self.frame_gap < 2:
      raise ValueError(
        f'frame_gap={self.frame_gap} leaves no second frame: pairs are 1 to frame_gap - 1 apart;'
        ' use 2 or more (published: 50).'
      )
    if self.resize not in RESIZES:
      raise ValueError(f'resize={self.resize!r} is unknown; use one of {", ".join(RESIZES)}.')
    for name in ('num_workers', 'num_threads', 'max_damaged_records'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} is negative; use 0 or more.')
    if not self.stall_seconds > 0:
      raise ValueError(
        f'stall_seconds={self.stall_seconds} is not positive; use the longest time that a batch may'
        ' take to come.'
      )


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
  """When checkpoints are written and which are kept.

  Attributes:
    every_steps: updates between two of them; one is always written at the end.
    keep_last: how many of the newest to keep.
    keep_every: those at multiples of this many steps are kept for good; 0 keeps none of them.
    keep_best: how many of the lowest score to keep too, be they among the newest or not. The score
      is the mean loss of the steps since the last multiple of `every_steps`.
  """

  every_steps: int = 1000
  keep_last: int = 3
  keep_every: int = 0
  keep_best: int = 0

  def __post_init__(self) -> None:
    for name in ('every_steps', 'keep_last'):
      if getattr(self, name) < 1:
        raise ValueError(f'checkpoint.{name}={getattr(self, name)} is not positive; use 1 or more.')
    for name in ('keep_every', 'keep_best'):
      if getattr(self, name) < 0:
        raise ValueError(f'checkpoint.{name}={getattr(self, name)} is negative; 0 keeps none.')
