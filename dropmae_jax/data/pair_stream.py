"""The keys of the pairs of a training stream: of each pair, its video and its random numbers.

They depend only on the seed and the number of videos of each dataset. Each epoch visits every video
once, in a new order. Each dataset of a mixture has its own epochs.
"""

import dataclasses
import functools
import threading
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np
from jaxtyping import Float64

from dropmae_jax.data import augment
from dropmae_jax.data.mixture import Mixture, mixture_of
from dropmae_jax.data.video_source import VideoSource

# More than any run needs.
EPOCHS = 10**9
# Random numbers of a pair: those of the frame numbers, then those of two crops.
FRAME_DRAWS = 2
PAIR_DRAWS = FRAME_DRAWS + 2 * augment.CROP_DRAWS


@dataclasses.dataclass(frozen=True, slots=True)
class PairKey:
  """Everything that a pair depends on, except the dataset and the options.

  Attributes:
    dataset: number of the dataset in its mixture.
    video: number of the video in that dataset.
    uniforms: from [0, 1), for the frame numbers and the crops.
  """

  dataset: int
  video: int
  uniforms: Float64[np.ndarray, f'{PAIR_DRAWS}']


@functools.lru_cache(maxsize=16)
def _epoch_order(num_videos: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(num_videos)


class _Uniforms(threading.local):
  """The random numbers of the pairs of a dataset, by position; a generator for each thread.

  They are those that `random_map` of grain 0.2 hands out (a test compares them), by which runs of
  earlier versions drew them. Grain takes several times as long, and holds the GIL meanwhile.
  """

  def __init__(self, seed: int) -> None:
    derived = np.random.SeedSequence((seed, 1)).generate_state(1)[0]
    self._bits = np.random.Philox(derived)
    self._state = self._bits.state
    self._rng = np.random.Generator(self._bits)

  def __getitem__(self, position: int) -> Float64[np.ndarray, f'{PAIR_DRAWS}']:
    self._state['state']['counter'][3] = position
    self._bits.state = self._state
    return self._rng.random(PAIR_DRAWS)


class PairKeys:
  """The endless stream of the keys of all pairs, by position; may be read in many threads.

  The datasets of a mixture alternate as evenly as their weights allow. Shares that are not
  multiples of 1/100 are off by up to 1 %.
  """

  def __init__(self, videos: VideoSource | Mixture, seed: int) -> None:
    """Reads only how many videos there are.

    Args:
      videos: a dataset or a mixture.
      seed: of the order, the pairs and the crops.
    """
    datasets, weights = mixture_of(videos).datasets, mixture_of(videos).weights
    self._num_videos = [len(each) for each in datasets]
    self._seeds = [seed] + [
      int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
      for number in range(1, len(datasets))
    ]
    self._uniforms = [_Uniforms(each) for each in self._seeds]
    self._places = None if len(datasets) == 1 else _mix(self._num_videos, weights)

  def __getitem__(self, position: int) -> PairKey:
    dataset, own_position = self._places[position] if self._places else (0, position)
    num_videos = self._num_videos[dataset]
    epoch, place = divmod(own_position, num_videos)
    # Not grain's shuffle: with few videos it takes up to milliseconds per pair, because it searches
    # a range of at least 2^16 numbers for each.
    video = int(_epoch_order(num_videos, self._seeds[dataset], epoch)[place])
    return PairKey(dataset, video, self._uniforms[dataset][own_position])


def _mix(num_videos: Sequence[int], weights: Sequence[Fraction]) -> grain.MapDataset:
  """Returns, for each position of a mixture, the dataset and the position in its own stream."""
  streams = [
    grain.MapDataset.range(each * EPOCHS).map(functools.partial(_place, number))
    for number, each in enumerate(num_videos)
  ]
  return grain.MapDataset.mix(streams, weights)


def _place(dataset: int, position: int) -> tuple[int, int]:
  return dataset, int(position)
