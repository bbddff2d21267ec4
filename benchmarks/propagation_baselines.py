"""Scores a checkpoint beside what needs no training, by label propagation on the same clips.

    python -m benchmarks.propagation_baselines --checkpoint=DIR [--root=DAVIS] [--json=FILE]

`trained`         the checkpoint
`random_weights`  the same architecture, newly initialised, of several seeds
`raw_rgb`         the pixels of a patch in place of features
`mean_colour`     their mean
`copy_first`      the first mask in every frame

The first three are taken with centred features too. Without --root the clips are the validation
clips of `dropmae-clips`. Frames are read at their own size, unless --input_size is given. A class
token is not used. Only the difference to random weights is evidence of learning.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float

from benchmarks.rounds import about, check_output
from dropmae_jax.data import synthetic_clips
from dropmae_jax.evaluation import evaluate, features, readouts
from dropmae_jax.evaluation.datasets.davis import Davis
from dropmae_jax.evaluation.label_propagation import Affinities, Propagation
from dropmae_jax.evaluation.protocols import PROTOCOLS
from dropmae_jax.evaluation.readouts import AttentionStatistics, FrameFeatures, Readout
from dropmae_jax.model import mae
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError

PROTOCOL = PROTOCOLS['cropmae']
# For small clips: few earlier frames, no radius (objects move far on a coarse grid), and few,
# sharp weights.
SMALL_CLIPS = dataclasses.replace(
  PROTOCOL.propagation, num_previous=5, radius=None, top_k=3, temperature=0.05
)


class _CopyFirst:
  """The labels of the first frame in every frame."""

  def store(self, number: int) -> None:
    """Does nothing."""

  def propagate(
    self, number: int, context: Any, labels: Float[Array, 's n labels'], near: Array
  ) -> Float[Array, 'n labels']:
    """Returns the labels of the first frame."""
    del number, context, near
    return labels[0]


def _pixels(
  frame: Float[np.ndarray, 'h w c'], identity: str, *, patch_size: int, is_mean: bool
) -> Float[Array, 'n d']:
  del identity
  patches = einops.rearrange(
    frame, '(gh h) (gw w) c -> (gh gw) (h w) c', h=patch_size, w=patch_size
  )
  return jnp.asarray(patches.mean(axis=1) if is_mean else patches.reshape(len(patches), -1))


@dataclasses.dataclass(frozen=True)
class Setup:
  """The clips and how labels are propagated.

  Attributes:
    benchmark: the clips.
    propagation: the settings.
    input_size: (height, width) of the network's input; None: that of the clip.
    patch_size: of the model.
    readout: of the models.
  """

  benchmark: Davis
  propagation: Propagation
  input_size: tuple[int, int] | None
  patch_size: int
  readout: Readout

  def score(self, make_affinities: evaluate.MakeAffinities) -> dict[str, float]:
    """Returns the summary of all clips."""
    scores = {}
    for name in self.benchmark.names:
      clip = self.benchmark.open(name)
      options = evaluate.Options(
        PROTOCOL, self.propagation, Readout(), self.input_size or clip.size
      )
      geometry = evaluate.make_geometry(self.benchmark, clip, options, self.patch_size)
      results = evaluate.evaluate_clip(self.benchmark, clip, options, geometry, make_affinities)
      scores[name] = self.benchmark.score(clip, list(results))
    return self.benchmark.summarise(scores)

  def score_model(self, encoder: features.Encoder, *, is_centred: bool) -> dict[str, float]:
    """Returns the summary of a model, and what its attention is like if that is read out."""
    readout = dataclasses.replace(self.readout, is_centred=is_centred)
    statistics: list[AttentionStatistics] = []
    numbers = self.score(
      functools.partial(readouts.model_affinities, encoder, readout, self.propagation, statistics)
    )
    if statistics:
      means = np.mean(np.array(statistics), axis=0).tolist()
      numbers |= dict(zip(AttentionStatistics._fields, means, strict=True))
    return numbers

  def score_pixels(self, *, is_mean: bool, is_centred: bool = False) -> dict[str, float]:
    """Returns the summary of pixels in place of features."""
    encode = functools.partial(_pixels, patch_size=self.patch_size, is_mean=is_mean)

    def make_affinities(frames: readouts.Frames, num_frames: int, grid: Any) -> Affinities:
      del grid
      return FrameFeatures(encode, frames, num_frames, self.propagation, is_centred=is_centred)

    return self.score(make_affinities)


def compare(setup: Setup, encoder: features.Encoder, seeds: int) -> dict[str, Any]:
  """Returns the summaries of the checkpoint and of all baselines by name; see the module."""
  content: dict[str, Any] = {'trained': setup.score_model(encoder, is_centred=False)}
  content['trained_centred'] = setup.score_model(encoder, is_centred=True)
  content |= {'random_weights': [], 'random_weights_centred': []}
  for seed in tqdm.trange(seeds, desc='random weights', disable=None):
    params = mae.init_params(jax.random.key(seed), encoder.architecture)
    random = dataclasses.replace(encoder, params=params)
    content['random_weights'].append(setup.score_model(random, is_centred=False))
    content['random_weights_centred'].append(setup.score_model(random, is_centred=True))
  content['raw_rgb'] = setup.score_pixels(is_mean=False)
  content['raw_rgb_centred'] = setup.score_pixels(is_mean=False, is_centred=True)
  content['mean_colour'] = setup.score_pixels(is_mean=True)
  content['copy_first'] = setup.score(lambda *clip: _CopyFirst())
  return content


def report(content: dict[str, Any]) -> None:
  """Prints a table with a row for each of `compare`; crossing and so on are shares."""
  names = list(content['trained'])
  cli.print_line(' '.join([f'{"":<24}', *(f'{name:>10}' for name in names)]))
  for row, summary in content.items():
    for number, numbers in enumerate(summary if isinstance(summary, list) else [summary]):
      label = f'{row} {number}' if isinstance(summary, list) else row
      shown = (f'{numbers[name]:.2f}' if name in numbers else '-' for name in names)
      cli.print_line(' '.join([f'{label:<24}', *(f'{each:>10}' for each in shown)]))


def main() -> None:
  """The command line."""
  parser = cli.Parser(
    prog='propagation_baselines',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--checkpoint', type=pathlib.Path, required=True, help='a workdir, or a file of weights')
  add('--root', type=pathlib.Path, help='clips in the layout of DAVIS; default: generated ones')
  add('--split', default='val', help='(%(default)s)')
  add('--input_size', type=evaluate.size_in_pixels, metavar='HxW', help='default: of the clips')
  add('--num_previous', type=int, default=SMALL_CLIPS.num_previous, help='(%(default)s)')
  add('--radius', type=float, default=0, help='0: no limit (%(default)s)')
  add('--top_k', type=int, default=SMALL_CLIPS.top_k, help='(%(default)s)')
  add('--temperature', type=float, default=SMALL_CLIPS.temperature, help='(%(default)s)')
  add('--readout', choices=readouts.READOUTS, default='single', help='of models (%(default)s)')
  add('--identity', choices=readouts.IDENTITIES, default='none', help='(%(default)s)')
  add('--seeds', type=int, default=3, help='of random weights (%(default)s)')
  add('--json', type=pathlib.Path, help='file to write the numbers to')
  given = parser.parse_args()
  if given.seeds < 1:
    raise UserError(f'--seeds={given.seeds} is too small; give at least 1.')
  check_output(given.json)
  readout = Readout(given.readout, identity=given.identity)
  encoder = features.load(given.checkpoint, class_token='none')
  readout.check(encoder)
  propagation = dataclasses.replace(
    SMALL_CLIPS,
    num_previous=given.num_previous,
    radius=given.radius or None,
    top_k=given.top_k,
    temperature=given.temperature,
  )
  with tempfile.TemporaryDirectory() as temporary:
    root = given.root
    if root is None:
      clips = pathlib.Path(temporary) / 'clips'
      synthetic_clips.write_clips(clips, synthetic_clips.ClipOptions())
      root = clips / 'davis'
    setup = Setup(
      Davis(root, split=given.split),
      propagation,
      given.input_size,
      encoder.architecture.patch_size,
      readout,
    )
    content = compare(setup, encoder, given.seeds)
  report(content)
  content['settings'] = {
    **about(given),
    'propagation': dataclasses.asdict(propagation),
    'weights': encoder.source,
  }
  if given.json:
    given.json.write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
  cli.run(main)
