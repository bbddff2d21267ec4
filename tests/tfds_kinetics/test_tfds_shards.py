"""The stored frames themselves: every option reaches their bytes, and nothing else does."""

import dataclasses
import math
import struct
import sys
import threading

import av
import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from av.video.reformatter import VideoReformatter
from conftest import run_python
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
from test_tfds_build import DATASET, command, write
from test_tfds_video import ROTATIONS, write_video

from tfds_kinetics import __main__ as command_line
from tfds_kinetics import build, workers
from tfds_kinetics.configs import COLLECTIONS
from tfds_kinetics.video import FrameOptions, UnusableVideo, read_jpegs

# No field has its default, and no two of them are equal.
OPTIONS = FrameOptions(
  short_side=40, jpeg_quality=61, frame_stride=3, max_frames=5, max_damage=0.2, time_limit=77.0
)
# Frames that can be decoded alone, in the order in which they are shown.
INTRA = {'g': '1', 'bf': '0', 'qp': '8'}


def flags(options):
  return [f'--{name}={value}' for name, value in dataclasses.asdict(options).items()]


def textured(height, width, count=20, seed=0):
  """Coloured noise, smooth enough for a codec and rough enough to tell resizes apart."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (count, height // 6, width // 6, 3), np.uint8)
  images = [
    Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC) for each in small
  ]
  return np.stack([np.asarray(image) for image in images])


def damage(path, packets):
  """Overwrites the middle of some packets, so that the decoder marks their frames as corrupt."""
  with av.open(str(path)) as container:
    places = [(packet.pos, packet.size) for packet in container.demux() if packet.size]
  with open(path, 'r+b') as file:
    for position, size in (places[packet] for packet in packets):
      file.seek(position + size // 2)
      file.write(bytes(60))
  return path


def turn(path, degrees):
  """Writes into the header of an mp4 that it is to be shown turned clockwise."""
  (a, b, c, d), _ = ROTATIONS[degrees]
  content = bytearray(path.read_bytes())
  matrix = content.index(b'tkhd') + 44
  struct.pack_into('>9i', content, matrix, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
  path.write_bytes(content)


def expected_jpegs(path, options, turned=None):
  """What is to be stored of a video: the same again, by the libraries alone."""
  jpegs = []
  with av.open(str(path)) as container:
    for number, frame in enumerate(container.decode(video=0)):
      if frame.is_corrupt or number % options.frame_stride:
        continue
      scale = min(1.0, options.short_side / min(frame.width, frame.height))
      width, height = round(frame.width * scale), round(frame.height * scale)
      scaled = VideoReformatter().reformat(frame, width, height, 'rgb24', interpolation='BICUBIC')
      image = Image.fromarray(scaled.to_ndarray())
      image = image if turned is None else image.transpose(turned)
      jpegs.append(
        simplejpeg.encode_jpeg(
          np.asarray(image), options.jpeg_quality, colorspace='RGB', colorsubsampling='420'
        )
      )
  return jpegs[: options.max_frames or None]


def stored(folder, split):
  """The JPEGs of each video of a split, by its path; checks the index against the records."""
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  source = tfds.builder_from_directory(folder).as_data_source(split, deserialize_method=raw)
  records = [tf_example_pb2.Example.FromString(source[number]) for number in range(len(source))]
  jpegs, place = {}, 0
  with np.load(folder / f'index-{split}.npz') as arrays:
    index = {name: arrays[name].tolist() for name in arrays}
  assert index['classes'] == sorted(set(index['classes']))
  rows = (index[name] for name in ('first', 'frames', 'path', 'label', 'youtube_id'))
  for first, frames, path, label, youtube_id in zip(*rows, strict=True):
    assert first == place
    assert path not in jpegs
    jpegs[path] = []
    for number, record in enumerate(records[first : first + frames]):
      values = {
        name: each.ListFields()[0][1].value for name, each in record.features.feature.items()
      }
      assert {name: list(each) for name, each in values.items() if name != 'jpeg'} == {
        'class_name': [index['classes'][label].encode()],
        'youtube_id': [youtube_id.encode()],
        'video': [path.encode()],
        'frame': [number],
      }
      jpegs[path] += values['jpeg']
    place += frames
  assert place == len(records)
  return jpegs


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
  """A tree of videos of which each is stored in another way."""
  root = tmp_path_factory.mktemp('frames') / 'videos'
  for folder in ('train/a', 'train/b', 'val/a', 'test/c'):
    (root / folder).mkdir(parents=True)
  write_video(root / 'train/a/wide.mp4', frames=textured(96, 132, seed=1), **INTRA)
  write_video(root / 'train/b/tall.mkv', 'ffv1', 'bgr0', textured(120, 66, seed=2))
  write_video(root / 'train/b/turned.mp4', frames=textured(66, 96, seed=3))
  turn(root / 'train/b/turned.mp4', 90)
  write_video(root / 'train/b/corrupt.mp4', frames=textured(96, 96, seed=4), **INTRA)
  damage(root / 'train/b/corrupt.mp4', [3, 9])
  write_video(root / 'train/b/worse.mp4', frames=textured(96, 96, 5, seed=5), **INTRA)
  damage(root / 'train/b/worse.mp4', [0, 2])
  write_video(root / 'val/a/small.avi', 'mjpeg', 'yuvj420p', textured(36, 54, seed=6))
  write_video(root / 'test/c/short.mov', frames=textured(60, 60, 4, seed=7))
  return root


TURNED = {'train/b/turned.mp4': Image.Transpose.ROTATE_270}
LEFT_OUT = {'train/b/worse.mp4'}


def assert_stored(folder, videos, options):
  """Every video is stored in its split as the options say."""
  paths = {path.relative_to(videos).as_posix() for path in videos.glob('*/*/*')} - LEFT_OUT
  for split in ('train', 'val', 'test'):
    jpegs_by_path = stored(folder, split)
    assert set(jpegs_by_path) == {path for path in paths if path.startswith(split)}
    for path, jpegs in jpegs_by_path.items():
      assert jpegs == expected_jpegs(videos / path, options, TURNED.get(path)), path


def test_every_option_reaches_the_frames(videos, tmp_path):
  """From the command line, through the plan and the process that reads, to the encoder."""
  defaults = dataclasses.asdict(FrameOptions())
  assert not set(dataclasses.asdict(OPTIONS).items()) & set(defaults.items())
  done = run_python(*command(videos, tmp_path, *flags(OPTIONS), '--workers=2'))
  assert done.returncode == 0, done.stderr
  assert_stored(tmp_path / DATASET, videos, OPTIONS)


def build_here(root, data_dir, options, collection='folder', **keywords):
  """Builds a dataset in this process; returns its folder."""

  def write_all(jobs, folder):
    return {job: write(job, folder) for job in jobs}

  planned = build.plan(COLLECTIONS[collection], root, data_dir, options, **keywords)
  return build.build(planned, write_all)


def run_here(monkeypatch, *arguments):
  """Runs the command line in this process, which keeps its own signals, limits and log."""
  monkeypatch.setattr(sys, 'argv', ['tfds_kinetics', *map(str, arguments)])
  monkeypatch.setattr(command_line.signal, 'signal', lambda *_: None)
  monkeypatch.setattr(command_line.resource, 'setrlimit', lambda *_: None)
  for name in ('setLevel', 'addHandler'):
    monkeypatch.setattr(command_line.log, name, lambda *_: None)
  monkeypatch.setattr(command_line.log, 'propagate', True)
  assert command_line.main() == 0


def test_frames_are_stored_whole_where_no_option_cuts_them(videos, tmp_path):
  """Each option at its end: all frames, all pixels, the best quality."""
  options = FrameOptions(short_side=4096, jpeg_quality=100, max_damage=0.2)
  assert_stored(build_here(videos, tmp_path, options), videos, options)


FILTERS = [
  getattr(Image.Resampling, name)
  for name in ('NEAREST', 'BOX', 'BILINEAR', 'HAMMING', 'BICUBIC', 'LANCZOS')
]


def test_frames_are_scaled_by_a_bicubic_filter(tmp_path):
  """PIL's is the nearest of its filters; frames of grey are scaled without their colour."""
  path = write_video(tmp_path / 'a.mkv', 'ffv1', 'gray', textured(96, 132, count=1))
  with av.open(path) as container:
    source = Image.fromarray(next(container.decode(video=0)).to_ndarray(format='rgb24'))
  (jpeg,) = read_jpegs(path, FrameOptions(short_side=40, jpeg_quality=100))
  image = simplejpeg.decode_jpeg(jpeg).astype(float)
  error = {
    kind: np.abs(image - np.asarray(source.resize((55, 40), kind))).mean() for kind in FILTERS
  }
  assert min(error, key=error.get) == Image.Resampling.BICUBIC, error
  assert simplejpeg.decode_jpeg_header(jpeg) == (40, 55, 'YCbCr', '420')


@pytest.mark.parametrize('how', ['a frame is corrupt', 'a packet fails'])
def test_damaged_frames_are_left_out_and_counted(tmp_path, how):
  path = tmp_path / 'a.mp4'
  write_video(path, frames=textured(96, 96, 10), **INTRA)
  whole = list(read_jpegs(str(path), FrameOptions()))
  if how == 'a frame is corrupt':
    damage(path, [3, 6])
  else:
    with av.open(str(path)) as container:
      places = [packet.pos for packet in container.demux() if packet.size]
    content = bytearray(path.read_bytes())
    for number in (3, 6):
      content[places[number] : places[number] + 40] = b'\xff' * 40
    path.write_bytes(content)
  kept = list(read_jpegs(str(path), FrameOptions(max_damage=2 / 10)))
  assert kept == [jpeg for number, jpeg in enumerate(whole) if number not in (3, 6)]
  for too_little in (0.0, math.nextafter(2 / 10, 0)):
    with pytest.raises(UnusableVideo, match=r'^2 of 10 packets are damaged .*--max_damage=0\.2 wo'):
      list(read_jpegs(str(path), FrameOptions(max_damage=too_little)))


def test_each_record_of_a_file_can_be_read_alone(data_dir):
  """As frames are read in random order."""
  for path in (data_dir / DATASET).glob('*.array_record*'):
    reader = ArrayRecordReader(str(path))
    assert 'group_size:1,' in reader.writer_options_string()
    reader.close()


class CountedProcess:
  """Stands for a process that writes shards; all that there are wait for one another."""

  made = 0

  def __init__(self, folder, stop):
    type(self).made += 1
    self.folder = folder

  def write(self, job):
    type(self).barrier.wait(timeout=10)
    return write(job, self.folder)

  def close(self):
    pass


@pytest.mark.parametrize('way', [[], ['--shard_range=0/1']])
def test_as_many_processes_write_as_were_asked_for(clips, tmp_path, monkeypatch, way):
  """There are nine shards, so three rounds for three processes."""
  monkeypatch.setattr(CountedProcess, 'barrier', threading.Barrier(3), raising=False)
  monkeypatch.setattr(CountedProcess, 'made', 0)
  monkeypatch.setattr(workers, 'ShardProcess', CountedProcess)
  run_here(monkeypatch, *command(clips, tmp_path, '--workers=3', *way)[2:])
  assert CountedProcess.made == 3
