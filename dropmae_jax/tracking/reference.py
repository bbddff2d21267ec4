"""The tracker in plain PyTorch, run on a state dict: an independent check of written files.

Like the reference of pre-training, it shares no code with the JAX model. It keeps all tokens, since
elimination has no weights.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional

from dropmae_jax.pytorch import reference


def maps(
  tensors: Mapping[str, np.ndarray],
  images: tuple[np.ndarray, np.ndarray],
  *,
  num_heads: int,
) -> list[np.ndarray]:
  """Runs the tracker of a file.

  Args:
    tensors: of the file. Without frame identities, as OSTrack has it, none are added.
    images: template and search image [h, w, 3], normalised.
    num_heads: of the encoder.

  Returns:
    The maps of score [1, s, s], size and offset [2, s, s].
  """
  with torch.inference_mode():
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    of_encoder = {
      name.removeprefix('backbone.'): each
      for name, each in state.items()
      if name.startswith('backbone.')
    }
    template, search = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in images)
    tokens = torch.cat([_embed(of_encoder, template, 'z'), _embed(of_encoder, search, 'x')], dim=1)
    tokens = reference.blocks(of_encoder, 'blocks', tokens, num_heads)
    tokens = reference.layer_norm(of_encoder, 'norm', tokens)
    grid = search.shape[-1] // of_encoder['patch_embed.proj.weight'].shape[-1]
    features = tokens[:, -(grid**2) :].transpose(1, 2).unflatten(2, (grid, grid))
    score, size, offset = (_branch(state, name, features) for name in ('ctr', 'size', 'offset'))
    score, size = (each.sigmoid().clamp(1e-4, 1 - 1e-4) for each in (score, size))
    return [each[0].numpy() for each in (score, size, offset)]


def _embed(state: reference.StateDict, image: torch.Tensor, frame: str) -> torch.Tensor:
  weight, bias = state['patch_embed.proj.weight'], state['patch_embed.proj.bias']
  tokens = functional.conv2d(image, weight, bias, stride=weight.shape[-1])
  tokens = tokens.flatten(2).transpose(1, 2) + state[f'pos_embed_{frame}']
  return tokens + state.get(f'temporal_pos_embed_{frame}', torch.zeros_like(tokens[:, :1]))


def _branch(state: reference.StateDict, branch: str, features: torch.Tensor) -> torch.Tensor:
  """Runs one branch of the head in evaluation mode, without what follows its last convolution."""
  for name in (f'box_head.conv{layer}_{branch}' for layer in range(1, 5)):
    features = functional.conv2d(
      features, state[f'{name}.0.weight'], state[f'{name}.0.bias'], padding=1
    )
    features = functional.batch_norm(
      features,
      *(state[f'{name}.1.{leaf}'] for leaf in ('running_mean', 'running_var', 'weight', 'bias')),
      eps=1e-5,
    ).relu()
  name = f'box_head.conv5_{branch}'
  return functional.conv2d(features, state[f'{name}.weight'], state[f'{name}.bias'])
