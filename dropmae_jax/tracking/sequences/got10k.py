"""GOT-10k: ROOT/val/list.txt names the sequences of a split; the truth of `test` is withheld.

ROOT/SPLIT/SEQ/00000001.jpg, ...
ROOT/SPLIT/SEQ/groundtruth.txt            x,y,w,h a line; `test`: of the first frame only
ROOT/SPLIT/SEQ/{absence,cover}.label      a number a line; not in `test`
ROOT/SPLIT/SEQ/meta_info.ini              with 'resolution: (W, H)'; not in `test`
"""

import pathlib
import re

import numpy as np

from dropmae_jax.runtime.errors import UserError, did_you_mean
from dropmae_jax.tracking.sequences import sequence as common
from dropmae_jax.tracking.sequences.sequence import AGAIN, Sequence

LIST = 'list.txt'
SPLITS = 'train', 'val', 'test'


def open_split(root: pathlib.Path, split: str | None = None) -> list[Sequence]:
  """Opens the sequences of a split.

  Args:
    root: the folder with train, val and test; or one of these, if split is None.
    split: 'train', 'val' or 'test', which is the default.

  Raises:
    UserError: the data set is not complete, or damaged.
  """
  if split not in (None, *SPLITS):
    raise UserError(f'--split={split} is no split of GOT-10k; {did_you_mean(split, SPLITS)}')
  folder = root if split is None and (root / LIST).is_file() else root / (split or 'test')
  if not (folder / LIST).is_file():
    raise UserError(
      f'{folder / LIST} does not exist; give the folder of GOT-10k with train, val and test as'
      ' --root, or download this list again.'
    )
  return [open_sequence(folder / name) for name in common.read_names(folder / LIST)]


def open_sequence(folder: pathlib.Path) -> Sequence:
  """Opens the sequence of a folder."""
  boxes = common.read_boxes(folder / 'groundtruth.txt')
  frames = common.numbered_frames(folder, first=1, digits=8)
  if len(boxes) == 1 < len(frames):
    return common.check(Sequence(folder.name, folder, frames, boxes))
  if len(boxes) != len(frames):
    raise UserError(f'{folder} has {len(frames)} frames and {len(boxes)} boxes; {AGAIN}.')
  absence, cover = (
    common.read_labels(folder / f'{name}.label', len(boxes)) for name in ('absence', 'cover')
  )
  return common.check(
    Sequence(
      folder.name,
      folder,
      frames,
      boxes,
      in_view=np.equal(absence, 0),
      cover=cover,
      size=_resolution(folder / 'meta_info.ini'),
    )
  )


def _resolution(path: pathlib.Path) -> tuple[int, int]:
  match = re.search(r'resolution: *\((\d+), *(\d+)\)', common.read_text(path))
  if not match:
    raise UserError(f"{path} has no line such as 'resolution: (1920, 1080)'; {AGAIN}.")
  return int(match[1]), int(match[2])
