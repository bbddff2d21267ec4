"""The network once more, in plain PyTorch on a state dict: what a written file must reproduce.

Written from the layout of the files alone, as a client of them would be, and sharing nothing with
the JAX model; so an error in names, order or transposition shows as a difference in features.
The only module that imports PyTorch when it is imported itself.
"""

from collections.abc import Mapping

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

# Well above what float32 leaves; a tanh GELU instead of the exact one makes 1e-4.
TOLERANCE = 2e-5
# Two libraries round in different orders: where weights amplify rounding, JAX was seen to differ by
# seven times what PyTorch's own float32 and float64 do, and by less on another processor.
ROUNDINGS = 32
# Never allowed to differ by more, however much the weights amplify rounding: outputs that have
# nothing to do with one another differ by about 1.
LARGEST_TOLERANCE = 0.25
_FRAMES = ('x', 'z')

StateDict = Mapping[str, torch.Tensor]


def fixed_images(image_size: int) -> np.ndarray:
  """Returns two fixed images as [2, h, w, 3], normalised float32: smooth waves and some noise."""
  rng = np.random.default_rng(20230401)
  row, column = np.meshgrid(*2 * [np.linspace(0, 1, image_size)], indexing='ij')
  frequency, phase = rng.uniform(2, 20, (2, 2, 1, 1, 3)), rng.uniform(0, 6, (2, 1, 1, 3))
  waves = np.sin(
    frequency[0] * row[..., None] + frequency[1] * column[..., None] + phase
  ) + 0.3 * rng.standard_normal((2, image_size, image_size, 3))
  return waves.astype(np.float32)


def encode(state: StateDict, images: torch.Tensor, *, num_heads: int) -> torch.Tensor:
  """Runs the encoder of a state dict of any layout on two images, nothing masked.

  Args:
    state: with frame identities, the two images are one pair, the first the earlier; without,
      each is encoded by itself.
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
  return _layer_norm(state, 'norm', _blocks(state, 'blocks', tokens, num_heads))


def decode(state: StateDict, latents: torch.Tensor, *, num_heads: int) -> torch.Tensor:
  """Runs the decoder on the latents of a pair, every second one replaced by the mask token."""
  tokens = _linear(state, 'decoder_embed', latents)
  tokens[:, 1::2] = state['mask_token']
  table = state['decoder_pos_embed'][:, 1:]
  code = [table + state[f'decoder_temporal_pos_embed_{frame}'] for frame in _FRAMES]
  tokens = _blocks(state, 'decoder_blocks', tokens + torch.cat(code, dim=1), num_heads)
  return _linear(state, 'decoder_pred', _layer_norm(state, 'decoder_norm', tokens))


def _blocks(state: StateDict, stack: str, tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
  """Runs all pre-norm transformer blocks of a stack, written out."""
  b, length, width = tokens.shape
  depth = len({name.split('.')[1] for name in state if name.startswith(f'{stack}.')})
  for name in (f'{stack}.{i}' for i in range(depth)):
    fused = _linear(state, f'{name}.attn.qkv', _layer_norm(state, f'{name}.norm1', tokens))
    fused = fused.reshape(b, length, 3, num_heads, width // num_heads)
    query, key, value = fused.permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) * (width // num_heads) ** -0.5).softmax(dim=-1)
    mixed = (weights @ value).transpose(1, 2).reshape(b, length, width)
    tokens = tokens + _linear(state, f'{name}.attn.proj', mixed)
    hidden = _linear(state, f'{name}.mlp.fc1', _layer_norm(state, f'{name}.norm2', tokens))
    tokens = tokens + _linear(state, f'{name}.mlp.fc2', functional.gelu(hidden))
  return tokens


def _linear(state: StateDict, name: str, tokens: torch.Tensor) -> torch.Tensor:
  return functional.linear(tokens, state[f'{name}.weight'], state[f'{name}.bias'])


def _layer_norm(state: StateDict, name: str, tokens: torch.Tensor) -> torch.Tensor:
  weight, bias = state[f'{name}.weight'], state[f'{name}.bias']
  return functional.layer_norm(tokens, weight.shape, weight, bias, eps=1e-6)


def torch_outputs(
  tensors: Mapping[str, np.ndarray], images: np.ndarray, architecture: Architecture
) -> list[np.ndarray]:
  """Runs what a file of any layout holds on `fixed_images`: `encode`, and `decode` where it can."""
  with torch.inference_mode():
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    latents = encode(state, pixels, num_heads=architecture.num_heads)
    outputs = [latents.numpy()]
    if 'decoder_embed.weight' in state:
      outputs.append(decode(state, latents, num_heads=architecture.decoder_num_heads).numpy())
    return outputs


def jax_outputs(
  params: dict, images: np.ndarray, architecture: Architecture, layout: str
) -> list[np.ndarray]:
  """Runs the JAX model on the same as `torch_outputs` does with a file of this layout."""
  graphdef, _ = mae.abstract_model(architecture)
  n = architecture.tokens_per_frame
  frame, pair = np.arange(n), np.arange(2 * n)
  if layout == 'timm':
    # Each image by itself: the first frame of a pair whose second is masked, without identity.
    frames, seen = np.stack([images, images], axis=1), Masking(frame, frame + n)
    zeros = {name: np.zeros_like(params[name]) for name in layouts.FRAME_IDENTITIES}
    params = params | zeros
  else:
    frames, seen = images[None], Masking(pair, pair[:0])
  if layout != 'full':
    # The decoder is not run, and need not be copied to the device.
    params = {
      name: jax.tree.map(lambda _: np.float32(0), value) if layouts.is_of_decoder(name) else value
      for name, value in params.items()
    }

  def batched(masked: Masking) -> Masking:
    return Masking(*(jnp.tile(indices, (len(frames), 1)) for indices in masked))

  @jax.jit
  def outputs(params: dict, frames: jax.Array) -> list[jax.Array]:
    model = nnx.merge(graphdef, params)
    latents = model.encode(patches.patchify(frames, architecture.patch_size), batched(seen))
    if layout != 'full':
      return [latents]
    dense = [attention.dense_attention] * architecture.decoder_depth
    every_second = batched(Masking(pair[::2], pair[1::2]))
    return [latents, model.decode(latents[:, ::2], every_second, dense)]

  with jax.default_matmul_precision('highest'):
    return [np.asarray(output) for output in outputs(params, frames)]


def largest_difference(
  tensors: Mapping[str, np.ndarray], params: dict, architecture: Architecture, layout: str
) -> float:
  """Compares a file's network in PyTorch with the JAX model on two fixed images, in float32.

  Args:
    tensors: of a file in this layout.
    params: the JAX parameters that the file should hold.
    architecture: of both.
    layout: one of `torch_export.LAYOUTS`.

  Returns:
    The largest difference over the largest value, of the encoder's latents (and in the full
    layout of the decoder's reconstruction, whichever is larger); nan where one is not finite.
  """
  images = fixed_images(architecture.image_size)
  theirs = torch_outputs(tensors, images, architecture)
  return _relative(theirs, jax_outputs(params, images, architecture, layout))


def rounding(tensors: Mapping[str, np.ndarray], architecture: Architecture) -> float:
  """Returns by how much float32 and float64 differ in PyTorch, as `largest_difference` counts.

  A few 1e-6 for trained or freshly drawn weights. Others that no training makes, such as normal
  ones of deviation 1, amplify rounding to 1e-2 and more, and so must be allowed to differ by it.
  """
  images = fixed_images(architecture.image_size)
  double = {name: array.astype(np.float64) for name, array in tensors.items()}
  exact = torch_outputs(double, images.astype(np.float64), architecture)
  return _relative(torch_outputs(tensors, images, architecture), exact)


def tolerance_of(rounding: float) -> float:
  """Returns what may differ where rounding alone makes this much."""
  return min(max(TOLERANCE, ROUNDINGS * rounding), LARGEST_TOLERANCE)


def _relative(outputs: list[np.ndarray], expected: list[np.ndarray]) -> float:
  """Returns the largest difference over the largest expected value; nan beats everything."""
  pairs = zip(outputs, expected, strict=True)
  return float(np.max([np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs]))
