"""DropMAE in JAX: masked autoencoding of video frame pairs with spatial-attention dropout.

The pipeline, and the package or module of each stage:

  video files
    --tfds_kinetics-->             JPEG frames in array_record files
    --data/-->                     uint8 frame pairs, cropped and in batches
    --model/pixels, patches, masking-->  visible patches of both frames
    --model/mae, vit, asad-->      reconstruction of the masked patches
    --train_step-->                loss, gradients, new parameters
    --checkpoints/-->              the state of a run, saved and restored
    --evaluation/, pytorch/-->     figures; weight files for PyTorch

The code:

  main.py         command line of pre-training
  train.py        builds a run from its config, and loops
  train_step.py   the update: a pure function
  optimizer.py, sharding.py
  config.py       every option, its type and its range
  config_file.py  reads configs and their overrides
  model/          the autoencoder: `asad.py` is the method, `mae.py` the model and its loss
  kernels/        ASAD on TPUs and GPUs, and the choice of an implementation
  data/           videos and datasets to batches
  checkpoints/    saving and restoring runs; weights for readers
  pytorch/        weight files in the layouts of PyTorch, both ways
  evaluation/     what a model reconstructs
  runtime/        command lines, errors, many hosts, watchdog, reports

Axes in the shapes of signatures:

  b  batch                      f  frames of a sample: 2, the earlier one first
  h, w  pixels                  c  colour channels
  n  tokens per frame           l  tokens per sample, l = f * n
  k  visible tokens             r  masked tokens, k + r = l
  p  values of a patch, patch_size * patch_size * 3, colour fastest
  d  width of a token           m  attention heads         e  width of a head
  i  query tokens               j  key tokens
"""
