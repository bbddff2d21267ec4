"""What a batch was made of that made training diverge, for whoever looks after the cause.

Nothing of it has to be kept while training: pairs and noise are functions of (seed, step).
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from dropmae_jax.config import Config
from dropmae_jax.data import frame_pairs, pair_stream
from dropmae_jax.data.mixture import Mixture
from dropmae_jax.train_step import derive_seeds


def describe_batch(config: Config, dataset: Mixture, step: int) -> dict[str, Any]:
  """Lists the pairs of a step's global batch, and what their noise is drawn from.

  Args:
    config: of the run.
    dataset: that it reads.
    step: number of the update, from 1 on.

  Returns:
    `seed`, `step`, `step_key` (the words of the key that all noise of the step is derived from,
    see `train_step.step_keys`), and `pairs`: of each its dataset, video, path, both frame numbers
    and both crops as (top, left, height, width), in the order of the batch. Where a frame cannot
    be read any more, `error` says why instead of the crops.
  """
  seeds = derive_seeds(config.seed)
  maker = frame_pairs.PairMaker(dataset, config.data, config.model.image_size)
  keys, paths = pair_stream.pair_keys(dataset, seeds.data), _paths(dataset)
  first = (step - 1) * config.batch_size
  places = range(first, first + config.batch_size)
  # The state of update N is at step N - 1 when its keys are derived.
  key = jax.random.fold_in(seeds.steps, step - 1)
  return {
    'seed': config.seed,
    'step': step,
    'step_key': jax.random.key_data(key).tolist(),
    'pairs': [_describe_pair(maker, keys[place], paths) for place in places],
    'config': dataclasses.asdict(config),
  }


def _paths(dataset: Mixture) -> list[Any]:
  """Returns the paths of each dataset's videos; None where they cannot be read."""
  found = []
  for each in dataset.datasets:
    try:
      found.append(each.paths())
    except Exception:  # As when the storage is gone; what does not need it is still of use.
      found.append(None)
  return found


def _describe_pair(
  maker: frame_pairs.PairMaker, key: pair_stream.PairKey, paths: list[Any]
) -> dict[str, Any]:
  try:
    drawn = maker.draw(key)
    video, numbers = drawn.video, drawn.frame_numbers
    more = {'crops': [list(box) for box in drawn.boxes]}
  except Exception as error:
    video, numbers, more = key.video, maker.frame_numbers(key), {'error': str(error)}
  of_dataset = paths[key.dataset]
  return {
    'dataset': key.dataset,
    'video': video,
    'path': None if of_dataset is None else str(of_dataset[video]),
    'frame_numbers': list(numbers),
    **more,
  }


def write(workdir: pathlib.Path, config: Config, dataset: Mixture, step: int) -> str:
  """Writes `bad_batch_N.json` on the first process, and returns a sentence that says so."""
  path = workdir / f'bad_batch_{step}.json'
  if jax.process_index():
    return 'The first process lists the pairs of its batch.'
  try:
    partial = path.with_suffix('.partial')
    partial.write_text(json.dumps(describe_batch(config, dataset, step), indent=1))
    partial.replace(path)
  except Exception as error:  # The cause is to be told, whatever becomes of this.
    return f'The pairs of its batch could not be listed: {error}'
  return f'The pairs of its batch are in {path}.'
