"""Pictures of an evaluation: results drawn over the frames, as a strip (PNG) and a film (MP4)."""

import pathlib
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dropmae_jax.data import synthetic_clips
from dropmae_jax.evaluation.datasets import masks
from dropmae_jax.evaluation.datasets.benchmark import Benchmark, Clip
from dropmae_jax.runtime import atomic_file
from dropmae_jax.runtime.errors import os_errors_as_user_errors

STRIP = 6  # Frames in a strip, the first and the last among them.
HEIGHT = 240  # Pixels of a strip, at most.
STRENGTH = 0.55  # Of the colour of an object.


def with_mask(
  frame: UInt8[np.ndarray, 'h w c'], mask: UInt8[np.ndarray, 'h w']
) -> UInt8[np.ndarray, 'h w c']:
  """Colours the objects of a mask, of any size, by DAVIS' palette."""
  mask = cv2.resize(mask, frame.shape[1::-1], interpolation=cv2.INTER_NEAREST)
  colours = np.array(masks.palette(), np.uint8).reshape(256, 3)[mask]
  mixed = (1 - STRENGTH) * frame + STRENGTH * colours
  is_object = (mask > 0) & (mask != masks.VOID)
  return np.where(is_object[..., None], mixed.round(), frame).astype(np.uint8)


def with_points(
  frame: UInt8[np.ndarray, 'h w c'], points: Float[np.ndarray, 'k xy']
) -> UInt8[np.ndarray, 'h w c']:
  """Draws points at (x, y) in pixels, each in its colour; one that is not finite is left out."""
  drawn = frame.copy()
  colours = np.array(masks.palette()).reshape(256, 3)
  radius = max(2, min(frame.shape[:2]) // 60)
  for number, point in enumerate(points):
    if np.isfinite(point).all():
      centre = tuple(np.round(np.clip(point, -1e4, 1e4)).astype(int).tolist())
      colour = colours[1 + number % 254].tolist()
      cv2.circle(drawn, centre, radius, colour, thickness=-1, lineType=cv2.LINE_AA)
  return drawn


def write(benchmark: Benchmark, clip: Clip, results: list[Any], path: pathlib.Path) -> None:
  """Writes the strip `<path>.png` and the film `<path>.mp4` of a clip.

  Raises:
    UserError: they cannot be written.
  """
  drawn = [benchmark.overlay(clip, number, result) for number, result in enumerate(results)]
  with os_errors_as_user_errors(f'{path}.png cannot be written', 'give another --output.'):
    path.parent.mkdir(parents=True, exist_ok=True)
  picture, film = (path.with_name(f'{path.name}.{ending}') for ending in ('png', 'mp4'))
  with atomic_file.staged(picture, num_bytes=0, has_card=False) as partial:
    strip(drawn).save(partial, format='PNG')
  with atomic_file.staged(film, num_bytes=0, has_card=False) as partial:
    synthetic_clips.write_mp4(partial, drawn)


def strip(images: list[UInt8[np.ndarray, 'h w c']]) -> Image.Image:
  """Returns frames at equal distances, side by side."""
  chosen = np.linspace(0, len(images) - 1, min(STRIP, len(images))).round().astype(int)
  row = Image.fromarray(np.concatenate([images[number] for number in chosen], axis=1))
  scale = min(1, HEIGHT / row.height)
  return row.resize((max(1, round(row.width * scale)), max(1, round(row.height * scale))))
