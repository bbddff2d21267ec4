"""Follows an object through a video file, and writes the video with box and score drawn."""

import pathlib
from collections.abc import Iterator
from fractions import Fraction

import cv2
import numpy as np
import tqdm
from jaxtyping import Float, UInt8

from dropmae_jax.data import synthetic_clips
from dropmae_jax.runtime import atomic_file
from dropmae_jax.runtime.errors import RunFailed, UserError
from dropmae_jax.runtime.paths import Path, is_remote
from dropmae_jax.tracking.crops import CropOptions
from dropmae_jax.tracking.follow import track
from dropmae_jax.tracking.follow.track import Locate, Source, Track
from tfds_kinetics import video as video_files

# All frames that can be decoded, as they are; tracking takes its time.
OPTIONS = video_files.FrameOptions(
  short_side=video_files.MOST_PIXELS, max_damage=1.0, time_limit=float('inf')
)
COLOUR = (255, 200, 0)


def follow(
  path: pathlib.Path,
  box: tuple[float, ...],
  locate: Locate,
  options: CropOptions,
  output: Path,
) -> Track:
  """Follows the object that is in a box of the first frame; writes an MP4 (h264).

  Args:
    path: of the video.
    box: (x, y, w, h) in pixels.
    locate: the network.
    options: of the crops.
    output: the file to write.

  Raises:
    UserError: the video cannot be decoded, the box is not inside, or the file cannot be written.
  """
  _check_output(output, path)
  frames = _frames(path)
  _check_box(box, next(_frames(path), None))
  with tqdm.tqdm(unit='frame', leave=False, disable=None) as progress:
    source = Source(f'--video={path}', np.array(box), frames)
    ((_, result),) = track.follow([source], locate, options, on_frame=progress.update)
  with atomic_file.staged(output, num_bytes=0, has_card=False) as partial:
    synthetic_clips.write_mp4(partial, _drawn(path, result), rate=_rate(path))
  return result


def _frames(path: pathlib.Path) -> Iterator[UInt8[np.ndarray, 'h w c']]:
  try:
    yield from video_files.read_frames(str(path), OPTIONS)
  except video_files.UnusableVideo as error:
    raise UserError(f'--video={path} cannot be used: {error}; give another.') from error
  except video_files.MachineFault as error:
    raise RunFailed(f'{error}.') from error


def _check_output(output: Path, video: pathlib.Path) -> None:
  if output.suffix.lower() != '.mp4':
    raise UserError(f'--output={output} does not end in .mp4; give a name that does.')
  atomic_file.check_file(output, has_card=False)
  if not is_remote(output) and output.exists() and video.exists() and output.samefile(video):
    raise UserError(f'--output={output} is the video itself; give another name.')


def _check_box(box: tuple[float, ...], frame: np.ndarray) -> None:
  height, width = frame.shape[:2]
  if min(height, width) < 2:
    raise UserError(f'the video has {width} x {height} pixels, too few for an MP4; give another.')
  x, y, w, h = box
  if not (0 < w <= width and 0 < h <= height and -w < x < width and -h < y < height):
    raise UserError(
      f'--box={",".join(f"{each:g}" for each in box)} is not in the {width} x {height} pixels of'
      ' the video; give X,Y,W,H of the object in its first frame.'
    )


def _rate(path: pathlib.Path) -> Fraction:
  """Returns the frames a second of a video, if the container states them."""
  with video_files.open_video(str(path)) as container:
    stated = video_files.first_stream(container).average_rate
  return stated or Fraction(synthetic_clips.FRAMES_PER_SECOND)


def _drawn(path: pathlib.Path, result: Track) -> Iterator[UInt8[np.ndarray, 'h w c']]:
  for frame, box, score in zip(_frames(path), result.boxes, result.scores, strict=True):
    yield with_box(frame, box, f'{score:.2f}')


def with_box(
  frame: UInt8[np.ndarray, 'h w c'], box: Float[np.ndarray, '4'], text: str
) -> UInt8[np.ndarray, 'h w c']:
  """Draws a box (x, y, w, h) in pixels with a text above it."""
  drawn = frame.copy()
  scale = max(1.0, min(frame.shape[:2]) / 240)
  x, y, w, h = (round(float(each)) for each in box)
  thickness = max(1, round(scale))
  cv2.rectangle(drawn, (x, y), (x + w, y + h), COLOUR, thickness, cv2.LINE_AA)
  corner = (max(0, x), max(round(12 * scale), y - round(3 * scale)))
  cv2.putText(
    drawn, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.4 * scale, COLOUR, thickness, cv2.LINE_AA
  )
  return drawn
