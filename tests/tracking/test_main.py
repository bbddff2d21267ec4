"""dropmae-tracker: from weights and sequences to boxes, pictures, scores and files for PyTorch."""

import json
import zipfile

import av
import numpy as np
import pytest
import recorded_tracker as recorded
import safetensors.numpy
import tracking_trees
from conftest import GOLDEN, assert_one_sentence

from dropmae_jax.data import synthetic_clips
from dropmae_jax.tracking import exchange, main
from dropmae_jax.tracking.sequences import benchmarks, result_files

FAST = ('--search_factor=3',)


@pytest.fixture(scope='module')
def tracker(tmp_path_factory):
  """A file of the tracker that is recorded, whose weights are random."""
  path = tmp_path_factory.mktemp('tracker') / 'tracker.safetensors'
  state = recorded.with_prefix(np.load(GOLDEN / 'tracker' / 'tracker_state.npz'), 'state/')
  weights = exchange.TrackerWeights(
    *exchange.from_torch(state, recorded.ARCHITECTURE), recorded.ARCHITECTURE, []
  )
  list(exchange.write(path, weights, verify=False))
  return path


@pytest.fixture
def run(run_here, tracker, tmp_path):
  """Tracks a data set; returns what was done and the folder."""

  def track(dataset, *more, output=tmp_path / 'out', checkpoint=tracker):
    root = tmp_path / dataset
    if not root.exists():
      tracking_trees.TREES[dataset](root)
    split = tracking_trees.SPLITS.get(dataset)
    split = [f'--split={split}'] if split else []
    given = f'--checkpoint={checkpoint}', f'--dataset={dataset}', f'--root={root}'
    done = run_here(main.main, 'run', *given, f'--output={output}', *split, *FAST, *more)
    return done, output

  return track


def boxes(dataset, output, root):
  sequences = benchmarks.open_sequences(dataset, root, tracking_trees.SPLITS.get(dataset))
  folder = output / 'results'
  return {each.name: result_files.read(dataset, folder, each)[0] for each in sequences}


def test_a_data_set_is_tracked_goes_on_and_is_scored(run, run_here, tmp_path):
  done, output = run('got10k')
  assert done.returncode == 0, done.stderr
  root = tmp_path / 'got10k'
  alone = boxes('got10k', output, root)
  assert {len(each) for each in alone.values()} == {tracking_trees.FRAMES}
  assert not (output / 'got10k.zip').exists()  # Of a test set only.
  assert 'frames/s' in (output / 'log.txt').read_text()

  # Side by side the boxes are the same.
  done, together = run('got10k', '--batch=3', output=tmp_path / 'together')
  assert done.returncode == 0, done.stderr
  for name, each in boxes('got10k', together, root).items():
    np.testing.assert_allclose(each, alone[name], atol=1)

  # What is finished is not tracked again.
  first, second = (result_files.paths('got10k', output / 'results', name)[0] for name in alone)
  content = second.read_text()
  second.unlink()
  first.write_text('1,2,3,4\n' * tracking_trees.FRAMES)
  done, _ = run('got10k')
  assert done.returncode == 0, done.stderr
  assert '1 of 2 sequences were finished before' in done.stdout
  assert first.read_text() == '1,2,3,4\n' * tracking_trees.FRAMES
  assert second.read_text() == content
  done, _ = run('got10k', '--keep_rate=1')
  assert_one_sentence(done, 'holds results with keep_rate = 0.7, not 1.0; give a new --output')

  results = f'--results={together / "results"}'
  arguments = results, '--dataset=got10k', f'--root={root}', '--split=val'
  others = '--others', str(output / 'results')
  done = run_here(main.main, 'score', *arguments, f'--output={tmp_path / "scores"}', *others)
  assert done.returncode == 0, done.stderr
  content = json.loads((tmp_path / 'scores' / 'scores.json').read_text())
  assert (content['tracker'], list(content['others'])) == ('together', ['out'])
  assert content['toolkit'] in done.stdout
  assert f'{content["summary"]["AO"]:.2f}' in done.stdout
  assert (tmp_path / 'scores' / 'success.png').is_file()


def test_a_frame_that_cannot_be_read_keeps_what_is_finished(run, tmp_path):
  names = tracking_trees.got10k(tmp_path / 'got10k', split='test')
  frame = tmp_path / 'got10k' / 'test' / names[1] / '00000003.jpg'
  whole = frame.read_bytes()
  frame.write_bytes(b'junk')
  done, output = run('got10k', '--split=test')
  assert_one_sentence(done, f'{frame}')
  boxes, _ = (result_files.paths('got10k', output / 'results', name)[0] for name in names)
  content, written = boxes.read_text(), boxes.stat().st_mtime_ns
  assert [path.name for path in (output / 'results').iterdir()] == names[:1]
  frame.write_bytes(whole)
  done, _ = run('got10k', '--split=test')
  assert done.returncode == 0, done.stderr
  assert '1 of 2 sequences were finished before' in done.stdout
  assert (boxes.read_text(), boxes.stat().st_mtime_ns) == (content, written)
  with zipfile.ZipFile(output / 'got10k.zip') as archive:
    files = set(archive.namelist())
  assert files == {f'{name}/{name}_{kind}.txt' for name in names for kind in ('001', 'time')}


@pytest.mark.parametrize('dataset', ['lasot', 'trackingnet', 'otb', 'folder'])
def test_results_are_in_the_layout_of_each_data_set(run, tmp_path, dataset):
  done, output = run(dataset)
  assert done.returncode == 0, done.stderr
  found = boxes(dataset, output, tmp_path / dataset)
  files = {path.stem for path in (output / 'results').glob('*.txt')}
  assert files == set(found)


def test_a_video_is_drawn_upon(run_here, tracker, tmp_path):
  options = synthetic_clips.ClipOptions(frames=6, height=48, width=64)
  frames, labels = synthetic_clips.make_clip(np.random.default_rng(0), 'drifting', options)
  video, output = tmp_path / 'in.mp4', tmp_path / 'out.mp4'
  synthetic_clips.write_mp4(video, frames, rate=12)
  rows, columns = np.nonzero(labels[0] == 1)
  box = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
  given = f'--checkpoint={tracker}', f'--video={video}', f'--output={output}'
  done = run_here(main.main, 'video', *given, f'--box={",".join(map(str, box))}', *FAST)
  assert done.returncode == 0, done.stderr
  assert '6 frames' in done.stdout
  with av.open(str(output)) as container:
    assert container.streams.video[0].average_rate == 12
    drawn = [frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)]
  assert [each.shape for each in drawn] == [frames[0].shape] * 6
  x, y, _, h = map(int, box)
  edge = drawn[0][y : y + h, x].astype(int)
  assert np.abs(edge - [255, 200, 0]).mean() < 60
  done = run_here(main.main, 'video', *given, '--box=200,10,5,5', *FAST)
  assert_one_sentence(done, '--box=200,10,5,5 is not in the 64 x 48 pixels of the video')
  done = run_here(main.main, 'video', *given, f'--box={",".join(map(str, box))}')
  assert_one_sentence(done, 'give --search_factor, such as 4')


def test_a_tracker_is_converted_and_comes_back(run_here, tracker, tmp_path):
  second = tmp_path / 'second.safetensors'
  given = f'--checkpoint={tracker}', f'--output={second}', '--no-verify'
  done = run_here(main.main, 'convert', *given)
  assert done.returncode == 0, done.stderr
  first, again = (safetensors.numpy.load_file(path) for path in (tracker, second))
  assert first.keys() == again.keys()
  assert all(np.array_equal(first[name], again[name]) for name in first)
  done = run_here(main.main, 'convert', *given, '--seed=1')
  assert_one_sentence(done, f'--seed does not go with {tracker}, which is a tracker; leave it out')
