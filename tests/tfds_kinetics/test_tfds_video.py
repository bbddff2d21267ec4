"""Every kind of video that comes along: containers, codecs, odd headers, odd files."""

import errno
import itertools
import os
import socketserver
import struct
import threading

import av
import numpy as np
import pytest
import simplejpeg
from av.stream import Disposition
from conftest import run_python

from dropmae_jax.evaluation import reconstruction
from tfds_kinetics import video
from tfds_kinetics.video import (
  FrameOptions,
  MachineFault,
  UnusableVideo,
  read_jpegs,
  stored_size,
)

FRAMES = 6


def pictures(height=48, width=64, count=FRAMES):
  """Frames whose grey level says their number; the top left quarter is white."""
  frames = np.empty((count, height, width, 3), np.uint8)
  frames[:] = (20 + 20 * np.arange(count, dtype=np.uint8))[:, None, None, None]
  frames[:, : height // 2, : width // 2] = 235
  return frames


def write_video(
  path,
  codec='libx264',
  pixels='yuv420p',
  frames=None,
  times=None,
  title='',
  movflags='',
  **options,
):
  frames = pictures() if frames is None else frames
  with av.open(str(path), 'w', options={'movflags': movflags} if movflags else {}) as container:
    container.metadata.update({'title': title} if title else {})
    stream = container.add_stream(codec, rate=25, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = pixels
    for number, picture in enumerate(frames):
      frame = av.VideoFrame.from_ndarray(picture, 'rgb24')
      frame.pts = times[number] if times else number
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return str(path)


def decoded(path, **options):
  return [simplejpeg.decode_jpeg(j) for j in read_jpegs(str(path), FrameOptions(**options))]


def numbers(images):
  """Which frames of `pictures` these are."""
  return [round((float(image[-1, -1].mean()) - 20) / 20) for image in images]


@pytest.mark.parametrize(
  ('name', 'codec', 'pixels'),
  [
    ('a.mp4', 'libx264', 'yuv420p'),
    ('a.mp4', 'libx264', 'yuv420p10le'),
    ('a.mkv', 'libx265', 'yuv420p10le'),
    ('a.ts', 'libx264', 'yuv420p'),
    ('a.webm', 'libvpx-vp9', 'yuv420p'),
    ('a.mp4', 'libsvtav1', 'yuv420p10le'),
    ('a.avi', 'mpeg4', 'yuv420p'),
    ('a.mpg', 'mpeg2video', 'yuv420p'),
    ('a.mov', 'mjpeg', 'yuvj420p'),
    ('a.flv', 'flv', 'yuv420p'),
    ('a.wmv', 'wmv2', 'yuv420p'),
    ('a.mkv', 'ffv1', 'bgr0'),
  ],
)
def test_containers_and_codecs(tmp_path, name, codec, pixels):
  quality = {'qscale': '2', 'b': '2M'} if codec in ('mpeg4', 'mpeg2video', 'flv', 'wmv2') else {}
  # The smallest frame that all encoders take.
  path = write_video(tmp_path / name, codec, pixels, pictures(64, 96), **quality)
  images = decoded(path)
  assert [image.shape for image in images] == [(64, 96, 3)] * FRAMES
  assert numbers(images) == list(range(FRAMES))


def test_frames_without_a_steady_rate_are_each_taken_once(tmp_path):
  path = write_video(tmp_path / 'a.mkv', times=[0, 1, 2, 40, 41, 90])
  assert numbers(decoded(path)) == list(range(FRAMES))


def test_of_two_streams_the_first_is_taken(tmp_path):
  with av.open(str(tmp_path / 'a.mkv'), 'w') as container:
    streams = [container.add_stream('ffv1', rate=25) for _ in range(2)]
    for stream in streams:
      stream.height, stream.width, stream.pix_fmt = 48, 64, 'bgr0'
    for number, picture in enumerate(pictures()):
      for stream, each in zip(streams, (picture, 255 - picture), strict=True):
        frame = av.VideoFrame.from_ndarray(each, 'rgb24')
        frame.pts = number
        container.mux(stream.encode(frame))
    for stream in streams:
      container.mux(stream.encode())
  assert numbers(decoded(tmp_path / 'a.mkv')) == list(range(FRAMES))


def test_odd_sizes(tmp_path):
  path = write_video(tmp_path / 'a.mp4', pixels='yuv444p', frames=pictures(49, 65))
  assert decoded(path)[0].shape == (49, 65, 3)
  assert decoded(path, short_side=31)[0].shape == (31, 41, 3)


@pytest.mark.parametrize(
  ('size', 'expected'),
  [
    ((340, 256), (340, 256)),
    ((1280, 720), (455, 256)),
    ((720, 1280), (256, 455)),
    ((64, 48), (64, 48)),
  ],
)
def test_short_side(size, expected):
  assert stored_size(*size, 256) == expected


# The matrix of a track header (ISO 14496-12, 8.3.2), 16.16 but for its last column, turned
# clockwise; and where the white quarter, top left at first, is then.
ROTATIONS = {
  90: ((0, 1, -1, 0), (0, -1)),
  180: ((-1, 0, 0, -1), (-1, -1)),
  270: ((0, -1, 1, 0), (-1, 0)),
}


@pytest.mark.parametrize('degrees', ROTATIONS)
def test_phones_turn_their_videos_by_metadata(tmp_path, degrees):
  path = tmp_path / 'a.mp4'
  write_video(path)
  (a, b, c, d), white = ROTATIONS[degrees]
  content = bytearray(path.read_bytes())
  matrix = content.index(b'tkhd') + 44
  content[matrix : matrix + 36] = struct.pack(
    '>9i', a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30
  )
  path.write_bytes(content)
  image = decoded(path)[0]
  assert image.shape == ((64, 48, 3) if degrees != 180 else (48, 64, 3))
  assert image[white].mean() > 200
  corners = [image[y, x].mean() > 200 for y in (0, -1) for x in (0, -1)]
  assert sum(corners) == 1


def test_one_frame_is_enough(tmp_path):
  assert len(decoded(write_video(tmp_path / 'a.mp4', frames=pictures(count=1)))) == 1


def test_only_the_beginning_is_taken_where_that_is_asked(tmp_path):
  path = write_video(tmp_path / 'a.mp4')
  assert numbers(decoded(path, max_frames=4)) == [0, 1, 2, 3]
  assert numbers(decoded(path, max_frames=2, frame_stride=2)) == [0, 2]
  assert numbers(decoded(path, max_frames=99, frame_stride=4)) == [0, 4]
  # The decoder of this codec keeps frames back, and gives the last ones all at once.
  for most in range(1, FRAMES + 1):
    assert numbers(decoded(path, max_frames=most)) == list(range(most))


def write_sound(path):
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('aac', rate=8000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
    frame.sample_rate = 8000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def refusal(path, **options):
  with pytest.raises(UnusableVideo) as caught:
    list(read_jpegs(str(path), FrameOptions(**options)))
  return str(caught.value)


def test_frames_that_no_jpeg_can_hold_are_told(tmp_path):
  path = write_video(tmp_path / 'a.mkv', 'ffv1', 'gray', pictures(16, 65504, count=1))
  assert refusal(path) == 'its frames are 65504 x 16 pixels; JPEG has 65500 at most'


def test_what_is_no_video_is_told_apart(tmp_path):
  write_sound(tmp_path / 'sound.mp4')
  assert refusal(tmp_path / 'sound.mp4') == 'it has no video stream'
  (tmp_path / 'folder.mp4').mkdir()
  assert refusal(tmp_path / 'folder.mp4') == 'it is not a file'
  os.mkfifo(tmp_path / 'pipe.mp4')
  assert refusal(tmp_path / 'pipe.mp4') == 'it is not a file'
  (tmp_path / 'snake.mp4').symlink_to('snake.mp4')
  assert 'Too many levels of symbolic links' in refusal(tmp_path / 'snake.mp4')
  (tmp_path / 'page.mp4').write_text('<html>Video unavailable</html>')
  assert 'cannot be opened' in refusal(tmp_path / 'page.mp4')


@pytest.mark.parametrize(
  'playlist',
  [
    '#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n',
    'ffconcat version 1.0\nfile {url}\n',
  ],
)
def test_a_playlist_fetches_nothing(tmp_path, playlist):
  fetched = []

  class Request(socketserver.BaseRequestHandler):
    def handle(self):
      fetched.append(self.client_address)

  with socketserver.TCPServer(('127.0.0.1', 0), Request) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / 'list.mp4').write_text(
      playlist.format(url=f'http://127.0.0.1:{server.server_address[1]}/a.mp4')
    )
    assert 'cannot be opened' in refusal(tmp_path / 'list.mp4')
    server.shutdown()
  assert not fetched


@pytest.mark.parametrize('name', ['a b.mp4', "it's.mp4", 'say "x".mp4', 'bär ☂.mp4', 'a:%03d?.mp4'])
def test_names_of_all_kinds(tmp_path, name):
  assert len(decoded(write_video(tmp_path / 'a.mp4'))) == FRAMES
  (tmp_path / 'a.mp4').rename(tmp_path / name)
  assert len(decoded(tmp_path / name)) == FRAMES


def test_a_video_that_takes_too_long_is_left_out(tmp_path):
  path = write_video(tmp_path / 'a.mp4')
  assert refusal(path, time_limit=1e-9) == (
    'it takes longer than --time_limit=1e-09 seconds; --max_frames would take its beginning'
  )


def test_a_cover_is_not_a_video(tmp_path):
  path = tmp_path / 'song.mp4'
  with av.open(str(path), 'w') as container:
    sound = container.add_stream('aac', rate=8000)
    cover = container.add_stream('mjpeg', rate=1)
    cover.width, cover.height, cover.pix_fmt = 64, 48, 'yuvj420p'
    cover.disposition = Disposition.attached_pic.value
    picture = av.VideoFrame.from_ndarray(pictures(count=1)[0], 'rgb24')
    for packet in [*cover.encode(picture), *cover.encode()]:
      container.mux(packet)
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
    silence.sample_rate = 8000
    container.mux(sound.encode(silence))
    container.mux(sound.encode())
  with av.open(str(path)) as container:
    assert len(container.streams.video) == 1
  assert refusal(path) == 'it has no video stream'


def test_a_playlist_of_local_files_is_not_followed(tmp_path):
  write_video(tmp_path / 'b.mp4')
  (tmp_path / 'a.mp4').write_text('ffconcat version 1.0\nfile b.mp4\nfile b.mp4\n')
  assert refusal(tmp_path / 'a.mp4') == 'it is a playlist'


def test_an_end_that_is_cut_off_between_packets_is_noticed(tmp_path):
  path = tmp_path / 'a.mp4'
  write_video(path, movflags='faststart', g='1', bf='0')
  with av.open(str(path)) as container:
    ends = [packet.pos + packet.size for packet in container.demux() if packet.size]
  os.truncate(path, ends[3])
  assert refusal(path).startswith('2 of 6 packets are damaged (the file is cut short)')
  assert numbers(decoded(path, max_damage=0.4)) == [0, 1, 2, 3]
  assert len(decoded(path, max_frames=3)) == 3


@pytest.mark.parametrize(('start', 'count'), [(0, 5), (4, 6)])
def test_an_edit_list_that_trims_is_no_damage(tmp_path, start, count):
  """Trimmed without encoding anew, an mp4 plays from a frame to another, and holds more."""
  path = tmp_path / 'a.mp4'
  write_video(path, frames=pictures(count=10), movflags='faststart', g='1', bf='0')
  content = bytearray(path.read_bytes())
  # Duration, in the units of mvhd, and start, in those of mdhd (ISO 14496-12, 8.6.6).
  place = content.index(b'elst') + 12
  duration, first = struct.unpack_from('>Ii', content, place)
  (second,) = struct.unpack_from('>I', content, content.index(b'mdhd') + 16)
  struct.pack_into('>Ii', content, place, duration * count // 10, first + start * second // 25)
  path.write_bytes(content)
  assert numbers(decoded(path)) == list(range(start, start + count))
  with av.open(str(path), options={'ignore_editlist': '1'}) as container:
    ends = [packet.pos + packet.size for packet in container.demux() if packet.size]
  os.truncate(path, ends[8])
  assert '(the file is cut short)' in refusal(path)


@pytest.mark.parametrize(
  ('name', 'codec'), [('a.mp4', 'libx264'), ('a.mkv', 'libx264'), ('a.avi', 'mpeg4')]
)
def test_titles_need_not_be_utf_8(tmp_path, name, codec):
  path = write_video(tmp_path / name, codec, title='CAFE')
  content = (tmp_path / name).read_bytes()
  assert content.count(b'CAFE') == 1
  (tmp_path / name).write_bytes(content.replace(b'CAFE', b'CAF\xe9'))
  assert len(decoded(path)) == FRAMES
  assert len(reconstruction.read_frames(tmp_path / name, (0, 1))) == 2


def failing_with(error):
  def failing(*_, **__):
    raise error

  return failing


@pytest.mark.parametrize(
  'error',
  [
    *(
      OSError(number, 'not now')
      for number in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ESTALE)
    ),
    MemoryError('not now'),
  ],
)
def test_faults_of_the_machine_are_no_verdict(tmp_path, monkeypatch, error):
  path = write_video(tmp_path / 'a.mp4')
  monkeypatch.setattr(video.av, 'open', failing_with(error))
  with pytest.raises(MachineFault, match=r'a\.mp4 cannot be read now \(not now\), .* fault; \w+ '):
    list(read_jpegs(path, FrameOptions()))


@pytest.mark.parametrize('is_short', [True, False])
def test_more_memory_than_there_is_is_a_verdict_where_memory_is_not_short(
  tmp_path, monkeypatch, is_short
):
  """A damaged header may ask for any amount."""
  path = write_video(tmp_path / 'a.mp4')
  monkeypatch.setattr(video.shortages, 'is_memory_short', lambda num_bytes: is_short)
  error = av.error.MemoryError(errno.ENOMEM, 'Cannot allocate memory')
  monkeypatch.setattr(video.av, 'open', failing_with(error))
  with pytest.raises(MachineFault if is_short else UnusableVideo, match='Cannot allocate memory'):
    list(read_jpegs(path, FrameOptions()))


# Reads videos with less and less memory: in each process MB more than it has, from none on.
LIMITED = """
import os, resource, sys
from tfds_kinetics import shards, video
def size():
  return next(int(l.split()[1]) << 10 for l in open('/proc/self/status') if l.startswith('VmSize'))
for path in sys.argv[1:]:
  for more in range(0, 60, 2):
    reader, writer = os.pipe()
    if not os.fork():
      resource.setrlimit(resource.RLIMIT_AS, (size() + (more << 20),) * 2)
      try:
        said = f'{len(list(video.read_jpegs(path, video.FrameOptions())))} frames'
      except BaseException as error:
        said = f'{type(error).__name__}: {error}'
      os.write(writer, said.encode())
      os._exit(0)
    os.close(writer)
    print(os.path.basename(path), os.read(reader, 10000).decode() or 'crashed')
    os.wait()
"""


def test_a_video_is_never_called_unusable_for_want_of_memory(tmp_path):
  large = pictures(720, 1280)
  videos = [
    write_video(tmp_path / 'a.mp4', 'libx264', 'yuv420p', large),
    write_video(tmp_path / 'a.avi', 'mpeg4', 'yuv420p', large),
  ]
  done = run_python('-c', LIMITED, *videos)
  assert done.returncode == 0, done.stderr
  said = done.stdout.splitlines()
  assert len(said) == 60
  assert not [each for each in said if 'UnusableVideo' in each]
  for name in ('a.mp4', 'a.avi'):
    assert f'{name} MachineFault: {tmp_path / name} cannot be read now (' in done.stdout
    assert f'{name} {len(large)} frames' in done.stdout


def test_what_pyav_cannot_represent_is_a_verdict(tmp_path, monkeypatch):
  path = write_video(tmp_path / 'a.mp4')
  error = UnicodeDecodeError('utf-8', b'\xe9', 0, 1, 'invalid start byte')
  monkeypatch.setattr(video.av, 'open', failing_with(error))
  assert refusal(path).startswith("UnicodeDecodeError: 'utf-8' codec")


@pytest.mark.parametrize(
  'error',
  [
    TypeError("open() got an unexpected keyword argument 'metadata_errors'"),
    AttributeError("module 'av' has no attribute 'open'"),
    NameError("name 'av' is not defined"),
    ImportError("cannot import name 'VideoStream'"),
  ],
  ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize('place', ['av.open', 'simplejpeg.encode_jpeg', 'np.rot90'])
def test_mistakes_in_a_program_are_no_verdict(tmp_path, monkeypatch, error, place):
  path = write_video(tmp_path / 'a.mp4')
  module, name = place.split('.')
  monkeypatch.setattr(getattr(video, module), name, failing_with(error))
  with pytest.raises(type(error)) as caught:
    list(read_jpegs(path, FrameOptions()))
  assert caught.value is error


def test_an_option_that_is_no_more_is_no_verdict(tmp_path, monkeypatch):
  path = write_video(tmp_path / 'a.mp4')
  monkeypatch.setattr(video, '_LENIENT_METADATA', {'of_another_version': 'replace'})
  with pytest.raises(TypeError, match='of_another_version'):
    list(read_jpegs(path, FrameOptions()))


@pytest.mark.parametrize(('clock', 'is_refused'), [('process_time', True), ('monotonic', False)])
def test_time_of_the_core_counts_and_not_that_of_the_clock(
  tmp_path, monkeypatch, clock, is_refused
):
  """A suspended machine is no fault of a video; each look at the clock finds it an hour later."""
  path = write_video(tmp_path / 'a.mp4')
  hours = itertools.count(0, 3600)
  monkeypatch.setattr(video.time, clock, lambda: next(hours))
  if is_refused:
    assert 'it takes longer than --time_limit=600 seconds' in refusal(path)
  else:
    assert len(decoded(path)) == FRAMES
