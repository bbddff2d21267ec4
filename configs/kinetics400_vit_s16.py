"""DropMAE ViT-S/16 on Kinetics-400: the published ViT-B/16 run with another encoder.

The decoder keeps its published size, as in MAE, where it is the same for every encoder.

    dropmae-build --config=kinetics400 --videos=VIDEOS --data_dir=data
    dropmae-train --config=kinetics400_vit_s16 --workdir=runs/k400_s

Presets and longer runs: `devices.py`. Hardware, hours, resulting loss: not yet run, and not
published.
"""

from ml_collections import ConfigDict

from dropmae_jax.configs import devices, kinetics400_vit_b16


def get_config(argument: str = '') -> ConfigDict:
  """Returns the published config with a ViT-S/16, changed by an argument."""
  config = kinetics400_vit_b16.get_config()
  config.model.size = 'S'
  return devices.change(config, argument)
