"""Writes clips with known objects: real h264 files in Kinetics layout, true masks in DAVIS layout.

    dropmae-clips --output=DIR [--train=N] [--val=N] [--frames=N] [--seed=N]

Textured shapes move, turn, grow and hide one another in front of a moving textured background. A
class is a kind of motion. The same seed gives the same clips. Below DIR:

  train/<class>/<clip>.mp4, val/<class>/<clip>.mp4
  davis/JPEGImages/480p/<clip>/00000.jpg, davis/Annotations/480p/<clip>/00000.png (object numbers,
  0 is background), davis/ImageSets/2017/{train,val}.txt
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from fractions import Fraction

import av
import cv2
import numpy as np
import tqdm
from jaxtyping import UInt8
from PIL import Image

from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError, os_errors_as_user_errors

FRAMES_PER_SECOND = 24
SPRITE = 96  # Pixels along a side of the canvas that a shape is drawn on.
PALETTE = (0, 0, 0, 200, 40, 40, 40, 200, 40, 220, 200, 40, 60, 80, 220)


@dataclasses.dataclass(frozen=True)
class ClipOptions:
  """What is written. The same options give the same files."""

  train: int = 48
  val: int = 4
  frames: int = 40
  height: int = 144
  width: int = 192
  objects: int = 3
  seed: int = 0


# Cells along a side of the noise, and its strength in grey levels.
GROUND = ((3, 55.0), (6, 25.0))
SKIN = ((3, 25.0), (6, 35.0))


def texture(
  rng: np.random.Generator, height: int, width: int, scales: tuple[tuple[int, float], ...]
) -> UInt8[np.ndarray, 'h w c']:
  """Draws a coloured texture: smooth noise of some scales around a base colour."""
  image = np.empty((height, width, 3), np.float32)
  image[:] = rng.uniform(40, 215, 3)
  for cells, strength in scales:
    noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
    image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
  return np.clip(image, 0, 255).astype(np.uint8)


def shape_mask(rng: np.random.Generator) -> UInt8[np.ndarray, 'h w']:
  """Draws one of several shapes, 1 inside: an ellipse, a ring, or a polygon or star."""
  mask = np.zeros((SPRITE, SPRITE), np.uint8)
  centre, radius = (SPRITE // 2, SPRITE // 2), SPRITE * 0.48
  kind = rng.choice(['ellipse', 'ring', 'polygon', 'star'])
  if kind in ('ellipse', 'ring'):
    axes = (int(radius), int(radius * rng.uniform(0.5, 1.0)))
    cv2.ellipse(mask, centre, axes, 0, 0, 360, 1, -1)
    if kind == 'ring':
      cv2.ellipse(mask, centre, (axes[0] // 2, axes[1] // 2), 0, 0, 360, 0, -1)
    return mask
  corners = int(rng.integers(3, 7))
  inner = [rng.uniform(0.4, 0.6)] if kind == 'star' else []
  lengths = np.array([1.0, *inner] * corners) * radius
  angles = np.linspace(0, 2 * np.pi, len(lengths), endpoint=False)
  points = SPRITE / 2 + lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
  cv2.fillPoly(mask, [points.round().astype(np.int32)], 1)
  return mask


def _bounce(phase: float) -> float:
  """A triangle wave between -1 and 1."""
  return 2 / np.pi * np.arcsin(np.sin(phase))


MOTIONS = {
  'bouncing': lambda u, v, t: (_bounce(u + 5 * t), _bounce(v + 3 * t)),
  'orbiting': lambda u, v, t: (np.cos(u + 4 * t), np.sin(u + 4 * t) * np.cos(v)),
  'swaying': lambda u, v, t: (np.sin(u + 6 * t), np.sin(v) + 0.3 * np.sin(u + 3 * t)),
  'drifting': lambda u, v, t: (
    np.cos(u) + (t - 0.5) * np.cos(v),
    np.sin(u) + (t - 0.5) * np.sin(v),
  ),
}


def object_placements(
  rng: np.random.Generator, motion: str, options: ClipOptions
) -> list[np.ndarray]:
  """Returns one 2x3 affine map per frame, from the shape's canvas to the frame."""
  u, v = rng.uniform(0, 2 * np.pi, 2)
  size = rng.uniform(0.35, 0.6) * options.height / SPRITE
  growth, spin = rng.uniform(0.0, 0.3), rng.uniform(-180, 180)
  maps = []
  for t in np.linspace(0, 1, options.frames):
    x, y = MOTIONS[motion](u, v, t)
    scale = size * (1 + growth * np.sin(2 * np.pi * t + v))
    affine = cv2.getRotationMatrix2D((SPRITE / 2, SPRITE / 2), spin * t, scale)
    affine[:, 2] += (
      options.width * (0.5 + 0.36 * x) - SPRITE / 2,
      options.height * (0.5 + 0.36 * y) - SPRITE / 2,
    )
    maps.append(affine)
  return maps


def make_clip(
  rng: np.random.Generator, motion: str, options: ClipOptions
) -> tuple[UInt8[np.ndarray, 't h w c'], UInt8[np.ndarray, 't h w']]:
  """Draws a clip and the object number of every pixel; higher numbers are in front."""
  height, width, count = options.height, options.width, options.frames
  margin = 24
  ground = texture(rng, height + 2 * margin, width + 2 * margin, GROUND)
  pan = rng.uniform(-1, 1, (2, 2)) * (margin - 1)
  frames = np.empty((count, height, width, 3), np.uint8)
  labels = np.zeros((count, height, width), np.uint8)
  for number, t in enumerate(np.linspace(0, 1, count)):
    shift = -margin + pan[0] + (pan[1] - pan[0]) * t
    affine = np.array([[1, 0, shift[0]], [0, 1, shift[1]]])
    frames[number] = cv2.warpAffine(ground, affine, (width, height))
  for label in range(1, options.objects + 1):
    mask, skin = shape_mask(rng), texture(rng, SPRITE, SPRITE, SKIN)
    for number, affine in enumerate(object_placements(rng, motion, options)):
      inside = cv2.warpAffine(mask, affine, (width, height), flags=cv2.INTER_NEAREST) > 0
      frames[number][inside] = cv2.warpAffine(
        skin, affine, (width, height), borderMode=cv2.BORDER_REPLICATE
      )[inside]
      labels[number][inside] = label
  return frames, labels


def write_mp4(
  path: pathlib.Path,
  frames: Iterable[UInt8[np.ndarray, 'h w c']],
  *,
  rate: int | Fraction = FRAMES_PER_SECOND,
) -> None:
  """Encodes frames as h264 so that the bytes are always the same.

  One thread, and a constant quantiser: with a constant rate factor the encoder's decisions changed
  from one call to the next (PyAV 18.1.0, November 2026).

  Args:
    path: to write.
    frames: one or more; of an odd side the last row or column is left out, as h264 needs.
    rate: frames a second.
  """
  frames = iter(frames)
  first = next(frames, None)
  if first is None:
    raise ValueError(f'there are no frames for {path}')
  height, width = (side // 2 * 2 for side in first.shape[:2])
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('libx264', rate=rate)
    stream.height, stream.width = height, width
    stream.pix_fmt = 'yuv420p'
    stream.options = {'qp': '18', 'threads': '1'}
    for frame in itertools.chain([first], frames):
      pixels = np.ascontiguousarray(frame[:height, :width])
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, 'rgb24')))
    container.mux(stream.encode())


def write_davis(folder: pathlib.Path, clip: str, frames: np.ndarray, labels: np.ndarray) -> None:
  """Writes frames and object numbers (palette PNG) as DAVIS lays them out."""
  images = folder / 'JPEGImages' / '480p' / clip
  annotations = folder / 'Annotations' / '480p' / clip
  images.mkdir(parents=True)
  annotations.mkdir(parents=True)
  for number, (frame, label) in enumerate(zip(frames, labels, strict=True)):
    Image.fromarray(frame).save(images / f'{number:05d}.jpg', quality=95)
    annotation = Image.fromarray(label, mode='P')
    annotation.putpalette(PALETTE)
    annotation.save(annotations / f'{number:05d}.png')


def write_clips(output: pathlib.Path, options: ClipOptions) -> int:
  """Writes all clips below `output`, whole or not at all; returns how many are new.

  Raises:
    UserError: `output` holds something else.
  """
  described = json.dumps(dataclasses.asdict(options))
  description = output / 'clips.json'
  if output.exists() and not (output.is_dir() and not any(output.iterdir())):
    if not description.exists() or description.read_text() != described:
      raise UserError(
        f'--output={output} holds something other than these clips;'
        ' remove it or name another folder.'
      )
    return 0
  staging = output.with_name(f'{output.name}.partial')
  shutil.rmtree(staging, ignore_errors=True)
  motions, number = list(MOTIONS), 0
  progress = tqdm.tqdm(total=options.train + options.val, unit='clip', disable=None)
  for split, count in (('train', options.train), ('val', options.val)):
    names = []
    for index in range(count):
      motion = motions[index % len(motions)]
      clip = f'{motion}_{number:04d}'
      rng = np.random.default_rng([options.seed, number])
      frames, labels = make_clip(rng, motion, options)
      (staging / split / motion).mkdir(parents=True, exist_ok=True)
      write_mp4(staging / split / motion / f'{clip}.mp4', frames)
      write_davis(staging / 'davis', clip, frames, labels)
      names.append(clip)
      number += 1
      progress.update()
    lists = staging / 'davis' / 'ImageSets' / '2017'
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f'{split}.txt').write_text(''.join(f'{name}\n' for name in names))
  progress.close()
  (staging / 'clips.json').write_text(described)
  os.rename(staging, output)
  return number


def main() -> None:
  """The command line."""
  parser = cli.Parser(prog='dropmae-clips', description=__doc__.splitlines()[0])
  parser.add_argument('--output', required=True, type=pathlib.Path, help='folder to make')
  for field in dataclasses.fields(ClipOptions):
    parser.add_argument(f'--{field.name}', type=int, default=field.default, help='(%(default)s)')
  arguments = vars(parser.parse_args())
  output = arguments.pop('output')
  options = ClipOptions(**arguments)
  for name, least in (('frames', 1), ('train', 1), ('val', 0), ('objects', 0), ('seed', 0)):
    if getattr(options, name) < least:
      raise UserError(f'--{name}={getattr(options, name)} is too small; give at least {least}.')
  for name in ('height', 'width'):
    if getattr(options, name) < 16 or getattr(options, name) % 2:
      raise UserError(f'--{name}={getattr(options, name)} must be even, as h264 needs, and >= 16.')
  with os_errors_as_user_errors(f'--output={output} cannot be written', 'give another folder.'):
    new = write_clips(output, options)
  total = options.train + options.val
  cli.print_line(
    f'{output}: {new} clips written' if new else f'{output}: {total} clips are there already'
  )


def command() -> None:
  """The entry point dropmae-clips."""
  cli.run(main)


if __name__ == '__main__':
  command()
