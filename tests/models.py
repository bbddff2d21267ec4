"""Models with the parameters that training starts from, made by one compiled program each."""

import jax
from flax import nnx

from dropmae_jax.model import mae

init_params = jax.jit(mae.init_params, static_argnums=1)


def initial_model(architecture):
  """A model of seed 0."""
  graphdef, _ = mae.abstract_model(architecture)
  return nnx.merge(graphdef, init_params(jax.random.key(0), architecture))
