"""The one-stream tracker (OSTrack, with the frame identities of DropTrack).

The tokens of template and search image go through the encoder's blocks together; the head makes
maps of those of the search image. Parameters have the names that they have in PyTorch checkpoints.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from dropmae_jax.config import Options, option
from dropmae_jax.model import mae, patches, position_embedding, vit
from dropmae_jax.model.attention import Attention, dense_attention
from dropmae_jax.runtime.errors import check_name
from dropmae_jax.tracking import elimination
from dropmae_jax.tracking.elimination import Kept, Standing
from dropmae_jax.tracking.head import CentreHead, Maps, initial_statistics

# The frame identity of the template, then that of the search image. In pre-training x is the
# earlier frame and z the later one; the published tracker has them the other way round.
IDENTITY_ORDERS = ('zx', 'xz')
# In checkpoints for the programs that load them; the tracker does not use them.
UNUSED = ('cls_token', 'pos_embed')


@dataclasses.dataclass(frozen=True)
class TrackerArchitecture(Options):
  """Every number that shapes the parameters; the defaults are the published ones at 256 pixels."""

  template_size: int = option(128, least=1, most=16384, help='side of the template in pixels')
  search_size: int = option(256, least=1, most=16384, help='side of the search image in pixels')
  patch_size: int = option(16, least=1, most=1024, help='side of a patch in pixels')
  width: int = option(768, least=1, most=16384, help='of a token')
  depth: int = option(12, least=1, most=256, help='blocks of the encoder')
  num_heads: int = option(12, least=1, most=1024, help='attention heads')
  mlp_ratio: float = option(
    4.0, above=0, most=64, help='hidden width of an MLP over the width of a token'
  )
  head_channels: int = option(256, least=8, most=16384, help='of the first convolution of the head')
  elimination_blocks: tuple[int, ...] = (3, 6, 9)
  pretraining_size: int = option(
    224, least=1, most=16384, help='side in pixels of the frames of pre-training, for pos_embed'
  )
  identity_order: str = option(
    'zx', help='frame identities of template and search image: zx as published, or xz'
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ('template_size', 'search_size', 'pretraining_size'):
      size = getattr(self, name)
      if size % self.patch_size:
        fitting = max(round(size / self.patch_size), 1) * self.patch_size
        raise ValueError(
          f'{name}={size} is not a multiple of patch_size={self.patch_size}; choose for example'
          f' {name}={fitting}.'
        )
    if self.width % self.num_heads or self.width % 4:
      raise ValueError(
        f'width={self.width} must be a multiple of 4 and of num_heads={self.num_heads}.'
      )
    if self.head_channels % 8:
      raise ValueError(f'head_channels={self.head_channels} must be a multiple of 8.')
    blocks = self.elimination_blocks
    if list(blocks) != sorted(set(blocks) & set(range(self.depth))):
      raise ValueError(
        f'elimination_blocks={blocks} must rise and be among the blocks 0 to {self.depth - 1}.'
      )
    check_name('identity_order', self.identity_order, IDENTITY_ORDERS)

  @property
  def template_grid(self) -> int:
    """Patches along one side of the template."""
    return self.template_size // self.patch_size

  @property
  def search_grid(self) -> int:
    """Patches along one side of the search image; the s of the shapes."""
    return self.search_size // self.patch_size

  def kept(self, rate: float) -> tuple[int, ...]:
    """Returns how many search tokens stay after each elimination at a keep rate."""
    return elimination.kept_counts(self.search_grid**2, rate, len(self.elimination_blocks))


def tracker_of_size(size: str, **other: int | float | str | tuple) -> TrackerArchitecture:
  """Returns the tracker of a row of `vit.SIZES`.

  Args:
    size: a name in `vit.SIZES`.
    **other: further fields of `TrackerArchitecture`, or other values for those of the row.

  Raises:
    ValueError: there is no such size, or the numbers do not fit together.
  """
  check_name('size', size, vit.SIZES)
  row = vit.SIZES[size]
  fields = {
    'elimination_blocks': elimination_blocks(row.depth),
    **{name: getattr(row, name) for name in ('width', 'depth', 'num_heads', 'patch_size')},
  }
  return TrackerArchitecture(**(fields | other))


def elimination_blocks(depth: int) -> tuple[int, ...]:
  """Returns the blocks of an encoder in which tokens are eliminated, at each quarter.

  Of ViT-B, the only published size, they are 3, 6 and 9.
  """
  return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))


class Backbone(nnx.Module):
  """The encoder, with position tables for template and search image."""

  def __init__(
    self, architecture: TrackerArchitecture, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
  ) -> None:
    a = architecture
    table = position_embedding.sincos_table(a.pretraining_size // a.patch_size, a.width)
    tables = {
      each: position_embedding.resample_table(table, grid)[:, 1:]
      for each, grid in (('z', a.template_grid), ('x', a.search_grid))
    }
    self.cls_token = nnx.Param(jnp.zeros((1, 1, a.width)))
    self.pos_embed = nnx.Param(jnp.asarray(table))
    self.temporal_pos_embed_x = mae.normal(rngs.params(), a.width)
    self.temporal_pos_embed_z = mae.normal(rngs.params(), a.width)
    self.pos_embed_z = nnx.Param(jnp.asarray(tables['z']))
    self.pos_embed_x = nnx.Param(jnp.asarray(tables['x']))
    self.patch_embed = vit.PatchEmbed(a.patch_size**2 * 3, a.width, dtype=dtype, rngs=rngs)
    self.blocks = nnx.List(
      [vit.Block(a.width, a.num_heads, a.mlp_ratio, dtype=dtype, rngs=rngs) for _ in range(a.depth)]
    )
    self.norm = vit.layer_norm(a.width, rngs=rngs)


class Tracker(nnx.Module):
  """Encoder and head.

  Attributes:
    architecture: its sizes.
    remat: a name in `mae.REMATERIALISATIONS`.
  """

  def __init__(
    self,
    architecture: TrackerArchitecture,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    remat: str = 'none',
  ) -> None:
    a = architecture
    self.architecture, self.remat = a, remat
    self.backbone = Backbone(a, rngs=rngs, dtype=dtype)
    self.box_head = CentreHead(a.width, a.head_channels, rngs=rngs, dtype=dtype)

  def __call__(
    self,
    template: Float[Array, 'b h w c'],
    search: Float[Array, 'b H W c'],
    statistics: dict,
    *,
    kept: Kept,
    residual_scales: Float[Array, 'depth 2 b'] | None = None,
    group_size: int | None = None,
    attend: Attention = dense_attention,
  ) -> tuple[Maps, dict]:
    """Returns the maps of the head, and the running statistics after this batch.

    Args:
      template: normalised pixels.
      search: likewise.
      statistics: running ones of the head, as of `init_statistics`.
      kept: how many search tokens stay after each elimination.
      residual_scales: of drop path, in training; see `draw_residual_scales`.
      group_size: samples whose batch statistics are taken together, in training; None: the running
        statistics are used and stay as they are.
      attend: how attention is computed; the masked form of elimination also gives it `present`, as
        `dense_attention` takes it.
    """
    tokens = self.encode(
      template, search, kept=kept, residual_scales=residual_scales, attend=attend
    )
    grid = self.architecture.search_grid
    features = rearrange(tokens[:, -(grid**2) :], 'b (h w) d -> b h w d', h=grid)
    maps, after = self.box_head(features, statistics['box_head'], group_size=group_size)
    return maps, {'box_head': after}

  def encode(
    self,
    template: Float[Array, 'b h w c'],
    search: Float[Array, 'b H W c'],
    *,
    kept: Kept,
    residual_scales: Float[Array, 'depth 2 b'] | None = None,
    attend: Attention = dense_attention,
  ) -> Float[Array, 'b l d']:
    """Returns the encoded tokens of the template, then those of the search grid.

    Removed tokens are zero. The arguments are those of a call.
    """
    a = self.architecture
    tokens = self.embed(template, search)
    standing = elimination.everything(len(search), a.search_grid**2)
    remaining = dict(zip(a.elimination_blocks, kept, strict=True))
    for index, block in enumerate(self.backbone.blocks):
      scales = None if residual_scales is None else residual_scales[index]
      run = functools.partial(self._run, block, count=remaining.get(index), attend=attend)
      policy = mae.REMATERIALISATIONS[self.remat]
      run = run if policy is None else jax.checkpoint(run, policy=policy)
      tokens, standing = run(tokens, standing, scales)
    tokens = self.backbone.norm(tokens)
    num_template = a.template_grid**2
    on_grid = elimination.on_grid(tokens[:, num_template:], standing, a.search_grid**2)
    return jnp.concatenate([tokens[:, :num_template], on_grid], axis=1)

  def embed(
    self, template: Float[Array, 'b h w c'], search: Float[Array, 'b H W c']
  ) -> Float[Array, 'b l d']:
    """Returns what goes into the first block: tokens with position and frame identity."""
    encoder, a = self.backbone, self.architecture
    identities = {'x': encoder.temporal_pos_embed_x, 'z': encoder.temporal_pos_embed_z}
    tables = encoder.pos_embed_z, encoder.pos_embed_x
    images = []
    for image, table, frame in zip((template, search), tables, a.identity_order, strict=True):
      tokens = encoder.patch_embed(patches.patchify(image[:, None], a.patch_size))
      images.append(tokens + table[...] + identities[frame][...])
    return jnp.concatenate(images, axis=1)

  def _run(
    self,
    block: vit.Block,
    tokens: Float[Array, 'b k d'],
    standing: Standing,
    scales: Float[Array, '2 b'] | None,
    *,
    count: int | Array | None,
    attend: Attention,
  ) -> tuple[Float[Array, 'b r d'], Standing]:
    """Runs a block, and removes tokens between its attention and its MLP.

    Args:
      block: of the encoder.
      tokens: of the template, then of the search image.
      standing: which tokens of the search image there are.
      scales: of both residuals.
      count: of the search tokens that stay; None: nothing is removed here.
      attend: how attention is computed.
    """
    num_template = self.architecture.template_grid**2
    centre = elimination.centre_token(self.architecture.template_grid)
    present = elimination.present_tokens(standing, num_template)
    of_present = attend if present is None else functools.partial(attend, present=present)
    scores = []

    def scored(query: Array, key: Array, value: Array) -> Array:
      if count is not None:
        scores.append(elimination.attention_received(query[:, centre], key, present))
      return of_present(query, key, value)

    tokens = tokens + _scaled(block.attn(block.norm1(tokens), scored), scales, 0)
    if count is not None:
      search, standing = elimination.eliminate(
        tokens[:, num_template:], standing, scores[0][:, num_template:], count
      )
      tokens = jnp.concatenate([tokens[:, :num_template], search], axis=1)
    return tokens + _scaled(block.mlp(block.norm2(tokens)), scales, 1), standing


def _scaled(residual: Array, scales: Array | None, which: int) -> Array:
  return residual if scales is None else residual * scales[which, :, None, None]


def draw_residual_scales(
  keys: Key[Array, ' b'], *, depth: int, rate: float
) -> Float[Array, 'depth 2 b']:
  """Draws drop path (stochastic depth): by what each residual of each sample is multiplied.

  It is 0 with a probability that rises linearly over the blocks from 0 to `rate`, and otherwise
  the inverse of its probability, so that the mean is 1.

  Args:
    keys: one per sample.
    depth: of the encoder.
    rate: the probability in the last block; at least 0 and below 1.
  """
  keep = 1 - jnp.linspace(0, rate, depth)[:, None]
  kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, (depth, 2)), out_axes=-1)(keys)
  return kept / keep[..., None]


@functools.lru_cache(maxsize=16)
def abstract_tracker(
  architecture: TrackerArchitecture, *, dtype: DTypeLike = jnp.float32, remat: str = 'none'
) -> tuple[nnx.GraphDef, dict]:
  """Returns the graph definition and the shapes of the parameters, without allocating any.

  `nnx.merge(graphdef, params)` is a tracker; `params` is a pure dict of arrays. The result is
  cached: do not modify it.
  """

  def make() -> Tracker:
    keys = mae.ParamKeys(jax.random.key(0))
    return Tracker(architecture, rngs=keys, dtype=dtype, remat=remat)

  graphdef, state = nnx.split(nnx.eval_shape(make))
  return graphdef, nnx.to_pure_dict(state)


@functools.partial(jax.jit, static_argnames='architecture')
def init_params(key: Key[Array, ''], architecture: TrackerArchitecture) -> dict:
  """Draws initial parameters (always float32), the encoder's as for pre-training."""
  return nnx.to_pure_dict(nnx.state(Tracker(architecture, rngs=mae.ParamKeys(key))))


def init_statistics(architecture: TrackerArchitecture) -> dict:
  """Returns running statistics with mean 0 and variance 1, by the paths of their batch norms."""
  return {'box_head': initial_statistics(architecture.head_channels)}


def is_trained(params: dict) -> dict:
  """Marks the parameters that get a gradient: all but the two that the tracker does not use."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key not in UNUSED, params)
