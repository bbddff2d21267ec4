"""FLOPs of a training step by formula.

Only the matrix products of the algorithm count, as two FLOPs per multiplication and addition. What
a program rematerialises to save memory counts once. ASAD adds none.
"""

from dropmae_jax.config import Architecture
from dropmae_jax.model import masking


def block(tokens: int, width: int, mlp_ratio: float, wanted: int | None = None) -> int:
  """FLOPs of a transformer block on one sample, forward.

  Args:
    tokens: that attention sees.
    width: of a token.
    mlp_ratio: hidden width of the MLP over `width`.
    wanted: how many tokens go on after attention; None: all.
  """
  before, after = 3 * width * width, width * width + 2 * width * int(width * mlp_ratio)
  wanted = tokens if wanted is None else wanted
  return 2 * (tokens * before + wanted * after) + attention(tokens, width)


def attention(tokens: int, width: int) -> int:
  """FLOPs of dense attention on one sample, forward: the logits, and the product with values."""
  return 2 * 2 * tokens * tokens * width


def encoder(architecture: Architecture, mask_ratio: float) -> int:
  """FLOPs of the encoder on the visible patches of one pair, forward and backward."""
  a = architecture
  visible = masking.num_visible(a.num_tokens, mask_ratio)
  blocks = a.depth * block(visible, a.width, a.mlp_ratio)
  # Pixels need no gradient: the backward pass of the embedding has one product, not two.
  return 3 * blocks + 2 * (2 * visible * a.patch_values * a.width)


def decoder(architecture: Architecture, mask_ratio: float, *, whole: bool = False) -> int:
  """FLOPs of the decoder on one pair, forward and backward.

  Only masked tokens go through what follows the last attention; with `whole`, all tokens do, as in
  other implementations.
  """
  a = architecture
  visible = masking.num_visible(a.num_tokens, mask_ratio)
  wanted = a.num_tokens if whole else a.num_tokens - visible
  blocks = (a.decoder_depth - 1) * block(a.num_tokens, a.decoder_width, a.mlp_ratio)
  blocks += block(a.num_tokens, a.decoder_width, a.mlp_ratio, wanted=wanted)
  ends = visible * a.width * a.decoder_width + wanted * a.decoder_width * a.patch_values
  return 3 * (blocks + 2 * ends)


def step(architecture: Architecture, mask_ratio: float, *, whole: bool = False) -> int:
  """FLOPs of a training step per pair."""
  return encoder(architecture, mask_ratio) + decoder(architecture, mask_ratio, whole=whole)
