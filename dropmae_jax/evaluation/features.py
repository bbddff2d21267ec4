"""Features of frames of any size, and of pairs, for zero-shot evaluations.

An encoder that was trained on square frames runs on any grid: its position tables are resampled as
the published evaluators do. All products are float32: of similarities that are 1e-4 apart, TF32 and
bfloat16 would change the order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Architecture
from dropmae_jax.evaluation import results_folder
from dropmae_jax.model import mae, patches, position_embedding
from dropmae_jax.model.attention import dense_attention
from dropmae_jax.model.chunks import Loop
from dropmae_jax.pytorch import import_model, layouts, weight_files
from dropmae_jax.runtime.errors import UserError, check_name
from dropmae_jax.runtime.paths import Path, absolute, is_folder

CLASS_TOKENS = 'file', 'none', 'zero'
# On a CPU a head at a time keeps the logits small; elsewhere 1/2 GiB of them fit.
ONE_HEAD, HALF_A_GIB = Loop(logits_at_once=1), Loop(logits_at_once=1 << 27)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """The model of a checkpoint or of a file of weights.

  Attributes:
    params: of the whole model, a pure dict; position tables as in the file.
    architecture: of the model.
    class_token: [d], or None: there is none.
    has_identities: whether the frame identities were trained.
    has_decoder: whether the decoder was trained.
    tensors: names of the tensors that were read, in the layout `full` of `layouts`.
    unused: names of the other tensors of a file.
    source: path, step of a workdir, sha256 of the parameters, and lines about the import.
  """

  params: dict
  architecture: Architecture
  class_token: np.ndarray | None
  has_identities: bool
  has_decoder: bool
  tensors: list[str]
  unused: list[str]
  source: dict


def load(
  path: Path,
  *,
  step: int | None = None,
  size: str | None = None,
  class_token: str = 'file',
) -> Encoder:
  """Reads an encoder, with its decoder where there is one that fits our model.

  Args:
    path: the workdir of a run; or a file of weights, as `import_model.read_model` reads them.
    step: of the checkpoint in a workdir; the newest by default.
    size: of the model, if a file does not tell.
    class_token: 'file': that of the file, if it has one; 'none'; 'zero': one of zeros, as
      evaluators that ignore missing tensors give to files without one.

  Raises:
    UserError: it cannot be read, or has values that are not finite.
  """
  check_name('--class_token', class_token, CLASS_TOKENS)
  if is_folder(path):
    if size is not None:
      raise UserError(f'--model={size} goes with a file, and {path} is a workdir; leave it out.')
    weights = saved_weights.load_weights(path, step=step)
    architecture, params, unused, fresh = weights.architecture, weights.params, {}, []
    source = {'path': str(absolute(path)), 'step': weights.step}
  else:
    if step is not None:
      raise UserError(f'--step={step} goes with a workdir, and {path} is none; leave it out.')
    model = import_model.read_model(weight_files.read(path), size=size, needs_decoder=False)
    import_model.check_finite(model.state, str(path))
    architecture, unused, fresh = model.architecture, dict(model.unused), model.fresh
    params = layouts.from_torch(model.state, architecture)
    source = {'path': str(absolute(path)), 'import': model.report}
  token = _class_token(unused.get(layouts.CLASS_TOKEN), class_token, architecture.width, path)
  if token is not None and class_token == 'file':
    del unused[layouts.CLASS_TOKEN]
  return Encoder(
    params,
    architecture,
    token,
    has_identities=not set(layouts.FRAME_IDENTITIES) & set(fresh),
    has_decoder=not any(map(layouts.is_of_decoder, fresh)),
    tensors=[name for name in layouts.tensor_names(architecture) if name not in fresh],
    unused=list(unused),
    source=source | {'sha256': results_folder.digest([params, token])},
  )


def _class_token(
  stored: np.ndarray | None, choice: str, width: int, path: Path
) -> np.ndarray | None:
  """Returns the class token of a choice of CLASS_TOKENS."""
  if choice == 'zero':
    return np.zeros(width, np.float32)
  if choice == 'none' or stored is None:
    return None
  if stored.size != width:
    raise UserError(
      f'{path} has a {layouts.CLASS_TOKEN} of the shape {list(stored.shape)} and a width of'
      f' {width}; add --class_token=none.'
    )
  import_model.check_finite({layouts.CLASS_TOKEN: stored}, str(path))
  return stored.reshape(width).astype(np.float32)


@functools.lru_cache(maxsize=2)
def at_grid(encoder: Encoder, grid: tuple[int, int]) -> dict:
  """Returns the parameters, on the device, for frames of another grid (height, width)."""
  params = dict(encoder.params)
  for name in layouts.POSITION_TABLES:
    params[name] = position_embedding.interpolate_table(np.asarray(params[name]), grid)
  if encoder.class_token is not None:
    params[layouts.CLASS_TOKEN] = encoder.class_token
  return jax.tree.map(jnp.asarray, params)


@functools.partial(jax.jit, static_argnames=('architecture', 'identity', 'num_blocks'))
@jax.default_matmul_precision('highest')
def encode_frames(
  params: dict,
  frames: Float[Array, 'b h w c'],
  *,
  architecture: Architecture,
  identity: str = 'none',
  num_blocks: int | None = None,
) -> Float[Array, 'b n d']:
  """Encodes each frame alone: all its tokens, after the final norm, without the class token.

  Args:
    params: of `at_grid`, for the grid of the frames.
    frames: normalised.
    architecture: of the model.
    identity: which frame identity is added: 'none', 'x' or 'z'.
    num_blocks: how many of the encoder's blocks to run; by default all.
  """
  model = _model(params, architecture)
  tokens = model.patch_embed(patches.patchify(frames[:, None], architecture.patch_size))
  positions = params['pos_embed'][0]
  tokens = tokens + positions[1:]
  if identity != 'none':
    tokens = tokens + params[f'temporal_pos_embed_{identity}']
  class_token = params.get(layouts.CLASS_TOKEN)
  if class_token is not None:
    first = jnp.broadcast_to(class_token + positions[0], (len(tokens), 1, tokens.shape[-1]))
    tokens = jnp.concatenate([first, tokens], axis=1)
  for block in model.blocks[:num_blocks]:
    tokens = block(tokens, _attend)
  return model.norm(tokens[:, class_token is not None :])


@functools.partial(jax.jit, static_argnames=('architecture', 'num_blocks'))
@jax.default_matmul_precision('highest')
def encode_pair(
  params: dict,
  frames: Float[Array, 'f h w c'],
  *,
  architecture: Architecture,
  num_blocks: int | None = None,
) -> Float[Array, 'f n d']:
  """Encodes an earlier and a later frame together: each token attends to both frames."""
  model = _model(params, architecture)
  vectors = patches.patchify(frames[:, None], architecture.patch_size)
  tokens = model.patch_embed(vectors) + params['pos_embed'][:, 1:]
  identities = jnp.concatenate([params[name] for name in layouts.FRAME_IDENTITIES])
  tokens = (tokens + identities).reshape(1, -1, architecture.width)
  for block in model.blocks[:num_blocks]:
    tokens = block(tokens, _attend)
  return model.norm(tokens).reshape(2, -1, architecture.width)


@functools.partial(jax.jit, static_argnames=('architecture', 'block'))
@jax.default_matmul_precision('highest')
def decoder_attention(
  params: dict, frames: Float[Array, 'f h w c'], *, architecture: Architecture, block: int
) -> Float[Array, 'i j']:
  """Returns how much each token of the later frame attends to those of the earlier one.

  Nothing is masked and no attention is dropped.

  Args:
    params: of `at_grid`.
    frames: normalised; the earlier frame first.
    architecture: of the model.
    block: of the decoder, from 0.

  Returns:
    Mean over heads of the softmax over the keys of both frames; a row is a token of the later
    frame, a column one of the earlier, and the sum of a row is the share that crosses.
  """
  model = _model(params, architecture)
  latents = encode_pair(params, frames, architecture=architecture)
  tokens = model.decoder_embed(latents) + params['decoder_pos_embed'][:, 1:]
  names = [f'decoder_{name}' for name in layouts.FRAME_IDENTITIES]
  tokens = tokens + jnp.concatenate([params[name] for name in names])
  tokens = tokens.reshape(1, -1, architecture.decoder_width)
  for each in model.decoder_blocks[:block]:
    tokens = each(tokens, _attend)
  block = model.decoder_blocks[block]
  attention: list[Array] = []

  def attend(query: Array, key: Array, value: Array) -> Array:
    count = query.shape[1] // 2

    def add_head(total: Array, head: tuple[Array, Array]) -> tuple[Array, None]:
      query, key = head
      probs = jax.nn.softmax(query @ key.T * query.shape[-1] ** -0.5)
      return total + probs[:, :count], None

    heads = rearrange(query[0, count:], 'i m e -> m i e'), rearrange(key[0], 'j m e -> m j e')
    total, _ = jax.lax.scan(add_head, jnp.zeros((count, count)), heads)
    attention.append(total / query.shape[2])
    return value

  block.attn(block.norm1(tokens), attend)
  return attention[0]


def _model(params: dict, architecture: Architecture) -> mae.MaskedAutoencoder:
  graphdef = mae.abstract_model(architecture)[0]
  return nnx.merge(graphdef, {k: v for k, v in params.items() if k != layouts.CLASS_TOKEN})


def _attend(query: Array, key: Array, value: Array) -> Array:
  loop = ONE_HEAD if jax.default_backend() == 'cpu' else HALF_A_GIB
  return dense_attention(query, key, value, loop=loop)
