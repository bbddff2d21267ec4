"""The benchmarks of the loader run, and measure what they say. No speed is tested."""

import json

import av
import numpy as np
import pytest
from conftest import run_python

from benchmarks import baselines, input_pipeline
from dropmae_jax.data.synthetic_clips import ClipOptions, make_clip
from dropmae_jax.runtime import cli


@pytest.fixture(scope='module')
def moving():
  """Frames that differ from one another everywhere."""
  options = ClipOptions(frames=30, height=64, width=80)
  return make_clip(np.random.default_rng(0), 'drifting', options)[0]


def write_with_keyframes(path, frames, every):
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('libx264', rate=25)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt, stream.options = 'yuv420p', {'qp': '18', 'g': str(every), 'bf': '2'}
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, 'rgb24')))
    container.mux(stream.encode())


def nearest(image, frames):
  return int(np.square(frames.astype(float) - image).mean(axis=(1, 2, 3)).argmin())


@pytest.mark.parametrize('every', [250, 7])
def test_a_baseline_decodes_the_frames_asked_for(tmp_path, moving, every):
  path = tmp_path / 'clip.mp4'
  write_with_keyframes(path, moving, every)
  for earlier in range(0, 29, 3):
    for later in (earlier + 1, min(29, earlier + 9)):
      opened = baselines.PyAvReader(path)
      assert nearest(opened.read(earlier), moving) == earlier
      assert nearest(opened.read(later), moving) == later
  assert nearest(baselines.PyAvReader(path).read(99), moving) == 29


def test_pyav_decodes_from_the_keyframe_before_and_goes_on(tmp_path, moving):
  path = tmp_path / 'clip.mp4'
  write_with_keyframes(path, moving, 7)
  reader, decoded = baselines.PyAvReader(path), []
  decode = reader.decode
  reader.decode = lambda: (decoded.append(frame) or frame for frame in decode())
  reader.read(17)
  assert decoded[0].key_frame
  assert len(decoded) == 4  # Frames 14 to 17.
  reader.read(19)
  assert len(decoded) == 6


def test_a_file_is_opened_once_per_pair(monkeypatch):
  opened = []

  class Numbers:
    def __init__(self, path):
      opened.append(path)

    def read(self, number):
      return np.full((16, 16, 3), number, np.uint8)

  monkeypatch.setattr(baselines, 'PyAvReader', Numbers)
  videos = baselines.FileVideos(('a',), [9])
  for numbers in ((3, 5), (6, 8)):
    assert [videos.frame(0, number)[0, 0, 0] for number in numbers] == list(numbers)
  assert opened == ['a', 'a']


def test_the_input_pipeline_is_measured_from_end_to_end(clips, tmp_path):
  command = ['-m', 'benchmarks.input_pipeline', f'--videos={clips}', '--rescale']
  command += [f'--scratch={tmp_path / "scratch"}', f'--json={tmp_path / "out.json"}']
  done = run_python(*command, '--repeats=1', '--pairs=8', '--threads=1,2')
  assert done.returncode == 0, done.stderr
  assert 'broken.mp4 is left out' in done.stdout
  result = json.loads((tmp_path / 'out.json').read_text())
  assert result['clips']['clips'] == 6
  assert result['clips']['frames'] == 48
  assert result['clips']['sizes'] == ['342x256']
  assert result['machine']['cores'] > 0
  assert result['machine']['libraries']['numpy'] == np.__version__
  ways = {(row['source'], row['resize'], row['threads']) for row in result['rates']}
  expected = {('dataset', resize, threads) for resize in ('fast', 'exact') for threads in (1, 2)}
  expected |= {(name, 'fast', threads) for name in ('python', 'pyav') for threads in (1, 2)}
  assert ways == expected
  for row in result['rates']:
    assert 0 < row['per_host']['min'] <= row['per_host']['median'] <= row['per_host']['max']
    assert row['per_core']['min'] > 0
  assert {row['over'] for row in result['speedups']} == {'pyav'}


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ('', 'there are no clips; give --videos=FOLDER or --generated=500'),
    ('--videos={tmp}', 'is not a folder with videos'),
    ('--videos={tmp} --generated=3', 'are two sources of clips'),
    ('--generated=0', '--generated=0 is too small'),
    ('--videos={clips} --repeats=0', '--repeats=0 is too small'),
    ('--videos={clips} --threads=0', '--threads=0 is not a list of numbers'),
    ('--videos={clips} --json={tmp}/none/out.json', 'does not exist; make it first'),
    ('--videos={clips} --json={tmp}', 'is a folder; give the name of a file'),
    ('--videos={clips} --scratch=README.md', 'is not a folder; give another name'),
  ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, clips, flags, message):
  arguments = flags.format(tmp=tmp_path, clips=clips).split()
  monkeypatch.setattr('sys.argv', ['input_pipeline', *arguments])
  with pytest.raises(SystemExit) as ended:
    cli.run(input_pipeline.main)
  assert ended.value.code == 2
  errors = capsys.readouterr().err.splitlines()
  assert len(errors) == 1
  assert errors[0].startswith('error: ')
  assert message in errors[0]
