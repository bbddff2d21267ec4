"""The masked autoencoder over frame pairs, and the loss that it is pre-trained with.

The core (`MaskedAutoencoder`, `reconstruction_loss`) is deterministic: masking and attentions are
handed in, so recorded ones can be. `pretraining_loss` draws them from keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from dropmae_jax import attention, masking, patches, position, vit
from dropmae_jax.attention import Attention, dense_attention
from dropmae_jax.masking import Masking


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Every number that shapes the parameters; the defaults are ViT-B/16 at 224 pixels."""

  image_size: int = 224
  patch_size: int = 16
  width: int = 768
  depth: int = 12
  num_heads: int = 12
  decoder_width: int = 512
  decoder_depth: int = 8
  decoder_num_heads: int = 16
  mlp_ratio: float = 4.0

  def __post_init__(self) -> None:
    for name, value in dataclasses.asdict(self).items():
      if value <= 0:
        raise ValueError(f'{name}={value} is not positive.')
    if self.image_size < self.patch_size or self.image_size % self.patch_size:
      down = max(self.image_size // self.patch_size, 1) * self.patch_size
      raise ValueError(
        f'image_size={self.image_size} is not a multiple of patch_size={self.patch_size};'
        f' choose for example image_size={down}.'
      )
    for part in ('', 'decoder_'):
      width, heads = getattr(self, f'{part}width'), getattr(self, f'{part}num_heads')
      if width % heads or width % 4:
        raise ValueError(
          f'{part}width={width} must be a multiple of 4 and of {part}num_heads={heads}.'
        )

  @property
  def grid(self) -> int:
    """Patches along one side of a frame."""
    return self.image_size // self.patch_size

  @property
  def tokens_per_frame(self) -> int:
    """The n of the shapes."""
    return self.grid**2

  @property
  def num_tokens(self) -> int:
    """The l of the shapes: the tokens of both frames."""
    return 2 * self.tokens_per_frame

  @property
  def patch_values(self) -> int:
    """The p of the shapes."""
    return self.patch_size**2 * 3


def architecture_of_size(size: str, **other: int | float) -> Architecture:
  """Returns the architecture of a row of `vit.SIZES`; `other` sets the remaining fields.

  Raises:
    ValueError: there is no such size, or the numbers do not fit one another.
  """
  if size not in vit.SIZES:
    raise ValueError(f'{size=} is not in the size table; choose one of {", ".join(vit.SIZES)}.')
  return Architecture(**(vit.SIZES[size]._asdict() | other))


@dataclasses.dataclass(frozen=True)
class Objective:
  """What the model is trained to do; the defaults are the published recipe.

  Attributes:
    mask_ratio: share of the tokens of both frames that is masked.
    masking: a scheme of `masking.MASKING_SCHEMES`.
    attention_dropout: P of ASAD in every decoder block; 0 switches it off.
    normalise_targets: predict pixels normalised per patch rather than pixels.
  """

  mask_ratio: float = 0.75
  masking: str = 'random'
  attention_dropout: float = 0.1
  normalise_targets: bool = True

  def __post_init__(self) -> None:
    if not 0 < self.mask_ratio < 1:
      raise ValueError(
        f'mask_ratio={self.mask_ratio} is not between 0 and 1 (both excluded);'
        ' the published value is 0.75.'
      )
    if not 0 <= self.attention_dropout <= 1:
      raise ValueError(
        f'attention_dropout={self.attention_dropout} is not between 0 and 1;'
        ' the published value is 0.1 and 0 switches it off.'
      )
    if self.masking not in masking.MASKING_SCHEMES:
      raise ValueError(
        f'masking={self.masking!r} is unknown; choose one of {", ".join(masking.MASKING_SCHEMES)}.'
      )


def normal(key: Array, width: int, *, deviation: float = 1.0) -> nnx.Param:
  """Returns a [1, 1, width] parameter drawn from a normal law."""
  return nnx.Param(deviation * jax.random.normal(key, (1, 1, width)))


# What of a block's activations is kept for its gradient; the rest is computed anew.
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
    self.pos_embed = nnx.Param(jnp.asarray(position.sincos_table(a.grid, a.width)))
    self.temporal_pos_embed_x = normal(rngs.params(), a.width)
    self.temporal_pos_embed_z = normal(rngs.params(), a.width)
    self.patch_embed = vit.PatchEmbed(a.patch_values, a.width, dtype=dtype, rngs=rngs)
    self.blocks = nnx.List(
      [vit.Block(a.width, a.num_heads, a.mlp_ratio, dtype=dtype, rngs=rngs) for _ in range(a.depth)]
    )
    self.norm = vit.layer_norm(a.width, rngs=rngs)

    self.mask_token = normal(rngs.params(), a.decoder_width, deviation=0.02)
    self.decoder_pos_embed = nnx.Param(jnp.asarray(position.sincos_table(a.grid, a.decoder_width)))
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
    """Runs a block; its gradient finds what `remat` keeps, and computes the rest anew."""
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
  attention_programs: attention.Programs = attention.PLAIN,
) -> Float[Array, '']:
  """Draws a masking and the dropped attention pairs, and returns the loss.

  Args:
    model: the autoencoder.
    frames: normalised pixels of the earlier and the later frame.
    masking_keys: one per sample.
    asad_keys: one per sample.
    objective: mask ratio, P and kind of targets.
    attention_programs: how attention is computed.
  """
  a = model.architecture
  scheme = masking.MASKING_SCHEMES[objective.masking]
  masked = scheme(masking_keys, num_tokens=a.num_tokens, mask_ratio=objective.mask_ratio)
  attentions = attention.decoder_attentions(
    asad_keys,
    num_blocks=a.decoder_depth,
    tokens_per_frame=a.tokens_per_frame,
    drop_rate=objective.attention_dropout,
    programs=attention_programs,
  )
  vectors = patches.patchify(frames, a.patch_size)
  latents = model.encode(vectors, masked, attention_programs.dense)
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
