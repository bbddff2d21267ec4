"""DropMAE ViT-B/16 on Kinetics-700: the 800-epoch run of the published logs.

Those logs fit 526,336 to 528,383 videos and batch 4096 in two micro-batches: 128 whole updates an
epoch (their half batch left over at each epoch's end was thrown away; ours is not).

    python -m tfds_kinetics --config=kinetics700 --videos=VIDEOS --data_dir=data
    python -m dropmae_jax.main --config=configs/kinetics700_vit_b16.py --workdir=runs/k700

Hardware, hours, resulting loss: not yet run. The published logs end at a mean loss of 0.2581.
"""

from ml_collections import ConfigDict

from dropmae_jax.configs import kinetics400_vit_b16

STEPS_PER_EPOCH = 128


def get_config() -> ConfigDict:
  """Returns the recipe of the published 800-epoch run."""
  config = kinetics400_vit_b16.get_config()
  config.dataset = 'kinetics_frames/kinetics700'
  config.num_steps = 800 * STEPS_PER_EPOCH
  config.accumulation_steps = 2
  config.optimizer.warmup_steps = 40 * STEPS_PER_EPOCH
  config.checkpoint.every_steps = 5 * STEPS_PER_EPOCH
  config.checkpoint.keep_every = 100 * STEPS_PER_EPOCH
  return config
