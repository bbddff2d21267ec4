"""JHMDB: the joints of a person are given in the first frame, and followed through the others.

The folder, as it is downloaded:

    splits/<action>_test_split1.txt                         lines such as 'name.avi 2'; 2 = test
    joint_positions/<action>/<name>/joint_positions.mat     pos_img [2, 15, t]: x, y; from 1
    Rename_Images/<action>/<name>/00001.png, 00002.png, ...

These names are what public readers of JHMDB use (TAP-Vid's and videowalk's); no download of it was
at hand to check them, nor that split 1 has the 268 clips that papers report.

Labels, the way back to pixels and the measure are those of CropMAE's evaluation, which goes back to
videowalk's, with all that is odd in them, as scores could not be compared otherwise: spots at the
upper and the left border are cut, and a joint is measured only in frames where it was found.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.io
from jaxtyping import Float32, Float64, Num, UInt8

from dropmae_jax.evaluation.datasets import overlays
from dropmae_jax.evaluation.datasets.benchmark import Clip, read_frame
from dropmae_jax.evaluation.protocols import Geometry, Protocol
from dropmae_jax.runtime.errors import UserError, first_line, os_errors_as_user_errors

JOINTS = 15
INPUT_SIZE = 320, 320
THRESHOLDS = 0.1, 0.2, 0.3, 0.4, 0.5
# A position is the mean over so many cells.
STRONGEST_CELLS = 5
POSITIONS = 'joint_positions.mat'


class Jhmdb:
  """The clips of a split of JHMDB for testing; a `Benchmark`.

  The result of a frame is [2, 15]: x and y of each joint in pixels of the frame, counted from 1 as
  in the files; NaN where a joint was not found. All protocols share labels and measure.

  Attributes:
    names: '<action>/<name>' of each clip.
  """

  def __init__(self, root: pathlib.Path, *, split: str = '1') -> None:
    """Reads the list of clips.

    Args:
      root: folder with splits/, joint_positions/ and Rename_Images/.
      split: number of the split.

    Raises:
      UserError: there are no lists, they are damaged, or they name no clip.
    """
    self._root = root
    ending = f'_test_split{split}.txt'
    with os_errors_as_user_errors(f'--root={root} cannot be read', 'give a readable folder.'):
      # macOS leaves hidden files of the same ending.
      lists = [path for path in sorted(root.glob(f'splits/*{ending}')) if path.name[0] != '.']
      names = [
        f'{path.name.removesuffix(ending)}/{name}' for path in lists for name in _test_clips(path)
      ]
    if not lists:
      raise UserError(
        f'--root={root} has no splits/*{ending}; give the folder with splits/, joint_positions/ and'
        ' Rename_Images/ of JHMDB.'
      )
    if not names:
      raise UserError(
        f"--root={root}: no line of splits/*{ending} has the 2 of a clip for testing, as 'name.avi"
        " 2' has; download them again."
      )
    self.names = names

  def open(self, name: str) -> Clip:
    """Reads the positions of a clip, and checks that its frames exist."""
    path = self._root / 'joint_positions' / name / POSITIONS
    positions = _read_positions(path, 'download it again')
    if not np.isfinite(positions).all():
      raise UserError(f'{path} has positions that are not numbers; download it again.')
    folder, num_frames = self._root / 'Rename_Images' / name, positions.shape[2]
    # Some clips have more frames than positions; those are not measured.
    frames = [folder / f'{number:05d}.png' for number in range(1, num_frames + 1)]
    missing = next((frame for frame in frames if not frame.is_file()), None)
    if missing:
      raise UserError(
        f'{missing} does not exist, and {path} has positions for {num_frames} frames; copy the'
        ' frames again.'
      )
    size = read_frame(frames[0]).shape[:2]

    def frame(number: int) -> UInt8[np.ndarray, 'h w c']:
      image = read_frame(frames[number])
      if image.shape[:2] != size:
        raise UserError(
          f'{frames[number]} has {image.shape[1]} x {image.shape[0]} pixels, and the first frame'
          f' has {size[1]} x {size[0]}; copy the frames again.'
        )
      return image

    return Clip(name, num_frames, size, frame, positions)

  def input_size(self, clip: Clip, protocol: Protocol, patch_size: int) -> tuple[int, int]:
    """Returns 320 x 320, whatever the shape of the frames."""
    return INPUT_SIZE

  def labels(
    self, clip: Clip, geometry: Geometry, protocol: Protocol
  ) -> Float32[np.ndarray, 'gh gw labels']:
    """Returns the spots of the joints in the first frame, after the background."""
    return draw(clip.truth[:, :, 0], clip.size, geometry)

  def read_out(
    self,
    clip: Clip,
    number: int,
    labels: Float32[np.ndarray, 'gh gw labels'],
    geometry: Geometry,
    protocol: Protocol,
  ) -> Float64[np.ndarray, 'xy joints']:
    """Returns the positions of the joints in pixels of the frame, from 1; NaN: not found."""
    return to_pixels(mean_positions(labels[..., 1:]), clip.size, geometry.grid)

  def write(self, clip: Clip, results: list[np.ndarray], folder: pathlib.Path) -> None:
    """Writes joint_positions.mat with pos_img [2, 15, t], as in the data set; NaN: not found."""
    path = folder / POSITIONS
    with os_errors_as_user_errors(f'{path} cannot be written', 'give another folder.'):
      scipy.io.savemat(path, {'pos_img': np.stack(results, axis=-1)})

  def read(self, clip: Clip, folder: pathlib.Path) -> list[np.ndarray]:
    """Reads joint_positions.mat."""
    path = folder / POSITIONS
    positions = _read_positions(path, f'remove {folder}')
    if positions.shape != clip.truth.shape:
      raise UserError(
        f'{path} has positions for {positions.shape[2]} frames, and the clip has {clip.num_frames};'
        f' remove {folder}.'
      )
    return list(np.moveaxis(positions, -1, 0))

  def overlay(self, clip: Clip, number: int, result: np.ndarray) -> UInt8[np.ndarray, 'h w c']:
    """Returns a frame with its joints."""
    return overlays.with_points(clip.frame(number), result.T - 1)

  def score(self, clip: Clip, results: list[np.ndarray]) -> Any:
    """Counts for each joint the frames in which it was found, and those with a small distance."""
    predicted = np.stack(results, axis=-1)
    distances = relative_distances(predicted, clip.truth)
    return {
      'found': np.isfinite(predicted[0, :, 1:]).sum(axis=1).tolist(),
      'within': {
        str(threshold): (distances <= threshold).sum(axis=1).tolist() for threshold in THRESHOLDS
      },
    }

  def table(self, scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the PCK of each clip in percent."""
    return {name: _pck([score]) for name, score in scores.items()}

  def summarise(self, scores: Mapping[str, Any]) -> dict[str, float]:
    """Returns PCK@0.1 .. 0.5 in percent: the mean over the joints, each over all clips."""
    return _pck(list(scores.values()))


def draw(
  positions: Num[np.ndarray, 'xy joints'], size: tuple[int, int], geometry: Geometry
) -> Float32[np.ndarray, 'gh gw labels']:
  """Draws a spot of at most 4 x 4 cells for each joint; the first label is what no spot covers.

  Labels of a cell do not sum to 1.

  Args:
    positions: x, y in pixels of the frame, from 1; they may lie outside of it.
    size: (height, width) of the frame.
    geometry: of the clip.
  """
  pixels, grid, frame = (np.array(each)[::-1, None] for each in (*geometry, size))
  # In this order of operations, as positions are truncated.
  x, y = (positions - 1) * pixels / frame / (pixels / grid)
  spots = _profiles(y, geometry.grid[0])[:, None] * _profiles(x, geometry.grid[1])
  background = spots.sum(axis=-1, keepdims=True) == 0
  return np.concatenate([background, spots], axis=-1).astype(np.float32)


def _profiles(
  positions: Float64[np.ndarray, ' joints'], num_cells: int
) -> Float64[np.ndarray, 'cells joints']:
  """Returns the values of spots along an axis, with deviation .5; positions are in cells.

  Both ends are truncated towards 0, so that spots at the upper and left border are cut.
  """
  cells = np.arange(num_cells)[:, None]
  start, end = np.trunc(positions - 1.5), np.trunc(positions + 2.5)
  values = np.exp(-2 * (cells - start - 2) ** 2)
  return np.where((start <= cells) & (cells < end), values, 0)


def mean_positions(maps: Float32[np.ndarray, 'gh gw maps']) -> Float64[np.ndarray, 'xy maps']:
  """Returns x, y of the strongest cells of each map in cells, weighted by their values.

  Cells are counted from 0, and nothing is added for their centres; NaN where a map is 0.
  """
  flat = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
  strongest = np.argsort(-flat, axis=0, kind='stable')[:STRONGEST_CELLS]
  values = np.take_along_axis(flat, strongest, axis=0)
  total = values.sum(axis=0)
  places = np.stack([strongest % maps.shape[1], strongest // maps.shape[1]])
  return (places * values).sum(axis=1) / np.where(total > 0, total, np.nan)


def to_pixels(
  cells: Float64[np.ndarray, 'xy *joints'], size: tuple[int, int], grid: tuple[int, int]
) -> Float64[np.ndarray, 'xy *joints']:
  """Returns positions in pixels of a frame of size (height, width), from 1."""
  return (cells.T / grid[::-1] * size[::-1]).T + 1


def relative_distances(
  predicted: Float64[np.ndarray, 'xy joints t'], truth: Num[np.ndarray, 'xy joints t']
) -> Float64[np.ndarray, 'joints later']:
  """Returns distances to the truth in units of the person's size, without those of frame 0.

  The size is .6 of the diagonal of the box around the truth of all joints that were found.

  Args:
    predicted: positions in pixels, from 1; NaN where a joint was not found, as then in the result.
    truth: true positions.
  """
  predicted, truth = predicted - 1, truth - 1
  is_found = np.isfinite(predicted)
  # The published code looks for the largest from -1 on, and so for persons left of the frame.
  box = truth.max(1, where=is_found, initial=-1) - truth.min(1, where=is_found, initial=1e6)
  with np.errstate(divide='ignore', invalid='ignore'):  # A box around one joint has no size.
    return (np.hypot(*(predicted - truth)) / (0.6 * np.hypot(*box)))[:, 1:]


def _pck(scores: list[Any]) -> dict[str, float]:
  """Returns PCK in percent over clips; joints that were found in none of them do not count."""
  num_found = np.sum([score['found'] for score in scores], axis=0)
  is_found = num_found > 0
  result = {}
  for threshold in THRESHOLDS:
    within = np.sum([score['within'][str(threshold)] for score in scores], axis=0)
    share = within[is_found] / num_found[is_found]
    result[f'PCK@{threshold}'] = 100 * float(share.mean()) if is_found.any() else 0.0
  return result


def _test_clips(path: pathlib.Path) -> list[str]:
  """Returns the names of clips for testing in a list, without '.avi'.

  Raises:
    UserError: a line is not as it should be.
  """
  names: dict[str, None] = {}
  for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
    name, use = line.split() if len(line.split()) == 2 else ('', line.strip())
    # Results are written into a folder of this name.
    if use and (use not in ('0', '1', '2') or name[:1] in ('', '.') or '/' in name):
      raise UserError(
        f"{path} has the line {line!r}, which is not like 'name.avi 2'; download it again."
      )
    if use == '2':
      names[name.removesuffix('.avi')] = None
  return list(names)


def _read_positions(path: pathlib.Path, remedy: str) -> Float64[np.ndarray, 'xy joints t']:
  """Reads pos_img.

  Raises:
    UserError: there is no such file, it is damaged, or holds something else.
  """
  if not path.is_file():
    raise UserError(f'{path} does not exist; {remedy}.')
  try:
    content = scipy.io.loadmat(path, variable_names=['pos_img'])
  except Exception as error:  # A damaged file may raise anything.
    raise UserError(f'{path} cannot be read ({first_line(error)}); {remedy}.') from error
  positions = content.get('pos_img')
  if not isinstance(positions, np.ndarray) or positions.dtype.kind not in 'fiu':
    raise UserError(f'{path} has no numbers under pos_img; {remedy}.')
  if positions.ndim != 3 or positions.shape[:2] != (2, JOINTS) or positions.shape[2] < 2:
    raise UserError(
      f'{path} has pos_img of the shape {positions.shape}, not (2, {JOINTS}, 2 frames or more);'
      f' {remedy}.'
    )
  return positions.astype(np.float64)
