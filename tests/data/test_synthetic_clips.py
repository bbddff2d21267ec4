"""Generated clips depend only on the seed, look like Kinetics and DAVIS, and have true masks."""

import dataclasses
import io
import pathlib

import av
import numpy as np
import pytest
from PIL import Image

from dropmae_jax.data import synthetic_clips
from dropmae_jax.data.synthetic_clips import ClipOptions
from dropmae_jax.runtime.errors import UserError

SMALL = ClipOptions(train=3, val=1, frames=5, height=48, width=64)


def files(folder):
  return {
    p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()
  }


def test_the_same_seed_gives_the_same_files_and_another_does_not(tmp_path):
  for name in ('one', 'two'):
    assert synthetic_clips.write_clips(tmp_path / name, SMALL) == 4
  assert files(tmp_path / 'one') == files(tmp_path / 'two')
  other = ClipOptions(train=3, val=1, frames=5, height=48, width=64, seed=1)
  synthetic_clips.write_clips(tmp_path / 'three', other)
  one, three = files(tmp_path / 'one'), files(tmp_path / 'three')
  assert one.keys() == three.keys()
  assert one['train/bouncing/bouncing_0000.mp4'] != three['train/bouncing/bouncing_0000.mp4']


def test_encoding_has_no_memory(tmp_path):
  """At full size, where the encoder's decisions once depended on earlier calls."""
  frames, _ = synthetic_clips.make_clip(np.random.default_rng(1), 'orbiting', ClipOptions())
  written = set()
  for number in range(4):
    path = tmp_path / f'{number}.mp4'
    synthetic_clips.write_mp4(path, frames)
    written.add(path.read_bytes())
  assert len(written) == 1


def jpeg_of(picture, **options):
  file = io.BytesIO()
  Image.fromarray(picture).save(file, 'jpeg', **options)
  return file.getvalue()


def test_every_clip_depends_on_its_number_only(tmp_path):
  options = ClipOptions(train=5, val=2, frames=3, height=48, width=64, objects=2, seed=3)
  output = tmp_path / 'clips'
  assert synthetic_clips.write_clips(output, options) == 7
  # Clip numbers continue from one split to the next; the kinds of motion restart.
  clips = {
    'train': ['bouncing_0000', 'orbiting_0001', 'swaying_0002', 'drifting_0003', 'bouncing_0004'],
    'val': ['bouncing_0005', 'orbiting_0006'],
  }
  expected = {'clips.json', *(f'davis/ImageSets/2017/{split}.txt' for split in clips)}
  for split, name in ((split, name) for split, names in clips.items() for name in names):
    motion, number = name.split('_')
    rng = np.random.default_rng([3, int(number)])
    frames, labels = synthetic_clips.make_clip(rng, motion, options)
    expected.add(f'{split}/{motion}/{name}.mp4')
    with av.open(str(output / split / motion / f'{name}.mp4')) as container:
      stream = container.streams.video[0]
      assert (stream.codec_context.name, stream.average_rate) == ('h264', 24)
      decoded = [frame.to_ndarray(format='rgb24') for frame in container.decode(stream)]
    assert np.abs(np.stack(decoded).astype(int) - frames).mean() < 6
    for place in range(3):
      image = f'davis/JPEGImages/480p/{name}/{place:05d}.jpg'
      mask = f'davis/Annotations/480p/{name}/{place:05d}.png'
      expected |= {image, mask}
      assert (output / image).read_bytes() == jpeg_of(frames[place], quality=95)
      mask = Image.open(output / mask)
      np.testing.assert_array_equal(mask, labels[place])
      assert mask.mode == 'P'
      assert mask.getpalette()[:9] == [0, 0, 0, 200, 40, 40, 40, 200, 40]
  assert set(files(output)) == expected
  for split, names in clips.items():
    assert (output / f'davis/ImageSets/2017/{split}.txt').read_text().split() == names


# No field at its default; and each at its least value.
ASKED = ClipOptions(train=5, val=2, frames=3, height=48, width=64, objects=1, seed=7)
LEAST = ClipOptions(train=1, val=0, frames=1, height=16, width=16, objects=0, seed=0)


def made_by_command(monkeypatch, options):
  """The options that the command line gives to `write_clips`."""
  written = []
  monkeypatch.setattr(synthetic_clips, 'write_clips', lambda *a: written.append(a) or 7)
  flags = [f'--{name}={value}' for name, value in dataclasses.asdict(options).items()]
  monkeypatch.setattr('sys.argv', ['synthetic_clips', '--output=clips', *flags])
  synthetic_clips.main()
  return written


@pytest.mark.parametrize('asked', [ASKED, LEAST])
def test_every_option_reaches_the_clips(monkeypatch, capsys, asked):
  assert made_by_command(monkeypatch, asked) == [(pathlib.Path('clips'), asked)]
  assert capsys.readouterr().out == 'clips: 7 clips written\n'


@pytest.mark.parametrize('field', dataclasses.asdict(LEAST))
def test_numbers_out_of_range_are_refused(monkeypatch, field):
  too_small = dataclasses.replace(LEAST, **{field: getattr(LEAST, field) - 1})
  with pytest.raises(UserError, match=rf'^--{field}=-?\d+ (is too small; give|must be even, as)'):
    made_by_command(monkeypatch, too_small)
  if field in ('height', 'width'):
    with pytest.raises(UserError, match=f'--{field}=47 must be even'):
      made_by_command(monkeypatch, dataclasses.replace(ASKED, **{field: 47}))


def test_masks_follow_the_objects():
  """Without objects only the background is left, and it differs exactly inside the masks."""
  options = ClipOptions(frames=6, height=96, width=128)
  for motion in synthetic_clips.MOTIONS:
    frames, labels = synthetic_clips.make_clip(np.random.default_rng(3), motion, options)
    bare, none = synthetic_clips.make_clip(
      np.random.default_rng(3), motion, ClipOptions(frames=6, height=96, width=128, objects=0)
    )
    assert not none.any()
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    changed = (frames != bare).any(axis=-1)
    assert not (changed & (labels == 0)).any()
    assert changed[labels > 0].mean() > 0.95
    places = [np.argwhere(label == 1).mean(axis=0) for label in labels if (label == 1).any()]
    assert np.ptp(places, axis=0).max() > 2, motion


def test_objects_hide_one_another():
  options = ClipOptions(frames=40)
  hidden = 0
  for seed in range(4):
    _, labels = synthetic_clips.make_clip(np.random.default_rng(seed), 'orbiting', options)
    sizes = np.array([[(label == n).sum() for n in (1, 2)] for label in labels])
    hidden += (sizes.min(axis=0) < 0.5 * sizes.max(axis=0)).any()
  assert hidden


def test_existing_clips_are_reused_and_others_not_overwritten(tmp_path):
  output, staging = tmp_path / 'clips', tmp_path / 'clips.partial'
  staging.mkdir()
  (staging / 'old.mp4').touch()  # Of a run that was killed.
  synthetic_clips.write_clips(output, SMALL)
  before = files(output)
  assert 'old.mp4' not in before
  assert synthetic_clips.write_clips(output, SMALL) == 0
  with pytest.raises(UserError, match='holds something other than these clips'):
    synthetic_clips.write_clips(output, ClipOptions(train=4))
  assert files(output) == before
