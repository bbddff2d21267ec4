"""What tests of the tracker share: the tiny one that is recorded, its names and its axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dropmae_jax.tracking import model

ARCHITECTURE = model.TrackerArchitecture(
  template_size=32,
  search_size=64,
  patch_size=4,
  width=24,
  depth=4,
  num_heads=3,
  head_channels=16,
  elimination_blocks=(1, 2, 3),
  pretraining_size=56,
)
GRAPHDEF, SHAPES = model.abstract_tracker(ARCHITECTURE)


def name_of(path):
  leaf = 'weight' if path[-1] in ('kernel', 'scale') else path[-1]
  return '.'.join(map(str, (*path[:-1], leaf)))


def of_name(tensors, shapes):
  """A tree of ours from PyTorch's tensors by name."""

  def leaf(path, shape):
    array = np.asarray(tensors[name_of(path)])
    if path[-1] == 'kernel':
      array = array.transpose(*range(2, array.ndim), 1, 0)
    return jnp.asarray(array.reshape(shape.shape), shape.dtype)

  flat = traverse_util.flatten_dict(shapes)
  return traverse_util.unflatten_dict({path: leaf(path, shape) for path, shape in flat.items()})


def tensors_of(*trees):
  """PyTorch's tensors by name, of several trees of ours."""
  leaves = {}
  for path, leaf in (pair for tree in trees for pair in traverse_util.flatten_dict(tree).items()):
    array, name = np.asarray(leaf), name_of(path)
    if name.endswith('patch_embed.proj.weight'):
      array = array.reshape(ARCHITECTURE.patch_size, ARCHITECTURE.patch_size, 3, -1)
    if path[-1] == 'kernel':
      array = array.transpose(-1, -2, *range(array.ndim - 2))
    leaves[name] = array
  return leaves


def with_prefix(arrays, prefix):
  return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def channels_last(images):
  return jnp.asarray(np.moveaxis(images, -3, -1))


def places_of(standing):
  """The places of the tokens that are present, in rising order, of every sample."""
  places = np.asarray(standing.places)
  present = np.ones(places.shape, bool) if standing.present is None else standing.present
  return [row[keep].tolist() for row, keep in zip(places, np.asarray(present), strict=True)]


def initial_state(golden):
  """The recorded parameters and running statistics."""
  tensors = with_prefix(golden('tracker/tracker_state'), 'state/')
  statistics = jax.eval_shape(functools.partial(model.init_statistics, ARCHITECTURE))
  return tuple(of_name(tensors, tree) for tree in (SHAPES, statistics))
