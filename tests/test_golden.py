"""Against numbers recorded from the published method's own code (tests/golden)."""

import dataclasses
import json
from functools import partial

import draws
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import scipy.stats
from conftest import run_python

from dropmae_jax import optimizer
from dropmae_jax.config import Objective, OptimizerOptions
from dropmae_jax.model import asad, fast_asad, mae, patches, pixels, position_embedding
from dropmae_jax.model.asad import Logits, num_dropped
from dropmae_jax.pytorch import layouts
from dropmae_jax.train_step import TrainState, update

CONFIG = {
  'img_size': 16,
  'patch_size': 4,
  'embed_dim': 16,
  'depth': 2,
  'num_heads': 2,
  'decoder_embed_dim': 12,
  'decoder_depth': 2,
  'decoder_num_heads': 3,
  'mlp_ratio': 4,
  'mask_ratio': 0.75,
}
ARCHITECTURE = parity.architecture_of(CONFIG)


@pytest.fixture(scope='module')
def state(golden):
  return {k.removeprefix('param/'): v for k, v in golden('tiny_state').items()}


def without_key_bias(name, array):
  """The gradient of the key third of a qkv bias is zero except for rounding."""
  third = array.shape[0] // 3
  return np.delete(array, slice(third, 2 * third)) if name.endswith('qkv.bias') else array


def relative(actual, expected):
  return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.fixture(scope='module')
def imported(state, tmp_path_factory):
  """The recorded state dict as a checkpoint: written as .pth, imported by the command line."""
  torch = pytest.importorskip('torch', reason='PyTorch is not installed')
  folder = tmp_path_factory.mktemp('imported')
  tensors = {name: torch.from_numpy(array) for name, array in state.items()}
  args = {'architecture': dataclasses.asdict(ARCHITECTURE)}
  torch.save({'model': tensors, 'args': args}, folder / 'recorded.pth')
  done = run_python(
    'convert_to_torch.py', f'--from_torch={folder}/recorded.pth', f'--output={folder}/run'
  )
  assert done.returncode == 0, done.stderr
  assert 'verified: ' in done.stdout
  return folder / 'run'


@pytest.mark.parametrize(
  ('name', 'through_checkpoint'),
  [
    ('fwd_p02_normpix', True),
    ('fwd_p04_raw', False),
    pytest.param('fwd_p02_normpix', False, marks=pytest.mark.slow),
    pytest.param('fwd_p04_raw', True, marks=pytest.mark.slow),
  ],
)
def test_forward_and_gradients(
  golden, state, request, run_here, tmp_path, name, through_checkpoint
):
  recorded = golden(name)
  config = CONFIG | {'P': float(recorded['P']), 'norm_pix_loss': bool(recorded['norm_pix'])}
  source = []
  if through_checkpoint:
    source = [f'--checkpoint={request.getfixturevalue("imported")}']
  case = {
    **({} if source else {f'state/{k}': v for k, v in state.items()}),
    'frames_x': recorded['frames_x'],
    'frames_z': recorded['frames_z'],
    'mask_noise': recorded['noise'],
    'drop_mask/0': recorded['drop_mask0'],
    'drop_mask/1': recorded['drop_mask1'],
    'config': json.dumps(config),
  }
  np.savez(tmp_path / 'case.npz', **case)
  done = run_here(parity.main, f'--case={tmp_path}/case.npz', f'--output={tmp_path}/o.npz', *source)
  assert done.returncode == 0, done.stderr
  result = np.load(tmp_path / 'o.npz')

  assert result['loss'] == pytest.approx(float(recorded['loss']), rel=1e-6)
  np.testing.assert_allclose(result['pred'], recorded['pred'], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(result['mask'], recorded['mask'])
  names = {k for k in recorded if k.startswith('grad/')}
  assert names == {k for k in result.files if k.startswith('grad/')}
  for key in names:
    ours, theirs = without_key_bias(key, result[key]), without_key_bias(key, recorded[key])
    assert relative(ours, theirs) < 1e-5, key
    if key.endswith('qkv.bias'):
      assert np.abs(result[key] - recorded[key]).max() < 1e-7


def test_intermediate_values(golden, state):
  recorded = golden('fwd_p02_normpix')
  case = {
    'frames_x': recorded['frames_x'],
    'frames_z': recorded['frames_z'],
    'mask_noise': recorded['noise'],
    'drops': [parity.within_frame(recorded[f'drop_mask{i}']) for i in range(2)],
  }
  case = jax.tree.map(jnp.asarray, case)
  params = jax.tree.map(jnp.asarray, layouts.from_torch(state, ARCHITECTURE))
  graphdef, _ = mae.abstract_model(ARCHITECTURE)

  @jax.jit
  def latents_and_loss(params):
    latents = []

    class Recorder(mae.MaskedAutoencoder):
      def encode(self, *args):
        latents.append(super().encode(*args))
        return latents[-1]

    model = parity.nnx.merge(graphdef, params)
    model.__class__ = Recorder
    other = Objective(normalise_targets=False)
    model_graph, model_params = parity.nnx.split(model)
    loss, _ = parity.recorded_loss(model_params, case, graphdef=model_graph, objective=other)
    return latents[0], loss

  latents, loss = latents_and_loss(params)
  np.testing.assert_allclose(latents, recorded['latent'], rtol=1e-5, atol=1e-5)
  assert float(loss) == pytest.approx(float(recorded['loss_other_norm_pix']), rel=1e-6)

  none = [jnp.zeros_like(drops) for drops in case['drops']]
  loss_of = jax.jit(partial(parity.recorded_loss, graphdef=graphdef, objective=Objective()))
  loss, _ = loss_of(params, case | {'drops': none})
  assert float(loss) == pytest.approx(float(recorded['loss_no_asad']), rel=1e-6)


def split_by_frame(logits):
  """[..., l, l] as recorded, to logits [1, f, m, i, n] with one matrix per head."""
  length = logits.shape[-1]
  n = length // 2
  blocks = logits.reshape(-1, 2, n, 2, n)
  parts = [[blocks[:, f, :, f] for f in (0, 1)], [blocks[:, f, :, 1 - f] for f in (0, 1)]]
  return Logits(*(jnp.asarray(np.stack(part))[None] for part in parts))


@pytest.mark.parametrize('name', ['asad_weights_extreme', 'fwd_p02_normpix', 'fwd_p04_raw'])
@pytest.mark.parametrize('module', [asad, fast_asad], ids=['definition', 'fast'])
def test_sampling_weights(golden, module, name):
  recorded = golden(name)
  weights = np.asarray(module.sampling_weights(split_by_frame(recorded['logits'])))[0]
  # As recorded: 2n queries, n keys of their own frame.
  weights = np.concatenate(list(weights), axis=1)
  np.testing.assert_allclose(weights, recorded['att_final'].reshape(weights.shape), rtol=5e-6)


@pytest.mark.parametrize('implementation', draws.IMPLEMENTATIONS)
def test_draws_have_the_recorded_distribution(golden, implementation):
  recorded = golden('asad_sampling_stats')
  drawn, batches, rate = 40_000, 5, float(recorded['P'])
  logits = split_by_frame(recorded['logits'])
  count = num_dropped(8, rate)
  assert count == recorded['sample_num']

  @jax.jit
  def frequencies(key):
    drops = draws.drops(implementation, key, logits, draws=drawn // batches, drop_rate=rate)
    return drops.sum(axis=(1, 2, 3)), drops.mean(axis=0)

  total = np.zeros((2, 8, 8))
  for key in jax.random.split(jax.random.key(0), batches):
    counts, mean = frequencies(key)
    assert (counts == count).all()
    total += np.asarray(mean, np.float64) / batches
  assert_distribution(recorded, total, drawn)


@pytest.mark.slow
def test_gpu_kernels_draw_what_xla_draws_from_the_recorded_logits(golden):
  """So they have XLA's distribution. Interpreted, they draw too slowly to show it themselves."""
  recorded = golden('asad_sampling_stats')
  rate, logits = float(recorded['P']), split_by_frame(recorded['logits'])
  ours, xla = draws.drops_of_gpu_and_xla(jax.random.key(0), logits, heads=64, drop_rate=rate)
  assert (ours.sum(axis=(1, 2, 3)) == num_dropped(8, rate)).all()
  np.testing.assert_array_equal(ours, xla)
  assert_distribution(recorded, np.asarray(ours.mean(axis=0), np.float64), len(ours))


def assert_distribution(recorded, frequencies, drawn):
  """Compares how often each pair is dropped, by a chi-square test.

  The pairs of a draw are dependent, as their number is fixed; so their covariance is used.
  """
  candidates = np.flatnonzero(recorded['att_final'].ravel())
  difference = (frequencies.reshape(-1) - recorded['freq'].ravel())[candidates]
  values, vectors = np.linalg.eigh(recorded['cov'][np.ix_(candidates, candidates)])
  is_free = values > 1e-9 * values.max()
  assert is_free.sum() == 111
  projected = vectors[:, is_free].T @ difference
  statistic = (projected**2 / (values[is_free] * (1 / recorded['draws'] + 1 / drawn))).sum()
  assert 1e-4 < scipy.stats.chi2.sf(statistic, 111) < 1 - 1e-4, statistic


def test_sincos(golden):
  recorded = golden('sincos')
  for width in (32, 16, 12):
    np.testing.assert_allclose(
      position_embedding.sincos_table(4, width)[0], recorded[f'g4_d{width}'], atol=1e-7
    )
  for grid, width in ((14, 768), (16, 512)):
    table = position_embedding.sincos_table(grid, width)[0]
    rows = recorded[f'g{grid}_d{width}_rows']
    axis = recorded[f'g{grid}_d{width}_axis']
    for row in rows:
      i, j = divmod(int(row) - 1, grid)
      expected = np.concatenate([axis[j], axis[i]]) if row else np.zeros(width)
      np.testing.assert_allclose(table[row], expected, atol=1e-7)
    np.testing.assert_allclose(
      table.astype(np.float64).sum(axis=1), recorded[f'g{grid}_d{width}_rowsum'], atol=1e-4
    )


def test_patchify(golden):
  recorded = golden('patchify')
  frames = recorded['image'].transpose(0, 2, 3, 1)[:, None]
  np.testing.assert_array_equal(patches.patchify(jnp.asarray(frames), 4), recorded['patches'])


def test_learning_rate(golden):
  recorded = golden('lr_schedule')
  schedule = optimizer.learning_rate(peak=2.4e-3, floor=0.0, warmup_steps=40, num_steps=400)
  with jax.enable_x64(True):
    exact = np.array([float(schedule(jnp.float64(epoch))) for epoch in recorded['epoch']])
  np.testing.assert_allclose(exact, recorded['lr'], rtol=1e-9, atol=1e-15)
  single = np.asarray(jax.vmap(schedule)(jnp.asarray(recorded['epoch'], jnp.float32)))
  np.testing.assert_allclose(single, recorded['lr'], atol=1e-9)


def unpack_drops(packed):
  """[..., l, n / 8] bits of own-frame columns, to [f, m, i, n] per sample."""
  drops = np.unpackbits(packed, axis=-1).astype(bool)
  *lead, length, n = drops.shape
  return np.moveaxis(drops.reshape(*lead, 2, length // 2, n), -3, -4)


@pytest.mark.parametrize('accumulation', [1, 2])
def test_training_trace(golden, state, accumulation):
  recorded = golden(f'train_accum{accumulation}')
  peak, floor, warmup, decay, _, mask_ratio = recorded['base']
  per_epoch = int(recorded['len_loader'])
  # The reference discards some micro-steps; here nothing is discarded, so they are left out.
  used = [
    t
    for t in range(len(recorded['loss']))
    if t % per_epoch < per_epoch // accumulation * accumulation
  ]
  groups = np.array(used).reshape(-1, accumulation)
  epochs = recorded['epoch'].max() + 1
  schedule = optimizer.learning_rate(
    peak=peak, floor=floor, warmup_steps=warmup, num_steps=float(epochs)
  )
  first = groups[:, 0]
  when = recorded['epoch'][first] + recorded['iter_in_epoch'][first] / per_epoch
  with jax.enable_x64(True):
    rates = np.array([float(schedule(jnp.float64(e))) for e in when])
  np.testing.assert_allclose(rates, recorded['lr'][first], rtol=1e-9, atol=1e-12)
  table = jnp.asarray(rates, jnp.float32)
  options = OptimizerOptions(weight_decay=float(decay))
  tx = optimizer.adamw(lambda count: table[count], options)
  loss_fn = partial(
    parity.recorded_loss,
    graphdef=mae.abstract_model(ARCHITECTURE)[0],
    objective=Objective(mask_ratio=float(mask_ratio)),
  )
  step = jax.jit(
    partial(
      update,
      loss_fn=lambda params, batch: loss_fn(params, batch)[0],
      tx=tx,
      schedule=lambda count: table[count],
      accumulation_steps=accumulation,
    )
  )

  def batch(group):
    def frames(u8):
      raw = u8[recorded['batch_index'][group]].transpose(0, 1, 3, 4, 2)
      normal = np.asarray(pixels.normalise(jnp.asarray(raw))).transpose(0, 1, 4, 2, 3)
      return interleave(normal)

    packed = recorded['drop_masks_packed'][group]
    return {
      'frames_x': frames(recorded['frames_x_u8']),
      'frames_z': frames(recorded['frames_z_u8']),
      'mask_noise': interleave(recorded['noise'][group]),
      'drops': [interleave(unpack_drops(packed[:, block])) for block in range(2)],
    }

  def interleave(micro):
    """[a, b, ...] to the one batch of which micro-batch i is every a-th sample from i on."""
    return jnp.asarray(np.moveaxis(micro, 0, 1).reshape(-1, *micro.shape[2:]))

  params = jax.tree.map(jnp.asarray, layouts.from_torch(state, ARCHITECTURE))
  train_state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))
  for group in groups:
    train_state, metrics = step(train_state, batch(group))
    assert float(metrics.loss) == pytest.approx(recorded['loss'][group].mean(), rel=1e-4)
    assert recorded['updated'][group[-1]]
    norm = recorded['grad_norm'][group[-1]]
    assert float(metrics.gradient_norm) == pytest.approx(norm, rel=1e-4)
  final = layouts.to_torch(train_state.params, ARCHITECTURE)
  for name, array in final.items():
    if name in layouts.POSITION_TABLES:
      np.testing.assert_array_equal(array, state[name])
      continue
    ours = without_key_bias(name, array)
    theirs = without_key_bias(name, recorded[f'final/{name}'])
    assert relative(ours, theirs) < 1e-4, name
