"""Every command of README.md and docs/ is run by a test, or said not to have been run."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, needs_torch

from dropmae_jax.data.synthetic_clips import ClipOptions, write_clips

README = (ROOT / 'README.md').read_text()
DOCS = {path.name: path.read_text() for path in [ROOT / 'README.md', *ROOT.glob('docs/*.md')]}
# What makes commands quick, whose options are otherwise those of README.
MORE = {
  'dropmae-train': '--config.model.size=XXS --config.model.image_size=32 --config.dtype=float32'
  ' --config.num_steps=4 --config.batch_size=8 --config.data.frame_gap=6',
  'dropmae-evaluate': '--input_size=144x192',
}
NEWCOMER = 'test_a_newcomer_gets_from_videos_to_a_file_and_a_score'
# Beginnings of commands, and the test that runs them, with small numbers in place of large ones;
# None: the document says that they have not been run, or at which commit they were.
RUN_BY = {
  'make test': 'the tests themselves',
  'make quickstart': None,
  'source .venv': NEWCOMER,
  'pip install': None,
  'dropmae-build --config=folder': NEWCOMER,
  'dropmae-build --config=kinetics700 --videos=/data/k700 --data_dir=/data/tfds --beam_runner': (
    'test_beam_itself_writes_what_one_machine_does'
  ),
  'dropmae-build --config=kinetics700': 'test_an_array_job_writes_what_one_machine_does',
  'dropmae-inspect': NEWCOMER,
  'dropmae-train --config=video_folder': NEWCOMER,
  'dropmae-train --config=kinetics400_vit_b16:24gb --dry_run=compile': 'test_the_compiler_is_asked',
  'dropmae-train': None,
  'dropmae-figures': NEWCOMER,
  'dropmae-convert --checkpoint=runs/mine --fold_identities': NEWCOMER,
  'dropmae-convert': NEWCOMER,
  'dropmae-evaluate': NEWCOMER,
  'dropmae-tracker video': 'test_a_video_is_drawn_upon',
  'dropmae-tracker run': 'test_a_data_set_is_tracked_goes_on_and_is_scored',
  'dropmae-tracker score': 'test_a_data_set_is_tracked_goes_on_and_is_scored',
  'dropmae-tracker convert': 'test_a_tracker_is_converted_and_comes_back',
  'python -m benchmarks.input_pipeline': 'test_the_input_pipeline_is_measured_from_end_to_end',
  'python -m benchmarks.propagation_baselines': (
    'test_a_checkpoint_is_compared_with_what_needs_no_training'
  ),
  'python -m benchmarks.propagation_speed': (
    'test_both_compute_the_same_labels_and_nothing_is_compiled_later'
  ),
  'python -m benchmarks.step_time': 'test_every_row_has_its_numbers',
  'python -m benchmarks.asad_sampler': 'test_the_samplers_are_compared',
  'python -m benchmarks.compiler.report': 'test_the_compilers_of_accelerators_make_both_steps',
  'python -m benchmarks.tracker_cost': 'test_every_form_is_compiled_once',
  'python -m benchmarks.soak': None,
  'python -m torch.distributed.launch': None,
  'python main_finetune.py': None,
  'gcloud': None,
  'srun': None,
}
NOT_RUN = re.compile(r'[Nn]ot\s+yet\s+run|has\s+been\s+run\s+yet|\(?commit\s[0-9a-f]{7}')
# Of the shell.
SYNTAX = re.compile(r'(#|case |done$|cd |status=|if |exit )')


def block_with(text, language, document=README):
  """The only block of a document that has this text."""
  blocks = re.findall(rf'```{language}\n(.*?)```', document, re.DOTALL)
  (block,) = (block for block in blocks if text in block)
  return block


def commands():
  """The commands of every document, with the section that each is in."""
  found = []
  for name, text in DOCS.items():
    intro, *sections = re.split(r'^##+ ', text, flags=re.MULTILINE)
    for section in ('', *sections):
      for script in re.findall(r'```bash\n(.*?)```', section or intro, re.DOTALL):
        for line in script.replace('\\\n', ' ').splitlines():
          if line.strip() and not SYNTAX.match(line.strip()):
            command = re.sub(r' +', ' ', line.strip()).removeprefix('until ')
            found.append((name, command, intro + section))
  return found


def test_every_command_is_run_or_said_not_to_be():
  defined = set()
  for path in ROOT.glob('tests/**/test_*.py'):
    defined |= set(re.findall(r'^def (test_\w+)', path.read_text(), re.MULTILINE))
  for name, command, section in commands():
    beginning = next((each for each in RUN_BY if command.startswith(each)), None)
    assert beginning, f'{name}: no test runs {command}'
    test = RUN_BY[beginning]
    if test is None:
      assert NOT_RUN.search(section), f'{name} does not say that this has not been run: {command}'
    else:
      assert test in defined or command == 'make test # the tests', test


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
  more = [
    command
    for name, command, _ in commands()
    if (name != 'README.md' and command.startswith(('dropmae-convert', 'dropmae-inspect')))
    or command.endswith('--verify')
  ]
  for run in (
    ['bash', '-euxc', script],
    [sys.executable, '-c', block_with('tfds.data_source', 'python')],
    [sys.executable, '-c', block_with('load_encoder', 'python')],
    [sys.executable, '-c', block_with('torch.load', 'python')],
    ['bash', '-euxc', '\n'.join(more)],
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
  for name in (
    'figure.png',
    'dropmae.pth',
    'dropmae.pth.sha256',
    'scores/results.json',
    'pairs.png',
  ):
    assert (tmp_path / name).is_file(), name
