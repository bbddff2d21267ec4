"""What the tracker costs is counted as it says. No speed is tested."""

import json
import unittest.mock
from types import SimpleNamespace

import jax
import pytest

from benchmarks import rounds, tracker_cost
from dropmae_jax.tracking import model

# Two blocks and 16 + 64 tokens: it compiles in seconds.
SMALLEST = '--model=XXS', '--search_sizes', 64


@pytest.fixture
def costs(run_here, tmp_path, monkeypatch):
  """Runs the benchmark on the smallest tracker and returns what it writes, and prints."""
  monkeypatch.setattr(tracker_cost.jax.config, 'update', lambda name, value: None)

  def run(*flags):
    path = tmp_path / 'out.json'
    done = run_here(tracker_cost.main, *SMALLEST, f'--json={path}', *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout

  return run


@pytest.mark.parametrize(('size', 'everything', 'kept'), [(256, 30.9, 22.6), (384, 74.9, 54.1)])
def test_products_of_the_published_sizes(size, everything, kept):
  architecture = model.tracker_of_size('B', template_size=size // 2, search_size=size)
  for rate, expected in ((1.0, everything), (0.7, kept)):
    products = tracker_cost.count_products(architecture, architecture.kept(rate))
    assert round(products / 1e9, 1) == expected


def test_the_formula_is_what_xla_counts(run_here, monkeypatch, tmp_path):
  monkeypatch.setattr(tracker_cost.jax.config, 'update', lambda name, value: None)
  path = tmp_path / 'out.json'
  flags = '--parts', 'counts', '--model=B', '--search_sizes', 256, f'--json={path}'
  printed = run_here(tracker_cost.main, *flags).stdout
  (row,) = json.loads(path.read_text())['counts'].values()
  for name in ('all', 'kept'):
    # XLA counts more than matrix products, and no products with the padding of convolutions.
    assert 1 < row[f'gmac_{name}_by_xla'] / row[f'gmac_{name}'] < 1.02
  assert row['trained'] < row['stored']
  assert f'| 256 | {row["trained"]:,} | {row["stored"]:,} | {row["tensors"]} |' in printed


@pytest.mark.parametrize(
  ('changed', 'sign'),
  [({'dtype': 'bfloat16'}, 'bf16'), ({'remat': 'full'}, 'optimization_barrier')],
)
def test_a_step_is_of_the_form_that_is_named(changed, sign):
  architecture = model.tracker_of_size('XXS', template_size=32, search_size=64)
  base = {'dtype': 'float32', 'remat': 'none', 'form': 'masked'}

  def lowered(**change):
    return tracker_cost.lower_step(
      architecture, jax.devices()[0], batch_size=2, keep_rate=0.5, **(base | change)
    )

  masked, gathered = lowered(**changed), lowered(form='gathered')
  assert sign in masked.as_text()
  assert sign not in gathered.as_text()
  # The masked form takes the counts as an argument, and computes with all tokens.
  assert len(jax.tree.leaves(masked.in_avals)) == len(jax.tree.leaves(gathered.in_avals)) + 1
  assert masked.cost_analysis()['flops'] > gathered.cost_analysis()['flops']


def test_every_form_is_compiled_once(costs, monkeypatch):
  asked = []

  def lower_step(*_, **settings):
    asked.append(tuple(settings[name] for name in ('dtype', 'remat', 'form')))
    sizes = dict.fromkeys(('argument', 'output', 'alias', 'temp', 'generated_code'), 0)
    sizes['temp'] = 25e9 * (1 + 3 * (settings['remat'] == 'none'))
    analysis = SimpleNamespace(**{f'{name}_size_in_bytes': each for name, each in sizes.items()})
    step = unittest.mock.Mock(spec=tracker_cost.jax.stages.Compiled)
    step.memory_analysis = lambda: analysis
    return SimpleNamespace(compile=lambda options: step)

  monkeypatch.setattr(tracker_cost, 'lower_step', lower_step)
  content, printed = costs('--parts', 'memory')
  assert len(set(asked)) == len(content['memory']) == 8
  assert printed.count('| full | masked | 25.0 | 0.0 | 25.0 | no | yes |') == 2
  assert printed.count('| none | gathered | 100.0 | 0.0 | 100.0 | no | no |') == 2


def test_a_step_that_is_too_large(costs, monkeypatch):
  def refuse(*_, **__):
    raise tracker_cost.jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 99 GB\nand more')

  monkeypatch.setattr(tracker_cost, 'lower_step', refuse)
  content, printed = costs('--parts', 'memory', '--forms', 'masked', '--remats', 'none')
  assert [row['refused'] for row in content['memory']] == ['RESOURCE_EXHAUSTED: 99 GB'] * 2
  assert printed.count('does not fit') == 2


def test_seconds_are_per_frame_and_sequence(costs, monkeypatch):
  followed = []

  def interleave(ways, **_):
    for way in ways.values():
      tracks = way.start()
      followed.append([len(result.boxes) for _, result in tracks])
    return {name: [6.0, 12.0] for name in ways}, {}

  monkeypatch.setattr(rounds, 'interleave', interleave)
  content, printed = costs('--parts', 'speed', '--batch_sizes', 3, '--frames=2', '--keep_rate=0.5')
  assert followed == [[3, 3, 3]] * 2
  assert {name: row['rounds'] for name, row in content['speed'].items()} == {
    'batch 3, r = 0.5': [1.0, 2.0],
    'batch 3, r = 1': [1.0, 2.0],
  }
  assert '| batch 3, r = 0.5 | 1.500 (1.000..2.000) |' in printed


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ('--parts=nothing', "invalid choice: 'nothing'"),
    ('--rounds=0', '--rounds=0 is too small'),
    ('--batch_sizes=0', '--batch_sizes=0 is too small'),
    ('--keep_rate=0', '--keep_rate=0 is out of range'),
    ('--search_sizes=250', '--search_sizes: template_size=125 is not a multiple'),
  ],
)
def test_bad_input_is_one_sentence(run_here, monkeypatch, flags, message):
  monkeypatch.setattr(tracker_cost.jax.config, 'update', lambda name, value: None)
  done = run_here(tracker_cost.main, *flags.split())
  assert done.returncode == 2
  (error,) = done.stderr.splitlines()
  assert error.startswith('error: ') and message in error
