"""DropMAE ViT-L/16 on Kinetics-400: the published ViT-B/16 run with another encoder.

The decoder keeps its published size, as in MAE, where it is the same for every encoder.

    dropmae-build --config=kinetics400 --videos=VIDEOS --data_dir=data
    dropmae-train --config=kinetics400_vit_l16 --workdir=runs/k400_l

Presets and longer runs: `devices.py`. Hardware, hours, resulting loss: not yet run, and not
published.
"""

from ml_collections import ConfigDict

from dropmae_jax.configs import devices, kinetics400_vit_b16


def get_config(argument: str = '') -> ConfigDict:
  """Returns the published config with a ViT-L/16, changed by an argument."""
  config = kinetics400_vit_b16.get_config()
  config.model.size = 'L'
  return devices.change(config, argument)
