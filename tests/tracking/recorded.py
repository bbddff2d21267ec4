"""What tests of the tracker share: the tiny one that is recorded, its names and its axes."""

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


def with_prefix(arrays, prefix):
  return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def compared(ours, tensors):
  """Name, our leaf and the recorded one in our layout, of every leaf of a tree."""
  theirs = traverse_util.flatten_dict(of_name(tensors, ours))
  for path, leaf in traverse_util.flatten_dict(ours).items():
    yield name_of(path), np.asarray(leaf), np.asarray(theirs[path])


def channels_last(images):
  return jnp.asarray(np.moveaxis(images, -3, -1))


def places_of(standing):
  """The places of the tokens that are present, in rising order, of every sample."""
  places = np.asarray(standing.places)
  present = np.ones(places.shape, bool) if standing.present is None else standing.present
  return [row[keep].tolist() for row, keep in zip(places, np.asarray(present), strict=True)]
