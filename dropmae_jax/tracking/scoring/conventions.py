"""The table of scoring conventions: by whose rules a number was computed.

Numbers of different toolkits are not comparable, not even under the same name. Each convention was
read off the toolkit that its entry names, and reproduces it on recorded results (tests/golden). All
numbers are in percent, though some toolkits print them as fractions.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from dropmae_jax.runtime.errors import check_name
from dropmae_jax.tracking.scoring import errors
from dropmae_jax.tracking.scoring.errors import Boxes, Errors
from dropmae_jax.tracking.sequences.sequence import Sequence


class Curve(NamedTuple):
  """How a curve is made: the share of frames whose error passes each threshold.

  Attributes:
    error: a name in `Errors`.
    thresholds: of the curve.
    passes: compares errors and thresholds.
    label: what the thresholds are, on the axis of a plot.
  """

  error: str
  thresholds: Float64[np.ndarray, ' t']
  passes: Callable[[np.ndarray, np.ndarray], Bool[np.ndarray, 'n t']]
  label: str


class Measured(NamedTuple):
  """The errors of a sequence or of a data set, and its curves, as shares between 0 and 1."""

  errors: Errors
  curves: Mapping[str, Float64[np.ndarray, ' t']]


Number = Callable[[Measured], float]


@dataclasses.dataclass(frozen=True)
class Convention:
  """How a toolkit computes its numbers.

  Attributes:
    toolkit: whose rules these are, and the commit they were read at.
    rules: what differs from other toolkits, in words.
    errors: of the frames of a sequence that count.
    curves: by name.
    numbers: of the data set, and of each sequence as if it were one.
    sequence_numbers: what else is reported of each sequence.
    is_pooled: frames of all sequences weigh the same; otherwise all sequences do.
  """

  toolkit: str
  rules: str
  errors: Callable[[Sequence, Boxes], Errors]
  curves: Mapping[str, Curve]
  numbers: Mapping[str, Number]
  sequence_numbers: Mapping[str, Number] = dataclasses.field(default_factory=dict)
  is_pooled: bool = False


def mean(curve: str) -> Number:
  """Returns the mean of a curve."""
  return lambda measured: float(np.mean(measured.curves[curve]))


def entry(curve: str, number: int) -> Number:
  """Returns one value of a curve."""
  return lambda measured: float(measured.curves[curve][number])


def area(curve: str) -> Number:
  """Returns the area under a curve by trapezoids, its thresholds scaled to 0..1."""

  def under(measured: Measured) -> float:
    values = measured.curves[curve]
    return float(np.trapezoid(values, np.linspace(0, 1, len(values))))

  return under


def mean_error(name: str) -> Number:
  """Returns the mean of an error over the frames that do not fail anyway."""
  return lambda measured: float(np.mean(measured.errors[name][measured.errors[name] >= 0]))


_OVERLAP = 'overlap threshold'
_PIXELS = 'location error threshold (pixels)'
_SIZES = 'location error threshold (sizes of the target)'


def _ope_curves(
  overlaps: Float64[np.ndarray, ' t'], relative: Float64[np.ndarray, ' u']
) -> dict[str, Curve]:
  return {
    'success': Curve('overlap', overlaps, np.greater, _OVERLAP),
    'precision': Curve('centre', np.arange(51.0), np.less_equal, _PIXELS),
    'norm_precision': Curve('relative', relative, np.less_equal, _SIZES),
  }


_GOT10K = 'GOT-10k toolkit (got-10k/toolkit 956e728)'
_OSTRACK = "the published tracker's own analysis (jimmy-dq/DropTrack 4364304, as in OSTrack)"
# It is pytracking's, but for curves that are shares of all frames in every data set.
_OSTRACK_RULES = (
  'success over all frames at 21 thresholds and its mean; precision at 20 pixels; normalised'
  ' precision at 0.2; a prediction of zero size repeats the one before; frames without a true box'
  ' fail in success and count as hits in normalised precision'
)


def _ostrack(rules: str, **options: float) -> Convention:
  return Convention(
    toolkit=_OSTRACK,
    rules=_OSTRACK_RULES + rules,
    errors=functools.partial(errors.ostrack, **options),
    curves=_ope_curves(np.arange(21) * 0.05, np.arange(51) / 100),
    numbers={
      'AUC': mean('success'),
      'OP50': entry('success', 10),
      'OP75': entry('success', 15),
      'precision': entry('precision', 20),
      'norm_precision': entry('norm_precision', 20),
    },
    sequence_numbers={'mean_overlap': mean_error('overlap')},
  )


# Named by the toolkit, or by TOOLKIT-DATASET where a toolkit has other rules for a data set.
CONVENTIONS: Mapping[str, Convention] = {
  'got10k': Convention(
    toolkit=f'{_GOT10K}, as for LaSOT and OTB',
    rules=(
      'all frames with a true box; success at 21 thresholds and its mean; precision at 20 pixels;'
      ' normalised precision is the mean over 51 thresholds up to 0.5'
    ),
    errors=errors.got10k_ope,
    curves=_ope_curves(np.linspace(0, 1, 21), np.linspace(0, 0.5, 51)),
    numbers={
      'success': mean('success'),
      'success_rate': entry('success', 10),
      'precision': entry('precision', 20),
      'norm_precision': mean('norm_precision'),
    },
  ),
  'got10k-got10k': Convention(
    toolkit=f'{_GOT10K}, as for its own validation set',
    rules=(
      'without the first frame and those where nothing of the target is visible; boxes are clipped'
      ' to the frame; AO and SR over the frames of all sequences together'
    ),
    errors=errors.got10k_val,
    curves={'success': Curve('overlap', np.linspace(0, 1, 101), np.greater, _OVERLAP)},
    numbers={
      'AO': mean_error('overlap'),
      'SR0.50': entry('success', 50),
      'SR0.75': entry('success', 75),
    },
    is_pooled=True,
  ),
  'ostrack': _ostrack(' (the rules for OTB, NFS, TNL2K and ITB)'),
  'ostrack-lasot': _ostrack(
    '; frames without the target in view fail everywhere (the rules for LaSOT)',
    uses_labels=True,
    hidden_relative=np.inf,
  ),
  'ostrack-lasot_ext': _ostrack(
    ', as do frames without the target in view (the rules for LaSOText)', uses_labels=True
  ),
  'ostrack-uav': _ostrack(' and in precision (the rules for UAV123)', invalid_centre=-1.0),
  'trackingnet': Convention(
    toolkit="TrackingNet's devkit (SilvioGiancola/TrackingNet-devkit 79783f2), as its server",
    rules=(
      'all frames; boxes are rounded to whole pixels; areas under curves of 21 thresholds, overlaps'
      ' included at their threshold'
    ),
    errors=errors.trackingnet,
    curves={
      'success': Curve('overlap', np.linspace(0, 1, 21), np.greater_equal, _OVERLAP),
      'precision': Curve('centre', np.linspace(0, 50, 21), np.less_equal, _PIXELS),
      'norm_precision': Curve('relative', np.linspace(0, 0.5, 21), np.less_equal, _SIZES),
    },
    numbers={
      'success': area('success'),
      'precision': area('precision'),
      'norm_precision': area('norm_precision'),
      'coverage': mean_error('coverage'),
    },
  ),
}
# The toolkit whose numbers papers report for a benchmark.
DEFAULTS = {
  'got10k': 'got10k',
  'lasot': 'ostrack',
  'lasot_ext': 'ostrack',
  'trackingnet': 'trackingnet',
  'otb': 'ostrack',
  'folder': 'ostrack',
}


def name_of(toolkit: str | None, benchmark: str) -> str:
  """Returns the name of the convention of a toolkit for a benchmark.

  Raises:
    UserError: there is no such toolkit.
  """
  toolkit = toolkit or DEFAULTS[benchmark]
  check_name('--toolkit', toolkit, CONVENTIONS)
  special = f'{toolkit}-{benchmark}'
  return special if special in CONVENTIONS else toolkit


def measure(convention: Convention, frames: Errors) -> Measured:
  """Returns the curves over frames that weigh the same."""
  return Measured(
    frames,
    {
      name: curve.passes(frames[curve.error][:, None], curve.thresholds).mean(axis=0)
      for name, curve in convention.curves.items()
    },
  )


def combine(convention: Convention, sequences: list[Measured]) -> Measured:
  """Returns what is measured of a data set, from that of its sequences."""
  frames = {
    name: np.concatenate([each.errors[name] for each in sequences]) for name in sequences[0].errors
  }
  if convention.is_pooled:
    return measure(convention, frames)
  return Measured(
    frames,
    {
      name: np.mean([each.curves[name] for each in sequences], axis=0) for name in convention.curves
    },
  )


def in_percent(numbers: Mapping[str, Number], measured: Measured) -> dict[str, float]:
  """Returns numbers by name, in percent."""
  return {name: 100 * number(measured) for name, number in numbers.items()}
