"""Lists the pairs of a batch whose loss or gradient was not finite, to help find the cause.

Nothing is recorded while training: pairs and noise are computed again from (seed, step).
"""

import dataclasses
import json
from typing import Any

import jax
from jaxtyping import Array, Key

from dropmae_jax.config import Config
from dropmae_jax.data import frame_pairs, pair_stream
from dropmae_jax.data.mixture import Mixture
from dropmae_jax.runtime.mirror import Mirror


def describe_batch(
  config: Config, dataset: Mixture, step: int, *, data_seed: int, step_key: Key[Array, '']
) -> dict[str, Any]:
  """Lists the pairs of a step's global batch, and the key of its noise.

  Args:
    config: of the run.
    dataset: of the run.
    step: number of the update, from 1 on.
    data_seed: of the stream of pairs, `train_step.Seeds.data`.
    step_key: of all steps, `train_step.Seeds.steps`.

  Returns:
    `seed`, `step`, `config`, `step_key` (the data of the key from which all noise of the step is
    derived, see `train_step.step_keys`), and `pairs`, in the order of the batch: of each pair its
    dataset, video, path, both frame numbers and both crops as (top, left, height, width). Of a
    pair that can no longer be read, `error` gives the reason in place of the crops.
  """
  maker = frame_pairs.PairMaker(dataset, config.data, config.model.image_size)
  keys, paths = pair_stream.PairKeys(dataset, data_seed), _paths(dataset)
  first = (step - 1) * config.batch_size
  positions = range(first, first + config.batch_size)
  # When the keys of update N are derived, the state's step is still N - 1.
  key = jax.random.fold_in(step_key, step - 1)
  return {
    'seed': config.seed,
    'step': step,
    'step_key': jax.random.key_data(key).tolist(),
    'pairs': [_describe_pair(maker, keys[position], paths) for position in positions],
    'config': dataclasses.asdict(config),
  }


def _paths(dataset: Mixture) -> list[Any]:
  """Returns the paths of each dataset's videos; None if it has none or they cannot be read."""
  paths = []
  for each in dataset.datasets:
    try:
      paths.append(each.paths())
    except Exception:  # For example, the storage is gone. The rest of the list is still useful.
      paths.append(None)
  return paths


def _describe_pair(
  maker: frame_pairs.PairMaker, key: pair_stream.PairKey, paths: list[Any]
) -> dict[str, Any]:
  try:
    drawn = maker.draw(key)
    video, numbers = drawn.video, drawn.frame_numbers
    more = {'crops': [list(box) for box in drawn.boxes]}
  except Exception as error:
    video, numbers, more = key.video, maker.frame_numbers(key), {'error': str(error)}
  dataset_paths = paths[key.dataset]
  return {
    'dataset': key.dataset,
    'video': video,
    'path': None if dataset_paths is None else str(dataset_paths[video]),
    'frame_numbers': list(numbers),
    **more,
  }


def write(
  mirror: Mirror,
  config: Config,
  dataset: Mixture,
  step: int,
  *,
  data_seed: int,
  step_key: Key[Array, ''],
) -> str:
  """Writes `non_finite_batch_N.json` on the first process, and returns a sentence that says so."""
  path = mirror.folder / f'non_finite_batch_{step}.json'
  if jax.process_index():
    return 'The first process lists the pairs of its batch.'
  try:
    partial = path.with_suffix('.partial')
    listed = describe_batch(config, dataset, step, data_seed=data_seed, step_key=step_key)
    partial.write_text(json.dumps(listed, indent=1))
    partial.replace(path)
  except Exception as error:  # The user must see why training stopped in any case.
    return f'The pairs of its batch could not be listed: {error}'
  mirror.push()
  return f'The pairs of its batch are in {mirror.workdir / path.name}.'
