"""Every row of the benchmarks is what its name says. No speed is tested."""

import dataclasses
import importlib.util
import json
import math
import re
import statistics
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, needs_torch, run_python, torch
from einops import rearrange

from benchmarks import (
  asad_sampler,
  kernel_check,
  rounds,
  step_time,
  torch_step,
  variants,
)
from benchmarks.compiler import report
from dropmae_jax import sharding, train_step
from dropmae_jax.config import Config, Objective
from dropmae_jax.kernels.tpu import asad_tpu
from dropmae_jax.model import attention, fast_asad, flops, mae, patches
from dropmae_jax.model.asad import Logits
from dropmae_jax.model.chunks import ChunkCounts
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.runtime import cli, targets
from dropmae_jax.runtime.errors import UserError

# One block each: it compiles in seconds. 16 tokens per frame, of which P = 0.2 drops 3 per query.
SMALLEST = architecture_of_size(
  'XXS', depth=1, decoder_depth=1, decoder_width=32, decoder_num_heads=2, image_size=32
)
BATCH = 2
DROPPED = 3 * 32
CUDA = 'jax_cuda12_plugin'


@pytest.fixture(scope='module', autouse=True)
def _quick_to_compile():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def small(monkeypatch):
  """Whatever model is asked for, it is the smallest."""
  monkeypatch.setattr(variants.vit, 'architecture_of_size', lambda size, **_: SMALLEST)


def configs(monkeypatch, *flags):
  monkeypatch.setattr('sys.argv', ['step_time', f'--batch_size={BATCH}', '--drop_rate=0.2', *flags])
  arguments = step_time.parse()
  arguments.dtype = 'float32'
  return variants.compared(variants.make_config(arguments, BATCH), jax.devices()[0])


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  """One dry run of everything: what was timed, the numbers, and what was printed."""
  pytest.importorskip('torch', reason='PyTorch is not installed')
  output, parts, printed = tmp_path_factory.mktemp('step_time') / 'out.json', {}, []
  make, show = step_time.make_parts, step_time.show
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(variants.vit, 'architecture_of_size', lambda size, **_: SMALLEST)
    patch.setattr(step_time, 'make_parts', lambda *given: parts.update(make(*given)) or parts)
    patch.setattr(step_time, 'show', lambda result: printed.append(show(result)) or printed[0])
    patch.setitem(step_time.LEAST_SECONDS, 'cpu', 0)
    patch.setitem(step_time.PRODUCT_SIZE, 'cpu', 32)
    flags = f'--batch_size={BATCH} --drop_rate=0.2 --rounds=3 --torch'
    patch.setattr('sys.argv', ['step_time', *flags.split(), f'--json={output}'])
    step_time.main()
  return parts, json.loads(output.read_text()), printed[0]


def test_every_row_has_its_numbers(measured):
  parts, result, printed = measured
  steps = {'step_dense', 'step_asad', 'step_torch'}
  both = {f'{part}_{kind}' for part in ('decoder', 'attention') for kind in ('dense', 'asad')}
  assert set(parts) == steps | both | {'encoder', 'sampler', 'optimizer', 'matrix_product'}
  assert set(result['rows']) == set(parts)
  for name, row in result['rows'].items():
    assert 0 < row['seconds']['min'] <= row['seconds']['median'] <= row['seconds']['max']
    assert len(result['seconds_of_rounds'][name]) == 3
    assert row['calls_per_measurement'] == 1
    assert (row['mfu'] is None) == (name in ('sampler', 'optimizer'))
    assert ('pairs_per_second' in row) == (name in steps)
    assert re.search(rf'^{name}  ', printed, re.MULTILINE)
  dense, asad_ = (result['seconds_of_rounds'][f'step_{kind}'] for kind in ('dense', 'asad'))
  tax = statistics.median(a / d for a, d in zip(asad_, dense, strict=True))
  assert result['asad_tax'] == pytest.approx(tax)
  assert f'asad_tax {tax:.3f}' in printed
  assert set(result['ratios']) == {
    f'{part}_{kind}/{part}_dense'
    for part, kind in [
      ('step', 'asad'),
      ('step', 'torch'),
      ('decoder', 'asad'),
      ('attention', 'asad'),
    ]
  }
  row = result['rows']['step_asad']
  assert row['pairs_per_second'] == pytest.approx(BATCH / row['seconds']['median'])
  assert row['mfu'] == pytest.approx(
    row['flops'] / row['seconds']['median'] / result['peak']['flops_per_second']
  )
  assert row['memory']['total'] > 12 * mae.num_parameters(mae.abstract_model(SMALLEST)[1])
  assert result['peak']['source'].startswith('the fastest matrix product of this run, float32')
  assert result['machine']['libraries']['jax'] == jax.__version__
  assert 'python' in result['command']


# The smallest step, where only JAX, Flax, Optax, NumPy, einops and jaxtyping are installed.
BARE = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name.partition('.')[0] in sys.argv[1].split(','):
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Hidden())
from benchmarks import step_time, variants
from dropmae_jax.config import Architecture
smallest = Architecture(**eval(sys.argv[2]))
variants.vit.architecture_of_size = lambda size, **_: smallest
step_time.LEAST_SECONDS['cpu'], step_time.PRODUCT_SIZE['cpu'] = 0, 32
sys.argv[1:] = sys.argv[3:]
step_time.cli.run(step_time.main)
"""
HIDDEN = (
  'PIL', 'array_record', 'av', 'cv2', 'dm_pix', 'grain', 'ml_collections', 'orbax', 'safetensors',
  'simplejpeg', 'tensorboard', 'tensorflow_datasets', 'tensorstore', 'torch', 'tqdm',
)  # fmt: skip


@pytest.mark.slow
def test_it_starts_where_little_more_than_jax_is_installed(tmp_path):
  flags = f'--batch_size={BATCH} --drop_rate=0.2 --rounds=1 --steps_only'
  command = ['-c', BARE, ','.join(HIDDEN), dataclasses.asdict(SMALLEST), *flags.split()]
  done = run_python(*command, f'--json={tmp_path / "out.json"}')
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / 'out.json').read_text())['rows']
  assert set(rows) == {'step_dense', 'step_asad', 'matrix_product'}


def test_the_rows_with_asad_drop_pairs_and_the_others_none(measured):
  parts, _, _ = measured
  dropped = np.concatenate(parts['sampler'].way.start(), axis=2)
  assert dropped.shape == (BATCH, 2, 2, 16, 16)
  assert (dropped.sum(axis=(1, 3, 4)) == DROPPED).all()
  assert not dropped[..., np.arange(16), np.arange(16)].any()
  dense, with_asad = (
    np.asarray(parts[f'attention_{kind}'].way.start()[0]) for kind in ('dense', 'asad')
  )
  assert np.abs(dense - with_asad).max() > 0.1
  first, second = (
    np.asarray(parts[f'decoder_{kind}'].way.start()[0]) for kind in ('dense', 'asad')
  )
  assert np.abs(first - second).max() > 1e-4


def test_steps_and_optimizer_take_turns_on_one_state(measured):
  parts, _, _ = measured
  before = parts['step_dense'].way.start()
  updates = int(before.step)
  for number, name in enumerate(('step_asad', 'optimizer', 'step_dense'), start=1):
    after = parts[name].way.start()
    assert int(after.step) == updates + number
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), name
    before = after


def products(jaxpr):
  """FLOPs of all matrix products in a traced program."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      ((contracted, _), _) = equation.params['dimension_numbers']
      length = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
      total += 2 * length * math.prod(equation.outvars[0].aval.shape)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      total += products(inner)
  return total


def traced(config):
  model = train_step.build(config, sharding.make_mesh(jax.devices()[:1]))
  frames = jax.ShapeDtypeStruct((BATCH, 2, 32, 32, 3), jnp.uint8)
  return jax.make_jaxpr(model.step)(model.abstract_state, frames, jax.random.key(0)).jaxpr


@needs_torch
def test_flops_are_those_of_the_step_and_of_pytorch(monkeypatch, small):
  from torch.nn.attention import SDPBackend, sdpa_kernel
  from torch.utils.flop_counter import FlopCounterMode

  dense, with_asad = (
    dataclasses.replace(config, attention='xla') for config in configs(monkeypatch).values()
  )
  formula = BATCH * flops.step(SMALLEST, 0.75)
  assert products(traced(dense)) == formula
  # The backward pass rematerialises the logits, which is half of a forward attention. The powers of
  # a head are summed by a product, as if they were a value; ties too, by row and within a row.
  logits = flops.attention(32, 32) / 2
  sums = SMALLEST.decoder_num_heads * 2 * (32**2 + 32**2 + 16**2)
  assert products(traced(with_asad)) == formula + BATCH * SMALLEST.decoder_depth * (logits + sums)
  step = torch_step.TorchStep(dense, 'cpu')
  frames = torch.zeros((BATCH, 2, 32, 32, 3), dtype=torch.uint8)
  # Written out, so that the counter sees its products.
  plain = sdpa_kernel(SDPBackend.MATH)
  with FlopCounterMode(display=False) as counter, plain:
    step(frames)
  assert counter.get_total_flops() == BATCH * flops.step(SMALLEST, 0.75, whole=True)


@needs_torch
def test_the_step_of_pytorch_is_of_the_same_model(monkeypatch, small):
  step = torch_step.TorchStep(configs(monkeypatch)['dense'], 'cpu')
  params = mae.abstract_model(SMALLEST)[1]
  fixed = sum(params[name].size for name in ('pos_embed', 'decoder_pos_embed'))
  trained = [p for p in step.model.parameters() if p.requires_grad]
  assert sum(p.numel() for p in trained) == mae.num_parameters(params) - fixed
  frames = np.random.default_rng(0).integers(0, 256, (BATCH, 2, 32, 32, 3), np.uint8)
  ours = patches.patchify(jnp.asarray(frames, jnp.float32), SMALLEST.patch_size)
  np.testing.assert_array_equal(step.patches(torch.from_numpy(frames)).numpy(), ours)
  before = [p.detach().clone() for p in trained]
  loss = step(torch.from_numpy(frames))
  assert 0.5 < float(loss) < 3
  assert all((p != b).any() for p, b in zip(trained, before, strict=True))


def test_every_data_sheet_is_found_by_the_name_of_its_device():
  assert targets.known_peak('NVIDIA H200')[0] == 989e12
  assert targets.known_peak('TPU v5 lite')[0] == 197e12
  assert targets.known_peak('cpu') is None
  known = set(targets.TPU_KINDS.values()) | {
    name for name, target in targets.TARGETS.items() if target.gpu
  }
  assert known == set(targets.TARGETS) - {'cpu'}


def test_the_peak_is_stated_known_or_measured(monkeypatch):
  assert step_time.choose_peak(2.5, 'float32', 1e9) == (2.5e12, 'as stated by --peak_tflops')
  assert step_time.choose_peak(None, 'bfloat16', 1e9)[0] == 1e9
  monkeypatch.setattr(step_time.targets, 'known_peak', lambda kind: (9e14, 'a sheet'))
  assert step_time.choose_peak(None, 'float32', 1e9)[0] == 1e9  # Data sheets are for bfloat16.
  assert step_time.choose_peak(None, 'bfloat16', 1e9) == (9e14, 'a sheet')


def test_rounds_go_back_and_forth():
  calls = []
  ways = {
    name: rounds.Way(lambda name=name: calls.append(name), lambda _: calls.append('wait'))
    for name in 'ab'
  }
  seconds, number = rounds.interleave(ways, rounds=3, least_seconds=0)
  assert number == {'a': 1, 'b': 1}
  assert [name for name in calls if name != 'wait'][6:] == list('abbaab')
  assert {len(taken) for taken in seconds.values()} == {3}
  calls.clear()
  rounds.Way(lambda: calls.append('start'), lambda _: calls.append('wait')).seconds(2)
  assert calls == ['start', 'wait', 'start', 'wait', 'wait']
  calls.clear()
  rounds.Way(lambda: calls.append('start'), lambda _: calls.append('wait'), False).seconds(2)
  assert calls == ['start', 'start', 'wait']


@pytest.fixture
def small_layer(monkeypatch):
  """A layer of two heads, for the comparison of samplers."""
  sizes = {'HEADS': 2, 'TOKENS': 32, 'DROP_RATE': 0.2, 'BATCH_SIZES': (1, 2)}
  for name, value in sizes.items():
    monkeypatch.setattr(asad_sampler, name, value)


@needs_torch
def test_both_samplers_draw_the_same_number_by_the_same_weights(small_layer):
  logits, matrix = asad_sampler.make_logits(3, ChunkCounts(3, 2))
  weights = asad_sampler.torch_weights(torch.from_numpy(matrix)).numpy()
  ours = jnp.stack(
    [fast_asad.sampling_weights(Logits(*chunk)) for chunk in zip(*logits, strict=True)]
  )
  ours = rearrange(ours, '(s h) c f k i n -> (s c) f (h k) i n', s=3)
  np.testing.assert_allclose(weights, ours, rtol=1e-5, atol=1e-9)
  dropped = asad_sampler.torch_drops(torch.from_numpy(matrix), DROPPED).numpy()
  assert dropped.shape == weights.shape
  assert (dropped.sum(axis=(1, 3, 4)) == DROPPED).all()
  assert (weights[dropped] > 0).all()


@needs_torch
def test_the_samplers_are_compared(small_layer, monkeypatch, capsys, tmp_path):
  output = tmp_path / 'out.json'
  monkeypatch.setattr('sys.argv', ['asad_sampler', '--rounds=2', f'--json={output}'])
  asad_sampler.main()
  result = json.loads(output.read_text())
  assert [row['batch_size'] for row in result['rows']] == [1, 2]
  assert all(row['speedup']['min'] > 0 for row in result['rows'])
  assert result['torch_threads'] == result['machine']['cores']
  assert f'{DROPPED} pairs of a head dropped' in capsys.readouterr().out


@pytest.mark.slow
def test_the_report_of_a_compiler(monkeypatch, capsys, small, tmp_path):
  output = tmp_path / 'out.json'
  flags = f'--target=cpu --dtype=float32 --batch_size={BATCH} --drop_rate=0.2 --json={output}'
  monkeypatch.setattr('sys.argv', ['report', *flags.split()])
  monkeypatch.setattr(report.jax.config, 'update', lambda name, value: None)
  report.main()
  result = json.loads(output.read_text())
  dense, with_asad = (result['rows'][name] for name in ('dense', 'asad'))
  assert with_asad['main_memory_bytes'] > dense['main_memory_bytes'] > 0
  assert with_asad['number_of_kernels'] == sum(with_asad['kernels'].values()) > 10
  assert dense['flops_by_formula'] == BATCH * flops.step(SMALLEST, 0.75)
  assert dense['flops'] > dense['flops_by_formula']
  tax = result['ratios']['asad/dense']
  assert tax['number_of_kernels'] == with_asad['number_of_kernels'] / dense['number_of_kernels']
  assert tax['least'] >= 1
  assert 'asad/dense: time' in capsys.readouterr().out


def test_there_is_no_tax_where_a_step_does_not_fit():
  fits = {
    'projected': {'least': 2.0, 'most': 4.0},
    'main_memory_bytes': 10,
    'number_of_kernels': 5,
  }
  more = {'projected': {'least': 3.0, 'most': 5.0}, 'main_memory_bytes': 11, 'number_of_kernels': 6}
  refused = {'refused': 'no'}
  assert report.compare({'a': fits, 'b': more, 'c': refused}) == {
    'b/a': {'least': 1.5, 'most': 1.25, 'main_memory_bytes': 1.1, 'number_of_kernels': 1.2}
  }
  assert report.compare({'a': refused, 'b': more}) == {}


@pytest.mark.parametrize(
  ('module', 'flags', 'message'),
  [
    (step_time, '', 'required: --batch_size'),
    (step_time, '--batch_size=0', '--batch_size=0 is too small'),
    (step_time, '--batch_size=2 --rounds=0', '--rounds=0 is too small'),
    (step_time, '--batch_size=2 --peak_tflops=-1', '--peak_tflops=-1.0 is not positive'),
    (step_time, '--batch_size=2 --drop_rate=0.004', 'drops none of 195 keys'),
    (step_time, '--batch_size=2 --drop_rate=2', 'attention_dropout=2.0 is out of range'),
    (step_time, '--batch_size=2 --image_size=30', 'is not a multiple of patch_size=16'),
    (step_time, '--batch_size=2 --dtype=int8', "invalid choice: 'int8'"),
    (step_time, '--batch_size=2 --json={tmp}', 'is a folder'),
    (asad_sampler, '--rounds=0', '--rounds=0 is too small'),
    (report, '--target=abacus', "invalid choice: 'abacus'"),
    (report, '--target=h200 --batch_size=0', '--batch_size=0 is too small'),
    (report, '--target=cpu --drop_rate=0', 'drops none of 195 keys'),
  ],
)
def test_bad_input_is_one_sentence(monkeypatch, capsys, tmp_path, module, flags, message):
  monkeypatch.setattr('sys.argv', [module.__name__, *flags.format(tmp=tmp_path).split()])
  monkeypatch.setattr(report.jax.config, 'update', lambda name, value: None)
  with pytest.raises(SystemExit) as ended:
    cli.run(module.main)
  assert ended.value.code == 2
  (error,) = capsys.readouterr().err.splitlines()
  assert error.startswith('error: ')
  assert message in error


def test_a_batch_that_does_not_fit_is_bad_input(monkeypatch):
  def refuse(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 99 GB')

  monkeypatch.setattr('sys.argv', ['step_time', '--batch_size=9999'])
  monkeypatch.setattr(step_time, 'make_parts', refuse)
  with pytest.raises(UserError, match=r'^--batch_size=9999 does not fit the memory'):
    step_time.main()


def test_pytorch_that_is_not_there_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(
    UserError, match=r"PyTorch, which is not installed; pip install -e '\.\[torch"
  ):
    rounds.import_torch()


@pytest.mark.parametrize(
  ('device', 'image_size', 'dtype', 'has_kernels'),
  [
    ({'platform': 'tpu'}, 224, 'bfloat16', True),
    ({'platform': 'tpu'}, 336, 'bfloat16', False),
    ({'platform': 'gpu', 'compute_capability': '9.0'}, 224, 'bfloat16', True),
    ({'platform': 'gpu', 'compute_capability': '9.0'}, 224, 'float32', False),
    ({'platform': 'gpu', 'compute_capability': '8.0'}, 224, 'bfloat16', False),
    ({'platform': 'cpu'}, 224, 'bfloat16', False),
  ],
)
def test_fused_kernels_are_compared_where_there_are_any(device, image_size, dtype, has_kernels):
  model = architecture_of_size('B', image_size=image_size)
  options = Config(data_dir='', num_steps=1, batch_size=1, model=model, dtype=dtype)
  compared = variants.compared(options, types.SimpleNamespace(**device))
  assert ('asad_fused' in compared) == has_kernels
  # Of GPUs, there is flash attention too.
  assert ('dense_fused' in compared) == (has_kernels and device['platform'] == 'gpu')
  over_flash = ('asad_fused', 'dense_fused') in variants.comparisons(compared)
  assert over_flash == ('dense_fused' in compared)
  left = variants.compared(options, types.SimpleNamespace(**device), without_fused=True)
  assert list(left) == ['dense', 'asad']


@pytest.mark.slow
def test_kernels_are_checked_before_they_are_timed(monkeypatch):
  size = architecture_of_size('XXS', image_size=32, decoder_width=64, decoder_num_heads=4)
  objective = Objective(attention_dropout=0.2)
  options = Config(
    data_dir='', num_steps=1, batch_size=1, model=size, objective=objective, dtype='float32'
  )
  device = types.SimpleNamespace(platform='tpu')
  check = partial(kernel_check.check, options, device, interpret=True)
  assert check().startswith('the kernels drop 96 pairs of a head; largest error: ')
  with monkeypatch.context() as patch:
    patch.setattr(asad_tpu, 'asad_attention', lambda *x, **_: attention.dense_attention(*x))
    wrong = r'are off, relative to what they should be: output 0\.\d+, gradient of the queries'
    with pytest.raises(UserError, match=wrong):
      check()
  draw = asad_tpu.dropped_pairs
  monkeypatch.setattr(asad_tpu, 'dropped_pairs', lambda *x, **how: draw(*x, **how) & False)
  with pytest.raises(UserError, match='kernels drop 0 to 0 pairs of a head instead of 96; please'):
    check()


@pytest.mark.slow
@pytest.mark.parametrize(('target', 'library'), [('tpu_v5e', 'libtpu'), ('h200', CUDA)])
def test_the_compilers_of_accelerators_make_both_steps(tmp_path, target, library):
  if not importlib.util.find_spec(library):
    pytest.skip(f'the compiler of {target} ({library}) is not installed: see docs/performance.md')
  output = tmp_path / 'out.json'
  done = run_python(
    '-m', 'benchmarks.compiler.report', f'--target={target}', '--model=XXS', '--image_size=32',
    '--batch_size=2', '--drop_rate=0.2', '--quick', f'--json={output}', timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  result = json.loads(output.read_text())
  assert result['ratios']['asad/dense']['main_memory_bytes'] > 1
  assert all(row['kernels']['fusion'] > 50 for row in result['rows'].values())


DOCUMENTATION = (ROOT / 'docs' / 'performance.md').read_text()
MODULES = {'step_time': step_time, 'asad_sampler': asad_sampler, 'compiler.report': report}


@pytest.mark.parametrize(
  ('name', 'flags'),
  sorted(set(re.findall(r'python -m benchmarks\.([\w.]+) ?([^`\n#]*)', DOCUMENTATION))),
)
def test_the_commands_of_the_documentation_are_understood(monkeypatch, name, flags):
  monkeypatch.setattr('sys.argv', [name, *flags.split()])
  MODULES[name].parse()
