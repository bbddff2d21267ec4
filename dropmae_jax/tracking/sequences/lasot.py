"""LaSOT: a folder for each class. LaSOText has the same layout, other classes and no splits.

  ROOT/CLASS/CLASS-N/img/00000001.jpg, ...
  ROOT/CLASS/CLASS-N/groundtruth.txt        x,y,w,h a line
  ROOT/CLASS/CLASS-N/full_occlusion.txt     one line of 0 and 1 between commas
  ROOT/CLASS/CLASS-N/out_of_view.txt        likewise
  ROOT/testing_set.txt                      one name a line; not in every download

Some downloads have a frame more than boxes; it is left out, as by the official toolkit.
"""

import pathlib

import numpy as np

from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking.sequences import sequence as common
from dropmae_jax.tracking.sequences.sequence import Sequence

LISTS = {'test': 'testing_set.txt', 'train': 'training_set.txt'}
# The 280 sequences of protocol II's testing set: of each class, their numbers.
TEST = """
  airplane 1 9 13 15, basketball 1 6 7 11, bear 2 4 6 17, bicycle 2 7 9 18, bird 2 3 15 17,
  boat 3 4 12 17, book 3 10 11 19, bottle 1 12 14 18, bus 2 5 17 19, car 2 6 9 17, cat 1 3 18 20,
  cattle 2 7 12 13, chameleon 3 6 11 20, coin 3 6 7 18, crab 3 6 12 18, crocodile 3 4 10 14,
  cup 1 4 7 17, deer 4 8 10 14, dog 1 7 15 19, drone 2 7 13 15, electricfan 1 10 18 20,
  elephant 1 12 16 18, flag 2 3 5 9, fox 2 3 5 20, frog 3 4 9 20, gametarget 1 2 7 13,
  gecko 1 5 16 19, giraffe 2 10 13 15, goldfish 3 7 8 10, gorilla 4 6 9 13, guitar 3 8 10 16,
  hand 2 3 9 16, hat 1 2 5 18, helmet 5 11 13 19, hippo 1 7 9 20, horse 1 4 12 15,
  kangaroo 2 5 11 14, kite 4 6 10 15, leopard 1 7 16 20, licenseplate 6 12 13 15, lion 1 5 12 20,
  lizard 1 3 6 13, microphone 2 6 14 16, monkey 3 4 9 17, motorcycle 1 3 9 18, mouse 1 8 9 17,
  person 1 5 10 12, pig 2 10 13 18, pool 3 7 12 15, rabbit 10 13 17 19, racing 10 15 16 20,
  robot 1 5 8 19, rubicCube 1 6 14 19, sepia 6 8 13 16, shark 2 3 5 6, sheep 3 5 7 9,
  skateboard 3 8 16 19, spider 14 16 18 20, squirrel 8 11 13 19, surfboard 4 5 8 12,
  swing 10 14 17 20, tank 6 9 14 16, tiger 4 6 12 18, train 1 7 11 20, truck 3 6 7 16,
  turtle 5 8 9 16, umbrella 2 9 17 19, volleyball 1 13 18 19, yoyo 7 15 17 19, zebra 10 14 16 17
"""


def open_split(root: pathlib.Path, split: str | None = None) -> list[Sequence]:
  """Opens the sequences of a set of LaSOT's protocol II.

  Args:
    root: the folder with a folder for each class.
    split: 'test' (default), 'train', or 'all' that are there. Where the data set comes without its
      lists, those for training are all that are not for testing.

  Raises:
    UserError: the data set is not complete, or damaged.
  """
  split = split or 'test'
  if split not in (*LISTS, 'all'):
    raise UserError(f'--split={split} is no split of LaSOT; give test, train or all.')
  present = _present(root)
  names = present
  if split in LISTS and (root / LISTS[split]).is_file():
    names = common.read_names(root / LISTS[split])
  elif split == 'test':
    names = test_names()
  elif split == 'train':
    names = [name for name in present if name not in set(test_names())]
  absent = [name for name in names if name not in set(present)]
  if absent:
    raise UserError(
      f'--root={root} lacks {len(absent)} of the {len(names)} sequences of LaSOT for {split}, such'
      f' as {_folder(root, absent[0])}; complete the data set, or give --split=all for those that'
      ' are there.'
    )
  return [_open_sequence(_folder(root, name)) for name in names]


def open_extension(root: pathlib.Path, split: str | None = None) -> list[Sequence]:
  """Opens LaSOText, all of which is for testing.

  Raises:
    UserError: the data set is damaged, or there is none.
  """
  if split is not None:
    raise UserError(f'--split={split} does not go with LaSOText, which has none; leave it out.')
  return open_split(root, 'all')


def test_names() -> list[str]:
  """Returns the names of the 280 sequences for testing, ordered by class and number."""
  classes = [entry.split() for entry in TEST.split(',')]
  return [f'{name}-{number}' for name, *numbers in classes for number in numbers]


def _folder(root: pathlib.Path, name: str) -> pathlib.Path:
  return root / name.rpartition('-')[0] / name


def _present(root: pathlib.Path) -> list[str]:
  """Returns the names of the sequences that are there."""
  names = [
    name
    for each in common.folder_names(root)
    if (root / each).is_dir()
    for name in common.folder_names(root / each)
    if name.rpartition('-')[0] == each and (root / each / name).is_dir()
  ]
  if not names:
    raise UserError(
      f'--root={root} has no CLASS/CLASS-1, such as airplane/airplane-1; give the folder that holds'
      ' the folders of the classes.'
    )
  return sorted(names, key=common.in_order)


def _open_sequence(folder: pathlib.Path) -> Sequence:
  boxes = common.read_boxes(folder / 'groundtruth.txt')
  is_hidden, is_outside = (
    common.read_labels(folder / f'{name}.txt', len(boxes))
    for name in ('full_occlusion', 'out_of_view')
  )
  images = folder / 'img'
  frames = common.numbered_frames(images, first=1, digits=8, num_frames=len(boxes))
  in_view = np.equal(is_hidden, 0) & np.equal(is_outside, 0)
  return common.check(Sequence(folder.name, images, frames, boxes, in_view=in_view))
