"""DropMAE in JAX: masked autoencoding of video frame pairs with spatial-attention dropout.

The road that data takes, and the file of each stop:

  video files  --tfds_kinetics-->  JPEG frames in array_record files
    --stream.py, data.py, augment.py-->  uint8 frame pairs on the device
    --pixels.py, patches.py, masking.py-->  visible patches of both frames
    --mae.py (vit.py, asad.py)-->  reconstruction of the masked patches
    --train_step.py-->             loss, gradients, the next parameters
    --checkpoint.py-->             figures.py, or convert.py --torch_files.py--> PyTorch files

Shape letters, the same in every signature:
  b batch            f frames in a sample (2: the earlier one, then the later one)
  h, w pixels        c colour channels
  n tokens per frame l tokens per sample, l = f * n
  k visible tokens   r removed (masked) tokens, k + r = l
  p values of a patch, patch_size * patch_size * 3, colour fastest
  d width of a token m attention heads, e width of a head
  i query token, j key token
"""
