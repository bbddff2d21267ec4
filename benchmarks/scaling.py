r"""Compiles the training step for devices that are not here, and says what it will need there.

    python -m benchmarks.scaling --target=tpu_v5e --chips=16 --model=B --pairs_per_device=32
    python -m benchmarks.scaling --target=h200 --model=L --pairs_per_device=16,32,64 --quick

The first prints FLOPs, bytes, memory, messages, and times projected by data sheets; the second, of
several batches, how memory grows, and the largest batch that will fit. It is the step of
`dropmae_jax.train` as the compiler of the target makes it; nothing is run, so nothing is measured.
Needs `pip install 'jax[tpu]'` or the CUDA plugin of jax, and no device. Results: docs/scaling.md.
"""

import argparse
import json
import pathlib
from typing import Any

import jax

from benchmarks import rounds, targets
from benchmarks.compiled import compile_step
from benchmarks.targets import TARGETS
from dropmae_jax.config import DTYPES, Config, MeshOptions
from dropmae_jax.kernels import implementations
from dropmae_jax.model import mae, vit
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError


def make_recipe(arguments: argparse.Namespace, pairs_per_device: int) -> Config:
  """Returns the recipe that is asked for, with as many pairs for each device.

  Raises:
    UserError: its numbers do not fit one another.
  """
  size = {'image_size': arguments.image_size} if arguments.image_size else {}
  try:
    return Config(
      data_dir='',
      num_steps=1000,
      batch_size=pairs_per_device * arguments.chips,
      accumulation_steps=arguments.accumulation_steps,
      model=architecture_of_size(arguments.model, **size),
      dtype=arguments.dtype,
      attention=arguments.attention,
      remat=arguments.remat,
      mesh=MeshOptions(data=arguments.data, fsdp=arguments.fsdp),
    )
  except ValueError as error:
    raise UserError(f'config: {error}') from error


def measure(
  arguments: argparse.Namespace, pairs_per_device: int, devices: list[jax.Device]
) -> dict[str, Any]:
  """Compiles and analyses the step of one batch; it may turn out not to fit."""
  options = make_recipe(arguments, pairs_per_device)
  result: dict[str, Any] = {'pairs_per_device': pairs_per_device, 'batch_size': options.batch_size}
  target = TARGETS[arguments.target]
  return result | compile_step(options, devices, target, quick=arguments.quick)


def largest_batches(results: list[dict[str, Any]], limits: list[float]) -> dict[str, Any]:
  """Lays a line through memory over batch, and says which batch reaches each limit.

  The line is that of the smallest and the largest batch that fit; how far those between are off
  it says how good it is, if there are any.
  """
  points = [(row['pairs_per_device'], row['memory']['total']) for row in results if 'memory' in row]
  if len(points) < 2:
    return {}
  (x0, y0), (x1, y1) = points[0], points[-1]
  slope = (y1 - y0) / (x1 - x0)
  state = y0 - slope * x0
  return {
    'bytes_per_pair': slope,
    'bytes_without_pairs': state,
    'worst_error': max((abs(state + slope * x - y) / y for x, y in points[1:-1]), default=None),
    'largest': {f'{gb:g} GB': max(0, int((gb * 1e9 - state) / slope)) for gb in limits},
  }


def show(result: dict[str, Any]) -> str:
  """Draws one batch as text."""
  head = f'{result["pairs_per_device"]} pairs per device, batch {result["batch_size"]}'
  if 'refused' in result:
    return f'{head}: does not fit: {result["refused"]}'
  memory, projected = result['memory'], result['projected']
  lines = [
    f'{head} (compiled in {result["compile_seconds"]:.0f} s); of one device and step:',
    f'  {result["flops"]:.4g} FLOPs, {result["bytes_accessed"]:.4g} bytes accessed (0: not told),'
    f' {result["main_memory_bytes"]:.4g} in main memory',
    f'  memory {memory["total"] / 1e9:.2f} GB: state and batch {memory["argument"] / 1e9:.2f},'
    f' temporary {memory["temp"] / 1e9:.2f}, program {memory["generated_code"] / 1e9:.2f};'
    f' peak by the compiler {memory["peak"] / 1e9:.2f} GB',
    f'  sends {result["sent_bytes"] / 1e6:.1f} MB,'
    f' {result["sent_beside_other_work"] / 1e6:.1f} MB of it beside other work',
  ]
  for row in result['collectives']:
    lines.append(
      f'    {row["number"]:5d} x {row["kind"]:18s} {row["dtypes"]:9s} among {row["group"]:3d}:'
      f' {row["operand_mb"]:9.2f} MB handed in, {row["sent_mb"]:9.2f} MB sent'
    )
  lines += [
    f'  projected: FLOPs {projected["compute"] * 1e3:.1f} ms, memory'
    f' {projected["memory"] * 1e3:.1f} ms, messages {projected["messages"] * 1e3:.2f} ms;'
    f' step {projected["least"] * 1e3:.1f} (all at once) to {projected["most"] * 1e3:.1f} ms',
    f'  projected efficiency: {projected["efficiency_beside"]:.1%} with messages beside the work,'
    f' {projected["efficiency_after"]:.1%} after it,'
    f' {projected["efficiency_at_peak"]:.1%} after work at the peak FLOP rate',
  ]
  return '\n'.join(lines)


def parse() -> argparse.Namespace:
  """Reads and checks the command line."""
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--target', required=True, choices=sorted(TARGETS), help='kind of device')
  parser.add_argument('--chips', type=int, default=1, help='devices (%(default)s)')
  parser.add_argument('--model', default='B', choices=sorted(vit.SIZES), help='(%(default)s)')
  parser.add_argument('--image_size', type=int, default=0, help='pixels (224)')
  parser.add_argument('--pairs_per_device', default='32', help='or several: 8,16,32 (%(default)s)')
  parser.add_argument('--accumulation_steps', type=int, default=1, help='(%(default)s)')
  parser.add_argument('--data', type=int, default=0, help='mesh.data; 0: what is left (0)')
  parser.add_argument('--fsdp', type=int, default=1, help='mesh.fsdp (%(default)s)')
  parser.add_argument('--remat', default='none', choices=sorted(mae.REMATERIALISATIONS))
  parser.add_argument('--attention', default='auto', choices=implementations.KINDS)
  parser.add_argument('--dtype', default='bfloat16', choices=DTYPES, help='(%(default)s)')
  parser.add_argument('--memory_gb', default='16,80,141', help='to fill (%(default)s)')
  parser.add_argument(
    '--quick',
    action='store_true',
    help='TPU: a third of the time; FLOPs, memory and messages are the same, the bytes are not',
  )
  parser.add_argument('--target_config', type=pathlib.Path, help="GPU: XLA's text proto of it")
  parser.add_argument('--json', type=pathlib.Path, help='file to write the numbers to')
  arguments = parser.parse_args()
  for name in ('chips', 'accumulation_steps'):
    if getattr(arguments, name) < 1:
      raise UserError(f'--{name}={getattr(arguments, name)} is too small; give at least 1.')
  try:
    arguments.pairs = sorted({int(number) for number in arguments.pairs_per_device.split(',')})
    arguments.limits = [float(number) for number in arguments.memory_gb.split(',')]
  except ValueError as error:
    raise UserError(f'{error}; give numbers with commas between them.') from error
  if arguments.pairs[0] < 1:
    raise UserError(f'--pairs_per_device={arguments.pairs_per_device}: give at least 1.')
  rounds.check_output(arguments.json)
  return arguments


def main() -> None:
  """The command line."""
  arguments = parse()
  # Devices that are here are not used, nor waited for.
  jax.config.update('jax_platforms', 'cpu')
  if arguments.target == 'cpu':
    jax.config.update('jax_num_cpu_devices', arguments.chips)
  found = targets.devices(arguments.target, arguments.chips, arguments.target_config)
  target = TARGETS[arguments.target]
  print(
    f'{arguments.chips} x {found[0].device_kind}, ViT-{arguments.model}, {arguments.dtype},'
    f' mesh.fsdp={arguments.fsdp}, remat={arguments.remat}. Projected with'
    f' {target.flops / 1e12:g} TFLOP/s, {target.memory_bandwidth / 1e9:g} GB/s of memory and'
    f' {target.link / 1e9:g} GB/s of links ({target.source}).',
    flush=True,
  )
  results = []
  for pairs in arguments.pairs:
    results.append(measure(arguments, pairs, found))
    print(show(results[-1]), flush=True)
  fit = largest_batches(results, arguments.limits)
  if fit:
    error = fit['worst_error']
    known = 'not checked by a third batch' if error is None else f'within {error:.1%} between'
    print(
      f'memory = {fit["bytes_without_pairs"] / 1e9:.3f} GB + pairs x'
      f' {fit["bytes_per_pair"] / 1e9:.4f} GB ({known}); so there fit '
      + ', '.join(f'{pairs} pairs into {limit}' for limit, pairs in fit['largest'].items())
    )
  if arguments.json:
    asked = {name: str(value) for name, value in vars(arguments).items()}
    arguments.json.write_text(
      json.dumps({'arguments': asked, 'results': results, 'fit': fit}, indent=1)
    )


if __name__ == '__main__':
  cli.run(main)
