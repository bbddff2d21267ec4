"""What a batch was made of that made training diverge, for whoever looks after the cause.

Nothing of it has to be kept while training: pairs and noise are functions of (seed, step).
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from dropmae_jax import data
from dropmae_jax.mixture import Mixture
from dropmae_jax.recipe import Recipe
from dropmae_jax.train_step import derive_seeds


def describe_batch(recipe: Recipe, dataset: Mixture, step: int) -> dict[str, Any]:
  """Lists the pairs of a step's global batch, and what their noise is drawn from.

  Args:
    recipe: of the run.
    dataset: that it reads.
    step: number of the update, from 1 on.

  Returns:
    `seed`, `step`, `step_key` (the words of the key that all noise of the step is derived from,
    see `train_step.step_keys`), and `pairs`: of each its dataset, video, path, both frame numbers
    and both crops as (top, left, height, width), in the order of the batch.

  Raises:
    BadInput: the frames cannot be read any more.
  """
  seeds = derive_seeds(recipe.seed)
  maker = data.PairMaker(dataset, recipe.data, recipe.model.image_size)
  keys = data.pair_keys(dataset, seeds.data)
  first = (step - 1) * recipe.batch_size
  paths, pairs = [each.paths() for each in dataset.datasets], []
  for place in range(first, first + recipe.batch_size):
    number, drawn = keys[place].dataset, maker.draw(keys[place])
    pairs.append(
      {
        'dataset': number,
        'video': drawn.video,
        'path': str(paths[number][drawn.video]),
        'frame_numbers': list(drawn.frame_numbers),
        'crops': [list(box) for box in drawn.boxes],
      }
    )
  # The state of update N is at step N - 1 when its keys are derived.
  key = jax.random.fold_in(seeds.steps, step - 1)
  return {
    'seed': recipe.seed,
    'step': step,
    'step_key': jax.random.key_data(key).tolist(),
    'pairs': pairs,
    'config': dataclasses.asdict(recipe),
  }


def write(workdir: pathlib.Path, recipe: Recipe, dataset: Mixture, step: int) -> str:
  """Writes `bad_batch_N.json` on the first process; returns a sentence that says so."""
  path = workdir / f'bad_batch_{step}.json'
  if jax.process_index() == 0:
    try:
      described = describe_batch(recipe, dataset, step)
      partial = path.with_suffix('.partial')
      partial.write_text(json.dumps(described, indent=1))
      partial.replace(path)
    except Exception as error:  # The cause is to be told, whatever becomes of this.
      return f'The pairs of its batch could not be listed: {error}'
  return f'The pairs of its batch are in {path}.'
