"""The extension points of README, used as a stranger uses them: from a file of his own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import COMPILE_ONCE, ROOT, TINY

SIZE = """
from dropmae_jax.configs import quickstart
from dropmae_jax.model import vit

vit.SIZES['tiny'] = vit.Size(width=32, depth=1, num_heads=2, patch_size=8)

def get_config():
  config = quickstart.get_config()
  config.model.size = 'tiny'
  return config
"""
MASKING = """
import jax, jax.numpy as jnp
from dropmae_jax.configs import quickstart
from dropmae_jax.model import masking

def later_frame_first(keys, *, num_tokens, mask_ratio):
  noise = jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(keys)
  noise += jnp.arange(num_tokens) >= num_tokens // 2
  return masking.masking_from_noise(noise, masking.num_visible(num_tokens, mask_ratio))

masking.MASKING_SCHEMES['later'] = later_frame_first
get_config = quickstart.get_config
"""
RULE = """
import jax.numpy as jnp
from dropmae_jax.configs import quickstart
from dropmae_jax.model import asad

def uniform(keys, logits, *, drop_rate):
  n = logits.own.shape[-1]
  weights = jnp.broadcast_to(1.0 - jnp.eye(n), logits.own.shape)
  return asad.draw_without_replacement(keys, weights, asad.num_dropped(n, drop_rate))

asad.ATTENTION_DROPOUTS['uniform'] = uniform
get_config = quickstart.get_config
"""
DATASET = """
import numpy as np

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


def train(folder, *arguments):
  """Three steps of a tiny run, started in a folder of the user's; returns their losses."""
  command = [sys.executable, '-m', 'dropmae_jax.main', '--workdir=run', *TINY, *arguments]
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **COMPILE_ONCE}
  done = subprocess.run(
    [*command, '--config.num_steps=3'],
    cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in (folder / 'run' / 'metrics.jsonl').read_text().splitlines()]
  return [row['loss'] for row in rows]


@pytest.mark.parametrize(
  ('source', 'choice'),
  [
    (SIZE, ['--config=mine.py', '--config.model.size=tiny']),
    (MASKING, ['--config=mine.py', '--config.objective.masking=later']),
    (RULE, ['--config=mine.py', '--config.objective.dropout_rule=uniform']),
    (DATASET, ['--config=quickstart', '--config.dataset=mine:Noise']),
  ],
  ids=['size', 'masking', 'rule', 'dataset'],
)
def test_a_file_of_the_users_adds_to_the_product(source, choice, data_dir, tmp_path):
  (tmp_path / 'mine.py').write_text(source)
  losses = train(tmp_path, f'--config.data_dir={data_dir}', *choice)
  assert len(losses) == 3
  assert np.isfinite(losses).all()
