"""Fixtures that are expensive and shared: clips, their dataset, a trained run, the goldens."""

import errno
import fcntl
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import types

import jax
import jaxtyping
import numpy as np
import pytest
from PIL import Image

from dropmae_jax.runtime import cli

try:
  import torch
except ModuleNotFoundError:
  torch = None

needs_torch = pytest.mark.skipif(torch is None, reason='PyTorch is not installed')

# Shapes in signatures are checked in tests only, and several devices are there to shard over.
jaxtyping.install_import_hook('dropmae_jax', 'typecheck.check')
jax.config.update('jax_num_cpu_devices', 8)
# The same programs are compiled again and again, by commands in processes of their own too.
# The first process to come here is the parent of all others, those that share out the tests too.
if 'DROPMAE_TEST_CACHE' not in os.environ:
  CACHE = tempfile.TemporaryDirectory(prefix='dropmae_test_cache')
  os.environ['DROPMAE_TEST_CACHE'] = CACHE.name
COMPILE_ONCE = {
  'JAX_COMPILATION_CACHE_DIR': os.environ['DROPMAE_TEST_CACHE'],
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}
jax.config.update('jax_compilation_cache_dir', COMPILE_ONCE['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
# Tests spend more time on compiling than on running what was compiled, and machine code that is not
# optimised is made sooner; older versions of JAX have emitters that need half the time of today's.
# Flags that are set already stay.
FAST_COMPILE = '--xla_backend_optimization_level=0'
if jax.__version_info__ < (0, 11):
  FAST_COMPILE += ' --xla_cpu_use_fusion_emitters=false'
os.environ.setdefault('XLA_FLAGS', FAST_COMPILE)

# A process inherits that signals are ignored, and no handlers: where Ctrl-C is ignored here, as
# under `nohup make test &` in a script, the commands that are tested are those of a terminal still.
for each in (signal.SIGINT, signal.SIGQUIT):
  if signal.getsignal(each) is signal.SIG_IGN:
    signal.signal(each, lambda *_: None)

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / 'tests' / 'golden'

# A model that compiles in seconds; 32 pixels are 16 tokens per frame, so P = 0.2 drops 96 pairs.
TINY = [
  '--config.model.size=XXS',
  '--config.model.image_size=32',
  '--config.model.decoder_width=32',
  '--config.model.decoder_depth=2',
  '--config.model.decoder_num_heads=2',
  '--config.objective.attention_dropout=0.2',
  '--config.data.frame_gap=5',
  '--config.data.num_threads=1',
  '--config.batch_size=4',
  '--config.optimizer.warmup_steps=2',
  '--config.log_every=1',
]


@pytest.fixture(autouse=True)
def _handlers_of_signals():
  """Commands that are run in this process keep theirs."""
  before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
  yield
  for each, handler in before.items():
    signal.signal(each, handler or signal.SIG_DFL)


@pytest.fixture(scope='session')
def golden():
  """Loads a recorded file by its stem."""

  def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f'{name}.npz') as arrays:
      return dict(arrays)

  return load


@pytest.fixture(scope='session')
def timm() -> types.ModuleType:
  """The library; it imports torchvision, whose operators fail to load beside a CPU torch."""
  pytest.importorskip('torch', reason='PyTorch is not installed')
  library = None
  try:
    importlib.import_module('torchvision')
  except RuntimeError:
    # Nothing here computes boxes; naming the two operators is all that the import asks for.
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for operator in ('nms', 'qnms'):
      library.define(f'{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
  import timm

  timm.torchvision_operators = library
  return timm


def run_python(*arguments, timeout: int = 300) -> subprocess.CompletedProcess:
  """Runs a command of the project as a user does, on one device."""
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=timeout,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1', **COMPILE_ONCE},
    check=False,
  )


@pytest.fixture
def run_here(monkeypatch, capsys):
  """Runs a command in this process, which spares its imports."""

  def run(main, *arguments) -> subprocess.CompletedProcess:
    monkeypatch.setattr(sys, 'argv', ['command', *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
      cli.run(main)
    captured = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, ended.value.code, captured.out, captured.err)

  return run


@pytest.fixture
def full_disk(monkeypatch):
  """Pictures are written in part, and then the disk is full."""

  def save(self, path, **_):
    pathlib.Path(path).write_bytes(b'half')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(Image.Image, 'save', save)


def assert_one_sentence(done, message: str) -> None:
  """A command refused its input in one sentence."""
  assert done.returncode == 2, done.stdout + done.stderr
  assert message in done.stderr
  errors = [line for line in done.stderr.splitlines() if line.strip()]
  assert len([line for line in errors if line.startswith('error: ')]) == 1
  assert 'Traceback' not in done.stderr


def train_arguments(data_dir, workdir, *more) -> list:
  """The command line of a tiny training run."""
  return [
    '-m',
    'dropmae_jax.main',
    '--config=configs/quickstart.py',
    f'--workdir={workdir}',
    f'--config.data_dir={data_dir}',
    *TINY,
    *more,
  ]


@pytest.fixture(scope='session')
def once(tmp_path_factory):
  """Returns the folder of a name, which the first of all test processes fills."""
  root = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    root = root.parent

  def folder_of(name: str, fill) -> pathlib.Path:
    folder, done = root / name, root / f'{name}.done'
    with (root / f'{name}.lock').open('w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not done.exists():
        fill(folder)
        done.touch()
    return folder

  return folder_of


def succeed(*arguments) -> None:
  done = run_python(*arguments)
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope='session')
def clips(once) -> pathlib.Path:
  """Six training and two validation clips of eight frames, and a broken file among them."""

  def fill(folder):
    succeed(
      '-m', 'dropmae_jax.data.synthetic_clips', f'--output={folder}', '--train=6', '--val=2',
      '--frames=8', '--height=48', '--width=64',
    )  # fmt: skip
    (folder / 'train' / 'bouncing' / 'broken.mp4').write_bytes(b'not a video')

  return once('clips', fill)


@pytest.fixture(scope='session')
def data_dir(clips, once) -> pathlib.Path:
  """The dataset of `clips`."""
  build = ('-m', 'tfds_kinetics', '--config=folder', f'--videos={clips}', '--workers=2')
  return once('data', lambda folder: succeed(*build, f'--data_dir={folder}'))


@pytest.fixture(scope='session')
def trained(data_dir, once) -> pathlib.Path:
  """The workdir of eight steps without a stop, with a checkpoint after the fourth too."""
  more = ('--config.num_steps=8', '--config.checkpoint.every_steps=4', '--profile_steps=3:4')
  return once('trained', lambda folder: succeed(*train_arguments(data_dir, folder, *more)))
