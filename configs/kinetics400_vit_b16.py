"""DropMAE ViT-B/16 on Kinetics-400 as published, with every field.

Wu et al., "DropMAE: Masked Autoencoders with Spatial-Attention Dropout for Tracking Tasks", CVPR
2023: batch 4096, 400 epochs of which 40 warm up, AdamW, base learning rate 1.5e-4 per 256 pairs
(peak 2.4e-3), weight decay 0.05, mask ratio 0.75, P = 0.1, frame gap 50. One epoch of the 241,553
videos is 58 updates.

    dropmae-build --config=kinetics400 --videos=VIDEOS --data_dir=data
    dropmae-train --config=kinetics400_vit_b16 --workdir=runs/k400

That is for devices that hold 4096 pairs, such as 64 TPU v5e or 32 GPUs of 80 GB. For others there
are presets (`devices.py`), and longer runs:

    dropmae-train --config=kinetics400_vit_b16:8x80gb --workdir=runs/k400 --local_processes=8
    dropmae-train --config=kinetics400_vit_b16:v5e-16,1600epochs --workdir=runs/k400

Hardware, hours, resulting loss: not yet run. The published logs of a 1600-epoch run show a mean
loss of 0.3142 after 100 epochs and 0.2632 at the end.
"""

from ml_collections import ConfigDict

from dropmae_jax.configs import devices


def get_config(argument: str = '') -> ConfigDict:
  """Returns the published config, which sets every field of a run, changed by an argument."""
  config = ConfigDict()
  config.data_dir = 'data'
  config.dataset = 'kinetics_frames/kinetics400'
  config.split = 'train'
  config.seed = 0
  config.init_from = ''
  config.num_steps = 0
  config.num_epochs = 400.0
  config.batch_size = 4096
  config.accumulation_steps = 1
  config.dtype = 'bfloat16'
  config.attention = 'auto'
  config.remat = 'none'
  config.log_every = 20
  config.score_every = 0
  config.scores = 'held_out'
  config.step_stall_seconds = 1800.0

  config.model = ConfigDict()
  config.model.size = 'B'
  config.model.image_size = 224
  config.model.mlp_ratio = 4.0

  config.objective = ConfigDict()
  config.objective.mask_ratio = 0.75
  config.objective.masking = 'random'
  config.objective.attention_dropout = 0.1
  config.objective.dropout_rule = 'asad'
  config.objective.normalise_targets = True

  config.data = ConfigDict()
  config.data.frame_gap = 50
  config.data.resize = 'fast'
  config.data.shared_augmentation = False
  config.data.num_threads = 0
  config.data.stall_seconds = 300.0
  config.data.max_damaged_records = 10

  config.optimizer = ConfigDict()
  config.optimizer.base_learning_rate = 1.5e-4
  config.optimizer.min_learning_rate = 0.0
  config.optimizer.warmup_steps = 0
  config.optimizer.warmup_epochs = 40.0
  config.optimizer.weight_decay = 0.05
  config.optimizer.beta1 = 0.9
  config.optimizer.beta2 = 0.95

  config.mesh = ConfigDict()
  config.mesh.data = 0
  config.mesh.fsdp = 1

  config.checkpoint = ConfigDict()
  config.checkpoint.every_steps = 500
  config.checkpoint.keep_last = 3
  config.checkpoint.keep_every = 5000
  return devices.change(config.lock(), argument)
