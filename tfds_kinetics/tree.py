"""Lists the videos of a folder tree, with their splits, classes, ids and copies.

Kinetics is distributed in several layouts: `train/<class>/<clip>.mp4`, `train/<clip>.mp4` beside
the official csv files, folders named `train_256` or `videos_val`. A clip is named by its YouTube
id, mostly followed by its start and end in seconds, as `<id>_000012_000022.mp4`.
"""

import csv
import dataclasses
import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator, Set

from tfds_kinetics.configs import SPLITS, VIDEO_SUFFIXES, VideoCollection
from tfds_kinetics.messages import BadInput

# Folder of some mirrors with good copies of clips that were damaged in the first distribution.
REPLACEMENTS = 'replacement'
CLIP_NAME = re.compile(r'(?P<id>[\w-]{11})(_(?P<start>\d+)_(?P<end>\d+))?', re.ASCII)
# YouTube id, start and end in seconds; clips without times are identified by the id alone.
ClipKey = tuple[str, int | None, int | None]
COLUMNS = {'youtube_id', 'time_start', 'time_end'}


@dataclasses.dataclass(frozen=True)
class Video:
  """A video of the collection.

  Attributes:
    path: below the root.
    label: name of its class; empty where none is known.
    size: in bytes; -1 where it is unknown, as for a broken link.
    youtube_id: of a Kinetics clip; empty for other collections.
    copies: other files of the same clip; each is read only if all before it fail.
  """

  path: str
  label: str
  size: int
  youtube_id: str = ''
  copies: tuple['Video', ...] = ()


@dataclasses.dataclass
class Listing:
  """The videos found below a root.

  Attributes:
    videos: of each split, sorted by path.
    left_out: (split, path, reason) of what cannot be a video.
    missing: of each split with annotations, the names of clips without a file.
    outside: the videos outside the folders of all splits.
  """

  videos: dict[str, list[Video]] = dataclasses.field(default_factory=dict)
  left_out: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  outside: list[Video] = dataclasses.field(default_factory=list)


def list_videos(
  collection: VideoCollection, root: pathlib.Path, annotations: pathlib.Path | None = None
) -> Listing:
  """Finds the videos of every split.

  Folders named as splits directly below `root` are splits; without one for training, all videos
  are training data. The first folder below that is a video's class, unless the annotations of
  Kinetics name another. Links are followed.

  Args:
    collection: the builder config; only clips of Kinetics have ids, annotations and copies.
    root: of the tree.
    annotations: folder of the official csv files; looked for in `root` if not given.

  Raises:
    BadInput: annotations cannot be read.
  """
  folders = split_folders(root)
  annotated, listing = {}, Listing()
  if collection.num_classes is not None:
    files = annotation_files(root, annotations)
    annotated = {split: read_annotations(files[split]) for split in folders if split in files}
  for split, places in folders.items():
    videos = [video for folder in places for video in _walk(root, folder, split, listing)]
    listing.videos[split] = sorted(videos, key=lambda video: video.path)
  inside = {folder for places in folders.values() for folder in places}
  if root not in inside:
    listing.outside = list(_walk(root, root, '', listing, but=inside))
  if collection.num_classes is not None:
    _apply_kinetics(listing, annotated)
  return listing


def split_folders(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the folders of each split; without one for training, the root is its folder."""
  folders: dict[str, list[pathlib.Path]] = defaultdict(list)
  for child in sorted(root.iterdir()):
    if child.name in SPLITS and child.is_dir():
      folders[SPLITS[child.name]].append(child)
  return dict(sorted(folders.items())) if 'train' in folders else {'train': [root]}


def printable(text: str) -> str:
  """Escapes the bytes of a file's name that are not UTF-8."""
  return os.fsencode(text).decode('utf-8', 'backslashreplace')


def is_video(name: str) -> bool:
  """Whether a file has the ending of a video."""
  return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _walk(
  root: pathlib.Path,
  folder: pathlib.Path,
  split: str,
  listing: Listing,
  but: Set[pathlib.Path] = frozenset(),
) -> Iterator[Video]:
  """Yields the videos below a folder, except below `but`; adds to `left_out` what is no file."""

  def leave_out(path: pathlib.Path, reason: str) -> None:
    listing.left_out.append((split, path.relative_to(root).as_posix(), reason))

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
    # Sorted, so that the choice among links to one folder does not depend on the file system.
    folders[:] = sorted(name for name in folders if pathlib.Path(place, name) not in but)
    below = os.path.relpath(place, folder)
    label = '' if below == os.curdir else below.split(os.sep)[0]
    # Paths are joined as text for speed: a collection has hundreds of thousands.
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


def _apply_kinetics(listing: Listing, annotated: dict[str, dict[ClipKey, str]]) -> None:
  """Adds ids and classes, joins the copies of each clip, and lists missing clips."""
  names = {name for labels in annotated.values() for name in labels.values() if name}
  class_names = {_letters(name): name for name in names}
  replacements = defaultdict(list)
  for video in listing.outside:
    if video.path.startswith(f'{REPLACEMENTS}/') and clip_key(video.path):
      replacements[clip_key(video.path)[0]].append(video)
  used = set()
  for split, videos in listing.videos.items():
    labels = annotated.get(split, {})
    label_of_id = {key[0]: label for key, label in labels.items()}
    clips: dict[ClipKey | str, list[Video]] = defaultdict(list)
    for video in videos:
      key = clip_key(video.path)
      label = class_names.get(_letters(video.label), video.label)
      if key is not None:
        label = (label_of_id.get(key[0]) if key[1] is None else labels.get(key)) or label
      known = dataclasses.replace(video, label=label, youtube_id=key[0] if key else '')
      clips[key or video.path].append(known)
    listing.videos[split] = [
      _with_copies(copies, replacements[copies[0].youtube_id]) for copies in clips.values()
    ]
    used |= {copy.path for video in listing.videos[split] for copy in (video, *video.copies)}
    if labels:
      listing.missing[split] = sorted(missing_clips(labels, set(clips)))
  listing.outside = [video for video in listing.outside if video.path not in used]


def _letters(name: str) -> str:
  """Returns the part of a class's name that its folder keeps: lower-case letters and digits."""
  return ''.join(filter(str.isalnum, name)).lower()


def _with_copies(copies: list[Video], replacements: list[Video]) -> Video:
  """Joins copies: a replacement first, then the largest file, as smaller ones may be cut short."""
  known = {'label': copies[0].label, 'youtube_id': copies[0].youtube_id}
  order = [dataclasses.replace(video, **known) for video in replacements]
  order += sorted(copies, key=lambda video: -video.size)
  return dataclasses.replace(order[0], copies=tuple(order[1:]))


# Names of clips and annotation files of Kinetics.


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
