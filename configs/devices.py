"""How the published batch of 4096 pairs fits the devices that there are, and longer runs.

    dropmae-train --config=kinetics400_vit_b16:24gb --workdir=runs/k400
    dropmae-train --config=kinetics400_vit_b16:v5e-16,1600epochs --workdir=runs/k400_long

None of these changes what a run learns: batch and epochs stay those of the config. A run may go on
with another preset. Hours and results: not yet run.

To add a preset: add a row, and let the compiler say whether it fits:
`dropmae-train --config=kinetics400_vit_b16:NAME --dry_run=compile --target=TARGET`.
"""

import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dropmae_jax.runtime.errors import UserError, did_you_mean


class Preset(NamedTuple):
  """What differs for some devices.

  Attributes:
    target: these devices, as `--target` calls them; the smallest memory where there are several.
    fields: of the config that differ, by size of the ViT.
  """

  target: str
  fields: dict[str, dict[str, Any]]


# What the compiled step takes of a device's memory, with two batches that are prefetched, stands
# beside each (docs/scaling.md). Of a GPU it must be less than the three quarters that JAX takes.
PRESETS = {
  # RTX 4090; A10G and L4 have as much memory. 15.5 of 18 GB.
  '24gb': Preset('rtx4090', {'B': {'accumulation_steps': 128}}),
  # One A100 or H100. 38.7 of 60 GB.
  '80gb': Preset('h100', {'B': {'accumulation_steps': 32}}),
  # 36.3 of 60 GB.
  '8x80gb': Preset('8xh100', {'B': {'accumulation_steps': 4}}),
  # Four chips of 32 GB, of which it takes 18.8.
  'v4-8': Preset('v4-8', {'B': {'accumulation_steps': 8}}),
  # 16 chips of 16 GB, of which it takes 11.6.
  'v5e-16': Preset('v5e-16', {'B': {'accumulation_steps': 4}}),
}


def change(config: ConfigDict, argument: str) -> ConfigDict:
  """Changes a config by what follows the colon in `--config=NAME:ARGUMENT`, and returns it.

  Args:
    config: with every field.
    argument: names of `PRESETS` and numbers of epochs (`1600epochs`), with commas between them.

  Raises:
    UserError: a name is unknown, there are two presets, or none for this size of the ViT.
  """
  names = argument.split(',') if argument else []
  presets = [name for name in names if name in PRESETS]
  if len(presets) > 1:
    raise UserError(f'{presets[0]} and {presets[1]} are two presets; give one of them')
  for name in names:
    if epochs := re.fullmatch(r'(\d{1,6})epochs', name):
      config.num_epochs = float(epochs[1])
    elif name in PRESETS:
      config.update_from_flattened_dict(_fields(name, config.model.size))
    else:
      known = did_you_mean(name, [*PRESETS, '800epochs', '1600epochs'])
      raise UserError(f'{name!r} is no preset; {known.removesuffix(".")}')
  return config


def _fields(name: str, size: str) -> dict[str, Any]:
  fields = PRESETS[name].fields
  if size not in fields:
    raise UserError(
      f'{name} has no preset of ViT-{size}, only of {", ".join(fields)}; leave it out, and give'
      ' --config.accumulation_steps=auto'
    )
  return fields[size]
