"""Files of an earlier commit: a run is resumed, a checkpoint and a .pth are converted.

golden/run.tar.xz holds a dataset of nine clips (`data`), the checkpoint of step 5 of 9 and the
metrics of all steps of a run on it (`run`), and that checkpoint exported --with_optimizer
(`dropmae.pth`). Commit d99c184 wrote them, with the seed version 3, by the config beside it.
"""

import json
import tarfile

import numpy as np
import pytest
from conftest import GOLDEN, run_python

from dropmae_jax.pytorch import main as convert_to_torch
from dropmae_jax.train_step import SEED_VERSION


@pytest.fixture
def older(tmp_path):
  """A folder with the files."""
  with tarfile.open(GOLDEN / 'run.tar.xz') as files:
    files.extractall(tmp_path, filter='data')
  return tmp_path


def rows_of(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_run_goes_on_with_the_same_losses(older):
  """Pairs, masks, dropped attention, flips and schedule are those of the earlier commit."""
  assert SEED_VERSION == 3, 'record a run of the new version, and say in the note why it changed'
  expected = rows_of(older / 'run')
  done = run_python(
    '-m', 'dropmae_jax.main', '--config=tests/golden/run_config.py', f'--workdir={older}/run',
    f'--config.data_dir={older}/data',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'resuming after step 5 of 9' in done.stdout
  rows = rows_of(older / 'run')
  assert [row['step'] for row in rows] == [2, 4, 6, 8, 9]
  assert rows[:2] == expected[:2]
  for name in ('loss', 'learning_rate', 'gradient_norm'):
    # Another machine or compiler rounds otherwise.
    np.testing.assert_allclose(
      [row[name] for row in rows], [row[name] for row in expected], rtol=1e-4, err_msg=name
    )


def leaves_of(value, path=''):
  """Lists what a loaded .pth holds, by path; tensors as numpy arrays."""
  if isinstance(value, dict | list | tuple):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, each in items for k, v in leaves_of(each, f'{path}/{key}').items()}
  return {path: value.numpy() if hasattr(value, 'numpy') else value}


def test_its_checkpoint_and_its_file_are_converted_into_one_another(older, monkeypatch):
  torch = pytest.importorskip('torch', reason='PyTorch is not installed')
  recorded = leaves_of(torch.load(older / 'dropmae.pth', weights_only=True))
  # The score, a mean training loss, is no longer read.
  for name in ('score', 'score_steps'):
    assert recorded.pop(f'/args/{name}')

  def convert(*job):
    monkeypatch.setattr('sys.argv', ['convert_to_torch.py', *job, '--with_optimizer'])
    assert not convert_to_torch.main()

  convert(f'--checkpoint={older}/run', f'--output={older}/again.pth')
  convert(f'--from_torch={older}/dropmae.pth', f'--output={older}/back')
  convert(f'--checkpoint={older}/back', f'--output={older}/from_back.pth')
  for name in ('again.pth', 'from_back.pth'):
    leaves = leaves_of(torch.load(older / name, weights_only=True))
    assert set(recorded) <= set(leaves), name
    for path, value in recorded.items():
      np.testing.assert_array_equal(leaves[path], value, err_msg=f'{name} {path}')
  assert len(recorded) > 300
