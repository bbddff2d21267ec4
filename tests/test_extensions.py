"""The extension points of README, used as a stranger uses them: from a file of his own."""

import json
import os
import subprocess
import sys

import numpy as np
from conftest import COMPILE_ONCE, ROOT, TINY

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


def test_a_file_of_the_users_adds_to_the_product(tmp_path):
  """A backbone size, a masking scheme, a dropout rule and a dataset; ten lines each at most."""
  sources = (SIZE, MASKING, RULE, DATASET)
  assert all(len(each.strip().splitlines()) <= 10 for each in sources)
  (tmp_path / 'mine.py').write_text('\n'.join((BEGIN, *sources)))
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **COMPILE_ONCE}
  done = subprocess.run(
    [
      sys.executable, '-m', 'dropmae_jax.main', '--workdir=run', '--config=mine.py', *TINY,
      '--config.model.size=tiny', '--config.objective.masking=later',
      '--config.objective.dropout_rule=uniform', '--config.dataset=mine:Noise',
      '--config.data_dir=.', '--config.num_steps=3',
    ],
    cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == [1, 2, 3]
  assert all(np.isfinite(row['loss']) for row in rows)
  described = json.loads((tmp_path / 'run/checkpoints/3/description/metadata').read_text())
  assert described['architecture']['width'] == 32
  assert ', 12 videos,' in done.stdout
