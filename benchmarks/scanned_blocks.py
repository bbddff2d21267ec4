r"""Times the encoder's blocks written out one after the other, as training has them, and as a scan.

    python -m benchmarks.scanned_blocks --model=B --batch_size=2 --rounds=5 --json=FILE

A scan is compiled once for all blocks, over parameters that are stacked; written out, a compiler
may fuse across blocks and choose for each. Both are forward and backward, of the visible tokens of
224 pixels, and take turns in every round. Results: docs/performance.md.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import rounds
from benchmarks.rounds import Way
from dropmae_jax.config import DTYPES
from dropmae_jax.data import loader_process
from dropmae_jax.model import attention, masking, vit
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError

MASK_RATIO = 0.75


def make_ways(
  size: str, batch_size: int, dtype: str
) -> tuple[dict[str, Callable], tuple[Any, Any, jax.Array]]:
  """Returns both ways to run the blocks, as functions to jit, and what both take.

  That is the parameters of every block, the same stacked, and tokens; they return the sum of the
  results and its gradient for tokens and for the parameters that they use.
  """
  a = architecture_of_size(size)
  settings = {'dtype': dtype, 'rngs': nnx.Rngs(params=0)}
  blocks = [vit.Block(a.width, a.num_heads, a.mlp_ratio, **settings) for _ in range(a.depth)]
  graphdef, _ = nnx.split(blocks[0])
  params = [nnx.split(block)[1] for block in blocks]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
  shape = (batch_size, masking.num_visible(a.num_tokens, MASK_RATIO), a.width)
  tokens = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

  def run(of_block: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, of_block)(tokens, attention.dense_attention)

  def written_out(params: Any, tokens: jax.Array) -> jax.Array:
    for of_block in params:
      tokens = run(of_block, tokens)
    return tokens.sum()

  def scanned(stacked: Any, tokens: jax.Array) -> jax.Array:
    last, _ = jax.lax.scan(lambda tokens, each: (run(each, tokens), None), tokens, stacked)
    return last.sum()

  def both(function: Callable, which: int) -> Callable:
    grad = jax.value_and_grad(function, (0, 1))
    return lambda *given: grad(given[which], given[2])

  ways = {'written_out': both(written_out, 0), 'scanned': both(scanned, 1)}
  return ways, (params, stacked, tokens)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
  """Compiles both, and has them take turns."""
  functions, given = make_ways(arguments.model, arguments.batch_size, arguments.dtype)
  ways, compile_seconds = {}, {}
  for name, function in functions.items():
    began = time.monotonic()
    made = jax.jit(function).lower(*given).compile()
    compile_seconds[name] = time.monotonic() - began
    ways[name] = Way(lambda made=made: made(*given))
  seconds, _ = rounds.interleave(ways, rounds=arguments.rounds, least_seconds=0.3)
  return {
    'rows': {
      name: {'seconds': rounds.spread(seconds[name]), 'compile_seconds': compile_seconds[name]}
      for name in ways
    },
    'scanned/written_out': rounds.ratios(seconds['scanned'], seconds['written_out']),
  }


def parse() -> argparse.Namespace:
  """Reads and checks the command line."""
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default='B', choices=sorted(vit.SIZES), help='(%(default)s)')
  parser.add_argument('--batch_size', type=int, required=True, help='pairs')
  parser.add_argument('--dtype', choices=DTYPES, help='of the products')
  parser.add_argument('--rounds', type=int, default=5, help='(%(default)s)')
  parser.add_argument('--json', type=pathlib.Path, help='file to write the numbers to')
  arguments = parser.parse_args()
  for name in ('batch_size', 'rounds'):
    if getattr(arguments, name) < 1:
      raise UserError(f'--{name}={getattr(arguments, name)} is too small; give at least 1.')
  rounds.check_output(arguments.json)
  return arguments


def main() -> None:
  """The command line."""
  # As a training run does without loader processes.
  loader_process.keep_freed_memory()
  arguments = parse()
  # CPUs are slow with bfloat16.
  arguments.dtype = arguments.dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
  asked = {name: str(value) for name, value in vars(arguments).items()}
  about = {'command': rounds.command(), 'machine': rounds.machine(), 'arguments': asked}
  result = about | measure(arguments)
  for name, row in result['rows'].items():
    milliseconds = rounds.show_range(row['seconds'], scale=1e3)
    print(f'{name:<12}{milliseconds} ms, compiled in {row["compile_seconds"]:.1f} s')
  print(f'scanned over written out: {rounds.show_range(result["scanned/written_out"], digits=3)}')
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
  cli.run(main)
