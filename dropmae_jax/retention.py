"""Which checkpoints of a run are kept, and the scores that the best are chosen by.

Orbax would keep scores in a file of their own beside each checkpoint; damage of one of these files
stops every reader of the folder. Ours are in the description, whose damage is one checkpoint's.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orbax.checkpoint.checkpoint_managers as orbax

# Names in a checkpoint's description.
SCORE, SCORE_STEPS = 'score', 'score_steps'


@dataclasses.dataclass(frozen=True)
class MeanLoss:
  """The mean of losses as they come; what it has taken so far goes on after a restart.

  Attributes:
    total: of the losses.
    num_steps: how many there are.
  """

  total: float = 0.0
  num_steps: int = 0

  def plus(self, losses: Iterable[float]) -> 'MeanLoss':
    """Returns the mean that has taken these too."""
    losses = list(losses)
    return MeanLoss(sum(losses, self.total), self.num_steps + len(losses))

  def described(self) -> dict[str, Any]:
    """Returns what a description says of it: the score, if there is one, and of how many steps."""
    if not self.num_steps:
      return {}
    return {SCORE: self.total / self.num_steps, SCORE_STEPS: self.num_steps}


def mean_in(description: Mapping[str, Any]) -> MeanLoss:
  """Reads what `described` has written; nothing was taken where there is no score."""
  score, num_steps = description.get(SCORE), description.get(SCORE_STEPS, 0)
  return MeanLoss() if score is None else MeanLoss(score * num_steps, num_steps)


def score_in(description: Mapping[str, Any], every_steps: int) -> float | None:
  """Returns the score by which a checkpoint may be among the best; older ones have none.

  The mean over fewer steps, as when a signal has stopped the run, would win by its noise.

  Args:
    description: of the checkpoint.
    every_steps: steps between two checkpoints, if its own config does not say it.
  """
  every_steps = description.get('config', {}).get('checkpoint', {}).get('every_steps', every_steps)
  return description.get(SCORE) if description.get(SCORE_STEPS, 0) >= every_steps else None


@dataclasses.dataclass(frozen=True)
class _Best:
  """Keeps the `n` checkpoints of the lowest scores, which are read anew at each decision."""

  n: int
  scores: Mapping[int, float | None]

  def should_preserve(
    self,
    checkpoints: Sequence[Any],
    *,
    context: orbax.PreservationContext,
  ) -> Sequence[bool]:
    """Answers orbax."""
    scored = [dataclasses.replace(each, metrics=self.scores.get(each.step)) for each in checkpoints]
    best = orbax.BestN(
      get_metric_fn=float, reverse=True, n=self.n, keep_checkpoints_without_metrics=False
    )
    return best.should_preserve(scored, context=context)


def policy(
  *, last: int, every: int, best: int, scores: Mapping[int, float | None]
) -> orbax.AnyPreservationPolicy:
  """Returns what orbax asks which checkpoints to keep: those that any of three reasons keeps.

  Args:
    last: how many of the newest.
    every: those at multiples of so many steps; 0 is no reason.
    best: how many of the lowest scores; 0 is no reason.
    scores: by step, as they are at the time that orbax asks.
  """
  reasons: list[Any] = [orbax.LatestN(last)]
  if every:
    reasons.append(orbax.EveryNSteps(every))
  if best:
    reasons.append(_Best(best, scores))
  return orbax.AnyPreservationPolicy(reasons)
