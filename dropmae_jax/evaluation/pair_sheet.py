"""Shows a dataset as training reads it, before training.

    dropmae-inspect --data_dir=DIR --output=FILE.png [--dataset=...] [--seed=N]

prints statistics of the split of each dataset, and draws the first pairs that training with this
seed reads: both whole frames with the boxes of their crops, the two crops, and at the bottom the
distribution of the distance between the frames of a pair. It reads only the frames that it draws.
"""

import argparse
import pathlib
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

from dropmae_jax.config import DataOptions
from dropmae_jax.data import augment, frame_pairs, pair_stream
from dropmae_jax.data.frame_pairs import DrawnPair
from dropmae_jax.data.mixture import Mixture, open_mixture
from dropmae_jax.data.video_source import TfdsVideos, VideoSource
from dropmae_jax.runtime import atomic_file, cli
from dropmae_jax.runtime.errors import UserError, check_name
from dropmae_jax.train_step import derive_seeds

GAP_DRAWS = 10_000
GAP_BARS = 25
BAR_WIDTH = 50  # Characters of the longest printed bar.
MARGIN, CAPTION, CHART = 8, 20, 140
PANEL = 640  # Pixels along a side of what is drawn, at most; a sheet has up to 100 rows of them.
BOX_COLOUR = (255, 210, 0)


class Index(NamedTuple):
  """What is known of a split without reading its frames; arrays have an entry per clip.

  Only datasets of tfds_kinetics have classes and a size in bytes; other datasets may have no paths.

  Attributes:
    dataset: its name.
    frames: number of frames.
    label: index of the class in `classes`.
    path: string.
    classes: names; '' where the dataset has no classes.
    num_bytes: of all shards.
  """

  dataset: str
  frames: Int[np.ndarray, ' n']
  label: Int[np.ndarray, ' n'] | None = None
  path: np.ndarray | None = None
  classes: np.ndarray | None = None
  num_bytes: int | None = None


class ShownPair(NamedTuple):
  """A pair of the training stream: its dataset, what was drawn and read, and the two crops.

  Frames and crops of more than PANEL pixels are scaled down, and the boxes with them.
  """

  dataset: int
  drawn: DrawnPair
  crops: UInt8[np.ndarray, 'f size size c']


def first_pairs(
  videos: Mixture, options: DataOptions, *, image_size: int, seed: int, count: int
) -> list[ShownPair]:
  """Makes the first pairs that training with this seed reads."""
  keys = pair_stream.PairKeys(videos, seed)
  maker = frame_pairs.PairMaker(videos, options, image_size)
  pairs = []
  for number in range(count):
    drawn, crops = maker.draw(keys[number]), np.empty((2, image_size, image_size, 3), np.uint8)
    maker.crop(drawn, crops)
    panels = [_fitted(image) for image in drawn.images]
    boxes = [
      augment.same_place(box, image.shape[:2], panel.shape[:2])
      for box, image, panel in zip(drawn.boxes, drawn.images, panels, strict=True)
    ]
    drawn = drawn._replace(images=panels, boxes=boxes)
    pairs.append(
      ShownPair(keys[number].dataset, drawn, np.stack([_fitted(crop) for crop in crops]))
    )
  return pairs


def _fitted(image: UInt8[np.ndarray, 'h w c']) -> UInt8[np.ndarray, 'sh sw c']:
  """Returns an image of at most PANEL pixels along a side: itself, or scaled down."""
  scale = max(image.shape[:2]) / PANEL
  if scale <= 1:
    return image
  size = [max(1, round(side / scale)) for side in image.shape[1::-1]]
  return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def read_index(videos: VideoSource, split: str) -> Index:
  """Collects what is known of an opened split."""
  if not isinstance(videos, TfdsVideos):
    dataset = f'{type(videos).__module__}:{type(videos).__qualname__}'
    frames = np.array([videos.num_frames(video) for video in range(len(videos))])
    path = np.asarray(videos.paths()) if hasattr(videos, 'paths') else None
    return Index(dataset, frames, path=path)
  folder = videos.folder
  shards = folder.glob(f'*-{split}.array_record*')
  arrays = videos.read_index('label', 'path', 'classes')
  columns = {name: arrays[name] for name in ('frames', 'label', 'path', 'classes')}
  dataset = '/'.join(folder.parts[-3:-1])
  return Index(dataset, **columns, num_bytes=sum(path.stat().st_size for path in shards))


def class_name(index: Index, video: int) -> str:
  """Returns the name of a clip's class; '-' if there are no classes."""
  return '-' if index.classes is None else str(index.classes[index.label[video]]) or '-'


def gap_counts(
  frames: Int[np.ndarray, ' n'], frame_gap: int, *, seed: int, draws: int
) -> Int[np.ndarray, ' g']:
  """Counts the gaps of pairs drawn from random clips with the distribution of training.

  These are not the pairs of the training stream.

  Args:
    frames: number of frames of each clip.
    frame_gap: the frames of a pair are at most frame_gap - 1 apart.
    seed: of clips and pairs.
    draws: number of pairs.

  Returns:
    The number of pairs with a gap of 0, 1, ..., frame_gap - 1 frames.
  """
  rng = np.random.default_rng(seed)
  pairs = [
    frame_pairs.sample_pair(rng.random, int(num_frames), frame_gap)
    for num_frames in rng.choice(frames, draws)
  ]
  return np.bincount([later - earlier for earlier, later in pairs], minlength=frame_gap)


def bars(counts: Int[np.ndarray, ' g']) -> list[tuple[str, int]]:
  """Groups gaps into bars of equal width: of each its range, such as '1-2', and its count."""
  width = -(-(len(counts) - 1) // GAP_BARS)
  grouped = [('0', int(counts[0]))] if counts[0] else []
  for low in range(1, len(counts), width):
    high = min(low + width, len(counts)) - 1
    name = str(low) if low == high else f'{low}-{high}'
    grouped.append((name, int(counts[low : high + 1].sum())))
  return grouped


def statistics(index: Index, counts: Int[np.ndarray, ' g']) -> str:
  """Returns statistics of the split and its gaps, as text; '-' where a number is not known."""
  frames = index.frames
  total, grouped = int(frames.sum()), bars(counts)
  most = max(count for _, count in grouped)
  classes = '-' if index.classes is None else sum(name != '' for name in index.classes)
  num_bytes = index.num_bytes
  size = '-' if num_bytes is None else f'{num_bytes} ({num_bytes / total:.0f} per frame)'
  lines = [
    f'dataset           {index.dataset}',
    f'clips             {len(frames)}',
    f'frames            {total}',
    f'frames per clip   least {frames.min()}, median {np.median(frames):g}, most {frames.max()}',
    f'classes           {classes}',
    f'bytes on disk     {size}',
    f'frames between the two of a pair, {counts.sum()} pairs:',
  ]
  lines += [
    f'{name:>9} {count / counts.sum():6.1%} {"#" * round(BAR_WIDTH * count / most)}'
    for name, count in grouped
  ]
  return '\n'.join(lines)


def draw_chart(pen: ImageDraw.ImageDraw, top: int, width: int, counts: np.ndarray) -> None:
  """Draws the gaps as a bar chart; below each bar is the least gap of its range."""
  grouped = bars(counts)
  most, step = max(count for _, count in grouped), (width - 2 * MARGIN) / len(grouped)
  title = f'frames between the two of a pair, {counts.sum()} pairs'
  pen.text((MARGIN, top), title, fill='black')
  floor = top + CHART - CAPTION
  for number, (name, count) in enumerate(grouped):
    left = MARGIN + number * step
    height = (CHART - 2 * CAPTION) * count / most
    pen.rectangle((left, floor - height, left + max(1, step - 3), floor), fill=(70, 110, 180))
    pen.text((left, floor + 3), name.partition('-')[0], fill='black')


def contact_sheet(
  pairs: list[ShownPair], indices: list[Index], counts: Int[np.ndarray, ' g']
) -> Image.Image:
  """Draws a row for each pair, and a chart of the gaps at the bottom.

  A row has a caption, the two frames with the boxes of the crops, and the two crops; it is as high
  as its own frames.

  Args:
    pairs: at least one.
    indices: of each dataset of the mixture.
    counts: of the gaps; see `gap_counts`.
  """
  images = [image for pair in pairs for image in pair.drawn.images]
  size = pairs[0].crops.shape[1]
  wide = max(image.shape[1] for image in images)
  columns = [MARGIN, 2 * MARGIN + wide, 3 * MARGIN + 2 * wide, 4 * MARGIN + 2 * wide + size]
  heights = [max(size, *(image.shape[0] for image in pair.drawn.images)) for pair in pairs]
  tops = np.cumsum([MARGIN, *(CAPTION + height + MARGIN for height in heights)]).tolist()
  width, bottom = columns[-1] + size + MARGIN, tops[-1]
  sheet = Image.new('RGB', (width, bottom + CHART), 'white')
  pen = ImageDraw.Draw(sheet)
  for top, pair in zip(tops, pairs, strict=False):
    earlier, later = pair.drawn.frame_numbers
    index, video = indices[pair.dataset], pair.drawn.video
    path = '-' if index.path is None else index.path[video]
    caption = (
      f'{index.dataset}   {path}   class {class_name(index, video)}'
      f'   frames {earlier} and {later} of {index.frames[video]}   gap {later - earlier}'
    )
    # PIL's built-in font has few letters.
    caption = caption.encode('ascii', 'backslashreplace').decode()
    pen.text((MARGIN, top + 3), caption, fill='black')
    panels = [*pair.drawn.images, *pair.crops]
    for left, panel in zip(columns, panels, strict=True):
      sheet.paste(Image.fromarray(panel), (left, top + CAPTION))
    for left, box in zip(columns, pair.drawn.boxes, strict=False):
      x, y = left + box.left, top + CAPTION + box.top
      pen.rectangle((x, y, x + box.width - 1, y + box.height - 1), outline=BOX_COLOUR, width=2)
  draw_chart(pen, bottom, width, counts)
  return sheet


def parse() -> tuple[argparse.Namespace, DataOptions]:
  """Reads the command line.

  Raises:
    UserError: an option is wrong.
  """
  defaults = DataOptions()
  parser = cli.Parser(prog='dropmae-inspect', description=__doc__.splitlines()[0])
  parser.add_argument(
    '--data_dir', required=True, type=pathlib.Path, help='as in the config of a training'
  )
  parser.add_argument('--output', required=True, type=epath.Path, help='the PNG to write')
  parser.add_argument(
    '--dataset',
    default='kinetics_frames/folder',
    help='as in the config (%(default)s)',
  )
  parser.add_argument('--split', default='train', help='(%(default)s)')
  parser.add_argument('--seed', type=int, default=0, help='of the training (%(default)s)')
  parser.add_argument('--pairs', type=int, default=8, help='to draw (%(default)s)')
  parser.add_argument('--image_size', type=int, default=224, help='of the crops (%(default)s)')
  parser.add_argument('--frame_gap', type=int, default=defaults.frame_gap, help='(%(default)s)')
  parser.add_argument('--resize', default=defaults.resize, help='(%(default)s)')
  parser.add_argument('--shared_augmentation', action='store_true', help='one crop for both frames')
  arguments = parser.parse_args()
  for name, low, high in (
    ('seed', 0, 2**32 - 1),
    ('pairs', 1, 100),
    ('image_size', 1, 4096),
    ('frame_gap', 2, 10**6),
  ):
    if not low <= getattr(arguments, name) <= high:
      raise UserError(f'--{name}={getattr(arguments, name)} is not in {low}..{high}.')
  check_name('--resize', arguments.resize, augment.RESIZES)
  options = DataOptions(
    frame_gap=arguments.frame_gap,
    resize=arguments.resize,
    shared_augmentation=arguments.shared_augmentation,
    num_threads=0,
  )
  return arguments, options


def main() -> None:
  """The command line."""
  arguments, options = parse()
  atomic_file.check_file(arguments.output, has_card=False)
  mixture = open_mixture(str(arguments.data_dir), arguments.dataset, arguments.split)
  indices = [read_index(each, arguments.split) for each in mixture.datasets]
  counts = []
  for index, weight in zip(indices, mixture.weights, strict=True):
    draws = max(1, round(GAP_DRAWS * weight / sum(mixture.weights)))
    counts.append(gap_counts(index.frames, options.frame_gap, seed=arguments.seed, draws=draws))
    for line in statistics(index, counts[-1]).split('\n'):
      cli.print_line(line)
  pairs = first_pairs(
    mixture,
    options,
    image_size=arguments.image_size,
    seed=derive_seeds(arguments.seed).data,
    count=arguments.pairs,
  )
  for sentence in dict.fromkeys(each for pair in pairs for each in pair.drawn.damaged):
    cli.print_line(f'note: {sentence} Another video is taken instead.')
  sheet = contact_sheet(pairs, indices, sum(counts))
  with atomic_file.staged(arguments.output, num_bytes=0, has_card=False) as partial:
    sheet.save(partial, format='PNG')
  cli.print_line(f'{arguments.output}: the first {len(pairs)} pairs of seed {arguments.seed}')


def command() -> None:
  """The entry point dropmae-inspect."""
  cli.run(main)


if __name__ == '__main__':
  command()
