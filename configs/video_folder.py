r"""ViT-B/16 on a folder of your own videos, on one device: a config to start from.

    dropmae-build --config=folder --videos=VIDEOS --data_dir=data
    dropmae-train --config=video_folder --workdir=runs/mine \
        --config.num_steps=20000 --config.batch_size=256

The learning rate is scaled with the batch size. Hours and results: not yet run at this size.
"""

from ml_collections import ConfigDict

from dropmae_jax.configs import kinetics400_vit_b16


def get_config() -> ConfigDict:
  """Returns a config to start from."""
  config = kinetics400_vit_b16.get_config()
  config.dataset = 'kinetics_frames/folder'
  config.num_steps, config.num_epochs = 20_000, 0.0
  config.batch_size = 64
  config.optimizer.warmup_steps, config.optimizer.warmup_epochs = 100, 0.0
  config.checkpoint.every_steps = 500
  config.checkpoint.keep_every = 0
  return config
