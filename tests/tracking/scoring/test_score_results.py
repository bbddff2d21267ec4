"""Scores of result files: from a data set on disk to numbers, a table and plots."""

import json

import numpy as np
import pytest
import tracking_trees as trees
from PIL import Image

from dropmae_jax.runtime.errors import UserError
from dropmae_jax.tracking.scoring import plots
from dropmae_jax.tracking.scoring.conventions import CONVENTIONS, DEFAULTS
from dropmae_jax.tracking.scoring.score import score, table
from dropmae_jax.tracking.sequences import result_files
from dropmae_jax.tracking.sequences.benchmarks import BENCHMARKS, open_sequences

SECONDS = np.full(trees.FRAMES, 0.02)


def track(benchmark, root, folder, move=0.0):
  """Writes results that are off by some pixels from frame 1 on."""
  for sequence in open_sequences(benchmark, root, trees.SPLITS.get(benchmark)):
    boxes = sequence.boxes + np.array([move, 0, 0, 0])
    result_files.write(benchmark, folder, sequence, boxes, SECONDS, whole_pixels=False)


@pytest.fixture
def tracked(tmp_path):
  """Returns root and results of perfect tracking."""

  def make(benchmark, move=0.0):
    root, results = tmp_path / 'data', tmp_path / 'mine'
    trees.TREES[benchmark](root)
    track(benchmark, root, results, move)
    return root, results

  return make


def refusal(*arguments, **options):
  with pytest.raises(UserError) as raised:
    score(*arguments, **options)
  message = str(raised.value)
  assert message.endswith('.') and '\n' not in message and '; ' in message, message
  return message


@pytest.mark.parametrize('benchmark', BENCHMARKS)
def test_perfect_results_of_every_benchmark(tracked, benchmark):
  root, results = tracked(benchmark)
  content = score(results, benchmark, root, split=trees.SPLITS.get(benchmark))
  assert json.loads(json.dumps(content)) == content
  assert content['tracker'] == 'mine'
  assert content['convention'].partition('-')[0] == DEFAULTS[benchmark]
  first, second = list(table(content))[:2]
  assert first == f'{content["toolkit"]}: {content["rules"]}'
  assert f'{benchmark}, {len(content["sequences"])} sequences' in second
  # By LaSOT's rules, two of five frames are hidden and fail; by LaSOText's, they are hits in
  # normalised precision.
  share = 60 if benchmark.startswith('lasot') else 100
  found = {
    key: content['summary'][key] for key in ('OP50', 'precision', 'SR0.50') if key in
    content['summary']
  }  # fmt: skip
  assert found
  assert found == pytest.approx(dict.fromkeys(found, share))
  normalised = content['summary'].get('norm_precision', 100)
  assert normalised == pytest.approx(60 if benchmark == 'lasot' else 100)


def test_numbers_by_hand(tracked):
  """Boxes of 12 to 14 by 9 pixels, moved by 3: IoU (w - 3) / (w + 3), from 9.5/15.5 to 11/17."""
  root, results = tracked('otb', move=3.0)
  content = score(results, 'otb', root)
  assert content['convention'] == 'ostrack'
  assert content['num_frames'] == 4 * trees.FRAMES
  summary = content['summary']
  assert summary['OP50'] == pytest.approx(100)
  assert summary['OP75'] == pytest.approx(20)  # The first frame only.
  # Thresholds 0 to 0.6 are passed by all; 0.65 to 0.95 by the first frame; 1 by none.
  assert summary['AUC'] == pytest.approx((13 * 100 + 7 * 20) / 21)
  widths = trees.boxes()[1:, 2]
  overlaps = [1, *((widths - 3) / (widths + 3))]
  per_sequence = content['sequences']['Subway']
  assert per_sequence['mean_overlap'] == pytest.approx(100 * np.mean(overlaps))
  # 3 pixels are more than 0.2 of the widths up to 14.
  assert summary['norm_precision'] == pytest.approx(20)
  assert summary['precision'] == pytest.approx(100)


def test_a_toolkit_can_be_chosen(tracked):
  root, results = tracked('otb', move=3.0)
  assert score(results, 'otb', root, 'got10k')['summary']['success_rate'] == pytest.approx(100)
  assert score(results, 'otb', root, 'trackingnet')['toolkit'].startswith('TrackingNet')
  assert score(results, 'otb', root, 'ostrack-uav')['convention'] == 'ostrack-uav'
  assert "'pysot' is unknown" in refusal(results, 'otb', root, 'pysot')


@pytest.mark.parametrize('toolkit', ['ostrack-lasot', 'got10k-got10k'])
def test_rules_that_need_labels_are_refused_without(tracked, toolkit):
  root, results = tracked('otb')
  assert "sequence 'Basketball'" in refusal(results, 'otb', root, toolkit)


def test_repetitions_are_pooled_as_by_the_toolkit(tracked):
  root, results = tracked('got10k')
  for sequence in open_sequences('got10k', root, 'val'):
    far = sequence.boxes + np.array([40, 0, 0, 0])
    trees.save_boxes(results / sequence.name / f'{sequence.name}_002.txt', far)
  content = score(results, 'got10k', root, split='val')
  assert content['summary']['SR0.50'] == pytest.approx(50)


def test_other_trackers_and_plots(tracked, tmp_path):
  root, results = tracked('lasot')
  track('lasot', root, tmp_path / 'theirs', move=6.0)
  plot_folder = tmp_path / 'figures' / 'new'
  content = score(results, 'lasot', root, others=(tmp_path / 'theirs',), plot_folder=plot_folder)
  assert json.loads(json.dumps(content)) == content
  assert content['others']['theirs']['summary']['AUC'] < content['summary']['AUC']
  assert [line.split()[0] for line in list(table(content))[3:]] == ['mine', 'theirs']
  names = ['success.png', 'precision.png', 'norm_precision.png']
  assert content['plots'] == [str(plot_folder / name) for name in names]
  for path in content['plots']:
    with Image.open(path) as image:
      assert image.format == 'PNG'
      assert image.size[0] >= 640
  (tmp_path / 'file').touch()
  assert 'file cannot be written' in refusal(results, 'lasot', root, plot_folder=tmp_path / 'file')


def test_curves_are_drawn_where_they_are():
  thresholds = np.linspace(0, 50, 51)
  lines = [plots.Line('a', np.full(51, 70.0), 70.0), plots.Line('b', np.full(51, 20.0), 20.0)]
  image = np.asarray(plots.draw('title', 'toolkit', 'label', thresholds, lines))
  middle = image[plots.TOP : plots.TOP + plots.HEIGHT, plots.LEFT + plots.WIDTH // 3]
  for line, colour in zip(lines, plots.COLOURS[:2], strict=True):
    wanted = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
    rows = np.flatnonzero((middle == wanted).all(axis=1))
    assert rows.size
    assert rows.mean() == pytest.approx((1 - line.number / 100) * plots.HEIGHT, abs=1.5)


def test_withheld_truth_cannot_be_scored(tmp_path):
  trees.got10k(tmp_path / 'got10k', 'test')
  assert '--split=val' in refusal(tmp_path, 'got10k', tmp_path / 'got10k')
  trees.trackingnet(tmp_path / 'trackingnet', is_withheld=True)
  assert '--split=TRAIN_0' in refusal(tmp_path, 'trackingnet', tmp_path / 'trackingnet')
  trees.folder(tmp_path / 'folder')
  trees.save_boxes(tmp_path / 'folder/yours/groundtruth.txt', trees.boxes(1))
  assert "'yours'" in refusal(tmp_path, 'folder', tmp_path / 'folder')


def test_wrong_results_are_refused(tracked, tmp_path):
  root, results = tracked('otb')
  assert "'Basketball' are missing" in refusal(root, 'otb', root)
  (results / 'Jogging.2.txt').unlink()
  assert "'Jogging.2'" in refusal(results, 'otb', root)
  (results / 'Basketball.txt').write_text('1,2,3,4\n')
  assert 'has 1 boxes' in refusal(results, 'otb', root)
  assert 'no folder' in refusal(tmp_path / 'none', 'otb', root)
  same = tmp_path / 'elsewhere' / 'mine'
  assert "both called 'mine'" in refusal(results, 'otb', root, others=(same,))


def test_a_sequence_without_a_frame_that_counts_is_refused(tracked):
  root, results = tracked('got10k')
  (root / 'val/GOT-10k_Val_000002/cover.label').write_text('8\n0\n0\n0\n0\n')
  message = refusal(results, 'got10k', root, split='val')
  assert "'GOT-10k_Val_000002' has no frame" in message


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
  """The GOT-10k toolkit, without its plots."""
  monkeypatch.setenv('MPLBACKEND', 'agg')
  monkeypatch.setenv('MPLCONFIGDIR', str(tmp_path))
  from got10k import datasets, experiments

  for each in (experiments.ExperimentGOT10k, experiments.ExperimentOTB):
    monkeypatch.setattr(each, 'plot_curves', lambda *_: None)
  # It asks for all 100 sequences, and would download those that are missing.
  names = {2015: ['Basketball', 'Jogging', 'Subway']}
  monkeypatch.setattr(datasets.OTB, '_OTB__version_dict', names)
  return experiments


@pytest.mark.parametrize('benchmark', ['got10k', 'otb'])
def test_the_toolkit_itself_reads_our_files(tracked, tmp_path, toolkit, benchmark):
  root = tracked(benchmark)[0]
  folder = {'got10k': 'GOT-10k', 'otb': 'OTB2015'}[benchmark]
  track(benchmark, root, tmp_path / folder / 'ours', move=3.0)
  folders = {'result_dir': str(tmp_path), 'report_dir': str(tmp_path / 'reports')}
  if benchmark == 'got10k':
    experiment = toolkit.ExperimentGOT10k(str(root), 'val', **folders)
  else:
    experiment = toolkit.ExperimentOTB(str(root), 2015, **folders)
  theirs = experiment.report(['ours'])['ours']
  content = score(
    tmp_path / folder / 'ours', benchmark, root, 'got10k', split=trees.SPLITS.get(benchmark)
  )
  names = {
    'got10k': {'ao': 'AO', 'sr': 'SR0.50', 'speed_fps': None},
    'otb': {'success_score': 'success', 'precision_score': 'precision', 'speed_fps': None},
  }[benchmark]
  assert theirs['seq_wise'].keys() == content['sequences'].keys()
  for their_name, name in names.items():
    expected = 50 if name is None else content['summary'][name] / 100
    assert theirs['overall'][their_name] == pytest.approx(expected, rel=1e-9)


def test_every_default_exists():
  assert DEFAULTS.keys() == BENCHMARKS.keys()
  assert set(DEFAULTS.values()) <= CONVENTIONS.keys()
