"""A training step of the plain masked autoencoder in PyTorch, to compare the speed of ours with.

Shapes, masking and loss are those of DropMAE, without ASAD and flips. It uses
scaled_dot_product_attention, autocast for bfloat16 and fused AdamW, but no torch.compile. The
batch is on the device already, as for the JAX step.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.parts import Part
from benchmarks.rounds import Way, import_torch
from dropmae_jax.config import Architecture, Config
from dropmae_jax.model import flops, masking, pixels
from dropmae_jax.runtime.errors import UserError

if TYPE_CHECKING:
  from torch import Tensor


def make(config: Config, frames: np.ndarray, platform: str) -> Part:
  """Returns the step on a batch of uint8 frames, to be timed.

  Raises:
    UserError: PyTorch is not installed, or not for this device.
  """
  torch = import_torch()
  if platform not in ('cpu', 'gpu'):
    raise UserError(f'--torch: PyTorch has no {platform} here to run on; leave --torch out.')
  if platform == 'gpu' and not torch.cuda.is_available():
    raise UserError(
      f'--torch: PyTorch {torch.__version__} does not see the GPU; install a build for CUDA, or'
      ' leave --torch out.'
    )
  device = 'cuda' if platform == 'gpu' else 'cpu'
  step = TorchStep(config, device)
  batch = torch.from_numpy(frames).to(device)
  wait = (lambda _: torch.cuda.synchronize()) if device == 'cuda' else (lambda _: None)
  count = len(frames) * flops.step(config.model, config.objective.mask_ratio)
  return Part(Way(lambda: step(batch), wait, in_turn=device == 'cpu'), flops=count)


class TorchStep:
  """A model and its optimizer; a call makes one update."""

  def __init__(self, config: Config, device: str) -> None:
    import torch

    self.model = autoencoder(config.model).to(device)
    decayed = [p for p in self.model.parameters() if p.ndim > 1]
    others = [p for p in self.model.parameters() if p.ndim <= 1]
    options = config.optimizer
    self.optimizer = torch.optim.AdamW(
      [{'params': decayed}, {'params': others, 'weight_decay': 0.0}],
      lr=config.peak_learning_rate,
      betas=(options.beta1, options.beta2),
      weight_decay=options.weight_decay,
      fused=True,
    )
    self.visible = masking.num_visible(config.model.num_tokens, config.objective.mask_ratio)
    self.patch_size = config.model.patch_size
    enabled = config.dtype == 'bfloat16'
    self.autocast = torch.autocast(device, torch.bfloat16, enabled=enabled)
    self.mean, self.deviation = (
      torch.tensor(colour, device=device)
      for colour in (pixels.IMAGENET_MEAN, pixels.IMAGENET_DEVIATION)
    )

  def __call__(self, frames: 'Tensor') -> 'Tensor':
    """Makes one update with uint8 [b, f, h, w, c]; returns the loss without waiting for it."""
    loss = self.loss(frames)
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self.optimizer.step()
    return loss.detach()

  def loss(self, frames: 'Tensor') -> 'Tensor':
    """Draws a masking and returns the loss."""
    import torch

    patches = self.patches((frames / 255 - self.mean) / self.deviation)
    order = torch.rand(patches.shape[:2], device=patches.device).argsort(dim=1)
    with self.autocast:
      reconstruction = self.model(patches, order, self.visible)
    deviation, mean = torch.std_mean(patches, dim=-1, keepdim=True)
    targets = (patches - mean) / (deviation.square() + 1e-6).sqrt()
    errors = (reconstruction.float() - targets).square().mean(dim=-1)
    return errors.gather(1, order[:, self.visible :]).mean()

  def patches(self, frames: 'Tensor') -> 'Tensor':
    """Cuts [b, f, h, w, c] into patch vectors [b, l, p]."""
    b, f, h, w, c = frames.shape
    p = self.patch_size
    cut = frames.reshape(b, f, h // p, p, w // p, p, c).permute(0, 1, 2, 4, 3, 5, 6)
    return cut.reshape(b, f * (h // p) * (w // p), p * p * c)


def autoencoder(a: Architecture) -> Any:
  """Returns the model, with the same numbers of parameters as ours."""
  import torch
  from torch import nn
  from torch.nn import functional

  class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
      super().__init__()
      self.num_heads, hidden = num_heads, int(width * a.mlp_ratio)
      self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
      self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
      self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: 'Tensor') -> 'Tensor':
      split = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.num_heads, -1))
      query, key, value = split.permute(2, 0, 3, 1, 4)
      mixed = functional.scaled_dot_product_attention(query, key, value)
      tokens = tokens + self.proj(mixed.transpose(1, 2).flatten(2))
      return tokens + self.fc2(functional.gelu(self.fc1(self.norm2(tokens))))

  class Autoencoder(nn.Module):
    """Encoder on the visible patches, decoder on all."""

    def __init__(self) -> None:
      super().__init__()
      self.embed = nn.Linear(a.patch_values, a.width)
      self.codes = self._codes(a.width)
      self.blocks = nn.Sequential(*(Block(a.width, a.num_heads) for _ in range(a.depth)))
      self.norm = nn.LayerNorm(a.width, 1e-6)
      self.decoder_embed = nn.Linear(a.width, a.decoder_width)
      self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, a.decoder_width))
      self.decoder_codes = self._codes(a.decoder_width)
      decoder = (Block(a.decoder_width, a.decoder_num_heads) for _ in range(a.decoder_depth))
      self.decoder_blocks = nn.Sequential(*decoder)
      self.decoder_norm = nn.LayerNorm(a.decoder_width, 1e-6)
      self.predict = nn.Linear(a.decoder_width, a.patch_values)

    def _codes(self, width: int) -> nn.ParameterDict:
      # Only the time counts, so the values of the fixed table do not matter.
      table = nn.Parameter(torch.randn(1, a.tokens_per_frame, width), requires_grad=False)
      return nn.ParameterDict({'frame': nn.Parameter(torch.randn(2, 1, width)), 'table': table})

    def forward(self, patches: 'Tensor', order: 'Tensor', visible: int) -> 'Tensor':
      def select(tokens: 'Tensor', indices: 'Tensor') -> 'Tensor':
        return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))

      def code(codes: nn.ParameterDict) -> 'Tensor':
        return (codes['frame'] + codes['table']).flatten(0, 1)[None]

      seen = order[:, :visible]
      codes = code(self.codes).expand(len(order), -1, -1)
      tokens = self.embed(select(patches, seen)) + select(codes, seen)
      latents = self.norm(self.blocks(tokens))
      masked = self.mask_token.expand(len(order), order.shape[1] - visible, -1)
      tokens = torch.cat([self.decoder_embed(latents).float(), masked], dim=1)
      tokens = select(tokens, order.argsort(dim=1)) + code(self.decoder_codes)
      return self.predict(self.decoder_norm(self.decoder_blocks(tokens)))

  return Autoencoder()
