r"""Trains under faults, and shows that they change nothing.

    python -m benchmarks.soak --minutes=10

A tiny model trains on generated clips while faults are drawn at random: kill -9 of the trainer or
of a loader process, SIGTERM, and damage of the newest checkpoint after a kill. The same command
goes on each time. A run that has come to its end is compared, parameters and moments, bit for bit,
with one that nobody disturbed; then the next one begins, until the time is over.
"""

import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
STOPPED = os.EX_TEMPFAIL
# Small enough for some hundred steps between two faults.
TINY = [
  '--config.model.size=XXS',
  '--config.model.image_size=32',
  '--config.model.decoder_width=32',
  '--config.model.decoder_depth=2',
  '--config.model.decoder_num_heads=2',
  '--config.objective.attention_dropout=0.2',
  '--config.data.num_workers=1',
  '--config.checkpoint.every_steps=50',
  '--config.checkpoint.keep_last=3',
  '--config.log_every=10',
]
# Longest time that a run is left alone before the next fault, in seconds from its first step.
LONGEST_CALM = 4.0


class Trainer:
  """One start of the training command; its output is kept in a file."""

  def __init__(self, arguments: list[str], log: pathlib.Path) -> None:
    self._log = log.open('a+')
    self._from = self._log.tell()
    self.process = subprocess.Popen(
      [sys.executable, '-m', 'dropmae_jax.main', *arguments],
      cwd=ROOT,
      stdout=self._log,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )

  def said(self) -> str:
    """Returns what this start has said so far."""
    self._log.seek(self._from)
    return self._log.read()

  def is_training(self) -> bool:
    """Whether the first step is done."""
    return 'first step' in self.said()

  def children(self) -> list[int]:
    """Lists the processes of the loader: those that multiprocessing has spawned."""
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
      try:
        fields = path.read_text().rpartition(')')[2].split()
        command = (path.parent / 'cmdline').read_bytes()
      except OSError:
        continue
      if int(fields[1]) == self.process.pid and b'spawn_main' in command:
        found.append(int(path.parent.name))
    return found

  def end(self, number: signal.Signals) -> int:
    """Sends a signal, and waits for the end."""
    self.process.send_signal(number)
    return self.process.wait(timeout=300)


def kill_trainer(trainer: Trainer, workdir: pathlib.Path, rng: random.Random) -> bool:
  """Kill -9, at any point: within a step, a save, a log line."""
  del workdir, rng
  return trainer.end(signal.SIGKILL) == -signal.SIGKILL


def stop_trainer(trainer: Trainer, workdir: pathlib.Path, rng: random.Random) -> bool:
  """SIGTERM, after which it must have saved and said so."""
  del workdir, rng
  status = trainer.end(signal.SIGTERM)
  if status not in (0, STOPPED):
    raise AssertionError(f'status {status} after SIGTERM:\n{trainer.said()}')
  return status == STOPPED


def kill_loader(trainer: Trainer, workdir: pathlib.Path, rng: random.Random) -> bool:
  """Kill -9 of a loader process; the trainer must go on by itself, so it is stopped afterwards."""
  for child in trainer.children():
    with contextlib.suppress(ProcessLookupError):
      os.kill(child, signal.SIGKILL)
  deadline = time.monotonic() + 60
  while 'built anew' not in trainer.said():
    if trainer.process.poll() is not None:
      return False  # It was at its end.
    if time.monotonic() > deadline:
      raise AssertionError(f'the loader was not built anew in a minute:\n{trainer.said()}')
    time.sleep(0.2)
  stop_trainer(trainer, workdir, rng)
  return True


def damage_checkpoint(trainer: Trainer, workdir: pathlib.Path, rng: random.Random) -> bool:
  """Kill -9, and then the newest checkpoint loses a file, the half of one, or a bit."""
  trainer.end(signal.SIGKILL)
  folders = (workdir / saved_weights.FOLDER).iterdir()
  steps = sorted((int(path.name), path) for path in folders if path.name.isdigit())
  if len(steps) < 2:
    return False  # The only one may not be lost.
  victim = rng.choice(sorted(path for path in steps[-1][1].rglob('*') if path.is_file()))
  content = bytearray(victim.read_bytes())
  deed = rng.choice(['remove', 'truncate', 'flip'])
  if deed == 'remove':
    victim.unlink()
  elif deed == 'truncate':
    victim.write_bytes(content[: len(content) // 2])
  else:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    victim.write_bytes(content)
  return True


# Each does something to a run, and says whether it came in time to do it.
FAULTS: dict[str, Callable[[Trainer, pathlib.Path, random.Random], bool]] = {
  'kill -9 of the trainer': kill_trainer,
  'SIGTERM': stop_trainer,
  'kill -9 of the loader': kill_loader,
  'damaged checkpoint': damage_checkpoint,
}


def make_data(folder: pathlib.Path) -> None:
  """Generates clips and builds their dataset."""
  clips = ['--train=12', '--val=1', '--frames=8', '--height=48', '--width=64']
  for command in (
    ['dropmae_jax.data.synthetic_clips', f'--output={folder}/clips', *clips],
    ['tfds_kinetics', '--config=folder', f'--videos={folder}/clips', f'--data_dir={folder}/data'],
  ):
    subprocess.run([sys.executable, '-m', *command], cwd=ROOT, check=True, capture_output=True)


def run_to_the_end(arguments: list[str], log: pathlib.Path) -> None:
  """Trains without a fault."""
  trainer = Trainer(arguments, log)
  if trainer.process.wait() != 0:
    raise AssertionError(f'a run that nobody disturbed failed:\n{trainer.said()}')


def differences(first: pathlib.Path, second: pathlib.Path) -> list[str]:
  """Names the parameters and moments that are not equal, bit for bit."""
  one, other = (saved_weights.load_weights(folder, with_moments=True) for folder in (first, second))
  if one.step != other.step:
    return [f'step {one.step} and {other.step}']
  trees = ((each.params, each.moments) for each in (one, other))
  (mine, theirs) = (jax.tree.leaves_with_path(tree) for tree in trees)
  return [
    jax.tree_util.keystr(path)
    for (path, a), (_, b) in zip(mine, theirs, strict=True)
    if not np.array_equal(a, b)
  ]


def disturb(
  arguments: list[str], workdir: pathlib.Path, *, rng: random.Random, deadline: float
) -> collections.Counter[str]:
  """Starts a run again and again until it has ended, or until the time is over; counts faults."""
  survived: collections.Counter[str] = collections.Counter()
  log = workdir.with_suffix('.log')
  while time.monotonic() < deadline:
    trainer = Trainer(arguments, log)
    while trainer.process.poll() is None and not trainer.is_training():
      time.sleep(0.1)
    calm = time.monotonic() + rng.uniform(0, LONGEST_CALM)
    while trainer.process.poll() is None and time.monotonic() < calm:
      time.sleep(0.05)
    status = trainer.process.poll()
    if status == 0:
      return survived
    if status is not None:
      raise AssertionError(f'status {status} without a fault:\n{trainer.said()}')
    name = rng.choice(list(FAULTS))
    if not FAULTS[name](trainer, workdir, rng):
      continue
    survived[name] += 1
    print(f'{sum(survived.values()):4d} {name}: {last_step(workdir)}', flush=True)
  run_to_the_end(arguments, log)
  return survived


def last_step(workdir: pathlib.Path) -> str:
  """Says how far a run has come."""
  lines = (workdir / 'log.txt').read_text().splitlines()
  return next((line.split('  ')[0] for line in reversed(lines) if ' step ' in line), '')


def soak(folder: pathlib.Path, *, minutes: float, num_steps: int, seed: int) -> dict[str, int]:
  """Runs until the time is over.

  Raises:
    AssertionError: a fault was not survived, or has changed what was trained.
  """
  make_data(folder)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'compiled')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  common = [
    '--config=configs/quickstart.py',
    f'--config.data_dir={folder}/data',
    f'--config.num_steps={num_steps}',
    *TINY,
  ]
  undisturbed = folder / 'undisturbed'
  run_to_the_end([*common, f'--workdir={undisturbed}'], folder / 'undisturbed.log')
  deadline = time.monotonic() + 60 * minutes
  rng = random.Random(seed)
  survived: collections.Counter[str] = collections.Counter()
  runs = 0
  while time.monotonic() < deadline:
    workdir = folder / f'run_{runs}'
    survived += disturb([*common, f'--workdir={workdir}'], workdir, rng=rng, deadline=deadline)
    wrong = differences(workdir, undisturbed)
    if wrong:
      raise AssertionError(f'run {runs} has changed: {wrong[:3]} ({len(wrong)} in all)')
    runs += 1
    print(f'run {runs}: {num_steps} steps, equal to the undisturbed one bit for bit', flush=True)
    shutil.rmtree(workdir)
  return {'runs': runs, 'steps': num_steps, 'faults': sum(survived.values()), **survived}


def main() -> None:
  """The command line."""
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--minutes', type=float, default=10, help='(%(default)s)')
  parser.add_argument('--steps', type=int, default=1500, help='of every run (%(default)s)')
  parser.add_argument('--seed', type=int, default=0, help='of the faults (%(default)s)')
  parser.add_argument('--json', type=pathlib.Path, help='file to write the counts to')
  arguments = parser.parse_args()
  if arguments.minutes <= 0 or arguments.steps < 1:
    raise UserError('--minutes and --steps must be positive; the defaults are 10 and 1500.')
  with tempfile.TemporaryDirectory(prefix='dropmae_soak') as folder:
    found = soak(
      pathlib.Path(folder),
      minutes=arguments.minutes,
      num_steps=arguments.steps,
      seed=arguments.seed,
    )
  for name, count in found.items():
    print(f'{name}: {count}')
  if arguments.json:
    arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == '__main__':
  cli.run(main)
