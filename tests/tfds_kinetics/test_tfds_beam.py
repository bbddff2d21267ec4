"""Apache Beam writes the shards: with a small stand-in for it here, and with Beam where it is."""

import importlib
import pickle
import sys
import types

import pytest
from conftest import run_python
from test_tfds_build import DATASET, command, contents, write
from test_tfds_shards import build_here, flags, run_here

import tfds_kinetics
from tfds_kinetics import build, shards, workers
from tfds_kinetics.configs import COLLECTIONS
from tfds_kinetics.messages import BadInput, ProgramError
from tfds_kinetics.video import FrameOptions, MachineFault


class DoFn:
  """What the builder's function is one of."""


class Step:
  """A transform: a function from elements to elements, to be run when the pipeline is left."""

  def __init__(self, run):
    self.run = run


class Pipeline:
  """Runs its steps one after the other, on exit, through pickles, as a cluster would."""

  def __init__(self, options):
    self.options, self.steps = options, []

  def __enter__(self):
    return self

  def __or__(self, step):
    self.steps.append(step)
    return self

  def __exit__(self, kind, *_):
    elements = []
    for step in self.steps if kind is None else ():
      elements = step.run(elements)


def stand_in(life):
  """A module with the names of apache_beam that the builder uses."""

  def create(elements):
    return Step(lambda _: list(elements))

  def reshuffle():
    return Step(lambda elements: elements[::-1])

  def par_do(function):
    def run(elements):
      remote = pickle.loads(pickle.dumps(function))
      results = []
      remote.setup()
      life.append('setup')
      try:
        for element in pickle.loads(pickle.dumps(elements)):
          results += remote.process(element)
          life.append(element.name)
      finally:
        remote.teardown()
        life.append('teardown')
      return results

    return Step(run)

  class PipelineOptions:
    def __init__(self, flags, runner, save_main_session):
      self.all = {'flags': flags, 'runner': runner, 'save_main_session': save_main_session}

    def get_all_options(self):
      return self.all

  module = types.ModuleType('apache_beam')
  module.DoFn, module.Pipeline = DoFn, Pipeline
  module.Create, module.Reshuffle, module.ParDo = create, reshuffle, par_do
  options = types.ModuleType('apache_beam.options.pipeline_options')
  options.PipelineOptions = PipelineOptions
  return {'apache_beam': module, 'apache_beam.options.pipeline_options': options}


@pytest.fixture
def life():
  """What the stand-in's workers did."""
  return []


@pytest.fixture
def beam(monkeypatch, life):
  """The builder's module, on the stand-in."""
  for name, module in stand_in(life).items():
    monkeypatch.setitem(sys.modules, name, module)
  sys.modules.pop('tfds_kinetics.beam', None)
  yield importlib.import_module('tfds_kinetics.beam')
  del sys.modules['tfds_kinetics.beam'], tfds_kinetics.beam


@pytest.fixture
def planned(clips, tmp_path):
  return build.plan(COLLECTIONS['folder'], clips, tmp_path, FrameOptions())


def test_a_runner_writes_what_one_machine_does(clips, tmp_path, beam, planned, life, monkeypatch):
  """From the command line: its options reach the frames, and the runner's reach the runner."""
  runners, real = [], beam.write_shards

  def write_shards(jobs, folder, options):
    runners.append(options.all)
    return real(jobs, folder, options)

  monkeypatch.setattr(beam, 'write_shards', write_shards)
  options = FrameOptions(short_side=32, jpeg_quality=50, frame_stride=2, max_frames=3)
  runner = ['--beam_runner=FlinkRunner', "--beam_options=--parallelism=2 --image='a b'"]
  run_here(monkeypatch, *command(clips, tmp_path, *flags(options), *runner)[2:])
  (told,) = runners
  assert told['flags'] == ['--parallelism=2', '--image=a b']
  assert told['runner'] == 'FlinkRunner'
  expected = build_here(clips, tmp_path / 'here', options)
  assert contents(tmp_path / DATASET) == contents(expected)
  assert life == ['setup', *(job.name for job in planned.jobs[::-1]), 'teardown']


def test_it_goes_on_where_another_stopped_and_removes_what_that_left(tmp_path, beam, planned, life):
  write(planned.jobs[0], tmp_path)
  leftover = tmp_path / f'{planned.jobs[1].name}-0.0123456789abcdef.partial'
  leftover.write_bytes(b'x')
  options = beam.runner_options('DirectRunner', '')
  tables = beam.write_shards(list(planned.jobs[:3]), tmp_path, options)
  assert life == ['setup', planned.jobs[2].name, planned.jobs[1].name, 'teardown']
  assert tables == {job: shards.finished_table(job, tmp_path) for job in planned.jobs[:3]}
  assert not leftover.exists()


@pytest.mark.parametrize(
  ('error', 'reason'),
  [
    (MachineFault('a.mp4: Too many open files'), 'a.mp4: Too many open files'),
    (workers.KilledAgain('killed again and again'), 'killed again and again'),
    (shards.SourceChanged('a.mp4 is gone now'), 'a.mp4 is gone now'),
    (RuntimeError('\nno such worker\nTraceback ...'), 'no such worker'),
    (ValueError('unknown runner'), 'unknown runner'),
  ],
)
def test_what_stops_a_runner_is_one_sentence(
  tmp_path, beam, planned, life, monkeypatch, error, reason
):
  def failing(*_):
    raise error

  monkeypatch.setattr(beam.ShardProcess, 'write', failing)
  with pytest.raises(BadInput) as caught:
    beam.write_shards(list(planned.jobs), tmp_path, beam.runner_options('DirectRunner', ''))
  assert str(caught.value) == (
    f'--beam_runner=DirectRunner ended early ({reason}); what is finished is kept, and the same'
    ' command resumes from there.'
  )
  assert life == ['setup', 'teardown']


@pytest.mark.parametrize(
  'error',
  [
    ProgramError('TypeError: planted'),
    RuntimeError('Traceback ...\ntfds_kinetics.messages.ProgramError: TypeError: planted'),
  ],
)
def test_a_mistake_in_a_program_is_no_bad_input(tmp_path, beam, planned, monkeypatch, error):
  def failing(*_):
    raise error

  monkeypatch.setattr(beam.ShardProcess, 'write', failing)
  with pytest.raises(type(error), match='TypeError: planted'):
    beam.write_shards(list(planned.jobs), tmp_path, beam.runner_options('DirectRunner', ''))


def test_workers_that_write_elsewhere_are_noticed(tmp_path, beam, planned, monkeypatch):
  monkeypatch.setattr(beam.ShardProcess, 'write', lambda *_: None)
  with pytest.raises(BadInput, match=r'9 shards are not in .* must see the same paths'):
    beam.write_shards(list(planned.jobs), tmp_path, beam.runner_options('DirectRunner', ''))


def test_flags_of_which_a_quote_is_not_closed(beam):
  with pytest.raises(BadInput, match=r'--beam_options=--image="x has no closing quotation; close'):
    beam.runner_options('DirectRunner', '--image="x')


def test_beam_itself_writes_what_one_machine_does(data_dir, clips, tmp_path):
  pytest.importorskip('apache_beam', reason='Apache Beam is an extra that is not installed here')
  done = run_python(*command(clips, tmp_path, '--beam_runner=DirectRunner'))
  assert done.returncode == 0, done.stderr
  assert contents(tmp_path / DATASET) == contents(data_dir / DATASET)
