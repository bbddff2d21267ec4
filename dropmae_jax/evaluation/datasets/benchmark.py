"""What a zero-shot benchmark consists of: clips, their labels on the grid of tokens, and a score.

To add a benchmark: write a class with the members of `Benchmark` and add it to
`evaluate.BENCHMARKS`.
"""

import dataclasses
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from dropmae_jax.evaluation.protocols import Geometry, Protocol
from dropmae_jax.runtime.errors import UserError, first_line, remedy_of

# What Pillow raises for files that are no images, or damaged.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True)
class Clip:
  """An opened clip.

  Attributes:
    name: as in the benchmark; also of the folder with its results, so it may contain '/'.
    num_frames: at least 2.
    size: (height, width) of its frames in pixels.
    frame: reads the RGB frame of a number, from 0; raises UserError.
    truth: what the benchmark needs for labels and score; its own affair.
  """

  name: str
  num_frames: int
  size: tuple[int, int]
  frame: Callable[[int], UInt8[np.ndarray, 'h w c']]
  truth: Any


@typing.runtime_checkable
class Benchmark(typing.Protocol):
  """A data set of clips whose first frame is labelled, and the measure for the rest.

  The constructor takes `root: pathlib.Path` and may take `split` and `scale`, which have defaults;
  it reads the list of clips and checks that it is not empty. All methods raise `UserError`, one
  sentence with path and remedy, if files are missing, damaged or do not fit together.

  Attributes:
    names: of the clips, in the benchmark's order.
  """

  names: list[str]

  def open(self, name: str) -> Clip:
    """Opens a clip and checks its files."""

  def input_size(self, clip: Clip, protocol: Protocol, patch_size: int) -> tuple[int, int]:
    """Returns height and width in pixels of the network's input; the caller fits it to patches."""

  def labels(
    self, clip: Clip, geometry: Geometry, protocol: Protocol
  ) -> Float32[np.ndarray, 'gh gw labels']:
    """Returns the labels of frame 0 on the grid of tokens."""

  def read_out(
    self,
    clip: Clip,
    number: int,
    labels: Float32[np.ndarray, 'gh gw labels'],
    geometry: Geometry,
    protocol: Protocol,
  ) -> np.ndarray:
    """Returns the result of a frame, such as a mask, from its propagated labels."""

  def write(self, clip: Clip, results: list[np.ndarray], folder: pathlib.Path) -> None:
    """Writes the results of all frames in the benchmark's layout for submissions.

    Args:
      clip: they belong to.
      results: of `read_out`, for frames 0, 1, ...
      folder: of this clip; exists and is empty.
    """

  def read(self, clip: Clip, folder: pathlib.Path) -> list[np.ndarray]:
    """Reads what `write` has written."""

  def overlay(self, clip: Clip, number: int, result: np.ndarray) -> UInt8[np.ndarray, 'h w c']:
    """Returns a frame with its result drawn over it (see `overlays`)."""

  def score(self, clip: Clip, results: list[np.ndarray]) -> Any:
    """Returns the numbers of a clip that `summarise` needs, as values for JSON."""

  def table(self, scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns numbers for people by the name of a clip and of the number, in percent or pixels."""

  def summarise(self, scores: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of the data set by name, from the `score` of every clip."""


def read_frame(path: pathlib.Path) -> UInt8[np.ndarray, 'h w c']:
  """Reads an image as RGB.

  Raises:
    UserError: there is none, or it is damaged.
  """
  try:
    with Image.open(path) as image:
      return np.asarray(image.convert('RGB'))
  except IMAGE_ERRORS as error:
    raise unreadable(path, error) from error


def unreadable(path: pathlib.Path, error: Exception) -> UserError:
  """Returns the error of a file that cannot be read."""
  remedy = remedy_of(error, 'download it again')
  return UserError(f'{path} cannot be read ({first_line(error)}); {remedy}.')
