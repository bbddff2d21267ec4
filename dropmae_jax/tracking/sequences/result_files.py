"""Files of tracking results, in the layout that the toolkit of each benchmark reads.

  got10k                 FOLDER/NAME/NAME_001.txt and FOLDER/NAME/NAME_time.txt
  all other benchmarks   FOLDER/NAME.txt          and FOLDER/times/NAME_time.txt

The first holds the box of each frame as x,y,w,h, the second the seconds that it took.
"""

import pathlib
import re
import zipfile

import numpy as np
from jaxtyping import Float

from dropmae_jax.runtime import atomic_file
from dropmae_jax.runtime.errors import UserError, os_errors_as_user_errors
from dropmae_jax.tracking.sequences import sequence as common
from dropmae_jax.tracking.sequences.sequence import Sequence

# Benchmarks with a server that takes archives, and whether its archive has the times too.
ARCHIVES = {'got10k': True, 'trackingnet': False}
# Published results of some sequences have more lines than there are boxes; the official toolkit and
# the published tracker's leave them out.
MAY_BE_LONGER = 'lasot', 'lasot_ext'


def paths(benchmark: str, folder: pathlib.Path, name: str) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns the paths of the boxes and of the times of a sequence."""
  if benchmark == 'got10k':
    return folder / name / f'{name}_001.txt', folder / name / f'{name}_time.txt'
  return folder / f'{name}.txt', folder / 'times' / f'{name}_time.txt'


def write(
  benchmark: str,
  folder: pathlib.Path,
  sequence: Sequence,
  boxes: Float[np.ndarray, 'n 4'],
  seconds: Float[np.ndarray, ' n'],
  *,
  whole_pixels: bool = True,
) -> None:
  """Writes the results of a sequence; its file of boxes appears last, when all is written.

  Args:
    benchmark: a name in `benchmarks.BENCHMARKS`.
    folder: of the results of all sequences; is made.
    sequence: that was tracked.
    boxes: of all frames, in pixels; the first one is given.
    seconds: that each frame took.
    whole_pixels: cut the numbers towards zero, as the published tracker does; otherwise they have
      three decimals, as in files of the GOT-10k toolkit.

  Raises:
    UserError: a file cannot be written.
  """
  if boxes.shape != (sequence.num_frames, 4) or len(seconds) != sequence.num_frames:
    raise ValueError(f'{boxes.shape=} {seconds.shape=} {sequence.num_frames=}')
  box_path, time_path = paths(benchmark, folder, sequence.name)
  for path, text in (
    (time_path, ''.join(f'{value:.8f}\n' for value in seconds)),
    (box_path, _lines(boxes, whole_pixels)),
  ):
    with os_errors_as_user_errors(f'{path} cannot be written', 'give another --output.'):
      path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file.staged(path, num_bytes=len(text), has_card=False) as partial:
      partial.write_text(text)


def _lines(boxes: Float[np.ndarray, 'n 4'], whole_pixels: bool) -> str:
  numbers = np.trunc(boxes) + 0.0 if whole_pixels else boxes  # + 0.0: without the sign of -0.
  form = '{:.0f}' if whole_pixels else '{:.3f}'
  return ''.join(','.join(map(form.format, box)) + '\n' for box in numbers)


def is_written(benchmark: str, folder: pathlib.Path, sequence: Sequence) -> bool:
  """Whether the results of a sequence are there, whole and of so many frames."""
  boxes, times = paths(benchmark, folder, sequence.name)
  if not (boxes.is_file() and times.is_file()):
    return False
  try:
    _read_file(benchmark, boxes, sequence)
  except UserError:
    return False
  return True


def read(
  benchmark: str, folder: pathlib.Path, sequence: Sequence
) -> list[Float[np.ndarray, 'n 4']]:
  """Reads the boxes of a sequence, of this or any other tracker.

  GOT-10k's toolkit repeats a tracker that is not deterministic; each repetition is another array.

  Raises:
    UserError: there are none, they are damaged, or not of this sequence.
  """
  return [_read_file(benchmark, path, sequence) for path in _find(benchmark, folder, sequence)]


def _find(benchmark: str, folder: pathlib.Path, sequence: Sequence) -> list[pathlib.Path]:
  """Returns the file of boxes, or those of all repetitions."""
  names = [sequence.name, *sequence.aliases]
  # The published tracker keeps results of GOT-10k like those of others until they are submitted.
  files = [path for name in names if (path := folder / f'{name}.txt').is_file()][:1]
  inside = folder / sequence.name
  if benchmark == 'got10k' and inside.is_dir():
    pattern = re.compile(re.escape(sequence.name) + r'_\d+\.txt')
    files = [inside / name for name in common.folder_names(inside) if pattern.fullmatch(name)]
  if files:
    return files
  expected = paths(benchmark, folder, sequence.name)[0]
  if not folder.is_dir():
    raise UserError(f'{folder} is no folder; give the folder with the results of all sequences.')
  raise UserError(
    f'the results of sequence {sequence.name!r} are missing: there is no {expected}; track this'
    ' sequence, or give the folder of results of this data set.'
  )


def _read_file(benchmark: str, path: pathlib.Path, sequence: Sequence) -> Float[np.ndarray, 'n 4']:
  remedy = f'track sequence {sequence.name!r} again'
  boxes = common.read_boxes(path, remedy)
  is_bad = ~(boxes >= [-np.inf, -np.inf, 0, 0]).all(axis=1)
  if is_bad.any():
    row = int(is_bad.argmax())
    raise UserError(
      f'{path} has {common.in_words(boxes[row])} for frame {row + 1}, which is not a valid box;'
      f' {remedy}.'
    )
  if benchmark in MAY_BE_LONGER:
    boxes = boxes[: sequence.num_frames]
  if len(boxes) != sequence.num_frames:
    raise UserError(
      f'{path} has {len(boxes)} boxes, and sequence {sequence.name!r} {sequence.num_frames} frames;'
      f' {remedy}.'
    )
  return boxes


def make_archive(
  benchmark: str, folder: pathlib.Path, sequences: list[Sequence], archive: pathlib.Path
) -> None:
  """Writes the archive that the server of a benchmark takes: no folder around the results.

  Raises:
    UserError: the benchmark has no server, results are missing or damaged, or the archive cannot be
      written.
  """
  if benchmark not in ARCHIVES:
    raise UserError(
      f'there is no server for {benchmark} that takes an archive (for {", ".join(ARCHIVES)} there'
      ' is); score the results here.'
    )
  files: list[pathlib.Path] = []
  for sequence in sequences:
    read(benchmark, folder, sequence)
    boxes, times = paths(benchmark, folder, sequence.name)
    files += [boxes, times] if ARCHIVES[benchmark] else [boxes]
  missing = next((path for path in files if not path.is_file()), None)
  if missing:
    raise UserError(f'{missing} does not exist; track sequence {missing.parent.name!r} again.')
  with (
    atomic_file.staged(archive, num_bytes=0, has_card=False) as partial,
    zipfile.ZipFile(partial, 'w', zipfile.ZIP_DEFLATED) as writer,
  ):
    for path in files:
      writer.write(path, path.relative_to(folder))
