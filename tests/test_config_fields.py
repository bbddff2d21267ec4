"""Every field of the config changes what it is there to change: the program, what is fed, written.

The program is traced and not compiled. Runs have a step that costs nothing in its place; they are
observed from the config to their end, and a field may change nothing that it is not for.
"""

import copy
import hashlib
import json
import threading
import time

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dropmae_jax import config_file, memory, optimizer, sharding, train, train_step
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Objective
from dropmae_jax.data import frame_pairs
from dropmae_jax.data.loader import LoaderStalled
from dropmae_jax.data.video_source import DamagedRecord, TfdsVideos
from dropmae_jax.evaluation import scores
from dropmae_jax.model import asad, mae, masking
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.train_step import Metrics

DEVICES = jax.devices()[:2]
STEPS = 6
BASE = {
  'data_dir': 'data',
  'num_steps': STEPS,
  'batch_size': 4,
  'dtype': 'float32',
  'attention': 'xla',
  'log_every': 2,
  'score_every': 4,
  'scores': 'held_out',
  'model': {
    'size': 'XXS',
    'image_size': 16,
    'depth': 1,
    'decoder_width': 32,
    'decoder_depth': 1,
    'decoder_num_heads': 2,
  },
  # 4 tokens a frame, of which each query loses one of its own frame's.
  'objective': {'attention_dropout': 0.4},
  'data': {'frame_gap': 4, 'num_threads': 1},
  'optimizer': {'warmup_steps': 2},
  'checkpoint': {'every_steps': 2, 'keep_last': 2},
}
# Fields that the devices' program is made of, with another value.
PROGRAM = {
  'num_steps': STEPS + 1,
  'batch_size': 8,
  'accumulation_steps': 2,
  'dtype': 'bfloat16',
  'attention': 'auto',
  'remat': 'full',
  'model.size': 'XS',
  'model.image_size': 32,
  'model.patch_size': 4,
  'model.width': 32,
  'model.depth': 2,
  'model.num_heads': 4,
  'model.decoder_width': 16,
  'model.decoder_depth': 2,
  'model.decoder_num_heads': 4,
  'model.mlp_ratio': 2.0,
  'objective.mask_ratio': 0.5,
  'objective.masking': 'last',
  'objective.attention_dropout': 0.7,
  'objective.dropout_rule': 'first',
  'objective.normalise_targets': False,
  'data.shared_augmentation': True,
  'optimizer.base_learning_rate': 1e-3,
  'optimizer.min_learning_rate': 1e-6,
  'optimizer.warmup_steps': 3,
  'optimizer.warmup_epochs': 3.0,
  'optimizer.weight_decay': 0.1,
  'optimizer.beta1': 0.8,
  'optimizer.beta2': 0.9,
  'mesh.fsdp': 2,
}
# Fields that other parts of a run read, with another value, and which observations it changes, or a
# part of the sentence that ends the run. The cheap step's metrics are of the frames, so that other
# pairs are other lines.
RUN = {
  'data_dir': ('nowhere', "in data_dir='nowhere'"),
  'dataset': ('kinetics_frames/none', 'there is no dataset kinetics_frames/none'),
  'split': ('val', {'fed', 'written', 'steps_per_epoch'}),
  'seed': (1, {'fed', 'written', 'initial', 'key'}),
  'init_from': ('{weights}', {'initial'}),
  'num_steps': (STEPS + 1, {'fed', 'written', 'scored', 'kept'}),
  'num_epochs': (7 / 3, {'fed', 'written', 'scored', 'kept'}),
  'batch_size': (4, {'fed', 'written', 'steps_per_epoch', 'batch_of_report'}),
  'log_every': (3, {'written'}),
  'score_every': (3, {'scored'}),
  'scores': ('other', {'scored'}),
  'step_stall_seconds': (77.0, {'watchdog'}),
  'model.image_size': (32, {'fed', 'written'}),
  'data.frame_gap': (2, {'fed', 'written', 'frame_gap'}),
  'data.resize': ('exact', {'fed', 'written'}),
  'data.shared_augmentation': (True, {'fed', 'written'}),
  'data.num_threads': (3, {'threads'}),
  'data.stall_seconds': (0.2, 'data.stall_seconds=0.2'),
  'data.max_damaged_records': (0, 'max_damaged_records=0'),
  'mesh.data': (1, 'do not share out the 2 devices'),
  'checkpoint.every_steps': (3, {'kept'}),
  'checkpoint.keep_last': (3, {'kept'}),
  'checkpoint.keep_every': (2, {'kept'}),
}


# Of six videos.
RUN_OPTIONS = {'batch_size': 2}


def config_with(name, value, **other):
  config = copy.deepcopy(BASE) | other
  *groups, leaf = name.split('.')
  part = config
  for group in groups:
    part = part.setdefault(group, {})
  part[leaf] = value
  if name in config_file.LENGTHS:
    part.pop(config_file.LENGTHS[name].rpartition('.')[2], None)
  return config


def last_masking(keys, *, num_tokens, mask_ratio):
  """Masks the last tokens of every sample."""
  noise = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.float32), (len(keys), num_tokens))
  return masking.masking_from_noise(noise, masking.num_visible(num_tokens, mask_ratio))


def first_dropped(keys, logits, *, drop_rate):
  """Drops each query's first key, unless that is itself."""
  n = logits.own.shape[-1]
  return jnp.broadcast_to((jnp.arange(n) == 0) & ~jnp.eye(n, dtype=bool), logits.own.shape)


def test_every_field_is_among_them():
  assert {*PROGRAM, *RUN} == set(config_file.field_types())


def traced(config):
  """The program of a step, and where its arrays lie."""
  made = optimizer.resolve_schedule(config_file.from_dict(config), num_videos=6)
  built = train.build(made, sharding.make_mesh(DEVICES, made.mesh))
  frames = (made.batch_size, 2, made.model.image_size, made.model.image_size, 3)
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = built.step.trace(built.abstract_state, jax.ShapeDtypeStruct(frames, jnp.uint8), key)
  return str(step.jaxpr), str(built.abstract_state)


@pytest.fixture(scope='module')
def base_program():
  assert traced(BASE) == traced(BASE)
  return traced(BASE)


@pytest.mark.parametrize('name', PROGRAM)
def test_a_field_changes_the_program(name, base_program, monkeypatch):
  monkeypatch.setitem(masking.MASKING_SCHEMES, 'last', last_masking)
  monkeypatch.setitem(asad.ATTENTION_DROPOUTS, 'first', first_dropped)
  assert traced(config_with(name, PROGRAM[name])) != base_program


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from equations(inner)


def loss_of(config):
  """The equations of the pre-training loss of a config's model."""
  made = config_file.from_dict(config)
  graphdef, params = mae.abstract_model(made.model, dtype=made.dtype, remat=made.remat)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))

  def loss(params, frames, keys):
    drawn = {'masking_keys': keys, 'asad_keys': keys, 'objective': made.objective}
    return mae.pretraining_loss(nnx.merge(graphdef, params), frames, **drawn)

  frames = jax.ShapeDtypeStruct((2, 2, 16, 16, 3), jnp.float32)
  return list(equations(jax.make_jaxpr(loss)(params, frames, keys).jaxpr))


@pytest.mark.parametrize(
  ('remat', 'policy'),
  [
    ('none', None),
    ('full', jax.checkpoint_policies.nothing_saveable),
    ('dots', jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
  ],
)
def test_every_block_is_rematerialised_by_the_policy(remat, policy):
  remats = [each for each in loss_of(config_with('remat', remat)) if 'policy' in each.params]
  # One block of the encoder and one of the decoder.
  assert [each.params['policy'] for each in remats] == [policy] * (2 if policy else 0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_every_product_of_parameters_is_in_the_dtype(dtype):
  dense = {'attention_dropout': 0.0}  # What ASAD sums by products is float32 always.
  products = [
    each
    for each in loss_of(config_with('dtype', dtype, objective=dense))
    if each.primitive.name == 'dot_general'
  ]
  with_parameters = [each for each in products if each.invars[1].aval.ndim == 2]
  # Two embeddings, a prediction, and at least four of each block.
  assert len(with_parameters) >= 3 + 2 * 4
  assert {v.aval.dtype.name for each in with_parameters for v in each.invars} == {dtype}


def test_attention_is_chosen_by_the_decoders_sizes(monkeypatch):
  told = []
  real = train_step.implementations.choose

  def programs_for(kind, mesh, **sizes):
    told.append((kind, sizes))
    return real(kind, mesh, **sizes)

  monkeypatch.setattr(train_step.implementations, 'choose', programs_for)
  config = config_with('model.decoder_num_heads', 4, dtype='bfloat16')
  train.build(config_file.from_dict(config), sharding.make_mesh(DEVICES))
  sizes = {'tokens_per_frame': 4, 'num_heads': 4, 'head_width': 8, 'dtype': 'bfloat16'}
  assert told == [('xla', {**sizes, 'rule': 'asad'})]


@pytest.mark.parametrize('platform', ['gpu', 'cpu'])
def test_gpus_are_asked_for_the_same_numbers(monkeypatch, platform):
  asked, jit = [], jax.jit

  def observed_jit(function, **options):
    asked.append(options.pop('compiler_options', None))
    return jit(function, **options)

  monkeypatch.setattr(sharding, 'platform_of', lambda mesh: platform)
  monkeypatch.setattr(jax, 'jit', observed_jit)
  train.build(config_file.from_dict(BASE), sharding.make_mesh(DEVICES))
  expected = {'xla_gpu_exclude_nondeterministic_ops': True} if platform == 'gpu' else None
  assert asked[-1] == expected


def digest(array):
  return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


@jax.jit
def cheap_step(state, frames, key):
  """Changes no parameters; its loss falls and rises, and is the lowest at first."""
  del key
  loss = frames.astype(jnp.float32).mean() / 255 - jnp.cos(2.0 * state.step)
  return state.replace(step=state.step + 1), Metrics(loss, loss, loss)


def observe(config, workdir, monkeypatch, frame=TfdsVideos.frame):
  """Trains by a config; returns what there was to see of it."""
  seen = {'fed': [], 'threads': set(), 'refusal': None}
  made = config_file.from_dict(config)
  build_program, watchdog, draw = train.build, train.Watchdog, frame_pairs.PairMaker.draw
  report = train.Report

  def observed_program(options, mesh):
    assert options == optimizer.resolve_schedule(made, num_videos=6)
    state = build_program(options, mesh).abstract_state

    def init(key):
      number = jax.random.key_data(key)[-1]
      return jax.tree.map(
        lambda leaf: jax.device_put(np.full(leaf.shape, number, leaf.dtype), leaf.sharding), state
      ).replace(step=jax.device_put(np.int32(0), state.step.sharding))

    def step(state, frames, key):
      if not seen['fed']:
        seen['initial'] = digest(jax.device_get(state.params['mask_token']))
        seen['key'] = jax.device_get(jax.random.key_data(key)).tolist()
      seen['fed'].append(digest(jax.device_get(frames)))
      return cheap_step(state, frames, key)

    seen['step'] = step
    return train.Model(init, step, state)

  def observed_step(options, *_):
    return memory.Fit(options, seen.pop('step'), 0.0)

  def observed_watchdog(seconds, **options):
    seen['watchdog'] = seconds
    return watchdog(seconds, **options)

  def observed_report(workdir, *, batch_size, **options):
    seen['batch_of_report'] = batch_size
    return report(workdir, batch_size=batch_size, **options)

  def observed_draw(self, key):
    seen['threads'].add(threading.get_ident())
    return draw(self, key)

  monkeypatch.setattr(train, 'build', observed_program)
  monkeypatch.setattr(train, 'compiled_step', observed_step)
  monkeypatch.setattr(train, 'Watchdog', observed_watchdog)
  monkeypatch.setattr(train, 'Report', observed_report)
  monkeypatch.setattr(frame_pairs.PairMaker, 'draw', observed_draw)
  monkeypatch.setattr(TfdsVideos, 'frame', frame)
  table = {name: lambda weights: {'step': weights.step} for name in ('held_out', 'other')}
  monkeypatch.setattr(scores, 'SCORES', table)
  monkeypatch.setattr(saved_weights, 'checksums', lambda tree: [])
  monkeypatch.setattr(jax, 'devices', lambda: DEVICES)
  try:
    assert train.train(made, workdir)
  except (UserError, LoaderStalled) as error:
    seen['refusal'] = str(error)
    return seen
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  seen['written'] = [(row['step'], row['loss']) for row in rows if 'loss' in row]
  seen['scored'] = [row for row in rows if 'loss' not in row]
  seen['kept'] = sorted(int(each.name) for each in (workdir / saved_weights.FOLDER).iterdir())
  described = workdir / saved_weights.FOLDER / str(seen['kept'][-1]) / 'description' / 'metadata'
  for name in ('frame_gap', 'steps_per_epoch'):
    seen[name] = json.loads(described.read_text())[name]
  return seen | {'threads': len(seen['threads']) > 1}


@pytest.fixture(scope='module')
def observed(data_dir, tmp_path_factory):
  """The observations of the base."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp('base') / 'run'
    return observe(config_with('data_dir', str(data_dir), **RUN_OPTIONS), folder, patch)


def test_the_base_run_is_observed_whole(observed):
  assert observed['refusal'] is None
  assert len(set(observed['fed'])) == STEPS
  assert [step for step, _ in observed['written']] == [2, 4, 6]
  assert observed['scored'] == [{'step': step, 'held_out/step': step} for step in (4, STEPS)]
  assert (observed['kept'], observed['steps_per_epoch']) == ([4, STEPS], 3)


frame = TfdsVideos.frame


def unhurried_frame(self, video, number):
  time.sleep(0.02)
  return frame(self, video, number)


def slow_frame(self, video, number):
  time.sleep(0.5)
  return frame(self, video, number)


def damaged_frame(self, video, number):
  if video == 3:
    raise DamagedRecord('video 3 is damaged.')
  return frame(self, video, number)


# What it takes to see some of them.
FRAMES = {
  'data.num_threads': unhurried_frame,
  'data.stall_seconds': slow_frame,
  'data.max_damaged_records': damaged_frame,
}


@pytest.mark.parametrize('name', RUN)
def test_a_field_changes_of_a_run_what_it_is_for(name, observed, data_dir, tmp_path, monkeypatch):
  value, expected = RUN[name]
  if name == 'init_from':
    value = str(tmp_path / 'weights')
    architecture = config_file.from_dict(BASE).model
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), mae.abstract_model(architecture)[1])
    described = saved_weights.describe(architecture, Objective())
    saved_weights.save_weights(tmp_path / 'weights', params, 3, described)
  config = config_with(name, value, **(RUN_OPTIONS | {'data_dir': str(data_dir)}))
  changed = observe(config, tmp_path / 'run', monkeypatch, FRAMES.get(name, frame))
  if isinstance(expected, str):
    assert expected in (changed['refusal'] or '')
  else:
    assert {key for key in observed if changed[key] != observed[key]} == expected


def test_micro_batches_are_not_the_batch_of_the_report(data_dir, tmp_path, monkeypatch):
  own = {'batch_size': 4, 'data_dir': str(data_dir)}
  config = config_with('accumulation_steps', 2, **own)
  assert observe(config, tmp_path / 'run', monkeypatch)['batch_of_report'] == 4
