"""Draws sequences, and a template and a search frame of each, from the published distribution.

Pure functions of uniform draws. As in OSTrack (botaoye/OSTrack at 33b5e12): the template is always
the earlier frame, and the search frame follows it by less than MAX_GAP.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from dropmae_jax.data.augment import Uniform

# The search frame is at most this minus 1 later, unless the target is in none of those frames.
MAX_GAP = 200
# By how much the gap grows each time that no frame is within it.
GAP_GROWTH = 5
# What a sequence needs: frames, and more than so many in which the target is visible.
LEAST_FRAMES, FEW_VISIBLE = 20, 4


def sequence_accepted(visible: Bool[np.ndarray, ' n']) -> bool:
  """Whether a sequence is trained on.

  Args:
    visible: whether the target is, in each frame.
  """
  return len(visible) >= LEAST_FRAMES and int(np.count_nonzero(visible)) > FEW_VISIBLE


def draw_sequence(
  uniform: Uniform, num_sequences: Sequence[int], weights: Sequence[float] | None = None
) -> tuple[int, int]:
  """Draws a dataset by its weight, and one of its sequences uniformly, with replacement.

  Args:
    uniform: called twice.
    num_sequences: of each dataset, accepted ones only; more than 0.
    weights: of the datasets, above 0; by default all are alike.

  Returns:
    the numbers of dataset and sequence.
  """
  bounds = np.cumsum(np.ones(len(num_sequences)) if weights is None else weights)
  # The product may round up to the last bound.
  dataset = np.searchsorted(bounds[:-1], uniform() * bounds[-1], side='right')
  return int(dataset), int(uniform() * num_sequences[dataset])


def draw_frames(
  uniform: Uniform, visible: Bool[np.ndarray, ' n'], *, max_gap: int = MAX_GAP
) -> tuple[int, int]:
  """Draws a template and a search frame of a sequence; the target is visible in both.

  The template is uniform over the frames but the last, the search frame uniform over those after it
  within the gap. If there is none, the gap grows by GAP_GROWTH, and both are drawn again.

  Args:
    uniform: called twice per attempt.
    visible: whether the target is, in each frame; in two at least.
    max_gap: the search frame is less than this later.
  """
  frames = np.flatnonzero(visible)
  num_templates = len(frames) - int(visible[-1])
  while True:
    first = int(uniform() * num_templates)
    end = np.searchsorted(frames, frames[first] + max_gap)
    num_choices = int(end) - first - 1
    second = uniform()
    if num_choices > 0:
      return int(frames[first]), int(frames[first + 1 + int(second * num_choices)])
    max_gap += GAP_GROWTH
