"""TAP-Vid: points are given in the frame where they are first seen, and followed from there on.

Reads tapvid_davis.pkl and robotap's pickles, a dict of videos by name, and tapvid_rgb_stacking.pkl,
a list of videos. A video is a dict of

    video     uint8 [t, h, w, 3]
    points    float32 [p, t, 2]: x, y; 0 is the left or upper border of the frame, 1 the other one
    occluded  bool [p, t]

and the whole file is held in memory. This layout is what its documentation and its reader say; no
such file was at hand.

Propagation does not say whether a point is occluded, so there is no occlusion accuracy and no
average Jaccard, only the accuracy of positions, `pts_within_N`: of all points visible in the truth,
in frames after their query ('first' in TAP-Vid's code), how many are found at less than N pixels of
a 256 x 256 frame. Frames are read in the resolution of the file, which TAP-Vid's authors do not
compare with the scores of methods that see 256 x 256 pixels.
"""

import pathlib
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, UInt8

from dropmae_jax.evaluation.datasets import array_pickle, jhmdb, overlays
from dropmae_jax.evaluation.datasets.benchmark import Clip
from dropmae_jax.evaluation.protocols import Geometry, Protocol
from dropmae_jax.runtime.errors import UserError, first_line, os_errors_as_user_errors

RESOLUTION = 256  # Of the measure.
THRESHOLDS = 1, 2, 4, 8, 16  # Pixels of it.
TRACKS = 'tracks.npz'


class Video(NamedTuple):
  """A video of TAP-Vid.

  Attributes:
    frames: RGB.
    points: x, y in 0..1.
    is_visible: whether the truth knows where a point is.
  """

  frames: UInt8[np.ndarray, 't h w c']
  points: Float[np.ndarray, 'p t xy']
  is_visible: Bool[np.ndarray, 'p t']


class Tracks(NamedTuple):
  """The points of a clip, whose frame 0 is their query frame.

  Attributes:
    points: their indices in the video.
    query_frame: number of the clip's first frame in the video.
    positions: x, y in pixels of 256 x 256.
    is_visible: whether the truth knows where a point is.
  """

  points: Int[np.ndarray, ' p']
  query_frame: int
  positions: Float64[np.ndarray, 'p t xy']
  is_visible: Bool[np.ndarray, 'p t']


class TapVid:
  """The clips of a file of TAP-Vid; a `Benchmark`.

  A clip consists of the points of a video that are first seen in the same frame, and of the video
  from that frame on. Points that are not seen again later have no part in the measure and are left
  out. Each point has a label of its own, so points do not influence each other.

  The result of a frame is [p, 2]: x and y of each point in pixels of 256 x 256.

  Attributes:
    names: '<video>@<query frame>' of each clip; videos of a list are called 0000, 0001, ...
  """

  def __init__(self, root: pathlib.Path) -> None:
    """Reads the whole file.

    Args:
      root: the .pkl, or a folder with one.

    Raises:
      UserError: there is no such file, it is damaged, or it has no points to follow.
    """
    path = _file_in(root)
    self._videos = read_videos(path)
    self._clips = {
      f'{name}@{query_frame:04d}': (name, query_frame, points)
      for name, video in self._videos.items()
      for query_frame, points in queries(video.is_visible)
    }
    if not self._clips:
      raise UserError(f'{path} has no point that is visible in two frames; give a file of TAP-Vid.')
    self.names = list(self._clips)

  def open(self, name: str) -> Clip:
    """Returns a clip of the file, which has been checked."""
    video_name, query_frame, points = self._clips[name]
    frames = self._videos[video_name].frames[query_frame:]
    _, positions, is_visible = self._videos[video_name]
    tracks = Tracks(
      points,
      query_frame,
      positions[points, query_frame:].astype(np.float64) * RESOLUTION,
      is_visible[points, query_frame:],
    )
    return Clip(name, len(frames), frames.shape[1:3], lambda number: frames[number], tracks)

  def input_size(self, clip: Clip, protocol: Protocol, patch_size: int) -> tuple[int, int]:
    """Returns a square, as the measure is in pixels of a square."""
    return protocol.input_size['tapvid'](clip.size, patch_size)

  def labels(
    self, clip: Clip, geometry: Geometry, protocol: Protocol
  ) -> Float32[np.ndarray, 'gh gw labels']:
    """Returns a label per point after the background; see `splat`."""
    return splat(clip.truth.positions[:, 0] / RESOLUTION, geometry.grid)

  def read_out(
    self,
    clip: Clip,
    number: int,
    labels: Float32[np.ndarray, 'gh gw labels'],
    geometry: Geometry,
    protocol: Protocol,
  ) -> Float32[np.ndarray, 'p xy']:
    """Returns the mean of the strongest cells' centres; the query where a point has none left."""
    query = clip.truth.positions[:, 0]
    height, width = geometry.grid
    cells = jhmdb.mean_positions(labels[..., 1:]).T
    positions = (cells + 0.5) / (width, height) * RESOLUTION
    is_given = np.isnan(positions) | (number == 0)
    return np.where(is_given, query, positions).astype(np.float32)

  def write(self, clip: Clip, results: list[np.ndarray], folder: pathlib.Path) -> None:
    """Writes tracks.npz.

    It holds `tracks`, float32 [p, t, 2], x, y in pixels of 256 x 256 from the query frame on;
    `points`, the indices of the points in the video; and `query_frame`, its number in the video.
    """
    path, truth = folder / TRACKS, clip.truth
    with os_errors_as_user_errors(f'{path} cannot be written', 'give another folder.'):
      np.savez(
        path,
        tracks=np.stack(results, axis=1),
        points=truth.points,
        query_frame=truth.query_frame,
      )

  def read(self, clip: Clip, folder: pathlib.Path) -> list[np.ndarray]:
    """Reads tracks.npz."""
    path, truth = folder / TRACKS, clip.truth
    try:
      with np.load(path, allow_pickle=False) as arrays:
        tracks, points = arrays['tracks'], arrays['points']
        query_frame = arrays['query_frame']
    except (OSError, LookupError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
      raise UserError(f'{path} cannot be read ({first_line(error)}); remove {folder}.') from error
    is_same = np.array_equal(points, truth.points) and np.array_equal(
      query_frame, truth.query_frame
    )
    if not is_same or tracks.shape != truth.positions.shape or tracks.dtype != np.float32:
      raise UserError(f'{path} is of other points or frames than {clip.name}; remove {folder}.')
    return list(np.moveaxis(tracks, 1, 0))

  def overlay(self, clip: Clip, number: int, result: np.ndarray) -> UInt8[np.ndarray, 'h w c']:
    """Returns a frame with its points."""
    return overlays.with_points(clip.frame(number), result / RESOLUTION * clip.size[::-1])

  def score(self, clip: Clip, results: list[np.ndarray]) -> Any:
    """Counts the visible points of later frames, and those that were found near the truth."""
    is_measured = clip.truth.is_visible.copy()
    is_measured[:, 0] = False
    return position_counts(np.stack(results, axis=1), clip.truth.positions, is_measured)

  def table(self, scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the accuracy of positions of each clip in percent."""
    return {name: _accuracy([score]) for name, score in scores.items()}

  def summarise(self, scores: Mapping[str, Any]) -> dict[str, float]:
    """Returns pts_within_1 .. 16 and their mean in percent: of each video, then of all videos."""
    videos: dict[str, list[Any]] = {}
    for name, score in scores.items():
      videos.setdefault(name.rpartition('@')[0], []).append(score)
    accuracies = [_accuracy(clips) for clips in videos.values()]
    return {key: float(np.mean([each[key] for each in accuracies])) for key in accuracies[0]}


def queries(is_visible: Bool[np.ndarray, 'p t']) -> list[tuple[int, Int[np.ndarray, ' _']]]:
  """Returns the frames in which points are first seen, and the indices of the points of each.

  Points that are seen in fewer than two frames are left out.
  """
  points = np.flatnonzero(is_visible.sum(axis=1) >= 2)
  first_seen = is_visible[points].argmax(axis=1)
  return [(int(frame), points[first_seen == frame]) for frame in np.unique(first_seen)]


def splat(
  points: Float64[np.ndarray, 'p xy'], grid: tuple[int, int]
) -> Float32[np.ndarray, 'gh gw labels']:
  """Spreads each point bilinearly over the four nearest cell centres, with weights that sum to 1.

  Args:
    points: x, y in 0..1.
    grid: (height, width) in cells.

  Returns:
    A label per point after that of the background, which is what the points leave of 1, or 0.
  """
  rows, columns = (
    _weights(points[:, axis], num_cells) for axis, num_cells in zip((1, 0), grid, strict=True)
  )
  maps = rows[:, None] * columns
  background = np.maximum(1 - maps.sum(axis=-1, keepdims=True), 0)
  return np.concatenate([background, maps], axis=-1).astype(np.float32)


def _weights(
  positions: Float64[np.ndarray, ' p'], num_cells: int
) -> Float64[np.ndarray, 'cells p']:
  """Returns bilinear weights of the cells along an axis; those at a border go on beyond it."""
  centres = np.arange(num_cells)[:, None] + 0.5
  places = np.clip(positions * num_cells, 0.5, num_cells - 0.5)
  return np.maximum(1 - np.abs(centres - places), 0)


def position_counts(
  predicted: Float[np.ndarray, 'p t xy'],
  truth: Float[np.ndarray, 'p t xy'],
  is_measured: Bool[np.ndarray, 'p t'],
) -> dict[str, Any]:
  """Counts the positions to measure, and those nearer to the truth than each threshold.

  Args:
    predicted: x, y in pixels of 256 x 256.
    truth: likewise.
    is_measured: whether a point is visible in a frame that is measured.
  """
  squared = np.square(predicted - truth).sum(axis=-1)
  return {
    'visible': int(is_measured.sum()),
    'within': {
      str(threshold): int((is_measured & (squared < threshold**2)).sum())
      for threshold in THRESHOLDS
    },
  }


def _accuracy(scores: list[Any]) -> dict[str, float]:
  """Returns the accuracy of positions over clips of one video, in percent."""
  visible = sum(score['visible'] for score in scores)
  result = {
    f'pts_within_{threshold}': 100 * sum(s['within'][str(threshold)] for s in scores) / visible
    for threshold in THRESHOLDS
  }
  return {**result, 'average_pts_within_thresh': float(np.mean(list(result.values())))}


def _file_in(root: pathlib.Path) -> pathlib.Path:
  """Returns the .pkl that is meant.

  Raises:
    UserError: there is none, or more than one.
  """
  with os_errors_as_user_errors(f'--root={root} cannot be read', 'give a readable file.'):
    files = [root] if root.is_file() else sorted(root.glob('*.pkl'))
  if not files:
    raise UserError(f'--root={root} holds no .pkl; give a file such as tapvid_davis.pkl.')
  if len(files) > 1:
    names = ', '.join(path.name for path in files)
    raise UserError(f'--root={root} holds several .pkl ({names}); give one of them.')
  return files[0]


def read_videos(path: pathlib.Path) -> dict[str, Video]:
  """Reads a file of TAP-Vid; runs nothing of it.

  Raises:
    UserError: it is damaged, names anything but numpy's arrays, or holds something else.
  """
  content = array_pickle.load(path)
  if isinstance(content, list):
    content = {f'{number:04d}': entry for number, entry in enumerate(content)}
  if not isinstance(content, dict) or not content:
    raise UserError(f'{path} holds no videos; give a file such as tapvid_davis.pkl.')
  for name in content:
    # Results are written into a folder of this name.
    if not isinstance(name, str) or not re.fullmatch(r'[\w@+-][\w@+. -]*', name):
      raise UserError(f'{path} has {name!r} as the name of a video; download it again.')
  return {name: _video(f'{path}: video {name!r}', entry) for name, entry in content.items()}


def _video(what: str, entry: Any) -> Video:
  """Checks an entry; `what` begins the sentences."""
  arrays = {}
  for key, kinds in (('video', 'u'), ('points', 'f'), ('occluded', 'b')):
    stand_in = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(stand_in, array_pickle.Array) or stand_in.values is None:
      raise UserError(f'{what} has no array {key!r}; download the file again.')
    arrays[key] = stand_in.values
    if arrays[key].dtype.kind not in kinds:
      raise UserError(f'{what} has {arrays[key].dtype} as {key!r}; download the file again.')
  frames, points, occluded = arrays.values()
  is_frames = frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == np.uint8
  if (
    not is_frames
    or frames.size == 0
    or points.shape != (*occluded.shape, 2)
    or len(frames) != points.shape[1]
  ):
    raise UserError(
      f'{what} has arrays that do not fit together: {frames.dtype} {frames.shape}, {points.shape},'
      f' {occluded.shape}; download the file again.'
    )
  if not np.isfinite(points[~occluded]).all():
    raise UserError(f'{what} has visible points without a position; download the file again.')
  return Video(frames, points, ~occluded)
