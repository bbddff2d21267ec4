"""The network in plain PyTorch, run on a state dict: an independent check of written files.

It follows the published layout and shares no code with the JAX model, so that an error in names,
order or transposition shows as a difference in features. This module and that of the tracker are
the only ones that import PyTorch at their top.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.nn import functional

from dropmae_jax.config import Architecture
from dropmae_jax.model import attention, mae, patches
from dropmae_jax.model.masking import Masking
from dropmae_jax.pytorch import layouts
from dropmae_jax.runtime.errors import UserError

# Well above float32 rounding; a tanh GELU instead of the exact one differs by 1e-4.
TOLERANCE = 2e-5
# Two libraries round in different orders. With weights that amplify rounding, JAX and PyTorch
# differed by up to seven times what PyTorch's float32 and float64 differ by.
ROUNDINGS = 32
# The upper limit, however much the weights amplify rounding: unrelated outputs differ by about 1.
LARGEST_TOLERANCE = 0.25
_FRAMES = ('x', 'z')

StateDict = Mapping[str, torch.Tensor]


def fixed_images(image_size: int) -> np.ndarray:
  """Returns two fixed images [2, h, w, 3], normalised float32: smooth waves with some noise."""
  rng = np.random.default_rng(20230401)
  row, column = np.meshgrid(*2 * [np.linspace(0, 1, image_size)], indexing='ij')
  frequency, phase = rng.uniform(2, 20, (2, 2, 1, 1, 3)), rng.uniform(0, 6, (2, 1, 1, 3))
  waves = np.sin(
    frequency[0] * row[..., None] + frequency[1] * column[..., None] + phase
  ) + 0.3 * rng.standard_normal((2, image_size, image_size, 3))
  return waves.astype(np.float32)


def encode(state: StateDict, images: torch.Tensor, *, num_heads: int) -> torch.Tensor:
  """Runs the encoder of a state dict of any layout on two images without masking.

  Args:
    state: if it has frame identities, the two images are one pair, the first one the earlier;
      otherwise each is encoded by itself.
    images: [2, 3, h, w] float32.
    num_heads: of the encoder.

  Returns:
    The latents: [1, 2 n, d] of a pair, [2, n, d] of single images.
  """
  weight, bias = state['patch_embed.proj.weight'], state['patch_embed.proj.bias']
  tokens = functional.conv2d(images, weight, bias, stride=weight.shape[-1])
  tokens = tokens.flatten(2).transpose(1, 2)
  tokens = tokens + state['pos_embed'][:, -tokens.shape[1] :]
  if 'temporal_pos_embed_x' in state:
    identities = torch.cat([state[f'temporal_pos_embed_{frame}'] for frame in _FRAMES])
    tokens = (tokens + identities).flatten(0, 1)[None]
  return layer_norm(state, 'norm', blocks(state, 'blocks', tokens, num_heads))


def decode(state: StateDict, latents: torch.Tensor, *, num_heads: int) -> torch.Tensor:
  """Runs the decoder on the latents of a pair; every second one becomes the mask token."""
  tokens = _linear(state, 'decoder_embed', latents)
  tokens[:, 1::2] = state['mask_token']
  table = state['decoder_pos_embed'][:, 1:]
  code = [table + state[f'decoder_temporal_pos_embed_{frame}'] for frame in _FRAMES]
  tokens = blocks(state, 'decoder_blocks', tokens + torch.cat(code, dim=1), num_heads)
  return _linear(state, 'decoder_pred', layer_norm(state, 'decoder_norm', tokens))


def blocks(state: StateDict, stack: str, tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
  """Runs the pre-norm transformer blocks of the encoder or decoder."""
  b, length, width = tokens.shape
  depth = len({name.split('.')[1] for name in state if name.startswith(f'{stack}.')})
  for name in (f'{stack}.{i}' for i in range(depth)):
    fused = _linear(state, f'{name}.attn.qkv', layer_norm(state, f'{name}.norm1', tokens))
    fused = fused.reshape(b, length, 3, num_heads, width // num_heads)
    query, key, value = fused.permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) * (width // num_heads) ** -0.5).softmax(dim=-1)
    mixed = (weights @ value).transpose(1, 2).reshape(b, length, width)
    tokens = tokens + _linear(state, f'{name}.attn.proj', mixed)
    hidden = _linear(state, f'{name}.mlp.fc1', layer_norm(state, f'{name}.norm2', tokens))
    tokens = tokens + _linear(state, f'{name}.mlp.fc2', functional.gelu(hidden))
  return tokens


def _linear(state: StateDict, name: str, tokens: torch.Tensor) -> torch.Tensor:
  return functional.linear(tokens, state[f'{name}.weight'], state[f'{name}.bias'])


def layer_norm(state: StateDict, name: str, tokens: torch.Tensor) -> torch.Tensor:
  """Runs a layer norm of a state dict."""
  weight, bias = state[f'{name}.weight'], state[f'{name}.bias']
  return functional.layer_norm(tokens, weight.shape, weight, bias, eps=1e-6)


def torch_outputs(
  tensors: Mapping[str, np.ndarray], images: np.ndarray, architecture: Architecture
) -> list[np.ndarray]:
  """Runs the network of a file in any layout on `fixed_images`.

  Returns:
    The result of `encode`, and that of `decode` if the file has a decoder.
  """
  with torch.inference_mode():
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    latents = encode(state, pixels, num_heads=architecture.num_heads)
    outputs = [latents.numpy()]
    if 'decoder_embed.weight' in state:
      outputs.append(decode(state, latents, num_heads=architecture.decoder_num_heads).numpy())
    return outputs


def jax_outputs(
  params: dict,
  images: np.ndarray,
  architecture: Architecture,
  *,
  as_pair: bool = True,
  with_decoder: bool = True,
) -> list[np.ndarray]:
  """Runs the JAX model on the inputs that `torch_outputs` runs a file's network on.

  Args:
    params: the pure parameter dict.
    images: [2, h, w, 3] float32.
    architecture: of the model.
    as_pair: encode the two images as a pair; otherwise each by itself, without frame identities.
    with_decoder: run the decoder too; only on a pair.
  """
  graphdef, _ = mae.abstract_model(architecture)
  n = architecture.tokens_per_frame
  frame, pair = np.arange(n), np.arange(2 * n)
  if as_pair:
    frames, visible = images[None], Masking(pair, pair[:0])
  else:
    # Each image is the first frame of a pair whose second frame is masked.
    frames, visible = np.stack([images, images], axis=1), Masking(frame, frame + n)
    params = params | {name: np.zeros_like(params[name]) for name in layouts.FRAME_IDENTITIES}
  if not with_decoder:
    # The decoder's parameters need not be copied to the device.
    params = {
      name: jax.tree.map(lambda _: np.float32(0), value) if layouts.is_of_decoder(name) else value
      for name, value in params.items()
    }

  def batched(masked: Masking) -> Masking:
    return Masking(*(jnp.tile(indices, (len(frames), 1)) for indices in masked))

  @jax.jit
  def outputs(params: dict, frames: jax.Array) -> list[jax.Array]:
    model = nnx.merge(graphdef, params)
    latents = model.encode(patches.patchify(frames, architecture.patch_size), batched(visible))
    if not with_decoder:
      return [latents]
    dense = [attention.dense_attention] * architecture.decoder_depth
    every_second = batched(Masking(pair[::2], pair[1::2]))
    return [latents, model.decode(latents[:, ::2], every_second, dense)]

  with jax.default_matmul_precision('highest'):
    return [np.asarray(output) for output in outputs(params, frames)]


def largest_difference(
  tensors: Mapping[str, np.ndarray], params: dict, architecture: Architecture
) -> float:
  """Compares a file's network in PyTorch with the JAX model on two fixed images, in float32.

  Args:
    tensors: of a file in any layout that has the encoder.
    params: the JAX parameters that the file should hold.
    architecture: of both.

  Returns:
    The largest absolute difference divided by the largest absolute value, of the latents or of the
    decoder's reconstruction (if the file has a decoder), whichever is larger; nan if a value is
    not finite.
  """
  images = fixed_images(architecture.image_size)
  expected = jax_outputs(
    params,
    images,
    architecture,
    as_pair=layouts.FRAME_IDENTITIES[0] in tensors,
    with_decoder='decoder_embed.weight' in tensors,
  )
  return relative(torch_outputs(tensors, images, architecture), expected)


def rounding(tensors: Mapping[str, np.ndarray], architecture: Architecture) -> float:
  """Returns how much float32 and float64 differ in PyTorch, as `largest_difference` measures it.

  A few 1e-6 for trained or newly initialised weights. Weights that training does not produce, such
  as normal ones with standard deviation 1, amplify rounding to 1e-2 and more.
  """
  images = fixed_images(architecture.image_size)
  double = {name: array.astype(np.float64) for name, array in tensors.items()}
  exact = torch_outputs(double, images.astype(np.float64), architecture)
  return relative(torch_outputs(tensors, images, architecture), exact)


def tolerance_of(rounding: float) -> float:
  """Returns the allowed difference for weights with this `rounding`."""
  return min(max(TOLERANCE, ROUNDINGS * rounding), LARGEST_TOLERANCE)


def check_difference(
  difference: float, rounding: Callable[[], float], *, what: str = 'features'
) -> str:
  """Returns a line that says by how much the outputs of two networks differ.

  Args:
    difference: as `relative` measures it.
    rounding: returns how much rounding alone makes; called if the difference is not small.
    what: the outputs.

  Raises:
    UserError: they differ by more than rounding explains.
  """
  tolerance, reason = TOLERANCE, ''
  if difference > tolerance:
    of_rounding = rounding()
    tolerance = tolerance_of(of_rounding)
    reason = f'; rounding alone makes {of_rounding:.1e} with these weights'
  if not difference <= tolerance:
    raise UserError(
      f'the {what} in PyTorch and in JAX differ by {difference:.2g} (relative; at most'
      f' {tolerance:.0e} is allowed), so nothing is written; please report this, or give'
      ' --no-verify.'
    )
  return f'verified: {what} in PyTorch and in JAX differ by {difference:.1e} (relative){reason}'


def relative(outputs: list[np.ndarray], expected: list[np.ndarray]) -> float:
  """Returns the largest difference divided by the largest expected value; nan if any is nan."""
  pairs = zip(outputs, expected, strict=True)
  return float(np.max([np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs]))
