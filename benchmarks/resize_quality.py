"""Compares what the fast resize loses with what the stored JPEG frames have lost already.

    python -m benchmarks.resize_quality --videos=FOLDER

For random frames of the videos and random crops by the method's law, all as PSNR: the fast against
the exact resize of the same stored frame, and the stored against the decoded frame, both at the
crop itself and after the exact resize. The higher PSNR is the smaller loss.
"""

import argparse
import json
import pathlib
import statistics
from typing import Any

import av
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from benchmarks import clips, rounds
from dropmae_jax.data import augment
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError
from tfds_kinetics.video import FrameOptions, stored_size

IMAGE_SIZE = 224
STORED = FrameOptions()
LOSSES = {
  'fast_resize': 'fast resize against exact',
  'storage': f'JPEG q{STORED.jpeg_quality} 4:2:0 against the decoded frame, at the crop',
  'storage_resized': 'the same, after the exact resize',
}


def psnr(first: np.ndarray, second: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB of two pictures of bytes; at most 100."""
  error = np.square(first.astype(np.float64) - second).mean()
  return float(10 * np.log10(255**2 / max(error, 255**2 / 1e10)))


def random_frames(
  path: pathlib.Path, rng: np.random.Generator, count: int
) -> list[UInt8[np.ndarray, 'h w c']]:
  """Decodes random frames of a video, as the dataset's builder scales them before it stores them.

  Raises:
    av.error.FFmpegError: the video cannot be decoded.
  """
  frames = []
  with av.open(str(path)) as container:
    total = sum(1 for _ in container.decode(video=0))
  wanted = set(rng.choice(total, min(count, total), replace=False).tolist())
  with av.open(str(path)) as container:
    for number, frame in enumerate(container.decode(video=0)):
      if number in wanted:
        size = stored_size(frame.width, frame.height, STORED.short_side)
        scaled = frame.reformat(*size, 'rgb24', interpolation='BICUBIC')
        frames.append(np.ascontiguousarray(scaled.to_ndarray()))
  return frames


def losses(frame: UInt8[np.ndarray, 'h w c'], rng: np.random.Generator) -> dict[str, float]:
  """Stores a frame as the dataset does, crops it at random, and returns the PSNR of each loss."""
  jpeg = simplejpeg.encode_jpeg(
    frame, quality=STORED.jpeg_quality, colorspace='RGB', colorsubsampling='420'
  )
  stored = simplejpeg.decode_jpeg(jpeg, 'RGB')
  box = augment.random_resized_crop_box(rng.random, *frame.shape[:2])
  inside = np.s_[box.top : box.top + box.height, box.left : box.left + box.width]
  fast, exact = (
    augment.crop_and_resize(stored, box, IMAGE_SIZE, resize=name) for name in ('fast', 'exact')
  )
  undamaged = augment.crop_and_resize(frame, box, IMAGE_SIZE, resize='exact')
  return {
    'fast_resize': psnr(fast, exact),
    'storage': psnr(stored[inside], frame[inside]),
    'storage_resized': psnr(exact, undamaged),
  }


def measure(root: pathlib.Path, *, crops: int, seed: int) -> dict[str, Any]:
  """Takes about equally many crops of every video, each of a frame of its own.

  Raises:
    UserError: there is no video, or none can be decoded.
  """
  rng, files, rows = np.random.default_rng(seed), clips.find_files(root), []
  videos = 0
  for path in files:
    try:
      frames = random_frames(path, rng, -(-crops // len(files)))
    except (av.error.FFmpegError, IndexError, ValueError) as error:
      print(f'note: {path} is left out: {error}')
      continue
    rows += [losses(frame, rng) for frame in frames]
    videos += 1
  if not rows:
    raise UserError(f'no video in --videos={root} can be decoded; give another folder.')
  summary = {
    name: {'mean': statistics.fmean(row[name] for row in rows), 'min': min(r[name] for r in rows)}
    for name in LOSSES
  }
  worse = sum(row['fast_resize'] < row['storage'] for row in rows)
  return {'videos': videos, 'crops': len(rows), 'psnr': summary, 'resize_loses_more_in': worse}


def show(result: dict[str, Any]) -> str:
  """Returns the table as text."""
  lines = [f'{result["crops"]} crops of {result["videos"]} videos; PSNR in dB', '']
  lines.append(f'{"":<62}{"mean":>6}{"min":>7}')
  for name, title in LOSSES.items():
    row = result['psnr'][name]
    lines.append(f'{title:<62}{row["mean"]:>6.1f}{row["min"]:>7.1f}')
  difference = result['psnr']['fast_resize']['mean'] - result['psnr']['storage']['mean']
  smaller = 'fast resize' if difference > 0 else 'storage'
  lines.append(
    f'The {smaller} loses less, by {abs(difference):.1f} dB in the mean; in'
    f' {result["resize_loses_more_in"]} of {result["crops"]} crops the resize loses more.'
  )
  return '\n'.join(lines)


def parse() -> argparse.Namespace:
  """Reads the command line.

  Raises:
    UserError: a flag is wrong.
  """
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--videos', type=pathlib.Path, required=True, help='a tree of videos')
  parser.add_argument('--crops', type=int, default=600, help='of all videos (%(default)s)')
  parser.add_argument('--seed', type=int, default=0, help='(%(default)s)')
  parser.add_argument('--json', type=pathlib.Path, help='file to write the numbers to')
  arguments = parser.parse_args()
  for name, least in (('crops', 1), ('seed', 0)):
    if getattr(arguments, name) < least:
      raise UserError(f'--{name}={getattr(arguments, name)} is too small; give at least {least}.')
  rounds.check_output(arguments.json)
  return arguments


def main() -> None:
  """The command line."""
  arguments = parse()
  result = measure(arguments.videos, crops=arguments.crops, seed=arguments.seed)
  print(show(result))
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
  cli.run(main)
