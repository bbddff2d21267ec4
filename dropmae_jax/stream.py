"""Which pairs are fed, by number: a function of the seed alone, and of how many videos there are.

One epoch is every video once, in an order of its own; of a mixture each dataset has its own epochs.
"""

import dataclasses
import functools

import grain
import numpy as np
from jaxtyping import Float64

from dropmae_jax import augment
from dropmae_jax.mixture import Mixture, mixture_of
from dropmae_jax.videos import VideoSource

# More than any run takes.
EPOCHS = 10**9
# For the frames, and for the crop of each.
PAIR_DRAWS = 2 + 2 * augment.CROP_DRAWS


@dataclasses.dataclass(frozen=True, slots=True)
class PairKey:
  """All that a pair is a function of, beside the dataset and the options.

  Attributes:
    dataset: number of a dataset in its mixture.
    video: number of a video in that dataset.
    uniforms: from [0, 1); what is random in the pair, from the frames to the last crop.
  """

  dataset: int
  video: int
  uniforms: Float64[np.ndarray, f'{PAIR_DRAWS}']


class EpochOrders:
  """The numbers of all videos, epoch after epoch, each in an order of its own; a source of grain.

  Grain's own shuffle costs up to milliseconds an element where there are few videos
  (benchmarks/input_pipeline.py), as it looks for each in a range of 2^16 numbers or more.
  """

  def __init__(self, num_videos: int, seed: int) -> None:
    self._num_videos, self._seed = num_videos, seed

  def __len__(self) -> int:
    return self._num_videos * EPOCHS

  def __getitem__(self, place: int) -> int:
    epoch, number = divmod(place, self._num_videos)
    return int(_epoch_order(self._num_videos, self._seed, epoch)[number])


@functools.lru_cache(maxsize=16)
def _epoch_order(num_videos: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(num_videos)


class _DrawKey(grain.transforms.RandomMap):
  """A video's number to the key of a pair of it."""

  def __init__(self, dataset: int) -> None:
    self._dataset = dataset

  def random_map(self, element: int, rng: np.random.Generator) -> PairKey:
    """Returns a key of random numbers for this video."""
    return PairKey(self._dataset, int(element), rng.random(PAIR_DRAWS))


def pair_keys(videos: VideoSource | Mixture, seed: int) -> grain.MapDataset:
  """Returns the endless stream of the keys of all pairs, by number.

  Args:
    videos: where frames come from. A mixture takes its datasets in turn, as evenly as their
      weights allow; ratios of weights that are no whole multiples of 1/100 are off by up to 1 %.
    seed: of order, pairs and crops.
  """
  mixture, parts = mixture_of(videos), []
  for number, each in enumerate(mixture.datasets):
    own = seed if number == 0 else int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    orders = grain.MapDataset.source(EpochOrders(len(each), own))
    parts.append(orders.seed(own).random_map(_DrawKey(number)))
  return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, mixture.weights)
