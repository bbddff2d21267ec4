"""Models initialised as for training."""

import jax
from flax import nnx

from dropmae_jax.model import mae


def initial_model(architecture):
  """A model with the initial parameters of key 0."""
  graphdef, _ = mae.abstract_model(architecture)
  return nnx.merge(graphdef, mae.init_params(jax.random.key(0), architecture))
