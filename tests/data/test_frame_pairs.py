"""The distribution of frame pairs, and a stream that depends only on (seed, step)."""

import contextlib
import hashlib
import itertools
from fractions import Fraction

import cv2
import grain
import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, run_python
from sources import DamagedVideos, NumberedVideos, PictureVideos

from dropmae_jax.config import DataOptions
from dropmae_jax.data import augment, frame_pairs, pair_stream
from dropmae_jax.data.mixture import Mixture
from dropmae_jax.data.video_source import DamagedRecord, open_dataset
from dropmae_jax.runtime.errors import UserError

OPTIONS = DataOptions(frame_gap=4, num_threads=1)


def batches(videos, count, *, options=OPTIONS, **keywords):
  keywords = {'image_size': 16, 'batch_size': 4, 'seed': 7} | keywords
  stream = frame_pairs.pair_batches(videos, options, **keywords)
  with contextlib.closing(stream):
    return [{k: v.copy() for k, v in next(stream).items()} for _ in range(count)]


def column(drawn, name):
  return np.concatenate([batch[name] for batch in drawn])


def assert_same(first, second):
  assert len(first) == len(second)
  for one, other in zip(first, second, strict=True):
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
  ('num_frames', 'gap'),
  [(1, 5), (2, 2), (2, 50), (3, 2), (3, 5), (5, 5), (6, 5), (30, 5), (250, 50)],
)
def test_pairs_follow_the_published_distribution(num_frames, gap):
  rng = np.random.default_rng(0)
  draws = 20_000
  drawn = [frame_pairs.sample_pair(rng.random, num_frames, gap) for _ in range(draws)]
  if num_frames == 1:
    assert set(drawn) == {(0, 0)}
    return
  expected = {}
  for start in range(num_frames - 1):
    ends = range(start + 1, min(num_frames, start + gap))
    expected |= {(start, end): 1 / (num_frames - 1) / len(ends) for end in ends}
  assert sum(expected.values()) == pytest.approx(1)
  pairs, counts = np.unique(np.array(drawn), axis=0, return_counts=True)
  counts = {tuple(map(int, pair)): count for pair, count in zip(pairs, counts, strict=True)}
  assert set(counts) <= set(expected)
  if len(expected) > 1 and len(expected) < 2000:
    observed = [counts.get(pair, 0) for pair in expected]
    expected_counts = np.array(list(expected.values())) * draws
    assert scipy.stats.chisquare(observed, expected_counts).pvalue > 1e-4
  if (num_frames, gap) == (250, 50):
    gaps = np.array([end - start for start, end in drawn])
    assert gaps.max() == 49
    assert gaps.mean() == pytest.approx(22.7, abs=0.4)


def test_an_epoch_visits_every_video_once_and_epochs_differ():
  videos = NumberedVideos([10] * 8)
  order = np.concatenate([batch['video'] for batch in batches(videos, 6)]).reshape(3, 8)
  for epoch in order:
    assert sorted(epoch) == list(range(8))
  assert len({tuple(epoch) for epoch in order}) == 3


def test_pairs_of_a_video_differ_between_epochs():
  drawn = batches(NumberedVideos([30]), 10, batch_size=1)
  assert len({tuple(batch['frame_numbers'][0]) for batch in drawn}) > 5


def test_only_the_two_frames_of_a_pair_are_read():
  videos = NumberedVideos([9, 9, 9, 9])
  maker = frame_pairs.PairMaker(videos, DataOptions(frame_gap=4), 16)
  for position in range(8):
    drawn = maker.draw(pair_stream.PairKeys(videos, 7)[position])
    assert videos.reads == [(drawn.video, number) for number in drawn.frame_numbers]
    videos.reads.clear()
    for image, number in zip(drawn.images, drawn.frame_numbers, strict=True):
      assert image.dtype == np.uint8
      assert (image == 40 * drawn.video + number).all()


def test_the_seed_changes_everything():
  many, one = NumberedVideos([30] * 8), PictureVideos([1])
  first, second = batches(many, 2), batches(many, 2, seed=8)
  for name in ('video', 'frame_numbers'):
    assert (column(first, name) != column(second, name)).any(), name
  # With one video of one frame only the crops are random.
  assert (column(batches(one, 2), 'frames') != column(batches(one, 2, seed=8), 'frames')).any()


@pytest.mark.parametrize('step', range(8))
def test_a_stream_resumes_at_any_step(step):
  """Six videos in batches of four: epochs end within batches and between them."""
  videos = NumberedVideos([10] * 6)
  assert_same(batches(videos, 8)[step:], batches(videos, 8 - step, first_step=step))


# Prints a digest of every pair of three batches, two epochs of the six videos; once for each group
# of host, number of hosts and threads.
HOST = """
import contextlib, hashlib, sys
from dropmae_jax.config import DataOptions
from dropmae_jax.data import frame_pairs, video_source
for group in sys.argv[2:]:
  host, num_hosts, num_threads = map(int, group.split(','))
  dataset = video_source.open_dataset(sys.argv[1], 'kinetics_frames/folder')
  options = DataOptions(frame_gap=4, num_threads=num_threads)
  stream = frame_pairs.pair_batches(dataset, options, image_size=16, batch_size=4, seed=7,
                                    host=host, num_hosts=num_hosts)
  with contextlib.closing(stream):
    for batch in [next(stream) for _ in range(3)]:
      pairs = zip(batch['frames'], batch['video'], batch['frame_numbers'], strict=True)
      print(*(hashlib.sha256(b''.join(a.tobytes() for a in pair)).hexdigest() for pair in pairs))
"""


def test_two_epochs_are_the_same_on_any_threads_and_hosts(data_dir):
  def digests(*groups):
    done = run_python('-c', HOST, data_dir, *groups)
    assert done.returncode == 0, done.stderr
    batches_of = [line.split() for line in done.stdout.splitlines()]
    return [batches_of[start : start + 3] for start in range(0, len(batches_of), 3)]

  (whole,) = digests('0,1,1')
  assert [len(batch) for batch in whole] == [4, 4, 4]
  assert len({pair for batch in whole for pair in batch}) == 12
  threads, *halves = digests('0,1,3', '0,2,1', '1,2,2')  # In another process, too.
  assert threads == whole
  assert [first + second for first, second in zip(*halves, strict=True)] == whole


def test_pairs_follow_the_distribution_through_the_whole_pipeline():
  """Clips of 1, 2, 3, gap and gap + 1 frames, against an independent implementation."""
  gap, lengths, epochs = 5, [1, 2, 3, 5, 6], 1000
  videos = NumberedVideos(lengths)
  options = DataOptions(frame_gap=gap, num_threads=2)
  drawn = batches(videos, epochs // 10, options=options, batch_size=50, image_size=2)
  video, pairs = column(drawn, 'video'), column(drawn, 'frame_numbers')
  for number, length in enumerate(lengths):
    pairs_of_video = pairs[video == number]
    assert len(pairs_of_video) == epochs
    observed = np.zeros((length, length))
    np.add.at(observed, tuple(pairs_of_video.T), 1)
    expected = np.zeros((length, length))
    for start in range(length - 1):
      ends = [end for end in range(length) if 0 < end - start < gap]
      expected[start, ends] = epochs / (length - 1) / len(ends)
    if length == 1:
      expected[0, 0] = epochs
    possible = expected > 0
    assert not observed[~possible].any()
    if possible.sum() > 1:
      assert scipy.stats.chisquare(observed[possible], expected[possible]).pvalue > 1e-4


def test_the_stream_is_the_recorded_one():
  """A run that was started with this stream must resume with the same pairs."""
  drawn = batches(NumberedVideos([1, 2, 3, 10, 30, 300]), 12, options=DataOptions(num_threads=1))
  content = b''.join(b['video'].tobytes() + b['frame_numbers'].tobytes() for b in drawn)
  assert hashlib.sha256(content).hexdigest() == (
    'f92cde411296cdc462b27304fe52ff8de7557bc59c18a68e1b11ccbdacd0810f'
  )


def test_hosts_share_the_global_batch():
  videos = NumberedVideos([10] * 6)
  whole = batches(videos, 3)
  shares = [batches(videos, 3, host=host, num_hosts=2) for host in range(2)]
  for step, batch in enumerate(whole):
    for name, array in batch.items():
      both = np.concatenate([share[step][name] for share in shares])
      np.testing.assert_array_equal(array, both)


@pytest.mark.parametrize('num_threads', [1, 3])
def test_large_batches_are_the_plain_stream(num_threads):
  videos, size = NumberedVideos([10] * 50), 96
  options = DataOptions(frame_gap=4, num_threads=num_threads)
  keys, maker = pair_stream.PairKeys(videos, 7), frame_pairs.PairMaker(videos, options, 16)
  shares = [
    batches(videos, 3, options=options, batch_size=size, first_step=2, host=host, num_hosts=2)
    for host in range(2)
  ]
  frames = np.empty((2, 16, 16, 3), np.uint8)
  for number in range(3 * size):
    step, row = divmod(number, size)
    host, row = divmod(row, size // 2)
    drawn = maker.draw(keys[2 * size + number])
    maker.crop(drawn, frames)
    batch = shares[host][step]
    np.testing.assert_array_equal(batch['frames'][row], frames)
    assert batch['video'][row] == drawn.video
    assert tuple(batch['frame_numbers'][row]) == drawn.frame_numbers


def test_every_batch_has_memory_of_its_own():
  stream = frame_pairs.pair_batches(
    NumberedVideos([10] * 24), OPTIONS, image_size=16, batch_size=32, seed=7
  )
  with contextlib.closing(stream):
    drawn = [next(stream)['frames'] for _ in range(8)]
  for one, other in itertools.combinations(drawn, 2):
    assert not np.shares_memory(one, other)


def test_hosts_that_do_not_divide_the_batch_are_refused():
  with pytest.raises(ValueError, match=r'batch_size=5 is not divisible by num_hosts=2; .*size=6'):
    batches(NumberedVideos([10]), 1, batch_size=5, num_hosts=2)


def test_threads_do_not_change_the_stream(data_dir):
  videos = open_dataset(str(data_dir), 'kinetics_frames/folder')
  plain = batches(videos, 4)
  assert_same(plain, batches(videos, 4, options=DataOptions(frame_gap=4, num_threads=2)))


MIXTURE = Mixture(
  (NumberedVideos([10] * 4), NumberedVideos([20] * 6), NumberedVideos([1] * 3)),
  (Fraction(3), Fraction('0.5'), Fraction('0.5')),
)


def test_a_mixture_keeps_its_proportions_everywhere():
  """At every position each dataset is within one pair of its exact share."""
  drawn = column(batches(MIXTURE, 60), 'dataset')
  assert drawn.dtype == np.int32
  for number, share in enumerate((0.75, 0.125, 0.125)):
    counts = np.cumsum(drawn == number)
    assert np.abs(counts - share * np.arange(1, 241)).max() <= 1
    assert counts[-1] == share * 240


def test_every_dataset_of_a_mixture_has_its_own_epochs():
  drawn = batches(MIXTURE, 60)
  dataset, video = column(drawn, 'dataset'), column(drawn, 'video')
  for number, source in enumerate(MIXTURE.datasets):
    videos = video[dataset == number]
    epochs = videos[: len(videos) // len(source) * len(source)].reshape(-1, len(source))
    assert (np.sort(epochs, axis=1) == np.arange(len(source))).all()
    assert len({tuple(epoch) for epoch in epochs}) > 3
  pairs = column(drawn, 'frame_numbers')
  assert pairs[dataset == 1].max() > 9
  assert (pairs[dataset == 2] == 0).all()


def test_a_mixture_does_not_give_equal_datasets_the_same_order_and_pairs():
  twin = NumberedVideos([50] * 40)
  drawn = batches(Mixture((twin, twin), (Fraction(1), Fraction(1))), 20)
  dataset, video = column(drawn, 'dataset'), column(drawn, 'video')
  assert (video[dataset == 0] != video[dataset == 1]).mean() > 0.5


def test_a_mixture_of_one_is_the_dataset_itself():
  videos = NumberedVideos([10] * 6)
  assert_same(batches(videos, 4), batches(Mixture((videos,), (Fraction(7),)), 4))


def test_a_mixture_resumes_at_any_step_on_any_hosts_and_workers():
  plain = batches(MIXTURE, 9)
  for step in (1, 4, 7):
    assert_same(plain[step:], batches(MIXTURE, 9 - step, first_step=step))
  shares = [batches(MIXTURE, 9, host=host, num_hosts=2) for host in range(2)]
  for name in plain[0]:
    both = np.concatenate([column(share, name).reshape(9, 2, -1) for share in shares], axis=1)
    np.testing.assert_array_equal(column(plain, name).reshape(9, 4, -1), both)
  assert_same(plain, batches(MIXTURE, 9, options=DataOptions(frame_gap=4, num_threads=3)))


def test_a_damaged_record_changes_its_own_pairs_and_no_others():
  damaged = {(2, 3), (5, 0), (5, 1)}
  whole, messages = batches(NumberedVideos([6] * 8), 30), []
  drawn = batches(DamagedVideos([6] * 8, damaged), 30, report_damaged=messages.append)
  wanted = zip(column(whole, 'video'), column(whole, 'frame_numbers'), strict=True)
  hit = np.array([any((v, n) in damaged for n in numbers) for v, numbers in wanted])
  assert hit.sum() > 10
  for name in whole[0]:
    np.testing.assert_array_equal(column(whole, name)[~hit], column(drawn, name)[~hit])
  read = zip(column(drawn, 'video'), column(drawn, 'frame_numbers'), strict=True)
  assert not any((v, n) in damaged for v, numbers in read for n in numbers)
  # Another video is taken instead, not the same one each time.
  assert len(set(column(drawn, 'video')[hit])) > 3
  assert set(messages) == {f'video {v} frame {n} is damaged.' for v, n in damaged}
  assert len(messages) >= hit.sum()


@pytest.mark.parametrize(('num_threads', 'first_step'), [(1, 7), (2, 0)])
def test_what_replaces_a_damaged_record_is_a_function_of_the_seed(num_threads, first_step):
  damaged = {(2, 3), (5, 0), (5, 1)}
  videos, messages = DamagedVideos([6] * 8, damaged), set()
  options = DataOptions(frame_gap=4, num_threads=num_threads)
  again = batches(
    videos, 30 - first_step, options=options, first_step=first_step, report_damaged=messages.add
  )
  assert_same(batches(videos, 30)[first_step:], again)
  assert messages == {f'video {v} frame {n} is damaged.' for v, n in damaged}


def test_too_many_damaged_records_of_one_pair_end_the_search():
  videos = DamagedVideos([6] * 8, {(v, n) for v in range(8) for n in range(6)})
  with pytest.raises(DamagedRecord, match=r'It is damaged record 11 of this start, and config'):
    batches(videos, 1)
  options = DataOptions(num_threads=1, max_damaged_records=0)
  with pytest.raises(DamagedRecord, match=r'It is damaged record 1 of .*max_damaged_records=0'):
    batches(videos, 1, options=options)


def test_a_pair_may_meet_the_same_damaged_record_again():
  """Of three records two are damaged, so many pairs meet one of them several times in a row."""
  options = DataOptions(num_threads=1, max_damaged_records=2)
  drawn = batches(DamagedVideos([1] * 3, {(0, 0), (1, 0)}), 20, options=options)
  assert set(column(drawn, 'video')) == {2}
  with pytest.raises(DamagedRecord, match=r'^video 0 frame 0 is damaged\. All of the 100 '):
    batches(DamagedVideos([1], {(0, 0)}), 1)


class DrawUniforms(grain.transforms.RandomMap):
  """Marks what is drawn with the number of the dataset."""

  def __init__(self, dataset):
    self._dataset = dataset

  def random_map(self, element, rng):
    return self._dataset, rng.random(pair_stream.PAIR_DRAWS)


@pytest.mark.parametrize('seed', [0, 2**40 + 1])
def test_pairs_are_those_that_grain_draws(seed):
  """Runs of earlier versions drew them with grain 0.2."""
  second = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])
  streams = [
    grain.MapDataset.range(10**12).seed(own).random_map(DrawUniforms(number))
    for number, own in enumerate((seed, second))
  ]
  videos = NumberedVideos([9] * 4)
  weights = Fraction(1, 3), Fraction(2)
  mixed = grain.MapDataset.mix(streams, weights)
  for keys, recorded in (
    (pair_stream.PairKeys(videos, seed), streams[0]),
    (pair_stream.PairKeys(Mixture((videos, videos), weights), seed), mixed),
  ):
    for position in (0, 1, 7, 10**6, 3 * 10**9):
      dataset, uniforms = recorded[position]
      assert keys[position].dataset == dataset
      np.testing.assert_array_equal(keys[position].uniforms, uniforms)


def test_the_stream_is_longer_than_any_run():
  class Many(NumberedVideos):
    def __len__(self):
      return 650_000

    def num_frames(self, video):
      return 300

  huge = Mixture((Many([]), Many([])), (Fraction(1, 1000), Fraction(1)))
  keys = pair_stream.PairKeys(huge, 7)
  first, second = keys[10**12 + 7], keys[10**12 + 7]
  assert first.video == second.video
  np.testing.assert_array_equal(first.uniforms, second.uniforms)
  batch = batches(huge, 1, first_step=10**11)[0]
  assert batch['frames'].shape == (4, 2, 16, 16, 3)


def test_shared_augmentation_crops_both_frames_alike(monkeypatch):
  boxes = []
  real = augment.crop_and_resize
  monkeypatch.setattr(
    augment,
    'crop_and_resize',
    lambda f, box, *a, **k: (boxes.append(box), real(f, box, *a, **k))[1],
  )
  videos = NumberedVideos([9] * 4)
  shared = DataOptions(frame_gap=4, num_threads=1, shared_augmentation=True)
  batches(videos, 2, options=shared)
  assert all(first == second for first, second in zip(boxes[::2], boxes[1::2], strict=True))
  boxes.clear()
  batches(videos, 2)
  assert any(first != second for first, second in zip(boxes[::2], boxes[1::2], strict=True))


class Growing(NumberedVideos):
  """All frames are the same picture, all but the first one in another shape."""

  def frame(self, video, number):
    rows, columns = np.mgrid[:120, :160]
    picture = np.stack([2 * rows, columns, rows], axis=-1).astype(np.uint8)
    return picture if number == 0 else cv2.resize(picture, (90, 160))


def test_each_frame_is_cropped_within_its_own_size():
  videos = Growing([2] * 20)
  keys = pair_stream.PairKeys(videos, 0)
  maker = frame_pairs.PairMaker(videos, DataOptions(num_threads=1), 32)
  boxes = np.array([maker.draw(keys[number]).boxes for number in range(20)])
  ends = boxes[..., :2] + boxes[..., 2:]
  assert (ends <= [[120, 160], [160, 90]]).all()
  assert (ends[:, 0, 1] > 90).any()
  assert (ends[:, 1, 0] > 120).any()


def test_shared_augmentation_crops_the_same_place_of_frames_of_different_sizes():
  options = DataOptions(frame_gap=4, num_threads=1, shared_augmentation=True)
  (drawn,) = batches(Growing([2] * 20), 1, options=options, batch_size=20, image_size=32)
  earlier, later = drawn['frames'].astype(int).swapaxes(0, 1)
  assert np.abs(earlier - later).max() <= 6


def test_the_resize_is_that_of_the_options(data_dir):
  videos = open_dataset(str(data_dir), 'kinetics_frames/folder')
  fast = batches(videos, 1)[0]['frames'].astype(int)
  exact_options = DataOptions(frame_gap=4, num_threads=1, resize='exact')
  exact = batches(videos, 1, options=exact_options)[0]['frames'].astype(int)
  difference = np.abs(fast - exact)
  assert 0 < difference.mean() < 8


def test_real_clips_where_they_exist():
  folder = ROOT.parent / 'shared' / 'videos' / 'train'
  if not folder.is_dir():
    pytest.skip('the real clips are not part of the project; this machine does not have them')
  from tfds_kinetics.video import FrameOptions, UnusableVideo, read_jpegs

  counts = {}
  for path in sorted(folder.glob('*/*')):
    try:
      counts[path.name] = len(list(read_jpegs(str(path), FrameOptions())))
    except UnusableVideo as reason:
      counts[path.name] = str(reason)
  assert counts.pop('corrupted.mp4').endswith('would take it')
  assert counts == {
    'demo.mp4': 280,
    'flipping_a_pancake.mkv': 310,
    'h265_10bits.mp4': 30,
    'nasa_13013.mp4': 325,
    'test.avi': 164,
    'test.mp4': 300,
    'bag.avi': 196,
  }


def test_opencv_adds_no_threads_to_the_loaders():
  before = cv2.getNumThreads()
  cv2.setNumThreads(2)
  batches(NumberedVideos([10] * 4), 1)
  assert cv2.getNumThreads() == 1
  cv2.setNumThreads(before)


class Returns(NumberedVideos):
  """Returns other frames than it should."""

  def __init__(self, lengths, convert):
    super().__init__(lengths)
    self.convert = convert

  def frame(self, video, number):
    return self.convert(super().frame(video, number))


@pytest.mark.parametrize(
  ('convert', 'returned'),
  [
    (lambda frame: (frame / 255).astype(np.float32), r'float32 \[20, 30, 3\]'),
    (lambda frame: frame[..., 0], r'uint8 \[20, 30\]'),
    (lambda frame: frame[..., :1], r'uint8 \[20, 30, 1\]'),
    (lambda frame: np.moveaxis(frame, 2, 0), r'uint8 \[3, 20, 30\]'),
    (lambda frame: np.concatenate([frame, frame[..., :1]], axis=2), r'uint8 \[20, 30, 4\]'),
    (lambda frame: frame[:0], r'uint8 \[0, 30, 3\]'),
  ],
)
def test_frames_that_are_no_rgb_are_refused(convert, returned):
  """OpenCV would leave some of them out without a word."""
  stream = frame_pairs.pair_batches(
    Returns([6] * 4, convert), DataOptions(num_threads=1), image_size=16, batch_size=2, seed=0
  )
  with (
    contextlib.closing(stream),
    pytest.raises(
      UserError, match=f'of config.dataset is {returned}; its class must return uint8 '
    ),
  ):
    next(stream)


def test_a_video_without_frames_is_refused():
  stream = frame_pairs.pair_batches(
    NumberedVideos([0] * 4), DataOptions(num_threads=1), image_size=16, batch_size=2, seed=0
  )
  with contextlib.closing(stream), pytest.raises(UserError, match='has num_frames=0; give 1 or mo'):
    next(stream)
