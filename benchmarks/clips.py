"""Videos to measure with, and their dataset: generated, rescaled or as they are."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
from fractions import Fraction
from typing import NamedTuple

import av

from dropmae_jax.data import synthetic_clips
from dropmae_jax.data.video_source import TfdsVideos, open_dataset
from dropmae_jax.runtime.errors import UserError
from tfds_kinetics.configs import VIDEO_SUFFIXES

SHORT_SIDE = 256
GENERATED = synthetic_clips.ClipOptions(val=0, frames=60, height=SHORT_SIDE, width=340)


class Clips(NamedTuple):
  """The same clips as a dataset, and as the files that it was built from."""

  videos: TfdsVideos
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
  paths = sorted(p for p in root.rglob('*') if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
  if not paths:
    raise UserError(f'--videos={root} is not a folder with videos; give the root of a video tree.')
  return paths


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


def prepare(
  scratch: pathlib.Path, *, videos: pathlib.Path | None, generated: int | None, rescaled: bool
) -> Clips:
  """Makes the clips and their dataset, unless they exist, and opens them.

  Args:
    scratch: folder for what is made, and from which it is used again.
    videos: a tree of videos.
    generated: number of clips to generate instead.
    rescaled: copy the clips at short side 256 first.

  Raises:
    UserError: something is missing or cannot be made.
  """
  if scratch.exists() and not scratch.is_dir():
    raise UserError(f'--scratch={scratch} is not a folder; give another name.')
  scratch.mkdir(parents=True, exist_ok=True)
  root = generate(scratch, generated) if generated else videos
  if rescaled:
    root = rescale(root, scratch)
  find_files(root)
  data_dir = scratch / f'data-{root.resolve().name}'
  build_dataset(root, data_dir)
  dataset = open_dataset(str(data_dir), 'kinetics_frames/folder')
  return Clips(dataset, tuple(root / path for path in dataset.paths().tolist()))
