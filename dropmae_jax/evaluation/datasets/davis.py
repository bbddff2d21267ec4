"""DAVIS-2017: the objects of the first frame are followed through a sequence; J, F and J&F.

  ROOT/ImageSets/2017/val.txt                one name a line
  ROOT/JPEGImages/480p/NAME/00000.jpg, ...
  ROOT/Annotations/480p/NAME/00000.png, ...  object numbers; 0 and 255 are background

Clips of `dropmae-clips` have this layout too. Results are NAME/00000.png, ..., as the official
evaluation reads them.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dropmae_jax.evaluation.datasets import measures
from dropmae_jax.evaluation.datasets.benchmark import Clip
from dropmae_jax.evaluation.datasets.mask_benchmark import MaskBenchmark
from dropmae_jax.runtime.errors import UserError, check_name

# Sizes that frames and masks have: their own, or (height, width).
SCALES: Mapping[str, tuple[int, int] | None] = {'native': None, '480x880': (480, 880)}


class Davis(MaskBenchmark):
  """DAVIS-2017, semi-supervised.

  The official evaluation scores at the native size. CropMAE and RSP score copies of DAVIS that were
  resized to 480 x 880, where F has another tolerance: `scale='480x880'` repeats that with frames
  resized bilinearly and masks by Pillow's nearest. How the frames of their copies were made differs
  (RSP: nearest, saved as JPEG again) or is not known (CropMAE).

  Attributes:
    names: of the sequences.
  """

  benchmark = 'davis'
  highest_label = measures.VOID - 1
  fewest_frames = 3  # The first and the last one are not scored.

  def __init__(self, root: pathlib.Path, *, split: str = 'val', scale: str = 'native') -> None:
    """Reads the list of sequences.

    Args:
      root: the folder that holds ImageSets, JPEGImages and Annotations.
      split: name of the list in ImageSets/2017.
      scale: a name in SCALES.

    Raises:
      UserError: the list is missing or empty, or a sequence of it is missing.
    """
    check_name('--scale', scale, SCALES)
    super().__init__(
      root,
      list_file=f'ImageSets/2017/{split}.txt',
      frame_folder='JPEGImages/480p',
      mask_folder='Annotations/480p',
      size=SCALES[scale],
    )

  def open(self, name: str) -> Clip:
    """Opens a sequence and checks its files.

    Raises:
      UserError: files are missing or do not fit together, or the first mask shows no object.
    """
    clip = super().open(name)
    if not measures.num_objects(clip.truth.mask(0)):
      path = self.mask_folder / name / f'{clip.truth.frames[0]}.png'
      raise UserError(f'{path} shows no object to follow; remove {name!r} from {self.list_file}.')
    return clip

  def score(self, clip: Clip, results: list[np.ndarray]) -> dict[str, list[list[float]]]:
    """Returns mean, recall and decay of 'J' and 'F' for each object.

    Raises:
      UserError: a result has another size than the truth, or objects that the truth has not.
    """
    truths = [clip.truth.mask(number) for number in range(clip.num_frames)]
    highest = measures.num_objects(truths[0])
    for frame, result in zip(clip.truth.frames, results, strict=True):
      if result.shape != clip.size or result.max() > highest:
        raise UserError(
          f'the result of frame {frame} of {clip.name!r} has the shape {result.shape} and objects'
          f' up to {result.max()}, but the truth {clip.size} and {highest}; remove the results of'
          ' this sequence so that they are computed again.'
        )
    scored = measures.object_measures(truths, results)
    return {
      'J': [list(measures.statistics(values)) for values in scored.region],
      'F': [list(measures.statistics(values)) for values in scored.boundary],
    }

  def table(self, scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns 'J&F', 'J' and 'F' of each sequence, means over its objects in percent."""
    table = {}
    for name, score in scores.items():
      region, boundary = (100 * float(np.mean(score[key], axis=0)[0]) for key in ('J', 'F'))
      table[name] = {'J&F': (region + boundary) / 2, 'J': region, 'F': boundary}
    return table

  def summarise(self, scores: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of the official evaluation in percent, means over all objects.

    They are 'J&F', 'J_mean', 'J_recall', 'J_decay', 'F_mean', 'F_recall' and 'F_decay'.
    """
    region, boundary = (
      np.concatenate([score[key] for score in scores.values()], dtype=np.float64)
      for key in ('J', 'F')
    )
    numbers = measures.summarise_objects(region, boundary)
    return {name: 100 * value for name, value in numbers.items()}
