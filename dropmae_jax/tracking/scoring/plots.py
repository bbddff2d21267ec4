"""Success and precision plots as images, drawn with Pillow as all figures here."""

import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from PIL import Image, ImageDraw, ImageFont

from dropmae_jax.runtime import atomic_file
from tfds_kinetics.messages import one_line

WIDTH, HEIGHT = 720, 480  # Of the axes; a row of the legend and the captions come on top.
LEFT, TOP, RIGHT, BOTTOM, ROW = 64, 64, 24, 56, 22
SCALE = 2  # All is drawn at twice the size and then reduced, which smooths the lines.
FONT_SIZE = 14
# Differ in lightness too, for those who see few colours (Okabe and Ito).
COLOURS = ('#d55e00', '#0072b2', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#999999')


class Line(NamedTuple):
  """A tracker in a plot.

  Attributes:
    tracker: its name.
    percent: its curve.
    number: what the legend says of it, in percent.
  """

  tracker: str
  percent: Float64[np.ndarray, ' t']
  number: float


class _Axes(NamedTuple):
  """Where thresholds and percentages lie in an image."""

  last: float  # Threshold at the right end.

  def place(self, threshold: float, percent: float) -> tuple[float, float]:
    """Returns the pixel of a point."""
    return LEFT + WIDTH * threshold / self.last, TOP + HEIGHT * (1 - percent / 100)


def draw(
  title: str, toolkit: str, label: str, thresholds: Float64[np.ndarray, ' t'], lines: list[Line]
) -> Image.Image:
  """Draws the curves of trackers, and a legend in which the best comes first.

  Args:
    title: above the plot.
    toolkit: whose rules the numbers follow; below the title.
    label: of the thresholds.
    thresholds: from 0 on.
    lines: of the trackers; each has its colour by its place here.
  """
  size = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM + ROW * len(lines)
  sheet = Image.new('RGB', (SCALE * size[0], SCALE * size[1]), 'white')
  pen, axes = _Pen(sheet), _Axes(float(thresholds[-1]))
  pen.text((LEFT, 14), title)
  pen.text((LEFT, 36), toolkit, '#555555')
  _draw_grid(pen, axes, label)
  colours = [COLOURS[number % len(COLOURS)] for number in range(len(lines))]
  # A second round of the colours is thinner.
  widths = [3 if number < len(COLOURS) else 1 for number in range(len(lines))]
  # The first tracker is drawn last, over the others.
  for line, colour, line_width in reversed(list(zip(lines, colours, widths, strict=True))):
    points = [axes.place(*point) for point in zip(thresholds, line.percent, strict=True)]
    pen.line(points, colour, line_width)
  order = sorted(range(len(lines)), key=lambda number: -lines[number].number)
  for row, number in enumerate(order):
    y = TOP + HEIGHT + BOTTOM + ROW * row
    pen.line([(LEFT, y), (LEFT + 28, y)], colours[number], widths[number])
    pen.text((LEFT + 38, y - 9), f'{lines[number].number:6.2f}   {one_line(lines[number].tracker)}')
  return sheet.resize(size, Image.Resampling.BOX)


def _draw_grid(pen: '_Pen', axes: _Axes, label: str) -> None:
  for part in range(11):
    percent, threshold = 10 * part, axes.last * part / 10
    pen.line([axes.place(0, percent), axes.place(axes.last, percent)], '#dddddd', 1)
    pen.line([axes.place(threshold, 0), axes.place(threshold, 100)], '#dddddd', 1)
    x, y = axes.place(0, percent)
    pen.text((x - 32, y - 9), f'{percent:3d}')
    x, y = axes.place(threshold, 0)
    pen.text((x - 9, y + 5), f'{threshold:g}')
  pen.text((LEFT, TOP + HEIGHT + 25), f'{label}; frames in percent', '#555555')


class _Pen:
  """Draws at SCALE times the size."""

  def __init__(self, sheet: Image.Image) -> None:
    self._pen = ImageDraw.Draw(sheet)
    self._font = ImageFont.load_default(SCALE * FONT_SIZE)

  def text(self, place: tuple[float, float], text: str, colour: str = 'black') -> None:
    """Writes text from its upper left corner."""
    self._pen.text((SCALE * place[0], SCALE * place[1]), text, fill=colour, font=self._font)

  def line(self, points: list[tuple[float, float]], colour: str, width: int) -> None:
    """Draws a line through points."""
    scaled = [(SCALE * x, SCALE * y) for x, y in points]
    self._pen.line(scaled, fill=colour, width=SCALE * width, joint='curve')


def save(image: Image.Image, path: pathlib.Path) -> None:
  """Writes a PNG.

  Raises:
    UserError: it cannot be written.
  """
  with atomic_file.staged(path, num_bytes=0, has_card=False) as partial:
    image.save(partial, format='PNG')
