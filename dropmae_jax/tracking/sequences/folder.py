"""Videos of your own: a folder of images and a groundtruth.txt for each, or one such folder.

  ROOT/NAME/groundtruth.txt       x,y,w,h a line, between commas, tabs or spaces
  ROOT/NAME/frame1.jpg, ...       or ROOT/NAME/img/frame1.jpg, ...

The frames are all images, in the order of the numbers in their names. A single box is that of the
first frame: enough for tracking, but not for scores.
"""

import os
import pathlib

from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking.sequences import sequence as common
from dropmae_jax.tracking.sequences.sequence import Sequence

TRUTH = 'groundtruth.txt'


def open_split(root: pathlib.Path, split: str | None = None) -> list[Sequence]:
  """Opens all sequences of a folder.

  Raises:
    UserError: there are none, or their files do not fit together.
  """
  if split is not None:
    raise UserError(f'--split={split} does not go with folders of videos; leave it out.')
  if (root / TRUTH).is_file():
    return [_open_sequence(root)]
  names = [name for name in common.folder_names(root) if (root / name / TRUTH).is_file()]
  if not names:
    raise UserError(
      f'--root={root} has no NAME/{TRUTH}; give a folder that holds one folder of images and'
      f' {TRUTH} for each video.'
    )
  return [_open_sequence(root / name) for name in sorted(names, key=common.in_order)]


def _open_sequence(folder: pathlib.Path) -> Sequence:
  boxes = common.read_boxes(folder / TRUTH, 'correct the file')
  images = folder / 'img' if (folder / 'img').is_dir() else folder
  frames = common.all_frames(images)
  if len(boxes) not in (1, len(frames)):
    raise UserError(
      f'{folder} has {len(frames)} images, and {TRUTH} {len(boxes)} boxes; give one box for each'
      ' image, or that of the first image only.'
    )
  return common.check(Sequence(os.path.basename(os.path.abspath(folder)), images, frames, boxes))
