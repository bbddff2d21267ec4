"""The extension points of README, used as a stranger uses them: from a file of his own."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import COMPILE_ONCE, ROOT, TINY

from dropmae_jax import sharding, train
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Config, Objective
from dropmae_jax.model import asad, masking, vit
from dropmae_jax.runtime.errors import UserError

BEGIN = """
import jax, jax.numpy as jnp, numpy as np
from dropmae_jax.configs import quickstart
from dropmae_jax.model import asad, masking, vit
"""
SIZE = """
vit.SIZES['tiny'] = vit.Size(width=32, depth=1, num_heads=2, patch_size=8)

def get_config():
  config = quickstart.get_config()
  config.model.size = 'tiny'
  return config
"""
MASKING = """
def later_frame_first(keys, *, num_tokens, mask_ratio):
  noise = jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(keys)
  noise += jnp.arange(num_tokens) >= num_tokens // 2
  return masking.masking_from_noise(noise, masking.num_visible(num_tokens, mask_ratio))

masking.MASKING_SCHEMES['later'] = later_frame_first
"""
RULE = """
def uniform(keys, logits, *, drop_rate):
  n = logits.own.shape[-1]
  weights = jnp.broadcast_to(1.0 - jnp.eye(n), logits.own.shape)
  return asad.draw_without_replacement(keys, weights, asad.num_dropped(n, drop_rate))

asad.ATTENTION_DROPOUTS['uniform'] = uniform
"""
DATASET = """
class Noise:
  def __init__(self, data_dir, split):
    self.seed = len(data_dir)
  def __len__(self):
    return 12
  def num_frames(self, video):
    return 5
  def frame(self, video, number):
    return np.random.default_rng([self.seed, video, number]).integers(0, 256, (40, 50, 3), np.uint8)
"""
WRITER = """
from dropmae_jax.runtime import report

def write(step, numbers):
  print(f'writer: {step} {sorted(numbers)}')
  raise OSError('no network')

report.METRICS_WRITERS.append(write)
"""


SCORE = """
from dropmae_jax.evaluation import scores

def mask_token(weights):
  return {'norm': np.linalg.norm(weights.params['mask_token'])}

scores.SCORES['mask_token'] = mask_token
"""


def test_a_file_of_the_users_adds_to_the_product(tmp_path):
  """A size, a masking scheme, a dropout rule, a dataset, a writer and a score; ten lines each."""
  sources = (SIZE, MASKING, RULE, DATASET, WRITER, SCORE)
  assert all(len(each.strip().splitlines()) <= 10 for each in sources)
  (tmp_path / 'mine.py').write_text('\n'.join((BEGIN, *sources)))
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **COMPILE_ONCE}
  done = subprocess.run(
    [
      sys.executable, '-m', 'dropmae_jax.main', '--workdir=run', '--config=mine.py', *TINY,
      '--config.model.size=tiny', '--config.objective.masking=later',
      '--config.objective.dropout_rule=uniform', '--config.dataset=mine:Noise',
      '--config.data_dir=.', '--config.num_steps=3',
      '--config.score_every=2', '--config.scores=mask_token',
    ],
    cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  scored = {row['step']: row['mask_token/norm'] for row in rows if 'mask_token/norm' in row}
  rows = [row for row in rows if 'loss' in row]
  assert [row['step'] for row in rows] == [1, 2, 3]
  assert all(np.isfinite(row['loss']) for row in rows)
  # The numbers are those of the weights at that step.
  assert list(scored) == [2, 3]
  params = saved_weights.load_weights(tmp_path / 'run').params
  assert scored[3] == pytest.approx(np.linalg.norm(params['mask_token']), rel=1e-6)
  assert scored[2] != scored[3]
  described = json.loads((tmp_path / 'run/checkpoints/3/description/metadata').read_text())
  assert described['architecture']['width'] == 32
  assert ', 12 videos,' in done.stdout
  # The failure of a writer does not end the run.
  names = sorted(set(rows[0]) - {'step'})
  for step in (1, 2, 3):
    assert f'writer: {step} {names}\n' in done.stdout
    assert f'a metrics writer has failed at step {step}; training goes on\n' in done.stdout


# What a scheme returns for two samples of eight tokens.
BAD_MASKINGS = {
  'no Masking': (np.arange(4), np.arange(4, 8)),
  'no samples': masking.Masking(np.arange(4), np.arange(4, 8)),
  'one sample': masking.Masking(np.arange(4)[None], np.arange(4, 8)[None]),
  'none masked': masking.Masking(np.tile(np.arange(8), (2, 1)), np.zeros((2, 0), int)),
  'one too few': masking.Masking(np.tile(np.arange(4), (2, 1)), np.tile(np.arange(4, 7), (2, 1))),
  'one twice': masking.Masking(np.tile(np.arange(4), (2, 1)), np.tile(np.arange(3, 7), (2, 1))),
}


@pytest.mark.parametrize('returned', BAD_MASKINGS.values(), ids=BAD_MASKINGS)
def test_a_scheme_that_does_not_part_the_tokens_is_refused(monkeypatch, returned):
  monkeypatch.setitem(masking.MASKING_SCHEMES, 'mine', lambda *_, **__: returned)
  with pytest.raises(ValueError, match=r"^masking='mine' must return .* each of the 8 tokens"):
    masking.check_scheme('mine', num_tokens=8, mask_ratio=0.5)


BAD_RULES = {
  'nothing': lambda keys, logits, *, drop_rate: None,
  'numbers': lambda keys, logits, *, drop_rate: logits.own,
  'one sample': lambda keys, logits, *, drop_rate: logits.own[0] > 0,
}


@pytest.mark.parametrize('rule', BAD_RULES.values(), ids=BAD_RULES)
def test_a_rule_that_does_not_mark_the_pairs_is_refused(monkeypatch, rule):
  monkeypatch.setitem(asad.ATTENTION_DROPOUTS, 'mine', rule)
  with pytest.raises(ValueError, match=r"^dropout_rule='mine' must return booleans .* it returns"):
    asad.check_rule('mine', tokens_per_frame=4, drop_rate=0.5)


@pytest.mark.parametrize(('field', 'table'), [
  ('masking', masking.MASKING_SCHEMES), ('dropout_rule', asad.ATTENTION_DROPOUTS)
])  # fmt: skip
def test_they_are_checked_before_a_model_is_built(monkeypatch, field, table):
  monkeypatch.setitem(table, 'mine', lambda *_, **__: None)
  objective = Objective(**{field: 'mine'})
  model = vit.architecture_of_size('XXS', image_size=32)
  config = Config(data_dir='', num_steps=1, batch_size=1, model=model, objective=objective)
  with pytest.raises(UserError, match=f"^config: {field}='mine' must return"):
    train.build(config, sharding.make_mesh(jax.devices()[:1]))
