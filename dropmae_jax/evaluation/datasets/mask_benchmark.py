"""What DAVIS and VIP share: for each clip a folder of JPEG frames and a folder of masks."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from dropmae_jax.evaluation.datasets import masks, overlays
from dropmae_jax.evaluation.datasets.benchmark import IMAGE_ERRORS, Clip, read_frame, unreadable
from dropmae_jax.evaluation.protocols import Geometry, Protocol, resize_nearest
from dropmae_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class MaskTruth:
  """`Clip.truth` of a benchmark with masks.

  Attributes:
    frames: names of the files of frames and masks, without suffix, in order.
    mask: reads the true mask of a frame, with the size of the clip.
    encode: labels of the first mask and their object numbers, computed once for each protocol and
      geometry.
  """

  frames: tuple[str, ...]
  mask: Callable[[int], UInt8[np.ndarray, 'h w']]
  encode: Callable[[Geometry, Protocol], tuple[np.ndarray, np.ndarray]]


class MaskBenchmark:
  """The readers and writers of a benchmark with masks; `Davis` and `Vip` add scores.

  Attributes:
    names: of the clips, in the order of the list.
    benchmark: its key in `Protocol.input_size` and `Protocol.resize_mask`.
    list_file: the text file that names the clips, one a line.
    frame_folder: holds a folder of JPEGs for each clip.
    mask_folder: holds a folder of PNGs for each clip, with the names of the JPEGs.
    highest_label: larger numbers in a mask are background.
    fewest_frames: of a clip.
  """

  benchmark: str
  highest_label: int
  fewest_frames: int

  def __init__(
    self,
    root: pathlib.Path,
    *,
    list_file: str,
    frame_folder: str,
    mask_folder: str,
    size: tuple[int, int] | None = None,
  ) -> None:
    """Reads the list of clips.

    Args:
      root: of the data set.
      list_file: relative to root.
      frame_folder: relative to root.
      mask_folder: relative to root.
      size: (height, width) that frames and masks are resized to; None keeps their own.

    Raises:
      UserError: the list is missing or empty, or a clip of it is missing.
    """
    self.list_file = root / list_file
    self.frame_folder, self.mask_folder = root / frame_folder, root / mask_folder
    self._size = size
    if not self.list_file.is_file():
      raise UserError(
        f'--root={root} has no {list_file}; give the folder that holds this file,'
        f' {frame_folder} and {mask_folder}.'
      )
    self.names = self._read_names()

  def _read_names(self) -> list[str]:
    try:
      text = self.list_file.read_text(encoding='utf-8-sig')
    except IMAGE_ERRORS as error:
      raise unreadable(self.list_file, error) from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
      raise UserError(f'{self.list_file} names no clip; download it again.')
    for name in names:
      if '/' in name or name.startswith('.'):  # Results are written into a folder of this name.
        raise UserError(f'{self.list_file} has {name!r} as the name of a clip; correct it.')
      if names.count(name) > 1:
        raise UserError(f'{self.list_file} names {name!r} twice; remove one of the lines.')
      for folder in (self.frame_folder / name, self.mask_folder / name):
        if not folder.is_dir():
          raise UserError(
            f'{folder} does not exist; complete the data set, or remove {name!r} from'
            f' {self.list_file}.'
          )
    return names

  def open(self, name: str) -> Clip:
    """Opens a clip and checks its files; all masks are read, and the headers of all frames.

    Raises:
      UserError: files are missing, damaged or of different sizes, or there are too few frames.
    """
    frames = self._frame_names(name)
    paths = [self.frame_folder / name / f'{frame}.jpg' for frame in frames]
    mask_paths = [self.mask_folder / name / f'{frame}.png' for frame in frames]
    first_mask = masks.read_png(mask_paths[0])
    for path, mask_path in zip(paths, mask_paths, strict=True):
      for each, size in ((path, _jpeg_size(path)), (mask_path, masks.read_png(mask_path).shape)):
        if size != first_mask.shape:
          raise UserError(
            f'{each} has {_in_words(size)} pixels, but {mask_paths[0]} has'
            f' {_in_words(first_mask.shape)}; give frames and masks of one size.'
          )

    def mask(number: int) -> UInt8[np.ndarray, 'h w']:
      return self._resize_mask(masks.read_png(mask_paths[number]))

    first_labels = self.without_void(self._resize_mask(first_mask))
    return Clip(
      name=name,
      num_frames=len(frames),
      size=self._size or first_mask.shape,
      frame=lambda number: self._read_frame(paths[number]),
      truth=MaskTruth(
        frames=tuple(frames),
        mask=mask,
        encode=functools.cache(lambda geometry, protocol: protocol.encode(first_labels, geometry)),
      ),
    )

  def _frame_names(self, name: str) -> list[str]:
    """Returns the names of a clip's frames, without suffix; each has a mask."""
    folders = self.frame_folder / name, self.mask_folder / name
    frames, with_mask = (
      # macOS leaves other files, such as ._00000.jpg, in archives.
      {path.stem for path in folder.glob(f'[!.]*{suffix}')}
      for folder, suffix in zip(folders, ('.jpg', '.png'), strict=True)
    )
    advice = f'complete the data set, or remove {name!r} from {self.list_file}.'
    for folder, these, those, kind in (
      (folders[0], frames, with_mask, 'frame'),
      (folders[1], with_mask, frames, 'mask'),
    ):
      if not these:
        raise UserError(f'{folder} holds no {kind}s; {advice}')
      if missing := sorted(those - these):
        raise UserError(
          f'{folder} lacks the {kind} of {len(missing)} of {len(those)} files, such as'
          f' {missing[0]}; {advice}'
        )
    if len(frames) < self.fewest_frames:
      raise UserError(
        f'{folders[0]} holds fewer than {self.fewest_frames} frames, too few to score; {advice}'
      )
    # 2 comes before 10.
    return sorted(frames, key=lambda frame: (len(frame), frame))

  def _read_frame(self, path: pathlib.Path) -> UInt8[np.ndarray, 'h w c']:
    frame = read_frame(path)
    if self._size is None:
      return frame
    resized = Image.fromarray(frame).resize(self._size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized)

  def _resize_mask(self, mask: UInt8[np.ndarray, 'h w']) -> UInt8[np.ndarray, 'sh sw']:
    return mask if self._size is None else resize_nearest(mask, self._size)

  def without_void(self, mask: UInt8[np.ndarray, 'h w']) -> UInt8[np.ndarray, 'h w']:
    """Returns a mask whose pixels without a label are background."""
    return np.where(mask > self.highest_label, 0, mask).astype(np.uint8)

  def input_size(self, clip: Clip, protocol: Protocol, patch_size: int) -> tuple[int, int]:
    """Returns height and width in pixels of the network's input; the caller fits it to patches."""
    return protocol.input_size[self.benchmark](clip.size, patch_size)

  def labels(
    self, clip: Clip, geometry: Geometry, protocol: Protocol
  ) -> Float32[np.ndarray, 'gh gw labels']:
    """Returns the labels of the first mask on the grid of tokens."""
    return clip.truth.encode(geometry, protocol)[0]

  def read_out(
    self,
    clip: Clip,
    number: int,
    labels: Float32[np.ndarray, 'gh gw labels'],
    geometry: Geometry,
    protocol: Protocol,
  ) -> UInt8[np.ndarray, 'h w']:
    """Returns the mask of a frame, with the size of the clip."""
    if number == 0 and not protocol.reads_out_first:
      return self.without_void(clip.truth.mask(0))
    _, ids = clip.truth.encode(geometry, protocol)
    return protocol.decode(labels, ids, geometry, clip.size, self.benchmark)

  def write(self, clip: Clip, results: list[np.ndarray], folder: pathlib.Path) -> None:
    """Writes the masks of all frames as palette PNGs with the names of the frames."""
    for frame, result in zip(clip.truth.frames, results, strict=True):
      masks.write_png(folder / f'{frame}.png', result)

  def read(self, clip: Clip, folder: pathlib.Path) -> list[np.ndarray]:
    """Reads the masks of all frames.

    Raises:
      UserError: one is missing or damaged.
    """
    try:
      return [masks.read_png(folder / f'{frame}.png') for frame in clip.truth.frames]
    except UserError as error:
      what = str(error).rpartition('; ')[0]
      raise UserError(f'{what}; remove {folder}, so that it is computed again.') from error

  def overlay(self, clip: Clip, number: int, result: np.ndarray) -> UInt8[np.ndarray, 'h w c']:
    """Returns a frame with the objects of its mask coloured."""
    return overlays.with_mask(clip.frame(number), result)


def _jpeg_size(path: pathlib.Path) -> tuple[int, int]:
  try:
    with Image.open(path) as image:
      return image.height, image.width
  except IMAGE_ERRORS as error:
    raise unreadable(path, error) from error


def _in_words(size: tuple[int, int]) -> str:
  return f'{size[1]} x {size[0]}'
