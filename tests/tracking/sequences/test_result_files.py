"""Files of results: layouts, reading back, archives; read by a toolkit's own loader too."""

import dataclasses
import zipfile

import numpy as np
import pytest
import tracking_trees as trees

from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking.sequences import result_files
from dropmae_jax.tracking.sequences.benchmarks import BENCHMARKS, open_sequences

BOXES = np.array([[10, 8, 12, 9], [-0.75, 7.999, 12.25, 9.5], [-3.2, 4, 0.9, 0], [1, 2, 3, 4],
                  [1000.0004, 2, 3, 4]])  # fmt: skip
SECONDS = np.array([0.5, 0.01, 0.01, 0.01, 0.0100004])


@pytest.fixture
def opened(tmp_path):
  """Returns the first sequence of a tree."""

  def first(benchmark):
    trees.TREES[benchmark](tmp_path / 'data')
    return open_sequences(benchmark, tmp_path / 'data', trees.SPLITS.get(benchmark))[0]

  return first


def refusal(function, *arguments):
  with pytest.raises(UserError) as raised:
    function(*arguments)
  message = str(raised.value)
  assert message.endswith('.') and '\n' not in message and '; ' in message, message
  return message


@pytest.mark.parametrize('benchmark', BENCHMARKS)
def test_results_come_back(opened, tmp_path, benchmark):
  sequence, folder = opened(benchmark), tmp_path / 'results'
  assert not result_files.is_written(benchmark, folder, sequence)
  result_files.write(benchmark, folder, sequence, BOXES, SECONDS, whole_pixels=False)
  assert result_files.is_written(benchmark, folder, sequence)
  (found,) = result_files.read(benchmark, folder, sequence)
  np.testing.assert_allclose(found, BOXES, atol=5e-4 + 1e-12)


def test_the_published_tracker_cuts_boxes_towards_zero(opened, tmp_path):
  result_files.write('otb', tmp_path, opened('otb'), BOXES, SECONDS)
  text = (tmp_path / 'Basketball.txt').read_text()
  assert text == '10,8,12,9\n0,7,12,9\n-3,4,0,0\n1,2,3,4\n1000,2,3,4\n'


def test_the_layouts(opened, tmp_path):
  for benchmark in ('got10k', 'trackingnet'):
    folder = tmp_path / benchmark
    result_files.write(benchmark, folder, opened(benchmark), BOXES, SECONDS, whole_pixels=False)
    files = {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}
    if benchmark == 'got10k':
      name = 'GOT-10k_Val_000001'
      assert files == {f'{name}/{name}_001.txt', f'{name}/{name}_time.txt'}
      assert (folder / name / f'{name}_001.txt').read_text().splitlines()[1] == (
        '-0.750,7.999,12.250,9.500'
      )
      times = (folder / name / f'{name}_time.txt').read_text()
      assert times.splitlines()[-1] == '0.01000040'
    else:
      assert files == {'-LqClgHw3Ys_0.txt', 'times/-LqClgHw3Ys_0_time.txt'}


def test_a_failure_leaves_no_boxes(opened, tmp_path):
  """So that the sequence is tracked again."""
  sequence = opened('otb')
  (tmp_path / 'times').write_text('in the way')
  message = refusal(result_files.write, 'otb', tmp_path, sequence, BOXES, SECONDS)
  assert 'times' in message
  assert not result_files.is_written('otb', tmp_path, sequence)


def test_results_of_other_trackers(opened, tmp_path):
  """Tabs, other names for one of several targets, and repetitions."""
  sequence = opened('otb')
  trees.save_boxes(tmp_path / 'Jogging_2.txt', BOXES, '\t')
  renamed = dataclasses.replace(sequence, name='Jogging.2', aliases=('Jogging_2', 'Jogging-2'))
  (found,) = result_files.read('otb', tmp_path, renamed)
  np.testing.assert_allclose(found, BOXES, rtol=1e-5)

  sequence = opened('got10k')
  for number in (1, 2, 3):
    trees.save_boxes(
      tmp_path / sequence.name / f'{sequence.name}_{number:03d}.txt',
      BOXES + np.array([number, 0, 0, 0]),
    )
  trees.save_boxes(tmp_path / sequence.name / f'{sequence.name}_time.txt', np.ones((5, 3)))
  runs = result_files.read('got10k', tmp_path, sequence)
  assert [run[0, 0] for run in runs] == [11, 12, 13]
  trees.save_boxes(tmp_path / 'flat' / f'{sequence.name}.txt', BOXES, '\t')
  assert len(result_files.read('got10k', tmp_path / 'flat', sequence)) == 1


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('1,2,3,4\n' * 4, 'has 4 boxes'),
    ('1,2,3,4\n' * 6, 'has 6 boxes'),
    ('1,2,3,4\n' * 4 + '1,2,3,nan\n', '1,2,3,nan for frame 5'),
    ('1,2,3,4\n1,2,-3,4\n' + '1,2,3,4\n' * 3, '1,2,-3,4 for frame 2'),
    ('1,2,3,4\n' * 4 + 'lost\n', "'lost' in line 5"),
    ('', 'holds no box'),
  ],
)
def test_damaged_results_are_refused(opened, tmp_path, text, expected):
  (tmp_path / 'Basketball.txt').write_text(text)
  assert expected in refusal(result_files.read, 'otb', tmp_path, opened('otb'))


def test_results_of_lasot_may_go_on_after_the_truth(opened, tmp_path):
  (tmp_path / 'airplane-1.txt').write_text('1,2,3,4\n' * 6)
  (found,) = result_files.read('lasot', tmp_path, opened('lasot'))
  assert len(found) == trees.FRAMES


def test_missing_results_name_the_sequence(opened, tmp_path):
  trees.save_boxes(tmp_path / 'Other.txt', BOXES)
  assert "'Basketball'" in refusal(result_files.read, 'otb', tmp_path, opened('otb'))
  assert 'no folder' in refusal(result_files.read, 'otb', tmp_path / 'none', opened('otb'))


@pytest.mark.parametrize('benchmark', ['got10k', 'trackingnet'])
def test_archives(tmp_path, benchmark):
  if benchmark == 'got10k':
    names = trees.got10k(tmp_path / 'data', 'test', ['GOT-10k_Test_000001', 'GOT-10k_Test_000002'])
    files = {f'{name}/{name}_{end}.txt' for name in names for end in ('001', 'time')}
  else:
    names = trees.trackingnet(tmp_path / 'data', is_withheld=True)
    files = {f'{name}.txt' for name in names}
  sequences = open_sequences(benchmark, tmp_path / 'data')
  folder, archive = tmp_path / 'results', tmp_path / 'submission.zip'
  result_files.write(benchmark, folder, sequences[0], BOXES, SECONDS)
  message = refusal(result_files.make_archive, benchmark, folder, sequences, archive)
  assert names[1] in message
  assert not archive.exists()
  result_files.write(benchmark, folder, sequences[1], BOXES, SECONDS)
  result_files.make_archive(benchmark, folder, sequences, archive)
  with zipfile.ZipFile(archive) as written:
    assert set(written.namelist()) == files
    for name in files:
      assert written.read(name) == (folder / name).read_bytes()


def test_an_archive_without_a_server_or_times_is_refused(opened, tmp_path):
  message = refusal(result_files.make_archive, 'otb', tmp_path, [], tmp_path / 'a.zip')
  assert 'no server for otb' in message
  sequence = opened('got10k')
  result_files.write('got10k', tmp_path, sequence, BOXES, SECONDS)
  (tmp_path / sequence.name / f'{sequence.name}_time.txt').unlink()
  message = refusal(result_files.make_archive, 'got10k', tmp_path, [sequence], tmp_path / 'a.zip')
  assert f'{sequence.name}_time.txt does not exist' in message
