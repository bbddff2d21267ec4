"""The loop with a step that costs nothing: what is fed, saved and told at which step, and its ends.

Every interval, size and limit differs from every other one, and none divides another.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
import signal
import threading
import time
import types
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sources import NumberedVideos

from dropmae_jax import config_file, main, memory, sharding, train
from dropmae_jax.checkpoints import manager as run_checkpoints
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.checkpoints.manager import Checkpoints, NotSaved
from dropmae_jax.config import CheckpointOptions, Config, DataOptions
from dropmae_jax.data import frame_pairs, loader, non_finite_batch
from dropmae_jax.data.loader import Loader, LoaderStalled
from dropmae_jax.data.mixture import Mixture, mixture_of
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.runtime import cli, multihost, watchdog
from dropmae_jax.runtime.errors import RunFailed, UserError
from dropmae_jax.runtime.report import NonFiniteLoss, Report
from dropmae_jax.train_step import SEED_VERSION, Metrics, TrainState, derive_seeds

CONFIG = Config(
  data_dir='/data',
  num_steps=11,
  batch_size=8,
  model=architecture_of_size('XXS', image_size=16, decoder_width=32, decoder_num_heads=2),
  dataset='kinetics_frames/a',
  split='val',
  seed=5,
  log_every=3,
  step_stall_seconds=77.0,
  data=DataOptions(frame_gap=6, num_threads=0, stall_seconds=55.0, shared_augmentation=True),
  checkpoint=CheckpointOptions(every_steps=4, keep_last=9),
)


class Videos(NumberedVideos):
  """25 of them: three batches of eight, and one that is left over."""

  fingerprint = 'abc'

  def __init__(self):
    super().__init__([10] * 25)
    self.before_frame = lambda: None

  def frame(self, video, number):
    self.before_frame()
    return super().frame(video, number)


class Number:
  """A metric on a device that is done when somebody waits for it."""

  def __init__(self, value, on_wait):
    self.value, self._on_wait = np.float32(value), on_wait

  def block_until_ready(self):
    if threading.current_thread() is threading.main_thread():
      self._on_wait()
    return self

  def __array__(self, *_, **__):
    return np.asarray(self.value)


class Fakes:
  """Instead of what is slow; writes down what the loop does.

  Attributes:
    events: in their order.
    fed: frames by step.
    losses: by step.
    at: what happens at a step.
    bad: a step whose loss is not a number.
  """

  def __init__(self):
    self.events, self.fed, self.losses, self.at, self.bad = [], {}, {}, {}, None
    self.videos, self.feeds = Videos(), []

  def open_mixture(self, *arguments):
    assert arguments == (CONFIG.data_dir, CONFIG.dataset, CONFIG.split)
    return mixture_of(self.videos)

  def build_program(self, config, mesh):
    state = TrainState(jnp.int32(0), {'a': jnp.zeros(2)}, {'b': jnp.zeros(2)})
    abstract = sharding.abstract_on(mesh, jax.eval_shape(lambda: state))
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    count = jax.jit(lambda s: TrainState(s.step + 1, {'a': s.params['a'] + 1}, s.opt_state))

    def step(state, frames, key):
      number = int(jax.device_get(state.step)) + 1
      self.events.append(f'step {number}')
      self.fed[number] = jax.device_get(frames)
      self.losses[number] = np.nan if number == self.bad else float(self.fed[number].mean()) / 64
      self.at.get(number, lambda: None)()
      done = lambda: self.events.append(f'waited for {number}')
      return count(state), Metrics(
        Number(self.losses[number], done), Number(number, lambda: None), Number(1, lambda: None)
      )

    self.step = step
    return train.Model(jax.jit(lambda key: state, out_shardings=places), step, abstract)

  def compiled_step(self, config, mesh, checkpoints):
    return memory.Fit(config, self.step, 0.0)


@pytest.fixture
def fakes(monkeypatch):
  fakes = Fakes()

  def not_caught(number, _):
    raise AssertionError(f'signal {number} is not caught')

  for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, not_caught)

  class Watchdog(watchdog.Watchdog):
    def __init__(self, seconds):
      assert seconds == CONFIG.step_stall_seconds

    def watch(self, what, *, is_slow=False, least=0):
      fakes.events.append(('watch', what, is_slow or least))

    def write_crashes_to(self, path):
      pass

    def close(self):
      fakes.events.append('closed: Watchdog')

  class SpiedLoader(Loader):
    def __init__(self, *functions, **options):
      fakes.feeds.append(options)
      super().__init__(*functions, **options)

    def __next__(self):
      fakes.asked = time.perf_counter()
      return super().__next__()

  for kind in (Loader, Report, Checkpoints):
    real = kind.close
    monkeypatch.setattr(
      kind,
      'close',
      lambda self, kind=kind, real=real: (
        fakes.events.append(f'closed: {kind.__name__}') or real(self)
      ),
    )
  real_arrived, real_compiled = Report.batch_arrived, Report.compiled

  def batch_arrived(self, asked):
    assert asked <= fakes.asked <= time.perf_counter()
    fakes.events.append('batch arrived')
    real_arrived(self, asked)

  def compiled(self, step):
    fakes.events.append(f'compiled: {step}')
    real_compiled(self, step)

  @contextlib.contextmanager
  def ending_together():
    fakes.events.append('ending together')
    yield types.SimpleNamespace(share=lambda workdir: fakes.events.append('failures are shared'))
    fakes.events.append('ending alone')

  monkeypatch.setattr(multihost, 'ending_together', ending_together)
  monkeypatch.setattr(Report, 'batch_arrived', batch_arrived)
  monkeypatch.setattr(Report, 'compiled', compiled)
  monkeypatch.setattr(train, 'Watchdog', Watchdog)
  monkeypatch.setattr(frame_pairs, 'Loader', SpiedLoader)
  monkeypatch.setattr(train, 'open_mixture', fakes.open_mixture)
  monkeypatch.setattr(train, 'build', fakes.build_program)
  monkeypatch.setattr(train, 'compiled_step', fakes.compiled_step)
  return fakes


def batches(steps):
  """The batches of the first steps, from the stream itself."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(frame_pairs, 'Loader', Loader)  # Not the one that is observed.
    stream = frame_pairs.pair_batches(
      NumberedVideos([10] * 25),
      CONFIG.data,
      image_size=16,
      batch_size=8,
      seed=derive_seeds(CONFIG.seed).data,
    )
  with contextlib.closing(stream):
    return [batch['frames'] for batch in itertools.islice(stream, steps)]


def assert_fed(fakes, steps):
  """Each step was fed its batch, and none another's."""
  expected = batches(max(steps))
  assert list(fakes.fed) == list(steps)
  for step in steps:
    np.testing.assert_array_equal(fakes.fed[step], expected[step - 1])


def assert_saved(workdir, steps):
  """The checkpoints are those of these steps; returns the last one's description."""
  saved = sorted(int(path.name) for path in (workdir / saved_weights.FOLDER).iterdir())
  assert saved == steps
  metadata = workdir / saved_weights.FOLDER / str(steps[-1]) / 'description' / 'metadata'
  return json.loads(metadata.read_text())


def log_of(workdir):
  return (workdir / 'log.txt').read_text()


def lines_of(workdir):
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [(row['step'], row['loss'], row['learning_rate']) for row in rows]


def test_every_step_gets_its_batch_its_limit_and_its_checkpoint(fakes, tmp_path):
  def implicit_transfer():
    with pytest.raises(Exception, match=r'[Dd]isallow'):
      jax.jit(lambda x: x + x)(np.ones(3))

  fakes.at[2] = implicit_transfer
  fakes.at[6] = lambda: logging.getLogger('dropmae_jax').warning('a warning of any module')
  workdir = tmp_path / 'new' / 'run'
  assert train.train(CONFIG, workdir) is True
  seen = list(fakes.events)
  assert_fed(fakes, range(1, 12))
  told = assert_saved(workdir, [4, 8, 11])
  expected = saved_weights.describe(
    CONFIG.model,
    CONFIG.objective,
    frame_gap=6,
    steps_per_epoch=3,
    data_fingerprint='abc',
    seed_version=SEED_VERSION,
    config=dataclasses.asdict(CONFIG),
  )
  assert {name: told[name] for name in expected} == json.loads(json.dumps(expected))
  rows = [(step, np.float32(fakes.losses[step]), step) for step in (3, 6, 9, 11)]
  assert lines_of(workdir) == rows
  log = log_of(workdir)
  for text in (
    ' 25 videos, 3 steps per epoch, 8 x cpu\n',
    '11 steps (3.667 epochs), ',
    'a warning of any module\n',
    f' dropmae-convert --checkpoint={workdir} --output=dropmae.pth\n',
  ):
    assert text in log
  written = config_file.load(str(workdir / 'config.json'))
  assert config_file.from_dict(written.to_dict()) == CONFIG
  (options,) = fakes.feeds
  assert (options['first_step'], options['stall_seconds']) == (0, 55)
  events = [('watch', 'opening the dataset', True), 'ending together']
  events += [('watch', 'reading config.init_from', True), 'failures are shared']
  events.append(('watch', 'restoring the state', True))
  events.append(('watch', 'compiling the training step', True))
  for step in range(1, 12):
    # At most two steps are under way: the one before the last is waited for.
    events += [('watch', 'loading a batch', 55 + 60), ('watch', f'step {step}', step == 1 or 0)]
    events += ['batch arrived', f'step {step}']
    events.append(f'waited for {max(step - 1, 1)}')
    if step == 1:
      events.append('compiled: 1')
    if step in (4, 8, 11):
      events.append(('watch', f'the checkpoint of step {step}', True))
  events += [('watch', 'closing the run', True), 'ending alone']
  events += [f'closed: {name}' for name in ('Loader', 'Report', 'Checkpoints', 'Watchdog')]
  assert seen == events


def stop_by(number):
  return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_checkpoints_costs_nothing(fakes, tmp_path, number):
  both = signal.SIGINT, signal.SIGTERM
  config = dataclasses.replace(
    CONFIG, checkpoint=dataclasses.replace(CONFIG.checkpoint, every_steps=5)
  )
  before = [signal.getsignal(each) for each in both]
  fakes.at[7] = stop_by(number)
  assert train.train(config, tmp_path) is False
  assert_fed(fakes, range(1, 8))
  assert_saved(tmp_path, [5, 7])
  name = number.name
  assert f'{name}: saved at step 7 of 11; the same command resumes from' in log_of(tmp_path)
  assert [signal.getsignal(each) for each in both] == before
  # The next start is stopped at its first step, and the last one too late.
  for at, fed, finished in ((8, range(8, 9), False), (11, range(9, 12), True)):
    fakes.at = {at: stop_by(number)}
    fakes.fed.clear()
    fakes.events.clear()
    assert train.train(config, tmp_path) is finished
    assert_fed(fakes, fed)
    assert f'compiled: {fed[0]}' in fakes.events
    assert f'resuming after step {fed[0] - 1} of 11\n' in log_of(tmp_path)
    assert fakes.feeds[-1]['first_step'] == fed[0] - 1
  assert_saved(tmp_path, [5, 7, 8, 10, 11])
  rows = [(step, np.float32(fakes.losses[step]), step) for step in (3, 6, 9, 11)]
  assert lines_of(tmp_path) == rows
  losses = np.float32([fakes.losses[step] for step in range(1, 12)]).astype(float)
  lines = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
  assert [row['loss_mean'] for row in lines] == [losses[i : i + 3].mean() for i in (0, 3, 6, 9)]


@pytest.mark.parametrize('steps', [0, 3])
def test_a_signal_while_a_batch_is_waited_for_saves_what_there_is(
  fakes, tmp_path, monkeypatch, steps
):
  monkeypatch.setattr(loader, 'POLL_SECONDS', 0.05)
  reads, released = itertools.count(), threading.Event()

  def before_frame():
    if next(reads) == steps * 2 * CONFIG.batch_size:
      while f'waited for {steps - 1}' not in fakes.events and steps:
        time.sleep(0.01)
      time.sleep(0.2)
      stop_by(signal.SIGTERM)()
      released.wait(30)

  fakes.videos.before_frame = before_frame
  # By two threads, frames of a batch may be read before the last ones of the batch before it.
  one_thread = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, num_threads=1))
  assert train.train(one_thread, tmp_path) is False
  released.set()
  assert_fed(fakes, range(1, steps + 1)) if steps else None
  saved = [path.name for path in (tmp_path / saved_weights.FOLDER).iterdir()]
  if steps:
    assert saved == ['3']
    assert 'SIGTERM: saved at step 3 of 11' in log_of(tmp_path)
  else:
    assert saved == []
    assert 'SIGTERM: no step was made; the same command starts again' in log_of(tmp_path)


@pytest.mark.parametrize(('bad', 'saved'), [(4, []), (5, ['4']), (11, ['4', '8'])])
def test_a_step_that_diverges_is_not_saved_and_its_batch_is_listed(fakes, tmp_path, bad, saved):
  """Found at the next line or checkpoint, and named by its own number."""
  fakes.bad = bad
  with pytest.raises(NonFiniteLoss, match=f'the loss of step {bad} is nan; .* are in ') as caught:
    train.train(CONFIG, tmp_path)
  assert caught.value.step == bad
  assert ('watch', 'listing the pairs of the batch', True) in fakes.events
  assert max(fakes.fed) == {4: 4, 5: 6, 11: 11}[bad]
  assert sorted(path.name for path in (tmp_path / saved_weights.FOLDER).iterdir()) == saved
  listed = json.loads((tmp_path / f'non_finite_batch_{bad}.json').read_text())
  assert (listed['seed'], listed['step']) == (5, bad)
  # A frame's pixels all say which one of which video it is.
  shown = [[40 * pair['video'] + n for n in pair['frame_numbers']] for pair in listed['pairs']]
  np.testing.assert_array_equal(fakes.fed[bad][:, :, 0, 0, 0], np.array(shown) % 256)
  key = jax.random.fold_in(derive_seeds(5).steps, bad - 1)
  assert listed['step_key'] == jax.random.key_data(key).tolist()
  assert f'the loss of step {bad} is nan' in log_of(tmp_path)


def test_the_pairs_of_a_mixture_are_listed_by_their_dataset():
  class Named(NumberedVideos):
    def __init__(self, name, number):
      super().__init__([10] * number)
      self.name = name

    def paths(self):
      return [f'{self.name}/{video}.mp4' for video in range(len(self))]

  weights = Fraction(1), Fraction(1)
  mixture = Mixture((Named('first', 3), Named('second', 9)), weights)
  seeds = {'data_seed': 3, 'step_key': jax.random.key(4)}
  pairs = non_finite_batch.describe_batch(CONFIG, mixture, step=2, **seeds)['pairs']
  assert len(pairs) == CONFIG.batch_size
  assert {pair['dataset'] for pair in pairs} == {0, 1}
  for pair in pairs:
    assert pair['path'] == f'{("first", "second")[pair["dataset"]]}/{pair["video"]}.mp4'


@pytest.mark.parametrize('bad', [None, 2])
def test_a_loader_that_does_not_end_hides_no_error(fakes, tmp_path, monkeypatch, bad):
  real = Loader.close

  def close(self):
    real(self)
    raise LoaderStalled('a thread of the loader did not end')

  monkeypatch.setattr(Loader, 'close', close)
  fakes.bad = bad
  with pytest.raises(NonFiniteLoss if bad else LoaderStalled):
    train.train(changed(CONFIG, {'num_steps': 2}), tmp_path)
  closed = [event for event in fakes.events if 'closed' in event]
  assert closed == [f'closed: {name}' for name in ('Loader', 'Report', 'Checkpoints', 'Watchdog')]


def test_after_a_signal_a_loader_that_does_not_end_does_not_change_the_status(
  fakes, tmp_path, monkeypatch
):
  real = Loader.close

  def close(self):
    real(self)
    raise LoaderStalled('a thread of the loader did not end')

  monkeypatch.setattr(Loader, 'close', close)
  fakes.at[2] = stop_by(signal.SIGTERM)
  assert train.train(CONFIG, tmp_path) is False
  assert_saved(tmp_path, [2])
  assert 'a thread of the loader did not end' in log_of(tmp_path)


@pytest.mark.parametrize('full_at', [4, 11])
@pytest.mark.parametrize('is_late', [False, True])
def test_a_checkpoint_that_cannot_be_written_is_told(
  fakes, tmp_path, monkeypatch, full_at, is_late
):
  """Whether it is known at once, or after it has been written in the background."""
  manager = run_checkpoints.ocp.CheckpointManager
  real, real_wait, written = manager.save, manager.wait_until_finished, []

  def save(self, step, **other):
    if step == full_at and not is_late:
      raise OSError('no space left')
    saved = real(self, step, **other)
    written.append(step)
    return saved

  def wait_until_finished(self):
    real_wait(self)
    if is_late and full_at in written:
      written.remove(full_at)
      shutil.rmtree(tmp_path / saved_weights.FOLDER / str(full_at))
      raise OSError('no space left')

  monkeypatch.setattr(manager, 'save', save)
  monkeypatch.setattr(manager, 'wait_until_finished', wait_until_finished)
  expected = pytest.raises(NotSaved, match=r'step 11 could not be saved .* resumes from step 8')
  with expected if full_at == 11 else contextlib.nullcontext():
    train.train(CONFIG, tmp_path)
  assert f'the checkpoint of step {full_at} could not be written (no space' in log_of(tmp_path)
  saved = sorted(int(path.name) for path in (tmp_path / saved_weights.FOLDER).iterdir())
  assert saved == [step for step in (4, 8, 11) if step != full_at]


CHANGES = {
  'batch_size': 16, 'seed': 3, 'data.frame_gap': 4, 'data.resize': 'exact',
  'data.shared_augmentation': False, 'objective.mask_ratio': 0.5,
}  # fmt: skip
MAY_CHANGE = {
  'data_dir': '/elsewhere', 'num_steps': 2, 'accumulation_steps': 2, 'dtype': 'float32',
  'log_every': 2, 'data.num_threads': 1, 'data.stall_seconds': 99.0,
  'optimizer.base_learning_rate': 0.01, 'checkpoint.every_steps': 7, 'mesh.fsdp': 2,
  'data.max_damaged_records': 3, 'remat': 'full', 'attention': 'xla', 'init_from': 'other',
}  # fmt: skip


def changed(config, fields):
  for name, value in fields.items():
    group, _, leaf = name.rpartition('.')
    part = dataclasses.replace(getattr(config, group) if group else config, **{leaf: value})
    config = dataclasses.replace(config, **{group: part}) if group else part
  return config


def value_of(config, name):
  for part in name.split('.'):
    config = getattr(config, part)
  return config


def test_a_run_does_not_go_on_as_another_one(fakes, tmp_path, monkeypatch):
  monkeypatch.setattr(fakes, 'open_mixture', lambda *_: mixture_of(fakes.videos))
  monkeypatch.setattr(train, 'open_mixture', fakes.open_mixture)
  begun = changed(CONFIG, {'num_steps': 1})
  assert train.train(begun, tmp_path)

  def written():
    files = [path for path in tmp_path.rglob('*') if path.is_file() and path.name != 'lock']
    return {path: path.read_bytes() for path in files}

  before = written()
  other = changed(begun, CHANGES)
  fakes.videos.fingerprint = 'def'
  with pytest.raises(UserError, match='holds another run') as refused:
    train.train(other, tmp_path)
  texts = [f'{n}: {value_of(begun, n)} -> {value}' for n, value in CHANGES.items()]
  texts.append('data_fingerprint: abc -> def')
  for text in texts:
    assert text in str(refused.value)
  assert str(refused.value).count(' -> ') == len(texts)
  assert written() == before
  assert train.train(other, tmp_path, allow_changes=True)
  for text in texts:
    assert f'changed since that checkpoint: {text}\n' in log_of(tmp_path)


def test_what_does_not_make_another_run_may_change(fakes, tmp_path, monkeypatch):
  monkeypatch.setattr(train, 'open_mixture', lambda *_: mixture_of(fakes.videos))
  begun = changed(CONFIG, {'num_steps': 1})
  assert train.train(begun, tmp_path)
  # No step is left, so that nothing of it has to work.
  assert train.train(changed(begun, MAY_CHANGE | {'num_steps': 1}), tmp_path)
  for name, value in MAY_CHANGE.items():
    if name != 'num_steps':
      text = f'changed since that checkpoint: {name}: {value_of(begun, name)} -> {value}\n'
      assert text in log_of(tmp_path)


# What the next start is given after eleven steps, or four, and what it says.
CONSEQUENCES = {
  'the end moves on': (
    11, {'num_steps': 22}, 'the learning rate of step 12 is 2.34e-06; with the config of that check'
  ),
  'another peak': (
    4, {'optimizer.base_learning_rate': 3e-4}, 'the learning rate of step 5 is 6.63e-06; with the'
  ),
  'warm-up alone': (
    4, {'optimizer.warmup_steps': 11}, 'warmup_steps=11 is not below config.num_steps=11, so the'
  ),
  'a start that is over': (4, {'init_from': 'other'}, 'config.init_from is not read, because '),
  'the same again': (11, {}, 'step 11 is done, so nothing is left to do for config.num_steps=11; '),
  'fewer steps': (11, {'num_steps': 6}, 'step 11 is done, so nothing is left to do for config.num'),
}  # fmt: skip


@pytest.mark.parametrize('case', CONSEQUENCES)
def test_what_follows_from_a_change_is_said(fakes, tmp_path, case):
  steps, changes, message = CONSEQUENCES[case]
  if steps < CONFIG.num_steps:
    fakes.at[steps] = stop_by(signal.SIGTERM)
  train.train(CONFIG, tmp_path)
  first = log_of(tmp_path)
  fakes.at.clear()
  fakes.feeds.clear()
  assert train.train(changed(CONFIG, changes), tmp_path)
  log = log_of(tmp_path).removeprefix(first)
  assert message in log
  other = 'learning rate' if 'learning' not in message else 'nothing is left'
  assert (other in log) == ('warm' in case)
  # Nothing is loaded where nothing is left to do.
  assert len(fakes.feeds) == ('nothing' not in message)


def test_warm_up_alone_is_said_at_the_start_and_a_usual_run_says_nothing(fakes, tmp_path):
  for warmup_steps in (10, 11):
    config = changed(CONFIG, {'num_steps': 11, 'optimizer.warmup_steps': warmup_steps})
    train.train(config, tmp_path / str(warmup_steps))
    log = log_of(tmp_path / str(warmup_steps))
    assert ('learning rate' in log) == (warmup_steps == 11)


def test_epochs_become_steps_and_the_log_says_how_many(fakes, tmp_path):
  for batch_size, line in (
    (8, '6 steps (2 epochs), the first 3 (1 epochs) of them warm-up\n'),
    (32, 'a batch of 32 pairs takes more than all 25 videos, so every step counts as one epoch\n'),
  ):
    config = Config(**(vars(CONFIG) | {'num_steps': 0, 'num_epochs': 2.0}))
    workdir = tmp_path / str(batch_size)
    assert train.train(
      changed(config, {'optimizer.warmup_epochs': 1.0, 'batch_size': batch_size}), workdir
    )
    assert line in log_of(workdir)
    assert lines_of(workdir)[-1][0] == (6 if batch_size == 8 else 2)


def test_epochs_before_a_change_count_as_they_were(fakes, tmp_path):
  """25 videos: three steps make an epoch, and one step of 16 pairs does."""
  for batch_size, steps, epochs in ((8, 4, 4 / 3), (16, 6, 4 / 3 + 2), (16, 7, 4 / 3 + 3)):
    fakes.at = {steps: stop_by(signal.SIGTERM)}
    train.train(changed(CONFIG, {'batch_size': batch_size}), tmp_path, allow_changes=True)
    folder = tmp_path / saved_weights.FOLDER / str(steps)
    described = json.loads((folder / 'description' / 'metadata').read_text())
    assert saved_weights.epochs(described, steps) == pytest.approx(epochs)
  assert saved_weights.epochs({'epoch': 4}, 9) == 5
  assert saved_weights.epochs({}, 9) is None


def too_large_for_this_machine():
  bytearray(2**60)


def too_large_for_a_device():
  jax.jit(lambda: jnp.zeros(2**50))()


@pytest.mark.parametrize(
  ('take', 'message'),
  [
    (
      too_large_for_this_machine,
      r'this machine has no memory left \(MemoryError\); lower config.batch_size',
    ),
    (
      too_large_for_a_device,
      r'a device has no memory left \(RESOURCE_EXHAUSTED: .*; the step alone needs 0.00 GB of it',
    ),
  ],
)
def test_a_shortage_of_memory_is_one_sentence(fakes, tmp_path, take, message):
  fakes.at[3] = take
  with pytest.raises(RunFailed, match=message) as ended:
    train.train(CONFIG, tmp_path)
  assert ended.value.exit_status == 1


def test_what_is_wrong_before_the_first_step_is_one_sentence(fakes, tmp_path):
  (tmp_path / 'file').touch()
  for config, workdir, message in (
    (
      changed(CONFIG, {'mesh.fsdp': 3}),
      tmp_path / 'new',
      r'config: mesh.data=0 and mesh.fsdp=3 do',
    ),
    (
      CONFIG,
      tmp_path / 'file' / 'run',
      r'--workdir=.*/file/run cannot be written \(Not a directory\); make room there',
    ),
  ):
    with pytest.raises(UserError, match=message):
      train.train(config, workdir)
    assert fakes.events[-1] == 'closed: Watchdog'
  assert sorted(path.name for path in tmp_path.iterdir()) == ['file']


def test_all_processes_must_mean_the_same_run(fakes, tmp_path, monkeypatch):
  """What is compared, once all have opened the dataset."""
  told = []
  monkeypatch.setattr(multihost, 'agree', told.append)
  monkeypatch.chdir(tmp_path)
  config = changed(CONFIG, {'num_steps': 1})
  train.train(config, tmp_path.relative_to(tmp_path) / 'run', allow_changes=True)
  facts = {
    'code version': multihost.code_version(),
    'config': repr(changed(config, {'data_dir': ''})),  # May lie elsewhere on each machine.
    '--workdir': str(tmp_path / 'run'),
    '--allow_changes': 'True',
  }
  assert told == [facts | {'dataset': 'abc'}, {'newest checkpoint in --workdir': 'None'}]
  told.clear()
  train.train(config, tmp_path / 'run')
  same = facts | {'--allow_changes': 'False'}
  assert told == [same | {'dataset': 'abc'}, {'newest checkpoint in --workdir': '1'}]
  told.clear()

  def none_there(*_):
    raise UserError('there is no such dataset')

  monkeypatch.setattr(train, 'open_mixture', none_there)
  with pytest.raises(UserError, match='there is no such dataset'):
    train.train(config, tmp_path / 'run')
  assert not told


def test_a_process_reads_its_share_of_every_batch(monkeypatch, caplog):
  monkeypatch.setattr(train.jax, 'process_index', lambda: 2)
  monkeypatch.setattr(train.jax, 'process_count', lambda: 4)
  asked = []

  def pair_batches(*arguments, **options):
    asked.append((arguments, options))
    return Loader.__new__(Loader)

  monkeypatch.setattr(frame_pairs, 'pair_batches', pair_batches)
  videos, mesh = mixture_of(Videos()), sharding.make_mesh()
  is_asked = lambda: False
  config = changed(CONFIG, {'data.max_damaged_records': 1})
  train.start_loader(config, videos, mesh, seed=13, first_step=6, is_interrupted=is_asked)
  ((arguments, options),) = asked
  damaged, move = options.pop('report_damaged'), options.pop('move')
  assert arguments == (videos, config.data)
  assert options == {
    'image_size': 16, 'batch_size': 8, 'seed': 13, 'first_step': 6, 'host': 2, 'num_hosts': 4,
    'is_interrupted': is_asked,
  }  # fmt: skip
  assert callable(move)
  damaged('first')
  assert 'first' in caplog.messages[0]
  with pytest.raises(UserError, match='max_damaged_records=1'):
    damaged('second')


@pytest.mark.parametrize(
  ('outcome', 'status'),
  [
    (True, 0),
    (False, os.EX_TEMPFAIL),
    (NonFiniteLoss('why', 3), 1),
    (NotSaved('why'), 1),
    (LoaderStalled('why'), os.EX_UNAVAILABLE),
    (UserError('why'), 2),
  ],
)
def test_the_exit_status_says_how_a_run_ended(tmp_path, monkeypatch, capsys, outcome, status):
  given = []

  def fake(config, workdir, *, allow_changes, profile_steps):
    given.append((config.num_steps, workdir, allow_changes, profile_steps))
    if isinstance(outcome, Exception):
      raise outcome
    return outcome

  command = ['--config=quickstart', f'--workdir={tmp_path}', '--allow_changes', '--distributed']
  command += [
    '--profile_steps=10:13',
    '--coordinator_address=a:1',
    '--num_processes=4',
    '--process_id=3',
  ]
  monkeypatch.setattr('sys.argv', ['dropmae-train', *command])
  logger = main.logging.get_absl_logger()
  monkeypatch.setattr(logger, 'filters', list(logger.filters))
  monkeypatch.setattr(main.logging, 'set_verbosity', lambda _: None)
  monkeypatch.setattr(multihost, 'join', lambda **options: given.append(options))
  monkeypatch.setattr(train, 'train', fake)
  with pytest.raises(SystemExit) as ended:
    cli.run(main.main)
  assert ended.value.code == status
  assert capsys.readouterr().err == ('error: why\n' if isinstance(outcome, Exception) else '')
  joined = {
    'distributed': True, 'coordinator_address': 'a:1', 'num_processes': 4,
    'process_id': 3, 'local_device_ids': None,
  }  # fmt: skip
  assert given == [joined, (2800, tmp_path, True, (10, 13))]


@pytest.mark.parametrize('status', [0, 75])
def test_a_process_that_is_lost_at_the_end_does_not_change_the_status(monkeypatch, status):
  def shutdown():
    raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED: Barrier timed out')

  def end(number):
    raise SystemExit(number)

  monkeypatch.setattr(main, 'Watchdog', lambda *_, **__: types.SimpleNamespace(watch=lambda _: 0))
  monkeypatch.setattr(jax.distributed, 'shutdown', shutdown)
  monkeypatch.setattr(os, '_exit', end)
  with pytest.raises(SystemExit) as ended:
    main._end(status)
  assert ended.value.code == status
