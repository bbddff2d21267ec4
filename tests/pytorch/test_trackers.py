"""Position tables with folded frame identities, against the model that adds both."""

import einops
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_layouts import TINY, random_state

from dropmae_jax.model import mae, patches
from dropmae_jax.model.masking import Masking
from dropmae_jax.pytorch import layouts, trackers


def tokens_of_model(state, image):
  """What the model's first block gets, of an image as the earlier and as the later frame."""
  state, architecture = layouts.at_resolution(state, TINY, len(image))
  graphdef, _ = mae.abstract_model(architecture)
  model = nnx.merge(graphdef, layouts.from_torch(state, architecture))
  model.blocks, model.norm = nnx.List([]), lambda tokens: tokens
  every = jnp.arange(architecture.num_tokens)[None]
  vectors = patches.patchify(jnp.stack([image, image])[None], architecture.patch_size)
  earlier, later = np.split(np.asarray(model.encode(vectors, Masking(every, every[:, :0]))[0]), 2)
  return {'x': earlier, 'z': later}


def tokens_of_tracker(net, image, frame):
  """As of OSTrack: patches and the table of the frame, and no identities."""
  weight = net['backbone.patch_embed.proj.weight']
  side = weight.shape[-1]
  cut = einops.rearrange(image, '(r i) (s j) c -> (r s) c i j', i=side, j=side)
  tokens = np.einsum('ncij,dcij->nd', cut, weight) + net['backbone.patch_embed.proj.bias']
  return tokens + net[f'backbone.pos_embed_{frame}'][0]


@pytest.mark.parametrize('sizes', [(16, 32), (24, 40), (32, 32)])
def test_a_tracker_without_identities_computes_the_same_tokens(sizes):
  state = random_state(TINY)
  net = trackers.fold_identities(layouts.in_layout(state, 'encoder'), sizes)
  assert not [name for name in net if 'temporal' in name]
  for frame, size in zip('zx', sizes, strict=True):
    image = np.random.default_rng(size).standard_normal((size, size, 3), np.float32)
    ours = tokens_of_model(state, image)
    theirs = tokens_of_tracker(net, image, frame)
    np.testing.assert_allclose(theirs, ours[frame], rtol=1e-5, atol=1e-5)
    # The table of one frame on the other is off by the difference of the identities everywhere.
    other = {'x': 'z', 'z': 'x'}[frame]
    off = state[f'temporal_pos_embed_{frame}'] - state[f'temporal_pos_embed_{other}']
    np.testing.assert_allclose(theirs - ours[other], off[0] + 0 * theirs, rtol=1e-3, atol=1e-4)
