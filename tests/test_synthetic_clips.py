"""Generated clips: seeded, laid out as Kinetics and DAVIS, masks true."""

import av
import numpy as np
import pytest
from conftest import run_python
from PIL import Image

from dropmae_jax import synthetic_clips
from dropmae_jax.command_line import BadInput
from dropmae_jax.synthetic_clips import ClipOptions

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
  """At full size, where the encoder has enough to decide that it once decided differently."""
  frames, _ = synthetic_clips.make_clip(np.random.default_rng(1), 'orbiting', ClipOptions())
  written = set()
  for number in range(4):
    path = tmp_path / f'{number}.mp4'
    synthetic_clips.write_mp4(path, frames)
    written.add(path.read_bytes())
  assert len(written) == 1


def test_layout(clips):
  names = {p.stem for p in clips.glob('train/*/*_*.mp4')}
  lists = clips / 'davis' / 'ImageSets' / '2017'
  assert set((lists / 'train.txt').read_text().split()) == names
  assert len((lists / 'val.txt').read_text().split()) == 2
  for name in names:
    for kind, suffix in (('JPEGImages', 'jpg'), ('Annotations', 'png')):
      frames = sorted(p.name for p in (clips / 'davis' / kind / '480p' / name).iterdir())
      assert frames == [f'{i:05d}.{suffix}' for i in range(8)]
    mask = Image.open(clips / 'davis' / 'Annotations' / '480p' / name / '00000.png')
    assert mask.mode == 'P'
    assert set(np.unique(mask)) <= {0, 1, 2, 3}


def test_videos_are_h264_of_the_drawn_frames(clips):
  path = next(clips.glob('val/*/*.mp4'))
  with av.open(str(path)) as container:
    assert container.streams.video[0].codec_context.name == 'h264'
    frames = [frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)]
  assert len(frames) == 8
  drawn = Image.open(clips / 'davis' / 'JPEGImages' / '480p' / path.stem / '00003.jpg')
  assert np.abs(frames[3].astype(int) - np.asarray(drawn)).mean() < 12


def test_masks_follow_the_objects():
  """Without objects only the background is left, and it differs exactly inside the masks."""
  options = ClipOptions(frames=6, height=96, width=128)
  for motion in synthetic_clips.MOTIONS:
    frames, labels = synthetic_clips.make_clip(np.random.default_rng(3), motion, options)
    bare, none = synthetic_clips.make_clip(
      np.random.default_rng(3), motion, ClipOptions(frames=6, height=96, width=128, objects=0)
    )
    assert not none.any()
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
  output = tmp_path / 'clips'
  synthetic_clips.write_clips(output, SMALL)
  before = files(output)
  assert synthetic_clips.write_clips(output, SMALL) == 0
  with pytest.raises(BadInput, match='holds something other than these clips'):
    synthetic_clips.write_clips(output, ClipOptions(train=4))
  assert files(output) == before


@pytest.mark.parametrize(
  ('field', 'message'), [('--frames=0', 'is too small; give at least 1'), ('--height=47', 'even')]
)
def test_impossible_numbers_are_refused(tmp_path, field, message):
  done = run_python('-m', 'dropmae_jax.synthetic_clips', f'--output={tmp_path}/x', field)
  assert done.returncode == 2
  assert field in done.stderr
  assert message in done.stderr
