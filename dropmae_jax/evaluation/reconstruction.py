"""Draws the reconstruction of masked frames by a checkpoint.

    dropmae-figures --checkpoint=DIR --video=FILE --output=FILE.png

shows a pair of frames (a row each) as input, as masked input, and as reconstruction.
"""

import pathlib

import av
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Objective
from dropmae_jax.data import augment
from dropmae_jax.data.augment import Box
from dropmae_jax.model import attention, mae, masking, patches, pixels
from dropmae_jax.model.mae import MaskedAutoencoder
from dropmae_jax.runtime import atomic_file, cli
from dropmae_jax.runtime.errors import UserError
from tfds_kinetics.video import UnusableVideo, open_video

TITLES = ('input', 'masked input', 'reconstruction')
PANEL = 224  # Pixels along a side of a panel, at least.
GREY = 128


def read_frames(video: pathlib.Path, numbers: tuple[int, ...]) -> list[UInt8[np.ndarray, 'h w c']]:
  """Decodes the frames of the given numbers; numbers beyond the end give the last frame.

  Raises:
    UserError: there is no such file, or no frame of it can be decoded.
  """
  if not video.is_file():
    raise UserError(f'--video={video} is not a file; give a video.')
  wanted = dict.fromkeys(numbers)
  try:
    with open_video(str(video)) as container:
      frame = None
      for number, frame in enumerate(container.decode(video=0)):
        if number in wanted:
          wanted[number] = frame.to_ndarray(format='rgb24')
        if number >= max(numbers):
          break
  except (av.error.FFmpegError, UnusableVideo, IndexError) as error:
    raise UserError(f'--video={video} cannot be decoded ({error}); give another video.') from error
  if frame is None:
    raise UserError(f'--video={video} has no frames; give another video.')
  last = frame.to_ndarray(format='rgb24')
  return [last if wanted[number] is None else wanted[number] for number in numbers]


def square(frame: UInt8[np.ndarray, 'h w c'], size: int) -> UInt8[np.ndarray, 'size size c']:
  """Cuts the largest centred square and resizes it."""
  height, width = frame.shape[:2]
  side = min(height, width)
  box = Box((height - side) // 2, (width - side) // 2, side, side)
  return augment.crop_and_resize(frame, box, size, resize='exact')


def reconstruct(
  model: MaskedAutoencoder, frames: Float[Array, 'b f h w c'], seed: int, objective: Objective
) -> tuple[Float[Array, 'b f h w c'], Float[Array, 'b f h w c']]:
  """Masks pairs of frames and predicts the masked patches, without attention dropout.

  A model with normalised targets does not predict the mean and the contrast of a patch. As usual
  for such pictures, these are taken from the input.

  Args:
    model: the trained model.
    frames: normalised pixels of pairs.
    seed: of the masking.
    objective: what the model was trained for.

  Returns:
    An array that is 1 where a pixel is masked and 0 elsewhere; and the frames with their masked
    patches replaced by the prediction.
  """
  size = model.architecture.patch_size
  vectors = patches.patchify(frames, size)
  # A scheme of the user's own is not in the table here: then patches are masked at random.
  scheme = masking.MASKING_SCHEMES.get(objective.masking, masking.random_masking)
  keys = jax.random.split(jax.random.key(seed), frames.shape[0])
  masked = scheme(keys, num_tokens=vectors.shape[1], mask_ratio=objective.mask_ratio)
  prediction = model(
    vectors, masked, [attention.dense_attention] * model.architecture.decoder_depth
  )
  if objective.normalise_targets:
    mean, deviation = patches.patch_statistics(vectors)
    prediction = prediction * deviation + mean
  is_masked = masking.is_masked(masked)[..., None]
  filled = jnp.where(is_masked, prediction, vectors)
  pixels_masked = jnp.broadcast_to(is_masked, vectors.shape).astype(jnp.float32)
  return patches.unpatchify(pixels_masked, size), patches.unpatchify(filled, size)


def draw_panels(rows: list[list[UInt8[np.ndarray, 'h w c']]]) -> Image.Image:
  """Arranges panels in a grid, with a title above each column."""
  scale = -(-PANEL // rows[0][0].shape[0])
  side, margin, header = rows[0][0].shape[0] * scale, 8, 24
  width = margin + len(TITLES) * (side + margin)
  sheet = Image.new('RGB', (width, header + len(rows) * (side + margin)), 'white')
  pen = ImageDraw.Draw(sheet)
  for column, title in enumerate(TITLES):
    left = margin + column * (side + margin)
    pen.text((left, 6), title, fill='black')
    for row, panels in enumerate(rows):
      panel = Image.fromarray(panels[column]).resize((side, side), Image.Resampling.NEAREST)
      sheet.paste(panel, (left, header + row * (side + margin)))
  return sheet


def reconstruction_figure(
  weights: saved_weights.Weights, video: pathlib.Path, *, frames: tuple[int, int], seed: int
) -> Image.Image:
  """Draws input, masked input and reconstruction of two frames of a video."""
  images = read_frames(video, frames)
  size = weights.architecture.image_size
  pair = np.stack([square(image, size) for image in images])
  graphdef, _ = mae.abstract_model(weights.architecture)
  model = nnx.merge(graphdef, weights.params)
  is_masked, filled = reconstruct(
    model, pixels.normalise(jnp.asarray(pair))[None], seed, weights.objective
  )
  masked_input = np.where(np.asarray(is_masked[0]) > 0, GREY, pair).astype(np.uint8)
  reconstruction = np.asarray(pixels.denormalise(filled[0]))
  return draw_panels([[pair[f], masked_input[f], reconstruction[f]] for f in range(2)])


def main() -> None:
  """The command line."""
  parser = cli.Parser(prog='dropmae-figures', description=__doc__.splitlines()[0])
  parser.add_argument('--checkpoint', required=True, type=epath.Path, help='a training workdir')
  parser.add_argument('--video', required=True, type=pathlib.Path, help='any video file')
  parser.add_argument('--output', required=True, type=epath.Path, help='the PNG to write')
  parser.add_argument(
    '--frames', type=int, nargs=2, default=(0, 10), help='earlier and later frame (%(default)s)'
  )
  parser.add_argument('--seed', type=int, default=0, help='of the masking (%(default)s)')
  arguments = parser.parse_args()
  if not 0 <= arguments.frames[0] <= arguments.frames[1]:
    raise UserError(f'--frames={arguments.frames} must be an earlier and a later frame, from 0 on.')
  atomic_file.check_file(arguments.output, has_card=False)
  weights = saved_weights.load_weights(arguments.checkpoint)
  figure = reconstruction_figure(
    weights, arguments.video, frames=tuple(arguments.frames), seed=arguments.seed
  )
  with atomic_file.staged(arguments.output, num_bytes=0, has_card=False) as partial:
    figure.save(partial, format='PNG')
  cli.print_line(
    f'{arguments.output}: frames {tuple(arguments.frames)}, checkpoint of step {weights.step}'
  )


def command() -> None:
  """The entry point dropmae-figures."""
  cli.run(main)


if __name__ == '__main__':
  command()
