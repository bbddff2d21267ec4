"""Timing in interleaved rounds, and a description of the machine: shared by the benchmarks.

The speed of a shared machine changes all the time. So every way is measured once in each round, and
two ways are compared by the ratios within rounds.
"""

import argparse
import contextlib
import importlib.metadata
import os
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dropmae_jax.runtime.errors import UserError

LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'libtpu', 'jax-cuda12-plugin', 'torch')


class Way(NamedTuple):
  """Something to time.

  Attributes:
    start: starts one call, and returns what `wait` waits for.
    wait: returns when that is done.
    in_turn: each call is waited for before the next one starts. Otherwise calls are queued, as in
      a training loop, so that the device always has work.
  """

  start: Callable[[], Any]
  wait: Callable[[Any], Any] = jax.block_until_ready
  in_turn: bool = True

  def seconds(self, calls: int) -> float:
    """Returns the mean time of some calls."""
    began = time.perf_counter()
    for _ in range(calls):
      result = self.start()
      if self.in_turn:
        self.wait(result)
    self.wait(result)
    return (time.perf_counter() - began) / calls


def warm_up(way: Way, least_seconds: float) -> int:
  """Runs a way until caches are warm; returns how many calls make a measurement."""
  way.seconds(2)
  return min(100, max(1, round(least_seconds / way.seconds(1))))


def interleave(
  ways: Mapping[str, Way], *, rounds: int, least_seconds: float
) -> tuple[dict[str, list[float]], dict[str, int]]:
  """Measures every way once per round, in alternating order.

  Args:
    ways: by name.
    rounds: how many.
    least_seconds: of a measurement; a fast way is called several times for that.

  Returns:
    The seconds of a call in each round, and how many calls made a measurement.
  """
  calls = {name: warm_up(way, least_seconds) for name, way in ways.items()}
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for number in range(rounds):
    for name in list(ways)[:: -1 if number % 2 else 1]:
      seconds[name].append(ways[name].seconds(calls[name]))
    print(f'round {number + 1} of {rounds} is done', file=sys.stderr, flush=True)
  return seconds, calls


def spread(values: Sequence[float]) -> dict[str, float]:
  """Returns median, minimum and maximum."""
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
  """Returns the spread of the ratios of two ways within rounds."""
  return spread([a / b for a, b in zip(over, under, strict=True)])


def show_range(values: Mapping[str, float], *, scale: float = 1, digits: int = 1) -> str:
  """Formats a spread as `median (min..max)`."""
  median, low, high = (f'{values[name] * scale:.{digits}f}' for name in ('median', 'min', 'max'))
  return f'{median} ({low}..{high})'


def cores() -> int:
  """Returns the number of cores that this process may use."""
  return len(os.sched_getaffinity(0))


def machine(libraries: Sequence[str] = LIBRARIES) -> dict[str, Any]:
  """Describes the machine, and the versions of libraries."""
  cpus = re.findall(r'model name\s*: (.*)', pathlib.Path('/proc/cpuinfo').read_text())
  installed = {}
  for library in libraries:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      installed[library] = importlib.metadata.version(library)
  return {
    'cpu': cpus[0] if cpus else platform.processor(),
    'cores': cores(),
    'device': jax.devices()[0].device_kind,
    'python': platform.python_version(),
    'libraries': {name: installed.get(name, 'not installed') for name in libraries},
  }


def about(arguments: argparse.Namespace) -> dict[str, Any]:
  """Describes a measurement: its command, the machine, and all arguments as text."""
  return {
    'command': ' '.join(['python', *sys.orig_argv[1:]]),
    'machine': machine(),
    'arguments': {name: str(value) for name, value in vars(arguments).items()},
  }


def check_output(path: pathlib.Path | None) -> None:
  """Checks before a measurement that its numbers can be written.

  Raises:
    UserError: they cannot.
  """
  if path and not path.absolute().parent.is_dir():
    raise UserError(f'the folder of --json={path} does not exist; make it first.')
  if path and path.is_dir():
    raise UserError(f'--json={path} is a folder; give the name of a file.')


def import_torch() -> Any:
  """Imports PyTorch, and lets it use as many threads as there are cores.

  Raises:
    UserError: it is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise UserError(
      "this compares with PyTorch, which is not installed; pip install -e '.[torch]', or leave"
      ' the comparison out.'
    ) from error
  torch.set_num_threads(cores())
  return torch
