"""OTB-2015 (OTB-100), and its subsets OTB-2013 and OTB-50, which differ in the sequences present.

  ROOT/NAME/img/0001.jpg, ...
  ROOT/NAME/groundtruth_rect.txt           x,y,w,h between commas, tabs or spaces
  ROOT/Jogging/groundtruth_rect.{1,2}.txt  two targets: two sequences, Jogging.1 and Jogging.2

Of five sequences only a part is annotated, and one has an empty file of boxes beside the real one.
Tiger1 is tracked from its sixth frame, as by OTB's own toolkit and the published tracker's; the
GOT-10k toolkit begins with the first, and so cannot read the results of this one sequence.
"""

import pathlib
import re

from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking.sequences import sequence as common
from dropmae_jax.tracking.sequences.sequence import AGAIN, Sequence

# First and last annotated frame, from 1, where it is not all of them (the benchmark's web page).
ANNOTATED = {
  'David': (300, 770),
  'Diving': (1, 215),
  'Football1': (1, 74),
  'Freeman3': (1, 460),
  'Freeman4': (1, 283),
}
SKIPPED = {'Tiger1': 5}
TRUTH = re.compile(r'groundtruth_rect(?:\.(\d+))?\.txt')


def open_split(root: pathlib.Path, split: str | None = None) -> list[Sequence]:
  """Opens all sequences of a folder, ordered by name.

  Raises:
    UserError: there are none, or their files do not fit together.
  """
  if split is not None:
    raise UserError(
      f'--split={split} does not go with OTB, whose subsets are folders; leave it out.'
    )
  found = []
  for name in common.folder_names(root):
    if (root / name).is_dir():
      files = [file for file in common.folder_names(root / name) if TRUTH.fullmatch(file)]
      files = [file for file in files if common.read_text(root / name / file).strip()]
      found += [_open_sequence(root / name, file, len(files) == 1) for file in files]
  if not found:
    raise UserError(
      f'--root={root} has no NAME/groundtruth_rect.txt; give the folder that holds the folders of'
      ' the sequences.'
    )
  return found


def _open_sequence(folder: pathlib.Path, file: str, is_only: bool) -> Sequence:
  """Opens a sequence; the names of results with several targets are those of known toolkits."""
  boxes = common.read_boxes(folder / file)
  frames = common.all_frames(folder / 'img')
  if len(frames) != len(boxes) and folder.name in ANNOTATED:
    first, last = ANNOTATED[folder.name]
    frames = frames[first - 1 : last]
  if len(frames) != len(boxes):
    raise UserError(
      f'{folder} has {len(frames)} frames with a box, and {file} {len(boxes)} boxes; {AGAIN}.'
    )
  skipped = SKIPPED.get(folder.name, 0)
  target = TRUTH.fullmatch(file)[1]
  names = [f'{folder.name}{sign}{target}' for sign in '._-'] if target else []
  name, *aliases = [folder.name, *names] if is_only else names or [folder.name]
  return common.check(
    Sequence(name, folder / 'img', frames[skipped:], boxes[skipped:], aliases=tuple(aliases))
  )
