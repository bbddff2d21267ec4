"""Scores that a run takes of its weights while it trains: `config.scores`, `config.score_every`."""

import functools
import logging
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from dropmae_jax.checkpoints.saved_weights import Weights
from dropmae_jax.config import Architecture, DataOptions, Objective
from dropmae_jax.data import frame_pairs
from dropmae_jax.data.mixture import open_mixture
from dropmae_jax.data.pair_stream import PairKeys
from dropmae_jax.data.video_source import TfdsVideos
from dropmae_jax.model import mae, pixels
from dropmae_jax.runtime.errors import UserError, check_name

# Pairs of the held-out loss, and how many are computed at a time.
HELD_OUT_PAIRS, CHUNK = 64, 16

_log = logging.getLogger('dropmae_jax')


def held_out(weights: Weights) -> dict[str, float]:
  """Returns the pre-training `loss` on 64 pairs of the dataset's split `val`.

  Pairs, crops, maskings and dropped attention are the same at every step and in every run with the
  same data, so that losses can be compared.

  Args:
    weights: of a run; its description says which dataset.

  Raises:
    UserError: the dataset has no such split, cannot be read, or is not that of the run any more.
  """
  config = weights.description['config']
  frames = _held_out_pairs(
    config['data_dir'],
    config['dataset'],
    DataOptions(**config['data']),
    weights.architecture.image_size,
    weights.description.get('data_fingerprint'),
  )
  losses = [
    _held_out_loss(
      weights.params,
      frames[first : first + CHUNK],
      first,
      architecture=weights.architecture,
      objective=weights.objective,
    )
    for first in range(0, HELD_OUT_PAIRS, CHUNK)
  ]
  return {'loss': float(np.mean(losses))}


@functools.lru_cache(maxsize=1)
def _held_out_pairs(
  data_dir: str, dataset: str, options: DataOptions, image_size: int, fingerprint: str | None
) -> UInt8[np.ndarray, 'b f h w c']:
  videos = open_mixture(data_dir, dataset, split='val')
  # Splits of a class of the user's own need not have one fingerprint.
  is_built = all(isinstance(each, TfdsVideos) for each in videos.datasets)
  if is_built and videos.fingerprint != fingerprint:
    raise UserError(f'{data_dir=} holds another dataset than the run was trained on; put it back.')
  keys, maker = PairKeys(videos, seed=0), frame_pairs.PairMaker(videos, options, image_size)
  frames = np.empty((HELD_OUT_PAIRS, 2, image_size, image_size, 3), np.uint8)
  for position, out in enumerate(frames):
    maker.crop(maker.draw(keys[position]), out)
  return frames


@functools.partial(jax.jit, static_argnames=('architecture', 'objective'))
def _held_out_loss(
  params: dict,
  frames: UInt8[Array, 'b f h w c'],
  first: Int[Array, ''],
  *,
  architecture: Architecture,
  objective: Objective,
) -> Float[Array, '']:
  key = jax.random.fold_in(jax.random.key(0), first)
  masking_key, asad_key = jax.random.split(key)
  return mae.pretraining_loss(
    nnx.merge(mae.abstract_model(architecture)[0], params),
    pixels.normalise(frames),
    masking_keys=jax.random.split(masking_key, len(frames)),
    asad_keys=jax.random.split(asad_key, len(frames)),
    objective=objective,
  )


# Each takes the weights of a step, whose `description` holds the config of the run, and returns
# numbers by name. They are called on the first process while the others wait.
SCORES: dict[str, Callable[[Weights], Mapping[str, float]]] = {'held_out': held_out}


def parse_names(text: str) -> list[str]:
  """Returns the names in `config.scores`.

  Raises:
    UserError: one is not in SCORES.
  """
  names = [name.strip() for name in text.split(',') if name.strip()]
  for name in names:
    check_name('config.scores', name, SCORES)
  return names


def take(names: list[str], weights: Weights) -> dict[str, float]:
  """Returns the numbers of scores, as SCORE/NAME; a score that fails is logged and left out."""
  numbers: dict[str, float] = {}
  for name in names:
    try:
      taken = SCORES[name](weights)
      numbers |= {f'{name}/{key}': float(value) for key, value in taken.items()}
    except UserError as error:
      _log.warning(f'there is no score {name!r} of step {weights.step}: {error}')
    except Exception:
      _log.exception(f'the score {name!r} has failed at step {weights.step}; training goes on')
  return numbers
