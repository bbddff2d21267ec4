"""Times label propagation on one clip, beside plain PyTorch, frame by frame in turn.

    python -m benchmarks.propagation_speed [--model=B] [--input_size=480x880] [--frames=50]

PyTorch computes what published evaluators do: features of one frame at a time, the whole affinity
to the 21 frames that a frame looks at, top-k, softmax. It runs in a process of its own, and only
while ours waits, so the peak memory that is printed is ours alone.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np
import safetensors.numpy
import tqdm

from benchmarks.rounds import import_torch, machine
from dropmae_jax.evaluation import evaluate, features, label_propagation, readouts
from dropmae_jax.evaluation.features import Encoder
from dropmae_jax.evaluation.protocols import PROTOCOLS
from dropmae_jax.evaluation.readouts import Readout
from dropmae_jax.model import mae, vit
from dropmae_jax.pytorch import layouts
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError

if TYPE_CHECKING:
  from torch import Tensor

LABELS = 4
COMPILED = '/jax/core/compile/backend_compile_duration'
PROPAGATION = PROTOCOLS['cropmae'].propagation


def clip(num_frames: int, size: tuple[int, int], grid: tuple[int, int]) -> list[np.ndarray]:
  """Returns normalised frames of a moving texture, and labels of the first one."""
  rng = np.random.default_rng(0)
  ground = rng.normal(size=(size[0] + num_frames, size[1] + num_frames, 3)).astype(np.float32)
  frames = np.stack([ground[t : t + size[0], t : t + size[1]] for t in range(num_frames)])
  labels = rng.dirichlet(np.ones(LABELS), grid).astype(np.float32)
  return [frames, labels]


def torch_labels(folder: pathlib.Path, num_heads: int) -> Iterator['Tensor']:
  """Yields the labels of every frame, computed by PyTorch."""
  torch = import_torch()
  from dropmae_jax.pytorch import reference

  tensors = safetensors.numpy.load_file(folder / 'weights.safetensors')
  state = {name: torch.from_numpy(array) for name, array in tensors.items()}
  frames = torch.from_numpy(np.load(folder / 'frames.npy')).permute(0, 3, 1, 2)
  labels = torch.from_numpy(np.load(folder / 'labels.npy'))
  grid = labels.shape[:2]
  cells = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in grid))
  near = torch.cdist(cells, cells) < PROPAGATION.radius
  previous = PROPAGATION.num_previous
  with torch.inference_mode():

    def encode(number: int) -> 'Tensor':
      tokens = reference.encode(state, frames[number : number + 1], num_heads=num_heads)[0]
      return torch.nn.functional.normalize(tokens, dim=-1)

    propagated = [labels.flatten(0, 1)]
    encoded = [encode(0)]
    outside = torch.where(near, 0.0, -1e10)
    yield propagated[0]
    for number in range(1, len(frames)):
      query = encode(number)
      context = [0, *(max(0, each) for each in range(number - previous, number))]
      keys = torch.stack([encoded[each] for each in context])
      affinity = torch.einsum('id,sjd->isj', query, keys)
      affinity[:, 1:] += outside[:, None]
      top, indices = affinity.flatten(1).topk(PROPAGATION.top_k, dim=1)
      weights = (top / PROPAGATION.temperature).softmax(dim=1)
      values = torch.cat([propagated[each] for each in context])
      propagated.append((weights[..., None] * values[indices]).sum(dim=1))
      encoded.append(query)
      yield propagated[-1]


def answer(folder: pathlib.Path, num_heads: int) -> None:
  """Makes a step of PyTorch for every line of the standard input, and says how long it took."""
  steps = torch_labels(folder, num_heads)
  for _ in sys.stdin:
    began = time.perf_counter()
    propagated = next(steps)
    print(time.perf_counter() - began, flush=True)
    np.save(folder / 'torch.npy', propagated.numpy())


def compare(encoder: Encoder, size: tuple[int, int], num_frames: int) -> dict:
  """Runs both on the same clip."""
  architecture = encoder.architecture
  grid = tuple(side // architecture.patch_size for side in size)
  compiled: list[float] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(seconds) if name == COMPILED else None
  )
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    frames, labels = clip(num_frames, size, grid)
    np.save(folder / 'frames.npy', frames)
    np.save(folder / 'labels.npy', labels)
    state = layouts.to_torch(features.at_grid(encoder, grid), architecture)
    state = layouts.in_layout(state, 'timm')
    safetensors.numpy.save_file(state, folder / 'weights.safetensors')
    affinities = readouts.model_affinities(
      encoder, Readout(), PROPAGATION, [], lambda number: frames[number], num_frames, grid
    )
    ours = label_propagation.propagate(affinities, num_frames, labels, PROPAGATION)
    command = [sys.executable, '-m', 'benchmarks.propagation_speed', f'--answer={folder}']
    command += [f'--num_heads={architecture.num_heads}']
    seconds: dict[str, list[float]] = {'ours': [], 'torch': []}
    programs = []
    with subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
      for _ in tqdm.trange(num_frames, unit='frame', disable=None):
        began, before = time.perf_counter(), len(compiled)
        propagated = next(ours)
        seconds['ours'].append(time.perf_counter() - began)
        programs.append(len(compiled) - before)
        other.stdin.write('\n')
        other.stdin.flush()
        seconds['torch'].append(float(other.stdout.readline()))
      other.stdin.close()
    difference = np.abs(np.load(folder / 'torch.npy') - propagated.reshape(-1, LABELS)).max()
  # The first frames compile, and are less work.
  rest = {name: values[5:] for name, values in seconds.items()}
  return {
    'seconds_per_frame': {name: statistics.median(values) for name, values in rest.items()},
    'ratio': statistics.median(
      theirs / ours for ours, theirs in zip(rest['ours'], rest['torch'], strict=True)
    ),
    'first_frames': seconds['ours'][:5],
    'programs_compiled_by_frame': programs,
    'peak_memory_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    'largest_difference_of_labels': float(difference),
  }


def main() -> None:
  """The command line."""
  parser = cli.Parser(
    prog='propagation_speed',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--model', choices=vit.SIZES, default='B', help='(%(default)s)')
  add('--input_size', type=evaluate.size_in_pixels, default=(480, 880), metavar='HxW')
  add('--frames', type=int, default=50, help='(%(default)s)')
  add('--json', type=pathlib.Path, help='file to write the numbers to')
  add('--answer', type=pathlib.Path, help=argparse.SUPPRESS)
  add('--num_heads', type=int, help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.answer:
    answer(given.answer, given.num_heads)
    return
  if given.frames < 10:
    raise UserError(f'--frames={given.frames} is too small; give at least 10.')
  architecture = vit.architecture_of_size(given.model)
  patch = architecture.patch_size
  if given.input_size[0] % patch or given.input_size[1] % patch:
    raise UserError(f'--input_size: patches of {patch} pixels do not divide it.')
  params = mae.init_params(jax.random.key(0), architecture)
  encoder = Encoder(params, architecture, None, True, True, [], [], {'path': 'random weights'})
  content = compare(encoder, given.input_size, given.frames)
  content['machine'] = machine()
  for name, value in content.items():
    cli.print_line(f'{name}: {value}')
  if given.json:
    given.json.write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
  cli.run(main)
