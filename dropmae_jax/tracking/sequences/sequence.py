"""What a sequence to track is, and the files that all layouts share: frames, boxes, labels.

Boxes are (x, y, w, h) in pixels, x and y of the upper left corner, as in the files.
"""

import dataclasses
import pathlib
import re
import warnings

import numpy as np
from jaxtyping import Bool, Float64, Int, UInt8

from dropmae_jax.evaluation.datasets import benchmark
from dropmae_jax.runtime.errors import UserError, os_errors_as_user_errors

IMAGE_SUFFIXES = '.jpg', '.jpeg', '.png', '.bmp'
AGAIN = 'download the sequence again, or correct the file'


@dataclasses.dataclass(frozen=True)
class Sequence:
  """A video with the box of its target in the first frame; all axes n are of frames.

  Attributes:
    name: unique in its data set; the name of its results too.
    folder: of the images.
    frames: names of the images, in order.
    boxes: [n, 4] true boxes; [1, 4], the first one only, where the data set withholds the others.
      Later ones may be NaN or of zero size, where there is no target to see.
    in_view: by the labels of the data set; None if it has no labels.
    cover: GOT-10k's visible share of the target in eighths, 0 to 8.
    size: GOT-10k's (width, height) of the frames in pixels.
    aliases: other names that toolkits give to the results of this sequence.
  """

  name: str
  folder: pathlib.Path
  frames: tuple[str, ...]
  boxes: Float64[np.ndarray, 'n 4']
  in_view: Bool[np.ndarray, ' n'] | None = None
  cover: Int[np.ndarray, ' n'] | None = None
  size: tuple[int, int] | None = None
  aliases: tuple[str, ...] = ()

  @property
  def num_frames(self) -> int:
    """The number of frames."""
    return len(self.frames)

  @property
  def first_box(self) -> Float64[np.ndarray, '4']:
    """The box that tracking starts from."""
    return self.boxes[0]

  @property
  def is_withheld(self) -> bool:
    """Whether the true boxes are known in the first frame only."""
    return len(self.boxes) < self.num_frames

  @property
  def is_visible(self) -> Bool[np.ndarray, ' n']:
    """In which of the frames with a true box the target can be seen, by the box and the labels."""
    is_box = (self.boxes[:, 2:] > 0).all(axis=1)
    if self.in_view is not None:
      is_box &= self.in_view
    return is_box if self.cover is None else is_box & (self.cover > 0)

  def frame(self, number: int) -> UInt8[np.ndarray, 'h w c']:
    """Reads a frame as RGB.

    Raises:
      UserError: it is missing or damaged.
    """
    return benchmark.read_frame(self.folder / self.frames[number])


def check(sequence: Sequence) -> Sequence:
  """Returns a sequence after checking that it can be tracked.

  Raises:
    UserError: the first box is empty.
  """
  box = sequence.first_box
  if not np.isfinite(box).all() or (box[2:] <= 0).any():
    raise UserError(
      f'the first box of sequence {sequence.name!r} is {in_words(box)}, which holds nothing to'
      ' track; correct its ground truth, or remove the sequence.'
    )
  return sequence


def in_words(box: Float64[np.ndarray, '4']) -> str:
  """Returns a box as it stands in files."""
  return ','.join(f'{value:g}' for value in box)


def read_text(path: pathlib.Path, remedy: str = AGAIN) -> str:
  """Reads a text file.

  Raises:
    UserError: it is missing, or is no text.
  """
  with os_errors_as_user_errors(f'{path} cannot be read', remedy):
    try:
      return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
      raise UserError(f'{path} is not a text file; {remedy}.') from error


def read_boxes(path: pathlib.Path, remedy: str = AGAIN) -> Float64[np.ndarray, 'n 4']:
  """Reads one box a line: four numbers between commas, tabs or spaces.

  Raises:
    UserError: a line is something else, or there is none.
  """
  text = read_text(path, remedy).replace(',', ' ')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # An empty file is reported below.
    try:
      boxes = np.loadtxt(text.splitlines(), ndmin=2, comments=None)
    except ValueError:
      rows = [row for row in enumerate(text.splitlines(), 1) if row[1].strip()]
      boxes = np.array([_box(path, row, remedy) for row in rows])
  if not boxes.size:
    raise UserError(f'{path} holds no box; {remedy}.')
  if boxes.shape[1] != 4:
    raise UserError(
      f'{path} has {boxes.shape[1]} numbers a line, and not x,y,width,height; {remedy}.'
    )
  if np.isinf(boxes).any():
    raise UserError(f'{path} has an infinite number in it; {remedy}.')
  return boxes


def _box(path: pathlib.Path, row: tuple[int, str], remedy: str) -> list[float]:
  """Parses a line of a file in which at least one is bad."""
  number, line = row
  try:
    values = [float(word) for word in line.split()]
  except ValueError:
    values = []
  if len(values) != 4:
    raise UserError(
      f'{path} has {line[:80]!r} in line {number}, and not x,y,width,height; {remedy}.'
    )
  return values


def read_labels(path: pathlib.Path, num_frames: int) -> Int[np.ndarray, ' n']:
  """Reads one whole number for each frame, in lines or between commas.

  Raises:
    UserError: the file is missing, holds something else, or has another number of labels.
  """
  words = read_text(path).replace(',', ' ').split()
  labels = np.array([_label(path, word) for word in words], np.int64)
  if len(labels) != num_frames:
    raise UserError(
      f'{path} has {len(labels)} labels, and the sequence {num_frames} boxes; {AGAIN}.'
    )
  return labels


def _label(path: pathlib.Path, word: str) -> int:
  try:
    value = float(word)
    if value.is_integer():
      return int(value)
  except ValueError:
    pass
  raise UserError(f'{path} has {word[:40]!r} as a label, and not a whole number; {AGAIN}.')


def read_names(path: pathlib.Path) -> list[str]:
  """Reads a list of sequences, one name a line.

  Raises:
    UserError: it is missing, names none, one twice, or one that could not be a folder.
  """
  names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
  if not names:
    raise UserError(f'{path} names no sequence; download it again.')
  for name in names:
    if '/' in name or '\\' in name or name.startswith('.'):
      raise UserError(f'{path} has {name!r} as the name of a sequence; correct it.')
  if len(set(names)) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise UserError(f'{path} names {twice!r} twice; remove one of the lines.')
  return names


def numbered_frames(
  folder: pathlib.Path, *, first: int, digits: int, num_frames: int | None = None
) -> tuple[str, ...]:
  """Returns the names of the JPEGs of a folder that are called by their numbers, in order.

  Args:
    folder: of the frames; other files are left alone.
    first: number of the first frame.
    digits: numbers are filled with zeros to so many.
    num_frames: so many are returned, even if there are more; None: all.

  Raises:
    UserError: the folder is missing or has no frames, or a number is missing.
  """
  present = {name for name in folder_names(folder) if re.fullmatch(r'\d+\.jpg', name)}
  count = len(present) if num_frames is None else num_frames
  names = [f'{number:0{digits}d}.jpg' for number in range(first, first + count)]
  if not present:
    raise UserError(f'{folder} holds no frames such as {first:0{digits}d}.jpg; copy them again.')
  missing = next((name for name in names if name not in present), None)
  if missing:
    total = f'{len(present)} frames' if num_frames is None else f'{num_frames} boxes'
    raise UserError(f'{folder / missing} does not exist, and there are {total}; copy it again.')
  return tuple(names)


def all_frames(folder: pathlib.Path) -> tuple[str, ...]:
  """Returns the names of the images of a folder, in the order of the numbers in them.

  Raises:
    UserError: the folder is missing or holds no images.
  """
  names = [each for each in folder_names(folder) if each.lower().endswith(IMAGE_SUFFIXES)]
  if not names:
    raise UserError(
      f'{folder} holds no images ({", ".join(IMAGE_SUFFIXES)}); copy the frames there.'
    )
  return tuple(sorted(names, key=in_order))


def in_order(name: str) -> list[tuple[int, str]]:
  """Returns a key that sorts frame9 before frame10."""
  parts = re.split(r'(\d+)', name)
  return [(int(part), '') if index % 2 else (0, part) for index, part in enumerate(parts)]


def folder_names(folder: pathlib.Path) -> list[str]:
  """Returns the names in a folder, without hidden ones, such as those that macOS leaves.

  Raises:
    UserError: it is missing, or cannot be read.
  """
  with os_errors_as_user_errors(f'{folder} cannot be read', 'complete the data set.'):
    return sorted(each.name for each in folder.iterdir() if not each.name.startswith('.'))
