"""The encoder of a checkpoint, or of a file of weights, for notebooks and programs of your own.

encoder = load_encoder('runs/mine')
features = encoder.encode(np.stack([earlier, later]), size=256)  # [2, 32, 32, d], patch 8
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Architecture
from dropmae_jax.data import augment
from dropmae_jax.model import mae, patches, pixels, position_embedding
from dropmae_jax.model.masking import Masking
from dropmae_jax.pytorch import import_model, layouts, weight_files
from dropmae_jax.runtime import paths
from dropmae_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A trained encoder.

  Attributes:
    params: of the whole model, a pure dict of float32 arrays.
    architecture: of the model; `patch_size`, `width` and the trained `image_size` are in it.
  """

  params: dict
  architecture: Architecture

  def encode(
    self, frames: np.ndarray, *, size: int | None = None
  ) -> Float[np.ndarray, '... gh gw d']:
    """Returns the last layer's normalised tokens, nothing masked.

    Args:
      frames: uint8 RGB. One frame [h, w, 3] is encoded alone, without a frame identity. A pair
        [2, h, w, 3], the earlier frame first, is encoded jointly: each token attends to both.
      size: side in pixels that frames are resized to (bicubic); a multiple of the patch size. The
        position table is resampled to it. By default the size that the model was trained at.

    Returns:
      float32 [gh, gw, d] or [2, gh, gw, d], with gh = gw = size / patch_size.

    Raises:
      UserError: frames of another shape or type, or a size that patches do not divide.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.shape[-1:] != (3,) or frames.shape[:-3] not in ((), (2,)):
      raise UserError(
        f'frames are {frames.dtype} {list(frames.shape)}; give uint8 [h, w, 3], or a pair as'
        ' [2, h, w, 3].'
      )
    try:
      image_size = self.architecture.image_size if size is None else size
      resized = dataclasses.replace(self.architecture, image_size=image_size)
    except ValueError as error:
      raise UserError(f'size={size} does not fit: {error}') from error
    height, width = frames.shape[-3:-1]
    whole, side = augment.Box(0, 0, height, width), resized.image_size
    pair = np.stack(
      [
        augment.crop_and_resize(frame, whole, side, resize='exact')
        for frame in frames.reshape(-1, height, width, 3)
      ]
    )
    table = position_embedding.resample_table(np.asarray(self.params['pos_embed']), resized.grid)
    params = self.params | {'pos_embed': table}
    if len(pair) == 1:
      params |= {name: np.zeros_like(params[name]) for name in layouts.FRAME_IDENTITIES}
    tokens = np.asarray(_encode(params, pair, architecture=resized))
    return tokens.reshape(*frames.shape[:-3], resized.grid, resized.grid, resized.width)


@functools.partial(jax.jit, static_argnames='architecture')
def _encode(
  params: dict, frames: UInt8[Array, 'f h w c'], *, architecture: Architecture
) -> Float[Array, 'l d']:
  model = nnx.merge(mae.abstract_model(architecture)[0], params)
  vectors = patches.patchify(pixels.normalise(frames)[None], architecture.patch_size)
  all_tokens = jnp.arange(vectors.shape[1])[None]
  return model.encode(vectors, Masking(visible=all_tokens, masked=all_tokens[:, :0]))[0]


def load_encoder(path: str | os.PathLike, *, step: int | None = None) -> Encoder:
  """Reads an encoder.

  Args:
    path: the workdir of a run; or a file of weights that dropmae-convert can import: DropMAE's,
      MAE's, timm's, a tracker's, or one that was exported here. Also in a bucket (gs://, s3://).
    step: of the checkpoint in a workdir; the newest by default.

  Raises:
    UserError: there is no such checkpoint or file, or it cannot be read.
  """
  path = paths.user_path(os.fspath(path))
  if paths.is_folder(path):
    weights = saved_weights.load_weights(path, step=step)
    return Encoder(weights.params, weights.architecture)
  if step is not None:
    raise UserError(f'step={step} goes with a workdir, and {path} is none; leave it out.')
  model = import_model.read_model(weight_files.read(path))
  import_model.check_finite(model.state, str(path))
  return Encoder(layouts.from_torch(model.state, model.architecture), model.architecture)
