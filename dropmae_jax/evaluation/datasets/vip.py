"""VIP, Video Instance-level Parsing: parts of people and clothes; mIoU of 20 classes.

  ROOT/lists/val_videos.txt                               one name a line, such as videos338
  ROOT/Images/NAME/000000000001.jpg, ...
  ROOT/Annotations/Category_ids/NAME/000000000001.png     a class 0..19; 0 is background

This is the archive VIP_Fine as the evaluations of UVC, videowalk and CropMAE read it. Not verified
on the data itself: that every frame in Images has a mask, that masks are grey or palette PNGs of
the size of their frame, and that no mask has other classes. What differs is an error that says so,
but for other classes: they are background in the first mask and are not scored elsewhere.

Results are NAME/000000000001.png in grey. The evaluation of UVC and that of videowalk read them;
that of CropMAE wants NAME/000000000001_mask.png.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from dropmae_jax.evaluation.datasets import measures
from dropmae_jax.evaluation.datasets.benchmark import Clip
from dropmae_jax.evaluation.datasets.mask_benchmark import MaskBenchmark
from dropmae_jax.evaluation.protocols import resize_nearest
from dropmae_jax.runtime.errors import UserError


class Vip(MaskBenchmark):
  """VIP, with the mask of the first frame given.

  Attributes:
    names: of the videos.
  """

  benchmark = 'vip'
  highest_label = measures.NUM_CLASSES - 1
  fewest_frames = 2

  def __init__(self, root: pathlib.Path, *, split: str = 'val') -> None:
    """Reads the list of videos.

    Args:
      root: the folder that holds lists, Images and Annotations.
      split: `lists` holds SPLIT_videos.txt.

    Raises:
      UserError: the list is missing or empty, or a video of it is missing.
    """
    super().__init__(
      root,
      list_file=f'lists/{split}_videos.txt',
      frame_folder='Images',
      mask_folder='Annotations/Category_ids',
    )

  def write(self, clip: Clip, results: list[np.ndarray], folder: pathlib.Path) -> None:
    """Writes the masks of all frames as grey PNGs with the names of the frames.

    Evaluations read them with OpenCV, which turns the numbers of a palette PNG into colours.
    """
    for frame, result in zip(clip.truth.frames, results, strict=True):
      Image.fromarray(result).save(folder / f'{frame}.png')

  def score(self, clip: Clip, results: list[np.ndarray]) -> dict[str, list[list[int]]]:
    """Returns the 'confusion' matrix of all frames, the first included: rows are true classes.

    Results of another size are resized to that of the truth by Pillow's nearest.

    Raises:
      UserError: a result has a class that VIP has not.
    """
    confusion = np.zeros((measures.NUM_CLASSES, measures.NUM_CLASSES), np.int64)
    for number, (frame, result) in enumerate(zip(clip.truth.frames, results, strict=True)):
      if result.max() > self.highest_label:
        raise UserError(
          f'the result of frame {frame} of {clip.name!r} has the class {result.max()}, but VIP has'
          f' classes up to {self.highest_label}; remove the results of this video so that they are'
          ' computed again.'
        )
      truth = clip.truth.mask(number)
      if result.shape != truth.shape:
        result = resize_nearest(result, truth.shape)
      confusion += measures.confusion_matrix(truth, result)
    return {'confusion': confusion.tolist()}

  def table(self, scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the 'mIoU' of each video in percent; that of the data set is not their mean."""
    return {
      name: {'mIoU': 100 * float(np.nanmean(measures.class_ious(np.array(score['confusion']))))}
      for name, score in scores.items()
    }

  def summarise(self, scores: Mapping[str, Any]) -> dict[str, float]:
    """Returns 'mIoU' over the pixels of all videos, and the 'IoU_<class>' it is the mean of.

    In percent. Classes have numbers, as the published lists of their names contradict each other.
    """
    confusion = np.sum([score['confusion'] for score in scores.values()], axis=0)
    ious = 100 * measures.class_ious(confusion)
    return {
      'mIoU': float(np.nanmean(ious)),
      **{f'IoU_{number}': float(iou) for number, iou in enumerate(ious) if not np.isnan(iou)},
    }
