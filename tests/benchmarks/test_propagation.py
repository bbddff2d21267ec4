"""The benchmarks of label propagation measure what they say. No speed is tested."""

import json

import numpy as np
import pytest
from conftest import needs_torch, run_python

from benchmarks import propagation_baselines
from dropmae_jax.evaluation.datasets.davis import Davis


def test_a_checkpoint_is_compared_with_what_needs_no_training(run_here, trained, clips, tmp_path):
  path = tmp_path / 'numbers.json'
  arguments = f'--checkpoint={trained}', f'--root={clips}/davis', f'--json={path}', '--seeds=2'
  done = run_here(propagation_baselines.main, *arguments)
  assert done.returncode == 0, done.stderr
  numbers = json.loads(path.read_text())
  of_seeds = numbers['random_weights']
  assert len(of_seeds) == 2
  every = [numbers['trained'], *of_seeds, numbers['raw_rgb'], numbers['mean_colour']]
  assert len({each['J&F'] for each in every}) == len(every)
  davis = Davis(clips / 'davis')
  scores = {}
  for name in davis.names:
    clip = davis.open(name)
    scores[name] = davis.score(clip, [clip.truth.mask(0)] * clip.num_frames)
  # Labels are on a grid, so their borders are not quite those of the mask.
  for name in ('J_mean', 'F_mean'):
    copied = davis.summarise(scores)[name]
    assert numbers['copy_first'][name] == pytest.approx(copied, abs=10)
    assert numbers['trained'][name] > 0


@needs_torch
@pytest.mark.slow
def test_both_compute_the_same_labels_and_nothing_is_compiled_later(tmp_path):
  path = tmp_path / 'numbers.json'
  command = '--model=XXS', '--input_size=32x48', '--frames=10', f'--json={path}'
  done = run_python('-m', 'benchmarks.propagation_speed', *command)
  assert done.returncode == 0, done.stderr
  numbers = json.loads(path.read_text())
  assert numbers['largest_difference_of_labels'] < 1e-5
  assert sum(numbers['programs_compiled_by_frame'][:3]) > 0
  assert sum(numbers['programs_compiled_by_frame'][3:]) == 0
  assert np.isfinite(numbers['ratio'])
