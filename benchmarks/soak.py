r"""Trains under random faults, and checks that they do not change the result.

    python -m benchmarks.soak --minutes=10

A tiny model trains on generated clips. The faults are kill -9 of the trainer, SIGTERM, a damaged
newest checkpoint after a kill, a second start beside the trainer, a dataset that is replaced and
put back, and a disk that is full for a while (where a file system may be mounted, as by root);
after each, the same command resumes the run. The final parameters and moments must equal those of a
run without faults, bit for bit. Then the next run starts, until the time is over.
"""

import collections
import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import ExitStatus, UserError

ROOT = pathlib.Path(__file__).parent.parent
# Small enough for some hundred steps between two faults.
TINY = [
  '--config.model.size=XXS',
  '--config.model.image_size=32',
  '--config.model.decoder_width=32',
  '--config.model.decoder_depth=2',
  '--config.model.decoder_num_heads=2',
  '--config.objective.attention_dropout=0.2',
  '--config.checkpoint.every_steps=50',
  '--config.checkpoint.keep_last=3',
  '--config.log_every=10',
]
# The longest time from a run's first step to its fault, in seconds.
LONGEST_CALM = 4.0


class Trainer:
  """One start of the training command, whose output goes to a file."""

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

  def output(self) -> str:
    """Returns the output of this start so far."""
    self._log.seek(self._from)
    return self._log.read()

  def is_training(self) -> bool:
    """Whether the first step is done."""
    return 'first step' in self.output()

  def end(self, number: signal.Signals) -> int:
    """Sends a signal; returns the exit status."""
    self.process.send_signal(number)
    return self.process.wait(timeout=300)


def kill_trainer(trainer: Trainer, *_: object) -> bool:
  """Kills the trainer with -9 at any point: within a step, a save, a log line."""
  return trainer.end(signal.SIGKILL) == -signal.SIGKILL


def stop_trainer(trainer: Trainer, *_: object) -> bool:
  """Sends SIGTERM, after which the trainer must exit with the status of a saved run."""
  status = trainer.end(signal.SIGTERM)
  if status not in (ExitStatus.DONE, ExitStatus.STOPPED):
    raise AssertionError(f'status {status} after SIGTERM:\n{trainer.output()}')
  return status == ExitStatus.STOPPED


def damage_checkpoint(trainer: Trainer, workdir: pathlib.Path, rng: random.Random) -> bool:
  """Kills the trainer, and damages a file of the newest checkpoint."""
  trainer.end(signal.SIGKILL)
  folders = (workdir / saved_weights.FOLDER).iterdir()
  steps = sorted((int(path.name), path) for path in folders if path.name.isdigit())
  if len(steps) < 2:
    return False  # There is no older one to resume from.
  victim = rng.choice(sorted(path for path in steps[-1][1].rglob('*') if path.is_file()))
  content = bytearray(victim.read_bytes())
  damage = rng.choice(['remove', 'remove a part', 'truncate', 'flip'])
  if damage == 'remove':
    victim.unlink()
  elif damage == 'remove a part':
    shutil.rmtree(steps[-1][1] / rng.choice(['params', 'opt_state', 'description']))
  elif damage == 'truncate':
    victim.write_bytes(content[: len(content) // 2])
  else:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    victim.write_bytes(content)
  return True


def start_second_trainer(trainer: Trainer, *_: object) -> bool:
  """Gives the same command once more, which must be refused, and kills the trainer."""
  done = subprocess.run(trainer.process.args, cwd=ROOT, capture_output=True, text=True, check=False)
  status = trainer.process.poll()
  if status:
    raise AssertionError(f'status {status} beside a second start:\n{trainer.output()}')
  if status == ExitStatus.DONE:
    return False
  if done.returncode != ExitStatus.UNAVAILABLE or 'is in use by process' not in done.stderr:
    raise AssertionError(f'status {done.returncode} of a second start:\n{done.stderr}')
  return kill_trainer(trainer)


def replace_data(trainer: Trainer, workdir: pathlib.Path, rng: random.Random) -> bool:
  """Kills the trainer and swaps two shards, with which a start must be refused; swaps them back."""
  if not kill_trainer(trainer):
    return False
  shards = rng.sample(sorted((workdir.parents[1] / 'data').rglob('*-train.array_record*')), 2)
  swap(*shards)
  done = subprocess.run(trainer.process.args, cwd=ROOT, capture_output=True, text=True, check=False)
  swap(*shards)
  if done.returncode != ExitStatus.BAD_INPUT or 'is another file than the one' not in done.stderr:
    raise AssertionError(f'status {done.returncode} with swapped shards:\n{done.stderr}')
  return True


def swap(one: pathlib.Path, other: pathlib.Path) -> None:
  """Exchanges two files."""
  aside = one.with_name('aside')
  one.rename(aside)
  other.rename(one)
  aside.rename(other)


def fill_disk(trainer: Trainer, workdir: pathlib.Path, rng: random.Random) -> bool:
  """Fills the disk of the workdir for some seconds, which must not end the run; then kills it."""
  filler = workdir.parent / 'filler'
  with contextlib.suppress(OSError), filler.open('wb', buffering=0) as file:
    while True:
      file.write(bytes(4096))
  time.sleep(rng.uniform(0, LONGEST_CALM))
  status = trainer.process.poll()
  filler.unlink()
  if status == ExitStatus.FAILED and 'could not be saved' in trainer.output():
    return True  # It came to its end meanwhile.
  if status:
    raise AssertionError(f'status {status} on a full disk:\n{trainer.output()}')
  time.sleep(rng.uniform(0, LONGEST_CALM / 4))
  return kill_trainer(trainer)


# Each returns whether it happened: False if the run had ended before.
FAULTS: dict[str, Callable[[Trainer, pathlib.Path, random.Random], bool]] = {
  'kill -9 of the trainer': kill_trainer,
  'SIGTERM': stop_trainer,
  'damaged checkpoint': damage_checkpoint,
  'second start': start_second_trainer,
  'replaced data': replace_data,
  'full disk': fill_disk,
}


@contextlib.contextmanager
def small_disk(folder: pathlib.Path) -> Iterator[None]:
  """Makes a folder, and mounts a small file system there if that is allowed."""
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', str(folder)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    print('no file system can be mounted here, so that no disk will be full', flush=True)
  try:
    yield
  finally:
    if folder.is_mount():
      subprocess.run(['umount', '--lazy', str(folder)], check=True)


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
    raise AssertionError(f'a run without faults failed:\n{trainer.output()}')


def differences(first: pathlib.Path, second: pathlib.Path) -> list[str]:
  """Lists the parameters and moments of two runs that are not equal, bit for bit."""
  one, other = (saved_weights.load_weights(folder, with_moments=True) for folder in (first, second))
  if one.step != other.step:
    return [f'step {one.step} and {other.step}']
  leaves, others = (jax.tree.leaves_with_path((each.params, each.moments)) for each in (one, other))
  return [
    jax.tree_util.keystr(path)
    for (path, a), (_, b) in zip(leaves, others, strict=True)
    if not np.array_equal(a, b)
  ]


def disturb(
  arguments: list[str], workdir: pathlib.Path, *, rng: random.Random, deadline: float
) -> collections.Counter[str]:
  """Runs the training under faults to its end; after the deadline without; counts the faults."""
  survived: collections.Counter[str] = collections.Counter()
  log = workdir.parents[1] / f'{workdir.name}.log'
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
      raise AssertionError(f'status {status} without a fault:\n{trainer.output()}')
    name = rng.choice([name for name in FAULTS if name != 'full disk' or workdir.parent.is_mount()])
    if not FAULTS[name](trainer, workdir, rng):
      continue
    survived[name] += 1
    print(f'{sum(survived.values()):4d} {name}: {last_step(workdir)}', flush=True)
  run_to_the_end(arguments, log)
  return survived


def last_step(workdir: pathlib.Path) -> str:
  """Returns the log's last line with a step, up to the step."""
  lines = (workdir / 'log.txt').read_text().splitlines()
  return next((line.split('  ')[0] for line in reversed(lines) if ' step ' in line), '')


def soak(folder: pathlib.Path, *, minutes: float, num_steps: int, seed: int) -> dict[str, int]:
  """Trains run after run until the time is over; returns counts of runs and faults.

  Raises:
    AssertionError: a run failed after a fault, or its result changed.
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
    workdir = folder / 'disk' / f'run_{runs}'
    survived += disturb([*common, f'--workdir={workdir}'], workdir, rng=rng, deadline=deadline)
    wrong = differences(workdir, undisturbed)
    if wrong:
      raise AssertionError(f'run {runs} differs in {wrong[:3]} ({len(wrong)} in all)')
    runs += 1
    print(
      f'run {runs}: {num_steps} steps, equal to the run without faults, bit for bit', flush=True
    )
    shutil.rmtree(workdir)
  return {'runs': runs, 'steps': num_steps, 'faults': sum(survived.values()), **survived}


def main() -> None:
  """The command line."""
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--minutes', type=float, default=10, help='(%(default)s)')
  parser.add_argument('--steps', type=int, default=1500, help='of every run (%(default)s)')
  parser.add_argument('--seed', type=int, default=0, help='of the faults (%(default)s)')
  arguments = parser.parse_args()
  if arguments.minutes <= 0 or arguments.steps < 1:
    raise UserError('--minutes and --steps must be positive; the defaults are 10 and 1500.')
  with (
    tempfile.TemporaryDirectory(prefix='dropmae_soak') as folder,
    small_disk(pathlib.Path(folder, 'disk')),
  ):
    counts = soak(
      pathlib.Path(folder),
      minutes=arguments.minutes,
      num_steps=arguments.steps,
      seed=arguments.seed,
    )
  for name, count in counts.items():
    print(f'{name}: {count}')


if __name__ == '__main__':
  cli.run(main)
