"""Which pairs are fed, by number: a function of the seed alone, and of how many videos there are.

One epoch is every video once, in an order of its own; of a mixture each dataset has its own epochs.
"""

import dataclasses
import functools

import grain
import numpy as np
from jaxtyping import Float64

from dropmae_jax.data import augment
from dropmae_jax.data.mixture import Mixture, mixture_of
from dropmae_jax.data.video_source import VideoSource

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


@functools.lru_cache(maxsize=16)
def _epoch_order(num_videos: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(num_videos)


class _DrawKey(grain.transforms.RandomMap):
  """A place in the stream of a dataset to the key of a pair.

  Each epoch is all videos in an order of its own. Grain's own shuffle costs up to milliseconds an
  element where there are few videos, as it looks for each in a range of 2^16 numbers or more.
  """

  def __init__(self, dataset: int, num_videos: int, seed: int) -> None:
    self._dataset, self._num_videos, self._seed = dataset, num_videos, seed

  def random_map(self, element: int, rng: np.random.Generator) -> PairKey:
    """Returns a key of random numbers for the video whose turn it is."""
    epoch, place = divmod(int(element), self._num_videos)
    video = int(_epoch_order(self._num_videos, self._seed, epoch)[place])
    return PairKey(self._dataset, video, rng.random(PAIR_DRAWS))


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
    places = grain.MapDataset.range(len(each) * EPOCHS).seed(own)
    parts.append(places.random_map(_DrawKey(number, len(each), own)))
  return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, mixture.weights)
