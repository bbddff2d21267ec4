r"""Compiles the training step for a device that is not here, with and without ASAD.

    python -m benchmarks.compiler.report --target=tpu_v5e --batch_size=16
    python -m benchmarks.compiler.report --target=h200 --batch_size=64 --json=FILE

Prints of each step its FLOPs, main memory traffic, memory, kernels, and the time by the speeds of
a data sheet; and what ASAD costs by these. Nothing is run, so no time is measured. Needs
`pip install 'jax[tpu]'` or the CUDA plugin of jax. Results: docs/performance.md.
"""

import argparse
import json
import pathlib
from typing import Any

import jax

from benchmarks import rounds, variants
from benchmarks.compiler import compiled
from dropmae_jax.model import flops
from dropmae_jax.runtime import cli, targets
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.runtime.targets import TARGETS


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
  """Returns the ratios of times, traffic and kernels between the steps that fit."""

  def ratios(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    times = {each: row['projected'][each] / base['projected'][each] for each in ('least', 'most')}
    counts = ['main_memory_bytes', 'number_of_kernels']
    # The cycles of Pallas kernels are not known.
    if base.get('expected_cycles') and not row['pallas_kernels']:
      counts.append('expected_cycles')
    return times | {name: row[name] / base[name] for name in counts}

  return {
    f'{name}/{base}': ratios(rows[name], rows[base])
    for name, base in variants.comparisons(rows)
    if 'projected' in rows[name] and 'projected' in rows[base]
  }


def measure(arguments: argparse.Namespace, device: jax.Device) -> dict[str, Any]:
  """Compiles every variant of the step; one may turn out not to fit."""
  base = variants.make_config(arguments, arguments.batch_size)
  target = TARGETS[arguments.target]
  formula = base.batch_size * flops.step(base.model, base.objective.mask_ratio)
  rows = {}
  configs = variants.compared(base, device, without_fused=arguments.without_fused)
  for name, config in configs.items():
    row = compiled.compile_step(config, device, target, quick=arguments.quick)
    row['flops_by_formula'] = formula
    rows[name] = row
    print(show(name, row), flush=True)
  return {'rows': rows, 'ratios': compare(rows)}


def show(name: str, row: dict[str, Any]) -> str:
  """Returns one step as text."""
  if 'refused' in row:
    return f'{name}: does not fit: {row["refused"]}'
  memory, projected = row['memory'], row['projected']
  kinds = ', '.join(
    f'{number} {kind}' for kind, number in sorted(row['kernels'].items(), key=lambda x: -x[1])
  )
  cycles = ''
  if row['expected_cycles']:
    cycles = (
      f'  {row["expected_cycles"] / 1e6:.1f} million cycles expected by the compiler'
      + (f' without {row["pallas_kernels"]} Pallas kernels' if row['pallas_kernels'] else '')
      + '\n'
    )
  return (
    f'{name} (compiled in {row["compile_seconds"]:.0f} s):\n'
    f'  {row["flops_by_formula"]:.4g} FLOPs by formula, {row["flops"]:.4g} by XLA;'
    f' {row["main_memory_bytes"] / 1e9:.2f} GB of main memory traffic\n'
    f'  memory {memory["total"] / 1e9:.2f} GB, temporary arrays {memory["temp"] / 1e9:.2f} of it\n'
    f'  {row["number_of_kernels"]} kernels: {kinds}\n{cycles}'
    f'  projected: FLOPs {projected["compute"] * 1e3:.1f} ms, memory'
    f' {projected["memory"] * 1e3:.1f} ms; step {projected["least"] * 1e3:.1f} (both at once) to'
    f' {projected["most"] * 1e3:.1f} ms (one after the other)'
  )


def parse() -> argparse.Namespace:
  """Reads and checks the command line."""
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--target', required=True, choices=sorted(TARGETS), help='kind of device')
  parser.add_argument('--batch_size', type=int, default=64, help='pairs (%(default)s)')
  variants.add_arguments(parser)
  parser.add_argument(
    '--quick', action='store_true', help='TPU: a third of the time, but other bytes and kernels'
  )
  parser.add_argument('--json', type=pathlib.Path, help='file to write the numbers to')
  arguments = parser.parse_args()
  arguments.dtype = arguments.dtype or 'bfloat16'
  if arguments.batch_size < 1:
    raise UserError(f'--batch_size={arguments.batch_size} is too small; give at least 1.')
  rounds.check_output(arguments.json)
  return arguments


def main() -> None:
  """The command line."""
  arguments = parse()
  # Devices of this machine are neither used nor waited for.
  jax.config.update('jax_platforms', 'cpu')
  (device,) = targets.devices(arguments.target)
  target = TARGETS[arguments.target]
  print(
    f'{device.device_kind}, ViT-{arguments.model}, {arguments.batch_size} pairs,'
    f' {arguments.dtype}, P = {arguments.drop_rate}, remat={arguments.remat}. Projected with'
    f' {target.flops / 1e12:g} TFLOP/s and {target.memory_bandwidth / 1e9:g} GB/s of memory'
    f' ({target.source}).',
    flush=True,
  )
  result = measure(arguments, device)
  for name, tax in result['ratios'].items():
    print(
      f'{name}: time {tax["least"]:.3f} (both at once) or {tax["most"]:.3f} (one'
      f' after the other), memory traffic {tax["main_memory_bytes"]:.3f}, kernels'
      f' {tax["number_of_kernels"]:.3f}'
      + (f', cycles {tax["expected_cycles"]:.3f}' if 'expected_cycles' in tax else '')
    )
  if arguments.json:
    arguments.json.write_text(json.dumps(rounds.about(arguments) | result, indent=1))


if __name__ == '__main__':
  cli.run(main)
