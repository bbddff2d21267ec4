"""DropMAE ViT-B/16 on Kinetics-700: the 800-epoch run of the published logs.

The logs show batch 4096 in two micro-batches and 128 whole updates an epoch, which fits 526,336 to
528,383 videos. The published code drops the half batch left at the end of an epoch; this one does
not.

    dropmae-build --config=kinetics700 --videos=VIDEOS --data_dir=data
    dropmae-train --config=kinetics700_vit_b16 --workdir=runs/k700

Hardware, hours, resulting loss: not yet run. The published logs end at a mean loss of 0.2581.
"""

from ml_collections import ConfigDict

from dropmae_jax.configs import devices, kinetics400_vit_b16


def get_config(argument: str = '') -> ConfigDict:
  """Returns the config of the published 800-epoch run, changed by an argument (`devices.py`)."""
  config = kinetics400_vit_b16.get_config()
  config.dataset = 'kinetics_frames/kinetics700'
  config.num_epochs = 800.0
  config.accumulation_steps = 2
  config.checkpoint.keep_every = 10_000
  return devices.change(config, argument)
