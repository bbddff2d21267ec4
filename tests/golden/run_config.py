"""The config of the run in run.tar.xz; few fields have their default values."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.data_dir = 'data'
  config.dataset = 'kinetics_frames/folder'
  config.split = 'val'
  config.seed = 3
  config.num_steps = 9
  config.batch_size = 4
  config.accumulation_steps = 2
  config.dtype = 'float32'
  config.attention = 'xla'
  config.remat = 'dots'
  config.log_every = 2
  config.model = ConfigDict(
    {
      'image_size': 32,
      'patch_size': 8,
      'width': 16,
      'depth': 2,
      'num_heads': 2,
      'decoder_width': 8,
      'decoder_depth': 2,
      'decoder_num_heads': 2,
      'mlp_ratio': 2.0,
    }
  )
  config.objective = ConfigDict(
    {'mask_ratio': 0.6, 'attention_dropout': 0.3, 'normalise_targets': False}
  )
  config.data = ConfigDict({'frame_gap': 3, 'resize': 'exact', 'num_threads': 0})
  config.optimizer = ConfigDict(
    {
      'base_learning_rate': 0.3,
      'min_learning_rate': 0.001,
      'warmup_steps': 2,
      'weight_decay': 0.1,
      'beta1': 0.8,
      'beta2': 0.9,
    }
  )
  config.checkpoint = ConfigDict({'every_steps': 5, 'keep_last': 2})
  return config
