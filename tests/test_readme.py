"""The commands of README.md, word for word: from videos to a PyTorch file and a score."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, needs_torch

from dropmae_jax.data.synthetic_clips import ClipOptions, write_clips

TEXT = (ROOT / 'README.md').read_text()
# What makes commands quick, whose options are otherwise those of README.
MORE = {
  'dropmae-train': '--config.model.size=XXS --config.model.image_size=32 --config.dtype=float32'
  ' --config.num_steps=4 --config.batch_size=8 --config.data.frame_gap=6',
  'dropmae-evaluate': '--input_size=144x192',
}


def block_with(text, language):
  """The only block of README that has this text."""
  blocks = re.findall(rf'```{language}\n(.*?)```', TEXT, re.DOTALL)
  (block,) = (block for block in blocks if text in block)
  return block


@pytest.mark.slow
@needs_torch
def test_a_newcomer_gets_from_videos_to_a_file_and_a_score(tmp_path):
  write_clips(tmp_path / 'clips', ClipOptions(train=12, val=1, frames=12))
  scripts = tmp_path / 'scripts'
  scripts.mkdir()
  for command, options in MORE.items():
    (scripts / command).write_text(f'#!/bin/sh\nexec {sys.prefix}/bin/{command} "$@" {options}\n')
    (scripts / command).chmod(0o755)
  script = block_with('dropmae-figures', 'bash')
  (clip,) = (tmp_path / 'clips' / 'val').rglob('*.mp4')
  for name, place in (('VIDEOS', 'clips'), ('CLIP.mp4', clip), ('DAVIS', 'clips/davis')):
    assert name in script
    script = script.replace(f'={name}', f'={place}')
  # The environment is the one of the tests.
  script = script.replace('source .venv/bin/activate\n', '')
  path = f'{scripts}:{sys.prefix}/bin:{os.environ["PATH"]}'
  for run in (
    ['bash', '-euxc', script],
    [sys.executable, '-c', block_with('tfds.data_source', 'python')],
    [sys.executable, '-c', block_with('load_encoder', 'python')],
    [sys.executable, '-c', block_with('torch.load', 'python')],
  ):
    done = subprocess.run(
      run,
      cwd=tmp_path,
      env=os.environ | {'PATH': path},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
  for name in ('figure.png', 'dropmae.pth', 'dropmae.pth.sha256', 'scores/results.json'):
    assert (tmp_path / name).is_file(), name
