"""DropMAE ViT-H/14 on Kinetics-400: the published ViT-B/16 run with another encoder.

The decoder keeps its published size, as in MAE, where it is the same for every encoder.

    dropmae-build --config=kinetics400 --videos=VIDEOS --data_dir=data
    dropmae-train --config=kinetics400_vit_h14 --workdir=runs/k400_h

Presets and longer runs: `devices.py`. Hardware, hours, resulting loss: not yet run, and not
published.
"""

from ml_collections import ConfigDict

from dropmae_jax.configs import devices, kinetics400_vit_b16


def get_config(argument: str = '') -> ConfigDict:
  """Returns the published config with a ViT-H/14, changed by an argument."""
  config = kinetics400_vit_b16.get_config()
  config.model.size = 'H'
  return devices.change(config, argument)
