"""TrackingNet: frames and boxes lie in separate folders; the truth of TEST is withheld.

  ROOT/TEST/frames/NAME/0.jpg, 1.jpg, ...
  ROOT/TEST/anno/NAME.txt                 x,y,w,h a line; TEST: of the first frame only

TRAIN_0 to TRAIN_11 have this layout too.
"""

import pathlib

from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking.sequences import sequence as common
from dropmae_jax.tracking.sequences.sequence import AGAIN, Sequence


def open_split(root: pathlib.Path, split: str | None = None) -> list[Sequence]:
  """Opens the sequences of a split.

  Args:
    root: the folder with TEST, TRAIN_0 and so on; or one of these, if split is None.
    split: such as 'TRAIN_0'; default: 'TEST'.

  Raises:
    UserError: the data set is not complete, or damaged.
  """
  folder = root if split is None and (root / 'anno').is_dir() else root / (split or 'TEST')
  if not (folder / 'anno').is_dir():
    raise UserError(
      f'{folder / "anno"} does not exist; give the folder of TrackingNet with TEST and TRAIN_0 as'
      ' --root, and one of these names as --split.'
    )
  files = [name for name in common.folder_names(folder / 'anno') if name.endswith('.txt')]
  if not files:
    raise UserError(f'{folder / "anno"} holds no NAME.txt; download the annotations again.')
  return [_open_sequence(folder, name.removesuffix('.txt')) for name in files]


def _open_sequence(folder: pathlib.Path, name: str) -> Sequence:
  boxes = common.read_boxes(folder / 'anno' / f'{name}.txt')
  images = folder / 'frames' / name
  frames = common.numbered_frames(images, first=0, digits=1)
  if len(boxes) not in (1, len(frames)):
    raise UserError(
      f'{images} has {len(frames)} frames, and there are {len(boxes)} boxes; {AGAIN}.'
    )
  return common.check(Sequence(name, images, frames, boxes))
