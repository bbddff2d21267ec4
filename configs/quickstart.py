r"""A tiny model on generated clips, for a CPU of two cores: what `make quickstart` trains.

python -m dropmae_jax.synthetic_clips --output=runs/quickstart/clips
python -m tfds_kinetics --config=folder --videos=runs/quickstart/clips \
        --data_dir=runs/quickstart/data
python -m dropmae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from configs import kinetics400_vit_b16


def get_config() -> ConfigDict:
  config = kinetics400_vit_b16.get_config()
  config.data_dir = 'runs/quickstart/data'
  config.dataset = 'kinetics_frames/folder'
  config.num_steps = 600
  config.batch_size = 32
  config.dtype = 'float32'
  config.model.size = 'XS'
  config.model.image_size = 64
  config.model.patch_size = 8
  config.model.decoder_width = 128
  config.model.decoder_depth = 4
  config.model.decoder_num_heads = 4
  config.data.frame_gap = 12
  config.data.num_workers = 0
  config.optimizer.base_learning_rate = 8e-3
  config.optimizer.warmup_steps = 60
  config.checkpoint.every_steps = 100
  config.checkpoint.keep_last = 2
  config.checkpoint.keep_every = 0
  return config
