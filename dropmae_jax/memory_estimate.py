"""Estimates what a training step takes of a device's memory, without compiling it."""

from dropmae_jax.config import Config


def prefetched(config: Config, number: int) -> int:
  """Returns the bytes on each device of the batches that wait there for the next steps."""
  return 2 * config.batch_size // number * 2 * config.model.image_size**2 * 3


def estimate(config: Config, number: int, platform: str) -> float:
  raise NotImplementedError
