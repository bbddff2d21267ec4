r"""Times the training step with and without ASAD, and its parts, in interleaved rounds.

    python -m benchmarks.step_time --model=B --batch_size=2 --rounds=7 --json=FILE
    python -m benchmarks.step_time --model=B --batch_size=64 --torch --json=FILE

The steps are those of training, on one device, with a batch that is there already. The table gives
medians over the rounds, pairs/s, FLOPs by formula, MFU and memory. `asad_tax` is the time of a step
with ASAD over one without: the median of the ratios within rounds. --torch adds a plain step of
PyTorch. docs/performance.md explains every row.
"""

import argparse
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_check, rounds, torch_step, variants
from benchmarks.parts import Part, Workbench
from benchmarks.rounds import Way
from dropmae_jax.config import Config
from dropmae_jax.data import loader
from dropmae_jax.runtime import cli, targets
from dropmae_jax.runtime.errors import UserError

# Of one measurement: long enough to be accurate, short enough for many rounds.
LEAST_SECONDS = {'cpu': 0.3, 'gpu': 0.5, 'tpu': 0.5}
# Of the matrix product that shows the highest rate of the device.
PRODUCT_SIZE = {'cpu': 2048, 'gpu': 8192, 'tpu': 8192}


def make_parts(config: Config, arguments: argparse.Namespace) -> dict[str, Part]:
  """Compiles what is to be timed, by name."""
  device = jax.devices()[0]
  configs = variants.compared(config, device, without_fused=arguments.without_fused)
  if 'asad_fused' in configs:
    print(kernel_check.check(config, device), file=sys.stderr, flush=True)
  bench = Workbench(configs, device)
  made = dict(_announced(bench.steps()))
  if arguments.torch:
    made['step_torch'] = torch_step.make(config, np.array(bench.frames), device.platform)
  if not arguments.steps_only:
    made |= dict(_announced(bench.parts()))
  size = PRODUCT_SIZE[device.platform]
  product = matrix_product(size, config.dtype)
  return made | {'matrix_product': Part(product, times=0, flops=2 * size**3)}


def _announced(compiled: Iterable[tuple[str, Part]]) -> Iterator[tuple[str, Part]]:
  """Prints what has been compiled: on a fast device compilation takes most of the time."""
  for name, part in compiled:
    print(f'compiled {name} in {part.compile_seconds:.1f} s', file=sys.stderr, flush=True)
    yield name, part


def matrix_product(size: int, dtype: str) -> Way:
  """Returns a product of two square matrices to time: the highest rate a device reaches."""
  matrix = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a, b: a @ b).lower(matrix, matrix).compile()
  return Way(lambda: product(matrix, matrix), in_turn=jax.default_backend() == 'cpu')


def choose_peak(stated: float | None, dtype: str, reached: float) -> tuple[float, str]:
  """Returns the FLOPs per second that are an MFU of 100 %, and where they are from.

  Args:
    stated: by the user, in TFLOP/s.
    dtype: of the products; data sheets are used for bfloat16 only.
    reached: by the matrix product.
  """
  if stated:
    return stated * 1e12, 'as stated by --peak_tflops'
  known = targets.known_peak(jax.devices()[0].device_kind)
  if known and dtype == 'bfloat16':
    return known
  return reached, f'the fastest matrix product of this run, {dtype}'


def summarise(
  parts: dict[str, Part],
  seconds: dict[str, list[float]],
  calls: dict[str, int],
  config: Config,
  stated_peak: float | None,
) -> dict[str, Any]:
  """Returns the numbers of the table."""
  product = parts['matrix_product'].flops
  reached = product / min(seconds['matrix_product'])
  peak, source = choose_peak(stated_peak, config.dtype, reached)
  rows = {}
  for name, part in parts.items():
    rate = part.flops and part.flops / rounds.spread(seconds[name])['median']
    rows[name] = {
      'seconds': rounds.spread(seconds[name]),
      'times_per_step': part.times,
      'calls_per_measurement': calls[name],
      'flops': part.flops,
      'mfu': rate and rate / peak,
      'compile_seconds': part.compile_seconds,
      'memory': part.memory,
    }
    if name.startswith('step_'):
      rows[name]['pairs_per_second'] = config.batch_size / rows[name]['seconds']['median']
  ratios = {}
  steps = [name.removeprefix('step_') for name in parts if name.startswith('step_')]
  if 'encoder_fused' in parts:
    ratios['encoder_fused/encoder'] = rounds.ratios(seconds['encoder_fused'], seconds['encoder'])
  for kind, base in variants.comparisons(steps):
    for whole in ('step', 'decoder', 'attention'):
      name, first = f'{whole}_{kind}', f'{whole}_{base}'
      if name in parts and first in parts:
        ratios[f'{name}/{first}'] = rounds.ratios(seconds[name], seconds[first])
  stats = jax.devices()[0].memory_stats() or {}
  return {
    'rows': rows,
    'ratios': ratios,
    'asad_tax': ratios['step_asad/step_dense']['median'],
    'peak': {'flops_per_second': peak, 'source': source, 'matrix_product': reached},
    'device_peak_bytes': stats.get('peak_bytes_in_use'),
    'seconds_of_rounds': seconds,
  }


def show(result: dict[str, Any]) -> str:
  """Returns the table as text."""
  about, host, peak = result['arguments'], result['machine'], result['peak']
  lines = [
    f'ViT-{about["model"]}, {about["image_size"]} pixels, {about["batch_size"]} pairs,'
    f' {about["dtype"]}, P = {about["drop_rate"]}, remat={about["remat"]};'
    f' {about["rounds"]} rounds: median (range)',
    f'{host["device"]}, {host["cpu"]}, {host["cores"]} cores; '
    + ', '.join(
      f'{name} {version}' for name, version in host['libraries'].items() if version[0].isdigit()
    ),
    f'MFU of {peak["flops_per_second"] / 1e12:.4g} TFLOP/s: {peak["source"]}. A matrix product'
    f' reaches {peak["matrix_product"] / 1e12:.4g} TFLOP/s.',
    '',
    f'{"":<23}{"ms":<29}{"a step":<8}{"pairs/s":<9}{"GFLOP":<10}{"MFU":<8}{"GB":<8}compiled in',
  ]
  for name, row in result['rows'].items():
    cells = (
      rounds.show_range(row['seconds'], scale=1e3, digits=2),
      f'x {row["times_per_step"]}' if row['times_per_step'] else '',
      f'{row["pairs_per_second"]:.4g}' if 'pairs_per_second' in row else '',
      f'{row["flops"] / 1e9:.4g}' if row['flops'] else '',
      f'{row["mfu"]:.1%}' if row['mfu'] else '',
      f'{row["memory"]["total"] / 1e9:.2f}' if row['memory'] else '',
      f'{row["compile_seconds"]:.1f} s' if row['compile_seconds'] else '',
    )
    widths = (29, 8, 9, 10, 8, 8, 0)
    padded = (f'{cell:<{width}}' for cell, width in zip(cells, widths, strict=True))
    lines.append(f'{name:<23}{"".join(padded)}'.rstrip())
  lines += ['', f'asad_tax {result["asad_tax"]:.3f}; ratios within rounds:']
  for name, values in result['ratios'].items():
    lines.append(f'  {name:<46}{rounds.show_range(values, digits=3)}')
  if result['device_peak_bytes']:
    lines.append(f'most memory in use at once: {result["device_peak_bytes"] / 1e9:.2f} GB')
  return '\n'.join(lines)


def parse() -> argparse.Namespace:
  """Reads and checks the command line."""
  parser = cli.Parser(description=__doc__.splitlines()[0])
  variants.add_arguments(parser)
  parser.add_argument('--batch_size', type=int, required=True, help='pairs, on one device')
  parser.add_argument('--rounds', type=int, default=5, help='(%(default)s)')
  parser.add_argument('--steps_only', action='store_true', help='leave out the parts of the step')
  parser.add_argument('--torch', action='store_true', help='a plain step of PyTorch too')
  parser.add_argument('--peak_tflops', type=float, help='of the device, for MFU')
  parser.add_argument('--json', type=pathlib.Path, help='file to write the numbers to')
  arguments = parser.parse_args()
  for name in ('batch_size', 'rounds'):
    if getattr(arguments, name) < 1:
      raise UserError(f'--{name}={getattr(arguments, name)} is too small; give at least 1.')
  if arguments.peak_tflops is not None and not arguments.peak_tflops > 0:
    raise UserError(f'--peak_tflops={arguments.peak_tflops} is not positive; leave it out.')
  rounds.check_output(arguments.json)
  return arguments


def main() -> None:
  """The command line."""
  # As in a training run.
  loader.keep_freed_memory()
  arguments = parse()
  if arguments.torch:
    # Two libraries share the device, so JAX must not reserve all of its memory.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    rounds.import_torch()
  # CPUs are slow with bfloat16.
  arguments.dtype = arguments.dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
  config = variants.make_config(arguments, arguments.batch_size)
  try:
    parts = make_parts(config, arguments)
    seconds, calls = rounds.interleave(
      {name: part.way for name, part in parts.items()},
      rounds=arguments.rounds,
      least_seconds=LEAST_SECONDS[jax.default_backend()],
    )
  except RuntimeError as error:
    # In the words of XLA, and of PyTorch.
    if not re.search('RESOURCE_EXHAUSTED|out of memory', str(error)):
      raise
    raise UserError(
      f'--batch_size={arguments.batch_size} does not fit the memory of the device; use a smaller'
      ' one, or --remat=full.'
    ) from error
  numbers = summarise(parts, seconds, calls, config, arguments.peak_tflops)
  result = rounds.about(arguments) | numbers
  print(show(result))
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
  cli.run(main)
