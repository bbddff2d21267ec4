"""Converts checkpoints to PyTorch files and back: dropmae-convert for a checkout."""

from dropmae_jax.pytorch.main import command

if __name__ == '__main__':
  command()
