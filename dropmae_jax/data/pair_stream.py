"""The keys of the pairs of a training stream: of each pair, its video and its random numbers.

They depend only on the seed and the number of videos of each dataset. Each epoch visits every video
once, in a new order. Each dataset of a mixture has its own epochs.
"""

import dataclasses
import functools

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


class _DrawKey(grain.transforms.RandomMap):
  """Maps a position in the stream of one dataset to the key of a pair.

  It shuffles the videos itself. Grain's shuffle takes up to milliseconds per element of a dataset
  with few videos, because it searches a range of at least 2^16 numbers for each.
  """

  def __init__(self, dataset: int, num_videos: int, seed: int) -> None:
    self._dataset, self._num_videos, self._seed = dataset, num_videos, seed

  def random_map(self, element: int, rng: np.random.Generator) -> PairKey:
    """Returns the key of the pair at a position."""
    epoch, position = divmod(int(element), self._num_videos)
    video = int(_epoch_order(self._num_videos, self._seed, epoch)[position])
    return PairKey(self._dataset, video, rng.random(PAIR_DRAWS))


def pair_keys(videos: VideoSource | Mixture, seed: int) -> grain.MapDataset:
  """Returns the endless stream of the keys of all pairs, indexed by position.

  Args:
    videos: a dataset or a mixture. The datasets of a mixture alternate as evenly as their weights
      allow. Shares that are not multiples of 1/100 are off by up to 1 %.
    seed: of the order, the pairs and the crops.
  """
  mixture, parts = mixture_of(videos), []
  for number, each in enumerate(mixture.datasets):
    own = seed if number == 0 else int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    positions = grain.MapDataset.range(len(each) * EPOCHS).seed(own)
    parts.append(positions.random_map(_DrawKey(number, len(each), own)))
  return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, mixture.weights)
