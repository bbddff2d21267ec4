"""Estimates what a training step takes of a GPU's memory, without compiling it.

The formula counts what the compiled program keeps; its factors were fitted to the compiles that
tests/recorded_compiles.json lists, from which it differs by less than 10 %.
"""

from dropmae_jax.config import Architecture, Config
from dropmae_jax.model import mae, masking

# Bytes that the backward pass keeps of a block, per value of its tokens and per attention logit.
OF_TOKENS = {'bfloat16': 44, 'float32': 62}
OF_LOGITS = {'bfloat16': 6.3, 'float32': 8.3}
# The same of the logits of a block that is rematerialised, and bytes per value of its input.
OF_LOGITS_AGAIN, OF_INPUTS = {'bfloat16': 10, 'float32': 13}, 4
# What is held beside the activations, and what gathering split parameters takes, in parameters.
BESIDE, GATHERED = 1.2, 1.4


def estimate(config: Config, number: int) -> float | None:
  """Returns the bytes that the step needs of each of so many GPUs; None if it is not known."""
  if config.remat not in ('none', 'full') or config.attention == 'fused':
    return None
  _, params = mae.abstract_model(config.model)
  params = 4 * mae.num_parameters(params)
  pairs = config.batch_size / number
  frames = pairs * 2 * config.model.image_size**2 * 3
  arguments = 3 * params / config.mesh.fsdp + frames
  micro_batch = pairs / config.accumulation_steps
  activations = micro_batch * _of_a_pair(config)
  # If blocks are rematerialised, gradients grow while activations are given back.
  is_whole = config.remat == 'none'
  temporary = activations + BESIDE * params if is_whole else max(activations, params)
  if config.mesh.fsdp > 1:
    temporary += GATHERED * params
  if config.accumulation_steps > 1:
    # The sum of the gradients, and the frames in the order of micro-batches.
    temporary += params / config.mesh.fsdp + frames
  return arguments + temporary


def _of_a_pair(config: Config) -> float:
  """Returns the bytes of activations that the backward pass needs of a pair."""
  blocks = _blocks(config.model, config.objective.mask_ratio)
  tokens, logits = OF_TOKENS[config.dtype], OF_LOGITS[config.dtype]
  if config.remat == 'none':
    return sum(
      depth * (tokens * count * width + logits * heads * count**2)
      for depth, count, width, heads in blocks
    )
  again = OF_LOGITS_AGAIN[config.dtype]
  inputs = sum(OF_INPUTS * depth * count * width for depth, count, width, _ in blocks)
  return inputs + max(
    tokens * count * width + again * heads * count**2 for _, count, width, heads in blocks
  )


def _blocks(a: Architecture, mask_ratio: float) -> list[tuple[int, int, int, int]]:
  """Returns depth, tokens, width and heads of encoder and decoder."""
  visible = masking.num_visible(a.num_tokens, mask_ratio)
  return [
    (a.depth, visible, a.width, a.num_heads),
    (a.decoder_depth, a.num_tokens, a.decoder_width, a.decoder_num_heads),
  ]
