"""The masked autoencoder over frame pairs, and the loss for pre-training it.

`MaskedAutoencoder` and `reconstruction_loss` are deterministic: the masking and the attention
functions are arguments, so tests can pass recorded ones. `pretraining_loss` draws them from keys.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from dropmae_jax.config import Architecture, Objective
from dropmae_jax.model import attention, masking, patches, position_embedding, vit
from dropmae_jax.model.attention import Attention, dense_attention
from dropmae_jax.model.masking import Masking


def normal(key: Array, width: int, *, deviation: float = 1.0) -> nnx.Param:
  """Returns a [1, 1, width] parameter drawn from a normal distribution."""
  return nnx.Param(deviation * jax.random.normal(key, (1, 1, width)))


# Which activations of a block are stored for the backward pass; the others are rematerialised.
REMATERIALISATIONS = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


class MaskedAutoencoder(nnx.Module):
  """Encodes the visible patches of two frames and reconstructs the masked ones.

  The tokens of the earlier frame (x) come first, then those of the later one (z). Parameters have
  the names that they have in PyTorch checkpoints. The two position tables are among them, as in
  those files, but get no gradient.
  """

  def __init__(
    self,
    architecture: Architecture,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    remat: str = 'none',
  ) -> None:
    self.architecture = a = architecture
    self.dtype, self.remat = dtype, remat
    self.pos_embed = nnx.Param(jnp.asarray(position_embedding.sincos_table(a.grid, a.width)))
    self.temporal_pos_embed_x = normal(rngs.params(), a.width)
    self.temporal_pos_embed_z = normal(rngs.params(), a.width)
    self.patch_embed = vit.PatchEmbed(a.patch_values, a.width, dtype=dtype, rngs=rngs)
    self.blocks = nnx.List(
      [vit.Block(a.width, a.num_heads, a.mlp_ratio, dtype=dtype, rngs=rngs) for _ in range(a.depth)]
    )
    self.norm = vit.layer_norm(a.width, rngs=rngs)

    self.mask_token = normal(rngs.params(), a.decoder_width, deviation=0.02)
    self.decoder_pos_embed = nnx.Param(
      jnp.asarray(position_embedding.sincos_table(a.grid, a.decoder_width))
    )
    self.decoder_temporal_pos_embed_x = normal(rngs.params(), a.decoder_width)
    self.decoder_temporal_pos_embed_z = normal(rngs.params(), a.decoder_width)
    self.decoder_embed = vit.linear(a.width, a.decoder_width, dtype=dtype, rngs=rngs)
    self.decoder_blocks = nnx.List(
      [
        vit.Block(a.decoder_width, a.decoder_num_heads, a.mlp_ratio, dtype=dtype, rngs=rngs)
        for _ in range(a.decoder_depth)
      ]
    )
    self.decoder_norm = vit.layer_norm(a.decoder_width, rngs=rngs)
    self.decoder_pred = vit.linear(a.decoder_width, a.patch_values, dtype=dtype, rngs=rngs)

  def encode(
    self, patch_vectors: Float[Array, 'b l p'], masked: Masking, attend: Attention = dense_attention
  ) -> Float[Array, 'b k d']:
    """Returns the latents of the visible patches, in the order of `masked.visible`."""
    frames = self.temporal_pos_embed_x, self.temporal_pos_embed_z
    tokens = self.patch_embed(masking.select(patch_vectors, masked.visible))
    tokens = tokens + _embeddings(masked.visible, self.pos_embed, *frames)
    for block in self.blocks:
      tokens = self._run(block, tokens, attend, None)
    return self.norm(tokens)

  def decode(
    self,
    latents: Float[Array, 'b k d'],
    masked: Masking,
    attentions: list[Attention],
    wanted: Int[Array, 'b r'] | None = None,
  ) -> Float[Array, 'b r p']:
    """Returns reconstructed patches of both frames.

    Args:
      latents: of the visible patches.
      masked: the masking that they were encoded with.
      attentions: one per block, over all tokens.
      wanted: indices of the patches to return, no two equal; by default all, in frame order.
    """
    frames = self.decoder_temporal_pos_embed_x, self.decoder_temporal_pos_embed_z
    embeddings = _embeddings(
      jnp.arange(self.architecture.num_tokens)[None], self.decoder_pos_embed, *frames
    )
    visible = self.decoder_embed(latents).astype(jnp.float32)
    tokens = masking.restore(visible, self.mask_token[...], masked) + embeddings
    # Only the last block can leave tokens out: the others attend to all.
    wanted_of_blocks = [None] * (len(attentions) - 1) + [wanted]
    for block, *how in zip(self.decoder_blocks, attentions, wanted_of_blocks, strict=True):
      tokens = self._run(block, tokens, *how)
    return self.decoder_pred(self.decoder_norm(tokens)).astype(jnp.float32)

  def _run(self, block: vit.Block, tokens: Array, attend: Attention, wanted: Array | None) -> Array:
    """Runs a block; `remat` says which of its activations the backward pass rematerialises."""
    run = functools.partial(block, attend=attend, wanted=wanted)
    policy = REMATERIALISATIONS[self.remat]
    return (run if policy is None else jax.checkpoint(run, policy=policy))(tokens)

  def __call__(
    self, patch_vectors: Float[Array, 'b l p'], masked: Masking, attentions: list[Attention]
  ) -> Float[Array, 'b l p']:
    """Encodes the visible patches and reconstructs all patches."""
    return self.decode(self.encode(patch_vectors, masked), masked, attentions)


def _embeddings(
  indices: Int[Array, 'b k'], table: nnx.Param, temporal_x: nnx.Param, temporal_z: nnx.Param
) -> Float[Array, 'b k d']:
  """Returns the sum of frame and position embedding for tokens of both frames.

  The position table gets no gradient; its slot 0 is unused.
  """
  positions = jax.lax.stop_gradient(table[0, 1:])
  frames = jnp.where((indices < len(positions))[..., None], temporal_x[...], temporal_z[...])
  return frames + positions[indices % len(positions)]


def reconstruction_loss(
  reconstruction: Float[Array, 'b r p'],
  patch_vectors: Float[Array, 'b r p'],
  *,
  normalise_targets: bool,
) -> Float[Array, '']:
  """Returns the mean squared error over the given patches, which should be the masked ones."""
  targets = patches.normalise_patches(patch_vectors) if normalise_targets else patch_vectors
  return jnp.square(reconstruction - targets).mean()


def pretraining_loss(
  model: MaskedAutoencoder,
  frames: Float[Array, 'b f h w c'],
  *,
  masking_keys: Key[Array, ' b'],
  asad_keys: Key[Array, ' b'],
  objective: Objective,
  implementations: attention.Implementations | None = None,
) -> Float[Array, '']:
  """Draws a masking and the dropped attention pairs, and returns the loss.

  Args:
    model: the autoencoder.
    frames: normalised pixels of the earlier and the later frame.
    masking_keys: one per sample.
    asad_keys: one per sample.
    objective: masking scheme, mask ratio, dropout rule, P and kind of targets.
    implementations: how attention is computed; by default `attention.plain`.
  """
  implementations = implementations or attention.plain(objective.dropout_rule)
  a = model.architecture
  scheme = masking.MASKING_SCHEMES[objective.masking]
  masked = scheme(masking_keys, num_tokens=a.num_tokens, mask_ratio=objective.mask_ratio)
  attentions = attention.decoder_attentions(
    asad_keys,
    num_blocks=a.decoder_depth,
    tokens_per_frame=a.tokens_per_frame,
    drop_rate=objective.attention_dropout,
    implementations=implementations,
  )
  vectors = patches.patchify(frames, a.patch_size)
  latents = model.encode(vectors, masked, implementations.dense)
  reconstruction = model.decode(latents, masked, attentions, wanted=masked.masked)
  targets = masking.select(vectors, masked.masked)
  return reconstruction_loss(reconstruction, targets, normalise_targets=objective.normalise_targets)


class ParamKeys(nnx.Rngs):
  """The keys of `nnx.Rngs(params=key)`, counted in Python.

  Flax (0.12.8) keeps the count in an array. Under tracing, each access to it searches the trace
  made so far, which takes seconds for a ViT-H.
  """

  def __init__(self, key: Key[Array, '']) -> None:
    super().__init__()
    self._key, self._counts = key, itertools.count()

  def params(self) -> Key[Array, '']:
    """Returns the next key."""
    return jax.random.fold_in(self._key, next(self._counts))


@functools.lru_cache(maxsize=16)
def abstract_model(
  architecture: Architecture, *, dtype: DTypeLike = jnp.float32, remat: str = 'none'
) -> tuple[nnx.GraphDef, dict]:
  """Returns the graph definition and the shapes of the parameters, without allocating any.

  `nnx.merge(graphdef, params)` is a model; `params` is a pure dict of arrays. The result is cached:
  do not modify it.
  """

  def make() -> MaskedAutoencoder:
    keys = ParamKeys(jax.random.key(0))
    return MaskedAutoencoder(architecture, rngs=keys, dtype=dtype, remat=remat)

  model = nnx.eval_shape(make)
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)


@functools.partial(jax.jit, static_argnames='architecture')
def init_params(key: Key[Array, ''], architecture: Architecture) -> dict:
  """Draws initial parameters (always float32) as published, and returns them as a pure dict."""
  model = MaskedAutoencoder(architecture, rngs=ParamKeys(key))
  return nnx.to_pure_dict(nnx.state(model))


def num_parameters(params: dict) -> int:
  """Returns the number of values in a parameter dict, with the two fixed position tables."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
