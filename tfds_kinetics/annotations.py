"""Reads what file names and annotation files say about the clips of Kinetics.

A clip is named by its YouTube id, mostly followed by its start and end in seconds:
`<id>_000012_000022.mp4`.
"""

import csv
import os
import pathlib
import re
from collections.abc import Iterator

from tfds_kinetics.configs import SPLITS
from tfds_kinetics.messages import BadInput

CLIP_NAME = re.compile(r'(?P<id>[\w-]{11})(_(?P<start>\d+)_(?P<end>\d+))?', re.ASCII)
# YouTube id, start and end in seconds; clips without times are identified by the id alone.
ClipKey = tuple[str, int | None, int | None]
COLUMNS = {'youtube_id', 'time_start', 'time_end'}


def clip_key(path: str) -> ClipKey | None:
  """Reads YouTube id, start and end in seconds from a clip's name."""
  match = CLIP_NAME.fullmatch(os.path.splitext(os.path.basename(path))[0])
  if match is None:
    return None
  start, end = match['start'], match['end']
  return match['id'], int(start) if start else None, int(end) if end else None


def annotation_files(
  root: pathlib.Path, annotations: pathlib.Path | None = None
) -> dict[str, pathlib.Path]:
  """Finds the annotation file of every split: the one whose name matches the split best.

  A candidate is a .csv or .txt file with the split's name as a word of its own name. Mirrors put
  other files beside and below these, so a candidate must have the columns. A .csv file directly in
  the folder is taken without them, so that the user is told what is wrong with it.

  Args:
    root: of the video tree; searched are the folder itself and all of its folder `annotations`.
    annotations: the only folder to search, if given.

  Raises:
    BadInput: `annotations` is not a folder, or has no such file.
  """
  if annotations is not None and not annotations.is_dir():
    raise BadInput(f'--annotations={annotations} is not a folder; give that of the csv files.')
  places = [annotations] if annotations else [root / 'annotations', root]
  ranked = sorted(
    (not has_columns, number, path.stem not in SPLITS, len(path.parts), len(path.name), path)
    for number, place in enumerate(places)
    for path in (place.glob('*') if place == root else place.rglob('*'))
    if path.suffix in ('.csv', '.txt') and path.is_file()
    for has_columns in [_columns(path) >= COLUMNS]
    if has_columns or (path.suffix == '.csv' and path.parent == place)
  )
  files: dict[str, pathlib.Path] = {}
  for *_, path in ranked:
    for word in re.split(r'[\W_]+', path.stem):
      if word in SPLITS:
        files.setdefault(SPLITS[word], path)
  if annotations is not None and not files:
    raise BadInput(
      f'--annotations={annotations} holds no train.csv, val.csv or the like; give the folder of'
      ' the official csv files.'
    )
  return files


def _columns(path: pathlib.Path) -> set[str]:
  try:
    with path.open(newline='', encoding='utf-8-sig') as file:
      return set(next(csv.reader(file), []))
  except (OSError, UnicodeDecodeError, csv.Error):
    return set()


def read_annotations(path: pathlib.Path) -> dict[ClipKey, str]:
  """Reads the class of every clip from an official csv file; empty where a test split has none.

  Raises:
    BadInput: the file cannot be read, or lacks a column.
  """
  try:
    with path.open(newline='', encoding='utf-8-sig') as file:
      rows = csv.DictReader(file)
      columns = rows.fieldnames or []
      lacking = COLUMNS - set(columns)
      if lacking:
        raise BadInput(
          f'{path} lacks the columns {", ".join(sorted(lacking))} (it has'
          f' {", ".join(columns) or "none"}); give the official csv files, or remove it.'
        )
      return {
        (row['youtube_id'], int(float(row['time_start'])), int(float(row['time_end']))): (
          row.get('label') or ''
        )
        for row in rows
      }
  except (OSError, UnicodeDecodeError, csv.Error, TypeError, ValueError, OverflowError) as error:
    if isinstance(error, BadInput):
      raise
    raise BadInput(
      f'{path} cannot be read as annotations ({error}); give the official csv files, or remove it.'
    ) from error


def missing_clips(annotated: dict[ClipKey, str], there: set[ClipKey | str]) -> Iterator[str]:
  """Yields the names of the clips that are annotated but have no file."""
  for youtube_id, start, end in annotated:
    if (youtube_id, start, end) not in there and (youtube_id, None, None) not in there:
      yield f'{youtube_id}_{start:06d}_{end:06d}'
