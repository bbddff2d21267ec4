"""Weights that are read from a bucket, and files that are written to one, of a server in here."""

import hashlib
import json
import shutil
import tempfile
import types

import numpy as np
import pytest
import safetensors.numpy
from conftest import assert_one_sentence, needs_torch, run_python, train_arguments
from gcs_server import serving

from dropmae_jax import api
from dropmae_jax.pytorch import main as convert
from dropmae_jax.pytorch import weight_files
from dropmae_jax.runtime import atomic_file, paths
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking import main as tracker

pytest.importorskip('gcsfs', reason='gcsfs is not installed, which reads and writes buckets')

WEIGHTS = safetensors.numpy.save({'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3)})
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def bucket(monkeypatch):
  with serving() as server:
    for name, value in server.environment.items():
      monkeypatch.setenv(name, value)
    yield server


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
  """The folder of temporary files; in the end there is none in it."""
  folder = tmp_path / 'temporary'
  folder.mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(folder))
  yield folder
  assert not list(folder.iterdir())


def contents(bucket):
  return {name: content for name, (_, content) in bucket.objects.items()}


def put(name, content):
  paths.user_path(f'gs://bucket/{name}').write_bytes(content)


def write(path, content=b'new'):
  with atomic_file.staged(paths.user_path(path), num_bytes=len(content)) as partial:
    partial.write_bytes(content)
    atomic_file.write_card(partial, {})


def test_weights_are_fetched_once_and_checked(bucket):
  put('w.safetensors', WEIGHTS)
  path = paths.user_path('gs://bucket/w.safetensors')
  file = weight_files.read(path)
  assert bucket.downloads == ['w.safetensors']
  assert file.tensors['a.weight'].tolist() == [[0, 1, 2], [3, 4, 5]]
  put('w.safetensors.sha256', f'{DIGEST}  w.safetensors\n'.encode())
  assert weight_files.read(path).integrity == f'intact: its sha256 matches {path}.sha256'
  put('w.safetensors', WEIGHTS + b'more')
  with pytest.raises(UserError, match=f'^{path} does not match {path}.sha256; download'):
    weight_files.read(path)


@pytest.mark.parametrize(
  ('path', 'status', 'reason'),
  [
    ('gs://bucket/none.pth', None, 'there is no such bucket or object'),
    ('gs://none/w.pth', None, 'there is no such bucket or object'),
    ('gs://bucket/w.pth', 403, 'somebody does not have access'),
  ],
)
def test_what_cannot_be_read(bucket, run_here, path, status, reason):
  bucket.refuses = lambda *_: status
  done = run_here(convert.main, f'--list={path}')
  assert_one_sentence(done, f'{path} cannot be read (')
  assert reason in done.stderr


def test_there_must_be_room_for_a_copy(bucket, temporary, monkeypatch):
  put('w.safetensors', bytes(2_000_000))
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=1_000_000))
  with pytest.raises(
    UserError, match=r'needs 2 MB and 1 MB are free in .*; free some space, or set'
  ):
    weight_files.read(paths.user_path('gs://bucket/w.safetensors'))
  with pytest.raises(UserError, match=r'--output=gs://bucket/o.pth needs 2 MB .* or set TMPDIR to'):
    write('gs://bucket/o.pth', bytes(2_000_000))


def test_a_file_is_written_before_its_sha256(bucket):
  for content in (b'first', b'second'):
    write('gs://bucket/run/o.pth', content)
    written = contents(bucket)
    assert written['run/o.pth'] == content
    digest = hashlib.sha256(content).hexdigest()
    assert written['run/o.pth.sha256'] == f'{digest}  o.pth\n'.encode()
    assert json.loads(written['run/o.pth.json'])['sha256'] == digest
    assert len(written) == 3
    generations = [bucket.objects[f'run/o.pth{ending}'][0] for ending in ('', '.json', '.sha256')]
    assert generations == sorted(generations)


def test_a_failed_upload_leaves_what_was_there(bucket):
  write('gs://bucket/o.pth', b'first')
  # Those of parts of an upload that has begun.
  bucket.refuses = lambda method, _: 403 if bucket.uploads and method != 'DELETE' else None
  with pytest.raises(UserError, match=r'--output=gs://bucket/o.pth cannot be written \(Forbidden'):
    write('gs://bucket/o.pth', bytes(6_000_000))
  assert contents(bucket)['o.pth'] == b'first'
  assert 'o.pth.sha256' not in contents(bucket)


@pytest.mark.parametrize(
  ('path', 'status', 'reason'),
  [
    ('gs://none/o.pth', None, 'there is no such bucket or object'),
    ('gs://bucket/o.pth', 403, 'somebody does not have access'),
    ('gs://bucket', None, 'does not name a file; give the path of one'),
    ('gs://bucket/folder', None, 'is a folder; give the name of a file'),
    ('gs://bucket/other', None, 'other.json is not the card of a weight file'),
    ('gs://bucket/a\nb', None, 'has control characters'),
  ],
)
def test_what_cannot_be_written_is_refused_before(bucket, path, status, reason):
  put('folder/file', b'')
  put('other.json', b'{}')
  before = contents(bucket)
  bucket.refuses = lambda method, _: status if method == 'POST' else None
  with pytest.raises(UserError) as caught:
    atomic_file.check_file(paths.user_path(path))
  assert reason in str(caught.value)
  assert (contents(bucket), bucket.uploads) == (before, {})


def test_a_check_leaves_nothing(bucket):
  requests = []
  bucket.refuses = lambda *request: requests.append(request)
  atomic_file.check_file(paths.user_path('gs://bucket/o.pth'))
  atomic_file.check_folder(paths.user_path('gs://bucket/run'))
  assert ('POST', 'o.pth') in requests
  assert (bucket.objects, bucket.uploads) == ({}, {})


def test_a_folder_of_the_console_is_empty(bucket):
  folder = paths.user_path('gs://bucket/run')
  bucket.objects['run/'] = 1, b''
  atomic_file.check_folder(folder)
  put('run/file', b'')
  for path in (folder, folder / 'file'):
    with pytest.raises(UserError, match=f'--output={path} is not empty; give a new folder'):
      atomic_file.check_folder(path)


def succeed(run_here, main, *arguments):
  done = run_here(main, *arguments)
  assert done.returncode == 0, done.stderr
  return done.stdout


@needs_torch
@pytest.mark.slow
def test_conversions_from_and_to_a_bucket(bucket, run_here, trained, clips, data_dir, tmp_path):
  """The same bytes as those of a conversion on this machine; then everything that reads them."""
  for folder in (tmp_path, 'gs://bucket'):
    output = f'--output={folder}/o.pth'
    succeed(run_here, convert.main, f'--checkpoint={trained}', output, '--no-verify')
  stored = contents(bucket)
  for name in ('o.pth', 'o.pth.sha256', 'o.pth.json'):
    assert stored[name] == (tmp_path / name).read_bytes()
  weights = 'gs://bucket/o.pth'
  listed = succeed(run_here, convert.main, f'--list={weights}')
  assert listed == succeed(run_here, convert.main, f'--list={tmp_path}/o.pth')

  options = (f'--from_torch={weights}', '--no-verify')
  succeed(run_here, convert.main, *options, '--output=gs://bucket/imported')
  succeed(run_here, convert.main, '--compare', weights, 'gs://bucket/imported')
  done = run_here(convert.main, *options, '--output=gs://bucket/imported')
  assert_one_sentence(done, '--output=gs://bucket/imported is not empty; give a new folder')
  # Without its last object a checkpoint does not count.
  marker, generations = 'imported/checkpoints/8/commit_success.txt', {}
  for name in bucket.names('imported'):
    generations[name] = bucket.objects[name][0]
  assert max(generations, key=generations.get) == marker
  del bucket.objects[marker]
  done = run_here(convert.main, '--list=gs://bucket/imported')
  assert_one_sentence(done, 'gs://bucket/imported holds no checkpoint; give')

  more = ('--config.num_steps=1', f'--config.init_from={weights}')
  run = run_python(*train_arguments(data_dir, tmp_path / 'run', *more))
  assert run.returncode == 0, run.stderr
  assert f'init_from {weights}: ' in run.stdout
  assert 'initialised: ' not in run.stdout
  frame = np.zeros((32, 32, 3), np.uint8)
  expected = api.load_encoder(trained).encode(frame)
  np.testing.assert_array_equal(api.load_encoder(weights).encode(frame), expected)
  video, output = next(clips.glob('val/*/*.mp4')), '--output=gs://bucket/figure.png'
  drawn = run_python(
    '-m', 'dropmae_jax.evaluation.reconstruction', f'--checkpoint={trained}', f'--video={video}',
    output, '--frames', 0, 5,
  )  # fmt: skip
  assert drawn.returncode == 0, drawn.stderr
  assert contents(bucket)['figure.png'].startswith(b'\x89PNG')
  bucket.downloads.clear()
  options = (f'--checkpoint={weights}', '--search_size=64', '--no-verify')
  succeed(run_here, tracker.main, 'convert', *options, '--output=gs://bucket/tracker.safetensors')
  assert bucket.downloads.count('o.pth') == 1
  assert 'tracker.safetensors.sha256' in contents(bucket)
