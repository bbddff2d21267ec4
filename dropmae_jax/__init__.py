"""DropMAE in JAX: masked autoencoding of video frame pairs with spatial-attention dropout.

The pipeline, and the package or module of each stage:

  video files
    --tfds_kinetics-->             JPEG frames in array_record files
    --data/-->                     uint8 frame pairs, cropped and in batches
    --model/pixels, patches, masking-->  visible patches of both frames
    --model/mae, vit, asad-->      reconstruction of the masked patches
    --train_step-->                loss, gradients, new parameters
    --checkpoints/-->              the state of a run, saved and restored
    --evaluation/, pytorch/-->     scores, figures; weight files for PyTorch

Axes in the shapes of signatures:

  b  batch                      f  frames of a sample: 2, the earlier one first
  h, w  pixels                  c  colour channels
  n  tokens per frame           l  tokens per sample, l = f * n
  k  visible tokens             r  masked tokens, k + r = l
  p  values of a patch, patch_size * patch_size * 3, colour fastest
  d  width of a token           m  attention heads         e  width of a head
  i  query tokens               j  key tokens
"""
