"""The configs that are compared: without dropout, and with each implementation of ASAD."""

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

from dropmae_jax.config import DTYPES, Config, Objective
from dropmae_jax.kernels import implementations
from dropmae_jax.model import mae, vit
from dropmae_jax.model.asad import num_dropped
from dropmae_jax.runtime.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that describe the step."""
  parser.add_argument('--model', default='B', choices=sorted(vit.SIZES), help='(%(default)s)')
  parser.add_argument('--image_size', type=int, default=224, help='pixels (%(default)s)')
  parser.add_argument('--dtype', choices=DTYPES, help='of the products')
  parser.add_argument('--remat', default='none', choices=sorted(mae.REMATERIALISATIONS))
  parser.add_argument(
    '--without_fused', action='store_true', help='leave out the kernels, if they do not work'
  )
  parser.add_argument('--drop_rate', type=float, default=0.1, help='P of ASAD (%(default)s)')


def make_config(arguments: argparse.Namespace, batch_size: int) -> Config:
  """Returns the config with ASAD that the flags of `add_arguments` describe.

  Raises:
    UserError: its numbers do not fit one another, or ASAD would drop nothing.
  """
  try:
    config = Config(
      data_dir='',
      num_steps=1000,
      batch_size=batch_size,
      model=vit.architecture_of_size(arguments.model, image_size=arguments.image_size),
      objective=Objective(attention_dropout=arguments.drop_rate),
      dtype=arguments.dtype,
      remat=arguments.remat,
    )
  except ValueError as error:
    raise UserError(f'config: {error}') from error
  others = config.model.tokens_per_frame - 1
  if num_dropped(others + 1, arguments.drop_rate) == 0:
    raise UserError(
      f'--drop_rate={arguments.drop_rate} drops none of {others} keys, so that there is nothing to'
      f' compare; use more than {1 / max(1, others):.3f}, or a larger --image_size.'
    )
  return config


def compared(config: Config, device: Any, *, without_fused: bool = False) -> dict[str, Config]:
  """Returns by name the configs whose steps are compared; the first is the base of the ratios."""
  objective = dataclasses.replace(config.objective, attention_dropout=0.0)
  dense = dataclasses.replace(config, objective=objective)
  configs = {'dense': dense, 'asad': config}
  a = config.model
  sizes = a.tokens_per_frame, a.decoder_num_heads, a.decoder_width // a.decoder_num_heads
  if not without_fused and not implementations.unsupported(device, *sizes, config.dtype):
    configs['asad_fused'] = dataclasses.replace(config, attention='fused')
    if device.platform == 'gpu':
      configs['dense_fused'] = dataclasses.replace(dense, attention='fused')
  return configs


def comparisons(names: Iterable[str]) -> list[tuple[str, str]]:
  """Pairs every config with the first one, and ASAD's kernels with flash attention too."""
  first, *others = names
  pairs = [(name, first) for name in others]
  kernels = ('asad_fused', 'dense_fused')
  return pairs + [kernels] * (set(kernels) <= set(others))
