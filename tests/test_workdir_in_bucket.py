"""A run whose workdir is in a bucket, of a server in this process."""

import json
import pathlib
import signal

import pytest
import safetensors.numpy
from conftest import assert_one_sentence, run_python, train_arguments
from gcs_server import serving
from processes import Processes, running
from test_commands import assert_same_weights, losses

pytest.importorskip('gcsfs', reason='gcsfs is not installed (the extra gcs)')
pytestmark = pytest.mark.slow

RUN = 'gs://bucket/run'
LAST = '--config.num_steps=8'
EVERY_SECOND = '--config.checkpoint.every_steps=2'


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """Makes this a new machine, which has nothing of a run."""

  def begin(name):
    (tmp_path / name).mkdir()
    monkeypatch.setenv('TMPDIR', str(tmp_path / name))

  begin('first')
  return begin


@pytest.fixture
def bucket(monkeypatch, machine):
  with serving() as server:
    for name, value in server.environment.items():
      monkeypatch.setenv(name, value)
    yield server


def copied(bucket, folder):
  """Copies the run to a folder, as one would by gcloud storage."""
  for name in bucket.names('run/'):
    path = pathlib.Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bucket.objects[name][1])
  return folder / 'run'


def assert_same_run(bucket, trained, tmp_path):
  workdir = copied(bucket, tmp_path / 'copy')
  assert losses(workdir) == losses(trained)
  assert_same_weights(workdir, trained)
  return workdir


def test_a_run_that_is_killed_while_it_saves_goes_on_elsewhere(
  bucket, machine, trained, data_dir, tmp_path
):
  arguments = train_arguments(data_dir, RUN, LAST, EVERY_SECOND)
  killed = []

  def refuses(method, name):
    if method == 'POST' and name == 'run/checkpoints/4/commit_success.txt' and not killed:
      process.kill()
      killed.append(process.wait())
      return 503
    return None

  bucket.refuses = refuses
  with running(*arguments) as process:
    process.wait(timeout=120)
  assert killed == [-signal.SIGKILL]
  assert 'run/checkpoints/4/params/manifest.ocdbt' in bucket.names()
  machine('second')
  done = run_python(*arguments)
  assert done.returncode == 0, done.stderr
  assert 'resuming after step 2 of 8' in done.stdout
  assert 'gs://bucket/run cannot be locked for other machines' in done.stdout
  workdir = assert_same_run(bucket, trained, tmp_path)
  assert 'step 2/8' in (workdir / 'log.txt').read_text()
  assert 'step 8/8' in (workdir / 'log.txt').read_text()
  for number, folder in enumerate((RUN, trained)):
    output = tmp_path / f'{number}.safetensors'
    done = run_python(
      '-m',
      'dropmae_jax.pytorch.main',
      f'--checkpoint={folder}',
      '--no-verify',
      f'--output={output}',
    )
    assert done.returncode == 0, done.stderr
  converted = [safetensors.numpy.load_file(tmp_path / f'{each}.safetensors') for each in (0, 1)]
  assert converted[0].keys() == converted[1].keys()
  assert all((converted[0][name] == converted[1][name]).all() for name in converted[0])


def test_a_bucket_that_refuses_for_a_while_does_not_end_a_run(bucket, trained, data_dir, tmp_path):
  """As on a disk that is full: no checkpoint, and the next one is written again."""

  def refuses(method, name):
    return 403 if method != 'GET' and name.startswith(('run/checkpoints/4', 'run/log')) else None

  bucket.refuses = refuses
  done = run_python(*train_arguments(data_dir, RUN, LAST, EVERY_SECOND))
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('the checkpoint of step 4 could not be written (') == 1
  assert done.stdout.count('log.txt, metrics.jsonl and the like cannot be copied') == 1
  assert 'run/checkpoints/4/commit_success.txt' not in bucket.names()
  bucket.refuses = lambda *_: None
  done = run_python(*train_arguments(data_dir, RUN, LAST, EVERY_SECOND))
  assert done.returncode == 0, done.stderr
  workdir = assert_same_run(bucket, trained, tmp_path)
  assert 'step 3/8' in (workdir / 'log.txt').read_text()


def test_a_damaged_checkpoint_is_set_aside_and_nothing_is_lost(bucket, trained, data_dir, tmp_path):
  arguments = train_arguments(data_dir, RUN, EVERY_SECOND)
  assert run_python(*arguments, '--config.num_steps=6').returncode == 0
  name = next(each for each in bucket.names('run/checkpoints/6/params/') if '/d/' in each)
  generation, content = bucket.objects[name]
  bucket.objects[name] = generation, content[: len(content) // 2]
  before = [each.removeprefix('run/checkpoints/6/') for each in bucket.names('run/checkpoints/6/')]
  done = run_python(*arguments, LAST, '--allow_changes')
  assert done.returncode == 0, done.stderr
  assert 'the checkpoint of step 6 is damaged (' in done.stdout
  assert 'resuming after step 4' in done.stdout
  assert 'it is set aside as gs://bucket/run/damaged/6-1' in done.stdout
  after = [each.removeprefix('run/damaged/6-1/') for each in bucket.names('run/damaged/')]
  assert after == sorted([*before, 'reason.txt'])


@pytest.mark.parametrize('part', ['params/_METADATA', 'params/ocdbt'])
def test_a_checkpoint_that_may_not_be_read_is_not_damaged(bucket, data_dir, part):
  arguments = train_arguments(data_dir, RUN, EVERY_SECOND)
  assert run_python(*arguments, '--config.num_steps=2').returncode == 0
  before = bucket.names('run/checkpoints')
  bucket.refuses = lambda _, name: 403 if name.startswith(f'run/checkpoints/2/{part}') else None
  done = run_python(*arguments, '--config.num_steps=4', '--allow_changes')
  assert done.returncode == 1, done.stderr
  assert 'the checkpoint cannot be read now (' in done.stderr
  assert bucket.names('run/checkpoints') == before


@pytest.mark.parametrize(
  ('workdir', 'status', 'message'),
  [
    ('gs://no-bucket/run', None, 'cannot be written (there is no such bucket or object); check'),
    (RUN, 403, 'somebody does not have access to run/'),
    ('s3://bucket/run', None, 'checkpoints can be written to gs:// and to folders only; give a'),
  ],
)
def test_a_bucket_that_cannot_be_used_is_one_sentence(bucket, data_dir, workdir, status, message):
  bucket.refuses = lambda method, _: status if method != 'GET' else None
  done = run_python(*train_arguments(data_dir, workdir, LAST))
  assert_one_sentence(done, message)
  assert f'{workdir}' in done.stderr
  assert not bucket.names()


def test_two_processes_write_one_run(bucket, data_dir, tmp_path):
  """Each has a machine of its own; of a failure they hear by the bucket."""
  arguments = train_arguments(data_dir, RUN, '--config.num_steps=4', EVERY_SECOND)
  for status, _, errors in Processes(arguments).ends():
    assert status == 0, errors
  rows = [json.loads(line) for line in bucket.objects['run/metrics.jsonl'][1].splitlines()]
  assert [row['step'] for row in rows] == [1, 2, 3, 4]
  assert 'run/checkpoints/4/commit_success.txt' in bucket.names()
  ended = Processes([*arguments, '--config.num_steps=6', '--config.seed=9']).ends()
  for status, _, errors in ended:
    assert status == 2
    assert 'holds another run (seed' in errors
