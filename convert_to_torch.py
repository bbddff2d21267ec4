"""Checkpoints to PyTorch files and back: the same as dropmae-convert, without installing."""

from dropmae_jax.pytorch.main import command

if __name__ == '__main__':
  command()
