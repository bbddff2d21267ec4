r"""A tiny model on generated clips, for a CPU with two cores: what `make quickstart` trains.

    dropmae-clips --output=runs/quickstart/clips
    dropmae-build --config=folder --videos=runs/quickstart/clips \
        --data_dir=runs/quickstart/data
    dropmae-train --config=quickstart --workdir=runs/quickstart

Takes minutes.
"""

from ml_collections import ConfigDict

from dropmae_jax.configs import kinetics400_vit_b16


def get_config() -> ConfigDict:
  """Returns a config that learns in minutes."""
  config = kinetics400_vit_b16.get_config()
  config.data_dir = 'runs/quickstart/data'
  config.dataset = 'kinetics_frames/folder'
  config.num_steps, config.num_epochs = 2800, 0.0
  config.batch_size = 8
  config.dtype = 'float32'
  config.log_every = 50
  config.model.size = 'XS'
  config.model.image_size = 64
  # In so few steps the model learns to look at the other frame only where that is easy.
  config.data.frame_gap = 6
  config.data.shared_augmentation = True
  config.optimizer.base_learning_rate = 0.064
  config.optimizer.warmup_steps, config.optimizer.warmup_epochs = 150, 0.0
  config.checkpoint.every_steps = 500
  config.checkpoint.keep_last = 2
  config.checkpoint.keep_every = 0
  return config
