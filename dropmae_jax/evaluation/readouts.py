"""Readouts: what the affinity between the tokens of two frames is computed from.

`single`     each frame is encoded alone; cosine of its tokens. What all published numbers use.
`roles`      likewise, earlier frames with the identity x and the later one with z, as in training.
`joint`      the pair is encoded together, each token attending to both frames; cosine.
`attention`  the pair is also decoded, nothing masked; attention of a block of the decoder.

All but the first need a model of frame pairs. `is_centred` takes away what all tokens have in
common: the mean over the tokens of the clip (joint: of that frame in that pair), and for attention
the mean of each column, which is divided by.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dropmae_jax.config import Architecture
from dropmae_jax.evaluation import features, label_propagation
from dropmae_jax.evaluation.features import Encoder
from dropmae_jax.evaluation.label_propagation import Affinities, Context, Propagation
from dropmae_jax.pytorch import layouts
from dropmae_jax.runtime.errors import UserError, check_name


class AttentionStatistics(NamedTuple):
  """What the attention of a pair is like; compare it with that of random weights.

  Attributes:
    crossing: share of the later frame's attention that goes to the earlier frame.
    favourites: share of the earlier frame's cells that are the favourite of some cell.
    own_place: share of the later frame's cells whose favourite is at their own place.
  """

  crossing: float
  favourites: float
  own_place: float


READOUTS = 'single', 'roles', 'joint', 'attention'
IDENTITIES = 'none', 'x', 'z'
# Reads the normalised input of a frame.
Frames = Callable[[int], Float32[np.ndarray, 'h w c']]


@dataclasses.dataclass(frozen=True)
class Readout:
  """How affinities are computed.

  Attributes:
    kind: one of READOUTS.
    is_centred: see above.
    identity: of the frames of `single`, one of IDENTITIES.
    block: the last block that runs, from 1: of the encoder, or of the decoder for `attention`; by
      default the last one of all.
  """

  kind: str = 'single'
  is_centred: bool = False
  identity: str = 'none'
  block: int | None = None

  def uses(self, tensor: str, architecture: Architecture) -> bool:
    """Whether affinities depend on a tensor, by its name in the layout `full` of `layouts`."""
    if tensor in ('mask_token', 'decoder_norm.weight', 'decoder_norm.bias'):
      return False
    if layouts.is_of_decoder(tensor) and (self.kind != 'attention' or 'pred' in tensor):
      return False
    if tensor in layouts.FRAME_IDENTITIES and self.kind == 'single':
      return tensor.endswith(f'_{self.identity}')
    stack, number, *layer = [*tensor.split('.'), '']
    is_attention = self.kind == 'attention'
    if stack != ('decoder_blocks' if is_attention else 'blocks'):
      return True
    last = self.block or (architecture.decoder_depth if is_attention else architecture.depth)
    # Of the block whose attention is read out, only what makes queries and keys is used.
    ends_early = is_attention and int(number) == last - 1
    return int(number) < last and (not ends_early or layer[0] == 'norm1' or layer[1] == 'qkv')

  def check(self, encoder: Encoder) -> None:
    """Checks that a model can be read out so.

    Raises:
      UserError: it cannot.
    """
    check_name('--readout', self.kind, READOUTS)
    check_name('--identity', self.identity, IDENTITIES)
    where = encoder.source['path']
    if self.kind != 'single' and self.identity != 'none':
      raise UserError(f'--identity={self.identity} goes with --readout=single; leave it out.')
    if (self.kind, self.identity) != ('single', 'none') and not encoder.has_identities:
      option = f'--identity={self.identity}' if self.kind == 'single' else f'--readout={self.kind}'
      raise UserError(
        f'{option} needs the identities of a model of frame pairs, and {where} has none; leave it'
        ' out.'
      )
    if self.kind in ('joint', 'attention') and encoder.class_token is not None:
      raise UserError(
        f'--readout={self.kind} has no place for a class token; add --class_token=none.'
      )
    if self.kind == 'attention' and not encoder.has_decoder:
      raise UserError(f'--readout=attention needs a decoder, and {where} has none; leave it out.')
    a = encoder.architecture
    blocks = a.decoder_depth if self.kind == 'attention' else a.depth
    if self.block is not None and not 1 <= self.block <= blocks:
      raise UserError(f'--block={self.block} is not in 1..{blocks}; give a number from there.')


def model_affinities(
  encoder: Encoder,
  readout: Readout,
  propagation: Propagation,
  statistics: list[AttentionStatistics],
  frames: Frames,
  num_frames: int,
  grid: tuple[int, int],
) -> Affinities:
  """Returns the affinities of a clip.

  Args:
    encoder: the model.
    readout: how they are computed.
    propagation: says which frames are looked at.
    statistics: gets those of every pair, if the readout is `attention`.
    frames: of the clip.
    num_frames: of the clip.
    grid: of a frame in tokens, (height, width).
  """
  params, architecture = features.at_grid(encoder, grid), encoder.architecture
  if readout.kind in ('single', 'roles'):

    def encode(frame: Float32[np.ndarray, 'h w c'], identity: str) -> Float[Array, 'n d']:
      return features.encode_frames(
        params,
        frame[None],
        architecture=architecture,
        identity=identity,
        num_blocks=readout.block,
      )[0]

    identities = ('x', 'z') if readout.kind == 'roles' else (readout.identity,) * 2
    return FrameFeatures(
      encode, frames, num_frames, propagation, identities, is_centred=readout.is_centred
    )
  return PairAffinities(params, architecture, frames, readout, propagation, statistics)


class FrameFeatures:
  """Affinities of frames that are encoded alone: the cosine of their features.

  Args:
    encode: from a frame and its identity to features.
    frames: of the clip.
    num_frames: of the clip.
    propagation: says which frames are looked at.
    identities: given to `encode` for frames that are looked at, and for the one that looks.
    is_centred: subtract the mean over the clip. All its features are then in memory.
  """

  def __init__(
    self,
    encode: Callable[[Float32[np.ndarray, 'h w c'], str], Float[Array, 'n d']],
    frames: Frames,
    num_frames: int,
    propagation: Propagation,
    identities: tuple[str, str] = ('none', 'none'),
    *,
    is_centred: bool = False,
  ) -> None:
    self._propagation, self._identities = propagation, identities
    self._slots: Array | None = None
    # A frame first looks at others and is then stored, mostly with the same features.
    frame = functools.lru_cache(maxsize=1)(frames)
    self._encode = functools.lru_cache(maxsize=1)(
      lambda number, identity: encode(frame(number), identity)
    )
    self._encoded: dict[str, list[np.ndarray]] = {}
    self._means: dict[str, np.ndarray] = {}
    for identity in dict.fromkeys(identities) if is_centred else ():
      encoded = [np.asarray(self._encode(number, identity)) for number in range(num_frames)]
      self._encoded[identity] = encoded
      self._means[identity] = np.mean([np.mean(each, axis=0) for each in encoded], axis=0)

  def _features(self, number: int, identity: str) -> Float[Array, 'n d']:
    if self._means:
      return _unit(self._encoded[identity][number] - self._means[identity])
    return _unit(self._encode(number, identity))

  def store(self, number: int) -> None:
    """Puts the features of a frame into its slot."""
    stored = self._features(number, self._identities[0])
    if self._slots is None:
      self._slots = jnp.stack([stored] * (1 + self._propagation.num_previous))
    else:
      slot = label_propagation.slot(number, self._propagation)
      self._slots = label_propagation.put(self._slots, slot, stored)

  def propagate(
    self,
    number: int,
    context: Context,
    labels: Float[Array, 's n labels'],
    grid: tuple[int, int],
  ) -> Float[Array, 'n labels']:
    """Returns the labels of a frame."""
    query = self._features(number, self._identities[1])
    return label_propagation.from_features(
      query, self._slots, labels, *context, grid=grid, propagation=self._propagation
    )


class PairAffinities:
  """Affinities of pairs of frames that are encoded together; see `model_affinities`."""

  def __init__(
    self,
    params: dict,
    architecture: Architecture,
    frames: Frames,
    readout: Readout,
    propagation: Propagation,
    statistics: list[AttentionStatistics],
  ) -> None:
    self._statistics = statistics
    self._is_attention = readout.kind == 'attention'
    # Attention is a distribution already, so its values are the weights.
    self._propagation = (
      dataclasses.replace(propagation, temperature=None) if self._is_attention else propagation
    )
    self._affinities = functools.partial(
      _attention if self._is_attention else _joint_similarity,
      params,
      architecture=architecture,
      block=readout.block,
      is_centred=readout.is_centred,
    )
    self._frame = functools.lru_cache(maxsize=1)(frames)
    self._stored: dict[int, np.ndarray] = {}

  def store(self, number: int) -> None:
    """Keeps a frame in its slot."""
    self._stored[label_propagation.slot(number, self._propagation)] = self._frame(number)

  def propagate(
    self,
    number: int,
    context: Context,
    labels: Float[Array, 's n labels'],
    grid: tuple[int, int],
  ) -> Float[Array, 'n labels']:
    """Returns the labels of a frame; encodes it with each frame that it looks at."""
    affinities = [jnp.zeros((labels.shape[1],) * 2)] * len(labels)
    for slot in sorted({int(slot) for slot in context.slots[context.frames >= 0]}):
      pair = np.stack([self._stored[slot], self._frame(number)])
      affinities[slot], statistics = self._affinities(pair)
      if self._is_attention:
        self._statistics.append(AttentionStatistics(*map(float, statistics)))
    return label_propagation.from_affinities(
      jnp.stack(affinities, axis=1), labels, *context, grid=grid, propagation=self._propagation
    )


@jax.jit
def _unit(tokens: Float[Array, '... d']) -> Float[Array, '... d']:
  norm = jnp.linalg.norm(tokens, axis=-1, keepdims=True)
  return tokens / jnp.maximum(norm, 1e-12)


@functools.partial(jax.jit, static_argnames=('architecture', 'block', 'is_centred'))
def _joint_similarity(
  params: dict,
  frames: Float[Array, 'f h w c'],
  *,
  architecture: Architecture,
  block: int | None,
  is_centred: bool,
) -> tuple[Float[Array, 'n n'], None]:
  """Returns the cosine of each token of the later frame with each of the earlier one."""
  tokens = features.encode_pair(params, frames, architecture=architecture, num_blocks=block)
  if is_centred:
    tokens = tokens - tokens.mean(axis=1, keepdims=True)
  earlier, later = _unit(tokens)
  return jnp.matmul(later, earlier.T, precision='highest'), None


@functools.partial(jax.jit, static_argnames=('architecture', 'block', 'is_centred'))
def _attention(
  params: dict,
  frames: Float[Array, 'f h w c'],
  *,
  architecture: Architecture,
  block: int | None,
  is_centred: bool,
) -> tuple[Float[Array, 'n n'], AttentionStatistics]:
  """Returns the attention of the later frame to the earlier one, and what it is like."""
  last = architecture.decoder_depth if block is None else block
  shares = features.decoder_attention(params, frames, architecture=architecture, block=last - 1)
  favourites = shares.argmax(axis=1)
  statistics = AttentionStatistics(
    crossing=shares.sum(axis=1).mean(),
    favourites=jnp.zeros(len(shares)).at[favourites].set(1).mean(),
    own_place=(favourites == jnp.arange(len(shares))).mean(),
  )
  return shares / shares.mean(axis=0) if is_centred else shares, statistics
