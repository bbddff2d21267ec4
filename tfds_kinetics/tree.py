"""First stop: the videos of a folder tree, with what their names and annotations say of them.

Kinetics lies about in several forms: `train/<class>/<clip>.mp4`, `train/<clip>.mp4` beside the
official csv files, folders called `train_256` or `videos_val`. A clip is named after its YouTube
id, mostly followed by the seconds of its start and end: `<id>_000012_000022.mp4`.
"""

import csv
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

from tfds_kinetics.configs import SPLITS, VIDEO_SUFFIXES, VideoCollection
from tfds_kinetics.messages import BadInput

CLIP_NAME = re.compile(r'(?P<id>[\w-]{11})(_(?P<start>\d+)_(?P<end>\d+))?', re.ASCII)
# Clips without times are told apart by their YouTube id alone.
ClipKey = tuple[str, int | None, int | None]


@dataclasses.dataclass(frozen=True)
class Video:
  """A video of the collection.

  Attributes:
    path: below the root.
    label: name of its class; empty where none is known.
    size: in bytes; -1 where there is none to be had, as of a link that leads nowhere.
    youtube_id: of the video that a Kinetics clip was cut from; empty for other collections.
  """

  path: str
  label: str
  size: int
  youtube_id: str = ''


@dataclasses.dataclass
class Listing:
  """What was found below a root.

  Attributes:
    videos: of each split, sorted by path.
    left_out: [split, path, reason] of what is no video, or the same clip as another.
    missing: of each split that has annotations, the names of the clips that are not there.
    outside: how many videos are in the folder of no split.
  """

  videos: dict[str, list[Video]] = dataclasses.field(default_factory=dict)
  left_out: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  outside: int = 0


def list_videos(
  collection: VideoCollection, root: pathlib.Path, annotations: pathlib.Path | None = None
) -> Listing:
  """Finds the videos of every split.

  Folders named as splits directly below `root` are splits; without one for training among them
  all videos are training data. The first folder below that is a video's class, unless the
  annotations of Kinetics say otherwise. Links are followed.

  Args:
    collection: Kinetics clips have ids, annotations and duplicates; of other videos nothing is
      assumed.
    root: of the tree.
    annotations: folder of the official csv files; looked for in `root` if not given.

  Raises:
    BadInput: annotations cannot be read.
  """
  folders: dict[str, list[pathlib.Path]] = {}
  for child in sorted(root.iterdir()):
    if child.name in SPLITS and child.is_dir():
      folders.setdefault(SPLITS[child.name], []).append(child)
  listing = Listing()
  if 'train' in folders:
    others = [child for child in root.iterdir() if child.name not in SPLITS]
    inside = (video for child in others if child.is_dir() for video in _walk(root, child, None))
    listing.outside = sum(1 for _ in inside)
    listing.outside += sum(is_video(child.name) for child in others if child.is_file())
  else:
    folders = {'train': [root]}
  for split, places in sorted(folders.items()):
    found = [video for folder in places for video in _walk(root, folder, (split, listing))]
    listing.videos[split] = sorted(found, key=lambda video: video.path)
  if collection.num_classes is not None:
    _apply_kinetics(listing, _annotation_files(root, annotations))
  return listing


def printable(text: str) -> str:
  """Shows what is not UTF-8 in a file's name by its bytes."""
  return os.fsencode(text).decode('utf-8', 'backslashreplace')


def is_video(name: str) -> bool:
  """Whether a file is called like a video."""
  return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _walk(
  root: pathlib.Path, folder: pathlib.Path, into: tuple[str, Listing] | None
) -> Iterator[Video]:
  """Yields the videos below a folder; what cannot be one is noted in the listing, if given."""

  def leave_out(path: pathlib.Path, reason: str) -> None:
    if into:
      into[1].left_out.append((into[0], path.relative_to(root).as_posix(), reason))

  def unreadable(error: OSError) -> None:
    leave_out(pathlib.Path(error.filename), f'the folder cannot be listed: {error.strerror}')

  visited = set()
  for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
    real = os.path.realpath(place)
    if real in visited:
      leave_out(pathlib.Path(place), 'the same folder as another, by a link')
      folders.clear()
      continue
    visited.add(real)
    folders.sort()  # Which of them is taken may not depend on the file system.
    below = os.path.relpath(place, folder)
    label = '' if below == os.curdir else below.split(os.sep)[0]
    # Joined as text: a collection has hundreds of thousands.
    prefix = pathlib.PurePath(os.path.relpath(place, root)).as_posix()
    prefix = '' if prefix == os.curdir else f'{prefix}/'
    for name in filter(is_video, folders):
      leave_out(pathlib.Path(place, name), 'it is a folder')
    for name in filter(is_video, names):
      try:
        size = os.stat(os.path.join(place, name)).st_size
      except OSError:
        size = -1
      yield Video(prefix + name, label, size)


def clip_key(path: str) -> ClipKey | None:
  """Reads YouTube id, start and end in seconds from a clip's name."""
  match = CLIP_NAME.fullmatch(os.path.splitext(os.path.basename(path))[0])
  if match is None:
    return None
  start, end = match['start'], match['end']
  return match['id'], int(start) if start else None, int(end) if end else None


def _annotation_files(
  root: pathlib.Path, annotations: pathlib.Path | None
) -> dict[str, pathlib.Path]:
  """Finds the csv file of every split: one that has the split's name in its own."""
  if annotations is not None and not annotations.is_dir():
    raise BadInput(f'--annotations={annotations} is not a folder; give that of the csv files.')
  places = [annotations] if annotations else [root / 'annotations', root]
  files: dict[str, pathlib.Path] = {}
  for place in places:
    for path in sorted(place.glob('*.csv')):
      for word in re.split(r'[\W_]+', path.stem):
        if word in SPLITS:
          files.setdefault(SPLITS[word], path)
  if annotations is not None and not files:
    raise BadInput(
      f'--annotations={annotations} holds no train.csv, val.csv or the like; give the folder of'
      ' the official csv files.'
    )
  return files


def read_annotations(path: pathlib.Path) -> dict[ClipKey, str]:
  """Reads an official csv file: the class of every clip; empty in a test split without labels.

  Raises:
    BadInput: it cannot be read, or lacks a column.
  """
  try:
    with path.open(newline='', encoding='utf-8-sig') as file:
      rows = csv.DictReader(file)
      columns = rows.fieldnames or []
      lacking = {'youtube_id', 'time_start', 'time_end'} - set(columns)
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


def _apply_kinetics(listing: Listing, files: dict[str, pathlib.Path]) -> None:
  """Adds ids and annotated classes, leaves duplicates out, and notes what is missing."""
  for split, videos in listing.videos.items():
    annotated = read_annotations(files[split]) if split in files else {}
    label_of_id = {key[0]: label for key, label in annotated.items()}
    kept: dict[ClipKey | str, Video] = {}
    for video in videos:
      key = clip_key(video.path)
      if key is None:
        kept[video.path] = video
        continue
      if key in kept:
        listing.left_out.append((split, video.path, f'the same clip as {kept[key].path}'))
        continue
      label = label_of_id.get(key[0]) if key[1] is None else annotated.get(key)
      kept[key] = dataclasses.replace(video, label=label or video.label, youtube_id=key[0])
    listing.videos[split] = list(kept.values())
    if annotated:
      listing.missing[split] = sorted(_missing(annotated, kept))


def _missing(annotated: Iterable[ClipKey], there: Iterable[ClipKey | str]) -> Iterator[str]:
  keys = set(there)
  for youtube_id, start, end in annotated:
    if (youtube_id, start, end) not in keys and (youtube_id, None, None) not in keys:
      yield f'{youtube_id}_{start:06d}_{end:06d}'
