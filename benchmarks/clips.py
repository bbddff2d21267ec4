"""Videos to measure with, and their dataset: generated, rescaled or as they are."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
from fractions import Fraction

import av

from dropmae_jax.data import synthetic_clips
from dropmae_jax.data.video_source import TfdsVideos, open_dataset
from dropmae_jax.runtime.errors import UserError
from tfds_kinetics.configs import VIDEO_SUFFIXES

SHORT_SIDE = 256
GENERATED = synthetic_clips.ClipOptions(val=0, frames=60, height=SHORT_SIDE, width=340)


@dataclasses.dataclass(frozen=True)
class Clips:
  """The same clips as a dataset, and as the files that it was built from.

  Attributes:
    videos: the dataset.
    split: of the dataset.
    paths: the file of each clip; empty if the files are not given.
  """

  videos: TfdsVideos
  split: str
  paths: tuple[pathlib.Path, ...]


def generate(scratch: pathlib.Path, count: int) -> pathlib.Path:
  """Returns the folder of `count` generated clips, made if it is not there."""
  output = scratch / f'clips-{count}'
  print(f'{output}: {count} generated clips; about a second each if they are not there yet')
  synthetic_clips.write_clips(output, dataclasses.replace(GENERATED, train=count))
  return output


def find_files(root: pathlib.Path) -> list[pathlib.Path]:
  """Lists the video files below a folder.

  Raises:
    UserError: there are none.
  """
  found = sorted(p for p in root.rglob('*') if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
  if not found:
    raise UserError(f'--videos={root} is not a folder with videos; give the root of a video tree.')
  return found


def rescale_file(source: pathlib.Path, destination: pathlib.Path) -> None:
  """Writes an h264 copy (crf 23) whose short side is 256 pixels, frame for frame.

  Raises:
    av.error.FFmpegError: a frame cannot be decoded.
  """
  with av.open(str(source)) as reader, av.open(str(destination), 'w') as writer:
    video = reader.streams.video[0]
    rate = Fraction(video.average_rate or synthetic_clips.FRAMES_PER_SECOND)
    scale = SHORT_SIDE / min(video.width, video.height)
    stream = writer.add_stream('libx264', rate=rate)
    # With yuv420p, h264 needs even sides.
    stream.width, stream.height = (2 * round(s * scale / 2) for s in (video.width, video.height))
    stream.pix_fmt = 'yuv420p'
    stream.options = {'crf': '23'}
    for number, frame in enumerate(reader.decode(video)):
      scaled = frame.reformat(stream.width, stream.height, 'yuv420p', interpolation='BICUBIC')
      scaled.pts, scaled.time_base = number, 1 / rate
      writer.mux(stream.encode(scaled))
    writer.mux(stream.encode())


def rescale(root: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
  """Returns a folder with a copy of each clip at short side 256, made if it is not there.

  Clips that cannot be decoded are left out, with a note.
  """
  files = find_files(root)
  content = ''.join(f'{path.relative_to(root)}:{path.stat().st_size};' for path in files)
  output = scratch / f'rescaled-{hashlib.sha256(content.encode()).hexdigest()[:12]}'
  if output.exists():
    return output
  staging = output.with_name(f'{output.name}.partial')
  shutil.rmtree(staging, ignore_errors=True)
  for path in files:
    # Two files may differ only in their suffix, so it stays in the name.
    copy = (staging / path.relative_to(root)).with_name(f'{path.name}.mp4')
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
      rescale_file(path, copy)
    except (av.error.FFmpegError, IndexError) as error:
      copy.unlink(missing_ok=True)
      print(f'note: {path} is left out: {error}')
  os.rename(staging, output)
  return output


def build_dataset(videos: pathlib.Path, data_dir: pathlib.Path) -> None:
  """Builds the dataset of a video tree by its command.

  Raises:
    UserError: with the error of the command.
  """
  command = ['-m', 'tfds_kinetics', '--config=folder', f'--videos={videos}']
  done = subprocess.run(
    [sys.executable, *command, f'--data_dir={data_dir}'],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise UserError(f'the dataset of {videos} cannot be built: {reason.removeprefix("error: ")}')


def open_clips(
  data_dir: pathlib.Path, dataset: str, split: str, root: pathlib.Path | None
) -> Clips:
  """Opens a dataset together with the files that it was built from.

  Args:
    data_dir: of the dataset.
    dataset: TFDS name and config.
    split: of the dataset.
    root: of the video tree; None if there are no files.

  Raises:
    UserError: there is no such dataset, or a file of it is not below `root`.
  """
  videos = open_dataset(str(data_dir), dataset, split)
  paths = tuple(root / path for path in videos.paths().tolist()) if root else ()
  missing = next((path for path in paths if not path.is_file()), None)
  if missing:
    raise UserError(
      f'--videos={root} is not the video tree of this dataset: there is no {missing};'
      ' give the tree that it was built from.'
    )
  return Clips(videos, split, paths)


def prepare(
  scratch: pathlib.Path,
  *,
  videos: pathlib.Path | None,
  generated: int | None,
  rescaled: bool,
  data_dir: pathlib.Path | None,
  dataset: str,
  split: str,
) -> Clips:
  """Makes the clips and their dataset, unless they exist, and opens them.

  Args:
    scratch: folder for what is made, and from which it is used again.
    videos: a tree of videos.
    generated: number of clips to generate instead.
    rescaled: copy the clips at short side 256 first.
    data_dir: an existing dataset; None: one is built.
    dataset: TFDS name and config of it.
    split: to open.

  Raises:
    UserError: something is missing or cannot be made.
  """
  if scratch.exists() and not scratch.is_dir():
    raise UserError(f'--scratch={scratch} is not a folder; give another name.')
  scratch.mkdir(parents=True, exist_ok=True)
  root = generate(scratch, generated) if generated else videos
  if rescaled and root:
    root = rescale(root, scratch)
  if data_dir is None:
    find_files(root)
    data_dir = scratch / f'data-{root.resolve().name}'
    build_dataset(root, data_dir)
  return open_clips(data_dir, dataset, split, root)
