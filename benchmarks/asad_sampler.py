r"""Times the sampler of ASAD, from a layer's logits to the dropped pairs, and that of PyTorch.

    python -m benchmarks.asad_sampler --rounds=9 --json=FILE

Ours is `fast_asad.sampling_weights` and `weighted_sampling.sample_drops`, jitted, in the chunks of
the training step. PyTorch's is that of the published method, but without a loop over heads:
softmax, weights, `torch.multinomial` without replacement, scatter. Both take the same float32
logits of a decoder layer, both on the CPU or both on the GPU, in interleaved rounds. Results:
docs/performance.md.
"""

import argparse
import functools
import json
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from benchmarks import rounds
from benchmarks.parts import chunks_here, drops
from benchmarks.rounds import Way
from dropmae_jax.data import loader
from dropmae_jax.model.asad import EPSILON, Logits, num_dropped
from dropmae_jax.model.chunks import ChunkCounts
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError

if TYPE_CHECKING:
  from torch import Tensor

# A decoder layer of ViT-B at 224 pixels.
HEADS, TOKENS, DROP_RATE = 16, 392, 0.1
BATCH_SIZES = (1, 2, 4)


def torch_weights(logits: 'Tensor') -> 'Tensor':
  """Returns the weights of within-frame pairs [b, f, m, i, n] from logits [b, m, l, l]."""
  import torch

  n = logits.shape[-1] // 2
  # [b, m, f, i, g, j]: attention of query i of frame f to key j of frame g.
  attention = logits.softmax(dim=-1).unflatten(-1, (2, n)).unflatten(2, (2, n))
  own = torch.stack([attention[:, :, 0, :, 0], attention[:, :, 1, :, 1]], dim=1)
  other = torch.stack([attention[:, :, 0, :, 1], attention[:, :, 1, :, 0]], dim=1)
  best_match = other.amax(dim=-1, keepdim=True) + EPSILON
  own = own + EPSILON
  own.diagonal(dim1=-2, dim2=-1).zero_()
  return own / own.sum(dim=-1, keepdim=True) * best_match


def torch_drops(logits: 'Tensor', count: int) -> 'Tensor':
  """Draws the pairs to drop as the published code does; True where dropped."""
  import torch

  weights = torch_weights(logits).transpose(1, 2)
  rows = weights.flatten(0, 1).flatten(1)
  drawn = torch.multinomial(rows, count, replacement=False)
  dropped = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, drawn, True)
  return dropped.view(weights.shape).transpose(1, 2)


def make_logits(batch_size: int, chunks: ChunkCounts) -> tuple[Logits, np.ndarray]:
  """Returns the same random logits twice: in chunks for ours, and as [b, m, l, l] for PyTorch."""
  n = TOKENS // 2
  own, other = np.random.default_rng(0).normal(size=(2, batch_size, 2, HEADS, n, n))
  own, other = own.astype(np.float32), other.astype(np.float32)
  earlier = np.concatenate([own[:, 0], other[:, 0]], axis=-1)
  later = np.concatenate([other[:, 1], own[:, 1]], axis=-1)
  sizes = {'s': chunks.samples, 'h': chunks.heads}
  ours = (rearrange(each, '(s c) f (h k) i n -> (s h) c f k i n', **sizes) for each in (own, other))
  return Logits(*map(jnp.asarray, ours)), np.concatenate([earlier, later], axis=-2)


def make_ways(batch_size: int) -> dict[str, Way]:
  """Returns both samplers on the same logits."""
  torch = rounds.import_torch()
  is_cpu = jax.default_backend() == 'cpu'
  if not is_cpu and not torch.cuda.is_available():
    raise UserError(
      f'PyTorch {torch.__version__} does not see the {jax.default_backend()}; set'
      ' JAX_PLATFORMS=cpu to compare both on the CPU.'
    )
  count = num_dropped(TOKENS // 2, DROP_RATE)
  chunks = chunks_here(batch_size, HEADS, TOKENS)
  logits, matrix = make_logits(batch_size, chunks)
  keys = jax.random.split(jax.random.key(0), batch_size)
  sample = jax.jit(functools.partial(drops, chunks=chunks, count=count))
  sample = sample.lower(keys, logits).compile()
  tensor = torch.from_numpy(matrix).to('cpu' if is_cpu else 'cuda')
  wait = (lambda _: None) if is_cpu else (lambda _: torch.cuda.synchronize())
  return {
    'ours': Way(lambda: sample(keys, logits), in_turn=is_cpu),
    'torch': Way(lambda: torch_drops(tensor, count), wait, in_turn=is_cpu),
  }


def measure(num_rounds: int) -> list[dict[str, Any]]:
  """Measures all batch sizes in turn in every round."""
  ways = {
    (name, batch_size): way
    for batch_size in BATCH_SIZES
    for name, way in make_ways(batch_size).items()
  }
  seconds, calls = rounds.interleave(ways, rounds=num_rounds, least_seconds=0.2)
  return [
    {
      'batch_size': batch_size,
      'seconds': {name: rounds.spread(seconds[name, batch_size]) for name in ('ours', 'torch')},
      'calls_per_measurement': {name: calls[name, batch_size] for name in ('ours', 'torch')},
      'speedup': rounds.ratios(seconds['torch', batch_size], seconds['ours', batch_size]),
    }
    for batch_size in BATCH_SIZES
  ]


def show(result: dict[str, Any]) -> str:
  """Returns the table as text."""
  count, host = num_dropped(TOKENS // 2, DROP_RATE), result['machine']
  lines = [
    f'{host["device"]}, {host["cpu"]}, {host["cores"]} cores, as many PyTorch threads; jax'
    f' {host["libraries"]["jax"]}, torch {host["libraries"]["torch"]}',
    f'{HEADS} heads, {TOKENS} tokens, {count} pairs of a head dropped;'
    f' {result["arguments"]["rounds"]} rounds: median (range)',
    f'{"samples":<9}{"ours, ms":<26}{"PyTorch, ms":<28}times as fast',
  ]
  for row in result['rows']:
    ours, theirs = (
      rounds.show_range(row['seconds'][name], scale=1e3) for name in ('ours', 'torch')
    )
    faster = rounds.show_range(row['speedup'])
    lines.append(f'{row["batch_size"]:<9}{ours:<26}{theirs:<28}{faster}')
  return '\n'.join(lines)


def parse() -> argparse.Namespace:
  """Reads and checks the command line."""
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5, help='(%(default)s)')
  parser.add_argument('--json', type=pathlib.Path, help='file to write the numbers to')
  arguments = parser.parse_args()
  if arguments.rounds < 1:
    raise UserError(f'--rounds={arguments.rounds} is too small; give at least 1.')
  rounds.check_output(arguments.json)
  return arguments


def main() -> None:
  """The command line."""
  # As in a training run.
  loader.keep_freed_memory()
  arguments = parse()
  rows = measure(arguments.rounds)
  threads = rounds.import_torch().get_num_threads()
  result = rounds.about(arguments) | {'torch_threads': threads, 'rows': rows}
  print(show(result))
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
  cli.run(main)
