"""The masked autoencoder over frame pairs, and the loss that it is pre-trained with.

The core (`MaskedAutoencoder`, `reconstruction_loss`) is deterministic: masking and attentions are
handed in, so recorded ones can be. `pretraining_loss` draws them from keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
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


# What of a block's activations is kept for its gradient; the rest is rematerialised.
REMATERIALISATIONS = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


class MaskedAutoencoder(nnx.Module):
  """Encodes the visible patches of two frames and reconstructs the masked ones.

  Token order is that of the frames: first the earlier (x), then the later (z). Names equal the
  PyTorch checkpoints'. The two position tables are carried with the parameters, because the
  files are, but no gradient reaches them.
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
    """Returns the latents of the visible patches in the masking's order; no other is embedded."""
    frames = self.temporal_pos_embed_x, self.temporal_pos_embed_z
    tokens = self.patch_embed(masking.select(patch_vectors, masked.visible))
    tokens = tokens + _codes(masked.visible, self.pos_embed, *frames)
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
    """Returns the reconstruction of patches of both frames.

    Args:
      latents: of the visible patches.
      masked: which these are.
      attentions: one per block; each sees all tokens.
      wanted: unlike patches to reconstruct, in this order; all in the frames' order by default.
    """
    frames = self.decoder_temporal_pos_embed_x, self.decoder_temporal_pos_embed_z
    code = _codes(jnp.arange(self.architecture.num_tokens)[None], self.decoder_pos_embed, *frames)
    visible = self.decoder_embed(latents).astype(jnp.float32)
    tokens = masking.restore(visible, self.mask_token[...], masked) + code
    leave_out = [None] * (len(attentions) - 1) + [wanted]
    for block, *how in zip(self.decoder_blocks, attentions, leave_out, strict=True):
      tokens = self._run(block, tokens, *how)
    return self.decoder_pred(self.decoder_norm(tokens)).astype(jnp.float32)

  def _run(self, block: vit.Block, tokens: Array, attend: Attention, wanted: Array | None) -> Array:
    """Runs a block; the backward pass has what `remat` keeps, and recomputes the rest."""
    run = functools.partial(block, attend=attend, wanted=wanted)
    policy = REMATERIALISATIONS[self.remat]
    return (run if policy is None else jax.checkpoint(run, policy=policy))(tokens)

  def __call__(
    self, patch_vectors: Float[Array, 'b l p'], masked: Masking, attentions: list[Attention]
  ) -> Float[Array, 'b l p']:
    """Encodes the visible patches and reconstructs all."""
    return self.decode(self.encode(patch_vectors, masked), masked, attentions)


def _codes(
  places: Int[Array, 'b k'], table: nnx.Param, temporal_x: nnx.Param, temporal_z: nnx.Param
) -> Float[Array, 'b k d']:
  """Adds frame identity and position; the table, whose slot 0 is unused, gets no gradient."""
  positions = jax.lax.stop_gradient(table[0, 1:])
  frames = jnp.where((places < len(positions))[..., None], temporal_x[...], temporal_z[...])
  return frames + positions[places % len(positions)]


def reconstruction_loss(
  reconstruction: Float[Array, 'b r p'],
  patch_vectors: Float[Array, 'b r p'],
  *,
  normalise_targets: bool,
) -> Float[Array, '']:
  """Mean squared error over patches of both frames together; those that are masked."""
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
    objective: mask ratio, P and kind of targets.
    implementations: how attention is computed; by default plainly.
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
  found = model.decode(latents, masked, attentions, wanted=masked.masked)
  targets = masking.select(vectors, masked.masked)
  return reconstruction_loss(found, targets, normalise_targets=objective.normalise_targets)


@functools.lru_cache(maxsize=16)
def abstract_model(
  architecture: Architecture, *, dtype: DTypeLike = jnp.float32, remat: str = 'none'
) -> tuple[nnx.GraphDef, dict]:
  """Returns the graph and the shapes of the parameters, without making any.

  `nnx.merge(graphdef, params)` is a model; `params` is a pure dict of arrays. Tracing takes a
  second for a ViT-B, so the result is remembered: do not change it.
  """
  model = nnx.eval_shape(
    lambda: MaskedAutoencoder(architecture, rngs=nnx.Rngs(params=0), dtype=dtype, remat=remat)
  )
  graphdef, state = nnx.split(model)
  return graphdef, nnx.to_pure_dict(state)


def init_params(key: Key[Array, ''], architecture: Architecture) -> dict:
  """Draws fresh parameters (always float32) by the published rules, as a pure dict."""
  model = MaskedAutoencoder(architecture, rngs=nnx.Rngs(params=key))
  return nnx.to_pure_dict(nnx.state(model))


def num_parameters(params: dict) -> int:
  """Counts the values of a parameter dict, the two fixed position tables included."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
