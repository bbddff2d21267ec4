"""The figure of a checkpoint shows its frames, its masks and the prediction of its model."""

import dataclasses
import stat

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import initial_model
from PIL import Image, ImageDraw

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Architecture, Objective
from dropmae_jax.evaluation import reconstruction
from dropmae_jax.model import attention, mae, masking, patches
from dropmae_jax.model.mae import MaskedAutoencoder
from dropmae_jax.runtime.errors import UserError

SMALL = Architecture(
  image_size=32, patch_size=8, width=8, depth=1, num_heads=1, decoder_width=8, decoder_depth=2,
  decoder_num_heads=1,
)  # fmt: skip
SIDE, SCALE, MARGIN, HEADER = 224, 7, 8, 24


def params_that_predict(values):
  """Parameters of a model whose prediction is the same for every patch, whatever it sees."""
  rng, (_, shapes) = np.random.default_rng(0), mae.abstract_model(SMALL)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
  params['decoder_pred'] = {'kernel': 0 * params['decoder_pred']['kernel'], 'bias': values}
  return params


PREDICTED = np.random.default_rng(0).normal(0, 1, SMALL.patch_values).astype(np.float32)


@pytest.fixture(scope='module', params=[True, False], ids=['normalised', 'pixels'])
def trained(request, tmp_path_factory):
  """A workdir of the objective, with two checkpoints of different weights."""
  objective = Objective(mask_ratio=0.6, normalise_targets=request.param)
  workdir = tmp_path_factory.mktemp('figures')
  for step, values in ((9, -PREDICTED), (10, PREDICTED)):
    folder = workdir / f'of_{step}'
    description = saved_weights.describe(SMALL, objective)
    saved_weights.save_weights(folder, params_that_predict(values), step, description)
  (workdir / 'of_9' / 'checkpoints' / '9').rename(workdir / 'of_10' / 'checkpoints' / '9')
  return workdir / 'of_10', objective


def draw(monkeypatch, *arguments):
  """Runs the command, with jax arrays as weights, as the checks of shapes in tests require."""

  def load_weights(folder):
    weights = load(folder)
    return dataclasses.replace(weights, params=jax.tree.map(jnp.asarray, weights.params))

  load = saved_weights.load_weights
  monkeypatch.setattr(saved_weights, 'load_weights', load_weights)
  monkeypatch.setattr('sys.argv', ['figures', *map(str, arguments)])
  reconstruction.main()
  monkeypatch.setattr(saved_weights, 'load_weights', load)


def read_panels(path):
  """The panels of a figure by row and column, at the size of the model's frames; checks titles."""
  sheet = np.asarray(Image.open(path))
  height, width = HEADER + 2 * (SIDE + MARGIN), MARGIN + 3 * (SIDE + MARGIN)
  assert sheet.shape == (height, width, 3)
  expected = Image.new('RGB', (width, HEADER), 'white')
  for column, title in enumerate(('input', 'masked input', 'reconstruction')):
    place = MARGIN + column * (SIDE + MARGIN), 6
    ImageDraw.Draw(expected).text(place, title, fill='black')
  np.testing.assert_array_equal(sheet[:HEADER], expected)
  panels = np.empty((2, 3, 32, 32, 3), np.uint8)
  for row in range(2):
    for column in range(3):
      top, left = HEADER + row * (SIDE + MARGIN), MARGIN + column * (SIDE + MARGIN)
      panel = sheet[top : top + SIDE, left : left + SIDE]
      panels[row, column] = panel[::SCALE, ::SCALE]
      np.testing.assert_array_equal(panel, panels[row, column].repeat(SCALE, 0).repeat(SCALE, 1))
  return panels


def read_frames(video, numbers):
  """Frames of a video, cut and scaled by PIL."""
  with av.open(str(video)) as container:
    images = [frame.to_image() for frame in container.decode(video=0)]
  cut = [images[min(number, len(images) - 1)].crop((8, 0, 56, 48)) for number in numbers]
  return np.stack([image.resize((32, 32), Image.Resampling.BICUBIC) for image in cut])


def masked_patches(seed, objective):
  """Which patches of a pair the training's own scheme masks with a key."""
  keys = jax.random.split(jax.random.key(seed), 1)
  drawn = masking.random_masking(keys, num_tokens=32, mask_ratio=objective.mask_ratio)
  return np.isin(np.arange(32), drawn.masked[0])


@pytest.mark.parametrize(('numbers', 'seed'), [((1, 5), 0), ((2, 99), 3)])
def test_the_figure_shows_what_the_model_predicts(
  trained, clips, tmp_path, monkeypatch, capsys, numbers, seed
):
  workdir, objective = trained
  video = next(clips.glob('val/*/*.mp4'))
  arguments = [f'--checkpoint={workdir}', f'--video={video}', '--frames', *numbers]
  draw(monkeypatch, *arguments, f'--seed={seed}', f'--output={tmp_path / "a.png"}')
  assert capsys.readouterr().out == (
    f'{tmp_path / "a.png"}: frames {numbers}, checkpoint of step 10\n'
  )
  shown, masked, outcome = read_panels(tmp_path / 'a.png').swapaxes(0, 1)
  expected = read_frames(video, numbers)
  assert (expected[0] != expected[1]).any()
  np.testing.assert_array_equal(shown, expected)
  is_masked = masked_patches(seed, objective)
  assert is_masked.sum() == 32 - int(32 * (1 - 0.6))
  # In plain numpy: two frames of 4 x 4 patches of 8 x 8 pixels.
  pixels = np.kron(is_masked.reshape(2, 4, 4), np.ones((8, 8))) > 0
  np.testing.assert_array_equal(masked, np.where(pixels[..., None], 128, expected))
  mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  filled = (expected / 255 - mean) / deviation
  for frame, row, column in np.argwhere(is_masked.reshape(2, 4, 4)):
    patch = filled[frame, 8 * row :, 8 * column :][:8, :8]
    scale, shift = patch.std(ddof=1), patch.mean()
    if not objective.normalise_targets:
      scale, shift = 1, 0
    patch[:] = PREDICTED.reshape(8, 8, 3) * scale + shift
  filled = np.clip(np.rint((filled * deviation + mean) * 255), 0, 255)
  assert np.abs(outcome - filled).max() <= 1
  np.testing.assert_array_equal(outcome[~pixels], expected[~pixels])


def test_the_seed_alone_decides_what_is_masked(trained, clips, tmp_path, monkeypatch):
  workdir, _ = trained
  video = next(clips.glob('val/*/*.mp4'))
  for name, *more in (('a',), ('b', '--seed=0'), ('c', '--seed=1')):
    output = tmp_path / f'{name}.png'
    draw(monkeypatch, f'--checkpoint={workdir}', f'--video={video}', f'--output={output}', *more)
  a, b, c = (tmp_path / f'{name}.png' for name in 'abc')
  np.testing.assert_array_equal(read_panels(a)[:, 0], read_frames(video, (0, 10)))
  assert a.read_bytes() == b.read_bytes()
  (first, second) = ((read_panels(path)[:, 1] == 128).all(axis=-1) for path in (a, c))
  assert (first != second).any()
  assert stat.S_IMODE(a.stat().st_mode) == 0o644
  assert sorted(tmp_path.iterdir()) == [a, b, c]


def another_masking(keys, *, num_tokens, mask_ratio):
  drawn = masking.random_masking(keys, num_tokens=num_tokens, mask_ratio=1 - mask_ratio)
  return masking.Masking(visible=drawn.masked, masked=drawn.visible)


@pytest.mark.parametrize('normalise_targets', [True, False])
def test_a_right_prediction_gives_the_frames_back(monkeypatch, normalise_targets):
  """For every pair of a batch, each with its own masking, and without attention dropout."""
  monkeypatch.setitem(masking.MASKING_SCHEMES, 'another', another_masking)
  objective = Objective(
    mask_ratio=0.5, masking='another', attention_dropout=0.9, normalise_targets=normalise_targets
  )
  frames = jnp.asarray(np.random.default_rng(1).normal(0, 1, (3, 2, 32, 32, 3)), jnp.float32)
  calls = []

  def right(self, vectors, masked, attentions):
    calls.append((masked, attentions))
    return patches.normalise_patches(vectors) if normalise_targets else vectors

  monkeypatch.setattr(MaskedAutoencoder, '__call__', right)
  model = nnx.merge(mae.abstract_model(SMALL)[0], params_that_predict(PREDICTED))
  is_masked, filled = reconstruction.reconstruct(model, frames, 4, objective)
  np.testing.assert_allclose(filled, frames, atol=1e-5)
  ((masked, attentions),) = calls
  assert attentions == [attention.dense_attention] * 2
  keys = jax.random.split(jax.random.key(4), 3)
  expected = another_masking(keys, num_tokens=32, mask_ratio=0.5)
  np.testing.assert_array_equal(masked.masked, expected.masked)
  assert len({tuple(row) for row in np.asarray(masked.masked).tolist()}) == 3
  np.testing.assert_array_equal(is_masked.mean(axis=(1, 2, 3, 4)), 0.5)


def test_an_earlier_figure_outlives_a_full_disk(trained, clips, tmp_path, monkeypatch, full_disk):
  workdir, _ = trained
  video, output = next(clips.glob('val/*/*.mp4')), tmp_path / 'out.png'
  output.write_bytes(b'earlier')
  with pytest.raises(UserError, match='No space left on device'):
    draw(monkeypatch, f'--checkpoint={workdir}', f'--video={video}', f'--output={output}')
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {output: b'earlier'}


def test_a_scheme_that_is_not_known_here_masks_at_random():
  model = initial_model(SMALL)
  frames = jax.random.normal(jax.random.key(0), (1, 2, 32, 32, 3))
  drawn = [
    reconstruction.reconstruct(model, frames, 3, Objective(masking=name))[0]
    for name in ('random', 'of another project')
  ]
  np.testing.assert_array_equal(*drawn)
