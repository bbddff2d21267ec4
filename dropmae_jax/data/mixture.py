"""Several datasets read as one, each with a weight."""

import dataclasses
import hashlib
import json
import pathlib
import re
from fractions import Fraction

from dropmae_jax.data.video_source import VideoSource, fingerprint, is_version_folder, open_dataset
from dropmae_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Datasets that are read together.

  Attributes:
    datasets: at least one.
    weights: a dataset's share of the pairs is its weight over the sum of all; positive.
  """

  datasets: tuple[VideoSource, ...]
  weights: tuple[Fraction, ...]

  def __len__(self) -> int:
    return sum(len(dataset) for dataset in self.datasets)

  @property
  def fingerprint(self) -> str:
    """A hash of all datasets and their shares; of one dataset, its own fingerprint."""
    if len(self.datasets) == 1:
      return fingerprint(self.datasets[0])
    shares = [str(weight / sum(self.weights)) for weight in self.weights]
    rows = [[fingerprint(each), share] for each, share in zip(self.datasets, shares, strict=True)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def mixture_of(videos: VideoSource | Mixture) -> Mixture:
  """Returns a mixture unchanged, and a dataset as a mixture of one."""
  return videos if isinstance(videos, Mixture) else Mixture((videos,), (Fraction(1),))


def open_mixture(data_dir: str, text: str, split: str = 'train') -> Mixture:
  """Opens the datasets of `config.dataset`.

  Args:
    data_dir: see `open_dataset`; several datasets share one data directory.
    text: one dataset's name, or several as 'NAME=WEIGHT,NAME=WEIGHT'; a NAME may be MODULE:CLASS.
    split: of every dataset.

  Raises:
    UserError: the text cannot be parsed, or a dataset is missing or cannot be read.
  """
  weights = _parse_weights(text)
  datasets = tuple(
    open_dataset(data_dir, name, split, num_datasets=len(weights)) for name in weights
  )
  if len(weights) > 1 and is_version_folder(pathlib.Path(data_dir)):
    raise UserError(
      f'data_dir={data_dir!r} is the folder of one dataset, and dataset={text!r} names'
      f' {len(weights)}; give the folder that was --data_dir when they were built.'
    )
  return Mixture(datasets, tuple(weights.values()))


def _parse_weights(text: str) -> dict[str, Fraction]:
  """Parses 'NAME' or 'NAME=WEIGHT,NAME=WEIGHT'. Weights are exact fractions: 0.3 is 3/10."""
  if not re.search('[=,]', text):
    return {text: Fraction(1)}
  weights: dict[str, Fraction] = {}
  for part in text.split(','):
    name, _, number = (each.strip() for each in part.partition('='))
    try:
      weight = Fraction(number)
    except (ValueError, ZeroDivisionError):
      weight = Fraction(0)
    if not name or name in weights or weight <= 0:
      raise UserError(
        f'dataset={text!r} is not understood at {part!r}; give one name, or several different ones'
        ' with positive weights, as NAME=3,NAME=1.'
      )
    weights[name] = weight
  return weights
