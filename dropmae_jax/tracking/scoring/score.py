"""Scores the files of results of a data set by the rules of a toolkit.

content = score(results, 'got10k', root, split='val', plot_folder=folder)
for line in table(content): ...
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dropmae_jax.runtime.errors import UserError, os_errors_as_user_errors
from dropmae_jax.tracking.scoring import conventions, plots
from dropmae_jax.tracking.scoring.conventions import Convention, Measured
from dropmae_jax.tracking.sequences import benchmarks, result_files
from dropmae_jax.tracking.sequences.sequence import Sequence

# Of dropmae-tracker run, below its --output, which is the tracker's name.
RESULTS = 'results'


def score(
  results: pathlib.Path,
  benchmark: str,
  root: pathlib.Path,
  toolkit: str | None = None,
  *,
  split: str | None = None,
  others: tuple[pathlib.Path, ...] = (),
  plot_folder: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Scores the results of a tracker, and of others beside it.

  Args:
    results: folder with the results of all sequences, as `result_files` or the toolkit writes them.
    benchmark: a name in `benchmarks.BENCHMARKS`.
    root: of the data set.
    toolkit: a name in `conventions.CONVENTIONS`; None: that whose numbers papers report.
    split: of the data set; GOT-10k's and TrackingNet's sets for testing have no truth to score by.
    others: folders of results of other trackers, which are named after their folders.
    plot_folder: gets a PNG of each curve with all trackers; is made.

  Returns:
    Values for JSON: 'toolkit', 'convention' and 'rules', which say how the numbers were computed;
    'summary', numbers in percent; 'sequences', likewise of each; 'curves', in percent too, and
    their 'thresholds'; 'others', of the other trackers; 'benchmark', 'root', 'split', 'results',
    'num_sequences', 'num_frames' and 'plots'.

  Raises:
    UserError: the data set or results are missing, damaged, or do not fit together; or there is no
      such toolkit, or the data set lacks what its rules need.
  """
  sequences = benchmarks.open_sequences(benchmark, root, split)
  name = conventions.name_of(toolkit, benchmark)
  convention = conventions.CONVENTIONS[name]
  _check_truth(sequences, benchmark)
  folders = _by_name([results, *others])
  measured = {
    tracker: _measure(folder, benchmark, sequences, convention)
    for tracker, folder in folders.items()
  }
  trackers = {
    tracker: {'results': str(folder), **_numbers(measured[tracker], sequences, convention)}
    for tracker, folder in folders.items()
  }
  ours = next(iter(trackers))
  content = {
    'benchmark': benchmark,
    'root': str(root),
    'split': split,
    'toolkit': convention.toolkit,
    'convention': name,
    'rules': convention.rules,
    'num_sequences': len(sequences),
    'num_frames': sum(sequence.num_frames for sequence in sequences),
    'tracker': ours,
    **trackers.pop(ours),
    'thresholds': {key: curve.thresholds.tolist() for key, curve in convention.curves.items()},
    'others': trackers,
    'plots': [],
  }
  if plot_folder is not None:
    content['plots'] = [str(path) for path in _plot(content, convention, plot_folder)]
  return content


def _check_truth(sequences: list[Sequence], benchmark: str) -> None:
  """Checks that all true boxes are there."""
  withheld = next((sequence for sequence in sequences if sequence.is_withheld), None)
  if withheld is None:
    return
  remedy = 'give boxes of all frames'
  if benchmark in result_files.ARCHIVES:
    other = {'got10k': 'val', 'trackingnet': 'TRAIN_0'}[benchmark]
    remedy = f'send an archive of the results to its server, or score --split={other}'
  raise UserError(
    f'sequence {withheld.name!r} has a true box in its first frame only, so that nothing can be'
    f' scored here; {remedy}.'
  )


def _by_name(folders: list[pathlib.Path]) -> dict[str, pathlib.Path]:
  """Returns folders by the names of their trackers."""
  named: dict[str, pathlib.Path] = {}
  for folder in folders:
    name = os.path.basename(os.path.abspath(folder))
    if name == RESULTS:
      name = os.path.basename(os.path.dirname(os.path.abspath(folder)))
    if name in named:
      raise UserError(
        f'{named[name]} and {folder} are both called {name!r}; rename one of the folders, as the'
        ' trackers are named after them.'
      )
    named[name] = folder
  return named


def _measure(
  folder: pathlib.Path, benchmark: str, sequences: list[Sequence], convention: Convention
) -> list[Measured]:
  """Measures the sequences of a tracker, the repetitions of each as if they were one."""
  measured = []
  for sequence in sequences:
    runs = [
      convention.errors(sequence, boxes) for boxes in result_files.read(benchmark, folder, sequence)
    ]
    frames = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    if not (frames['overlap'] >= 0).any():
      raise UserError(
        f'sequence {sequence.name!r} has no frame that counts by the rules of'
        f' {convention.toolkit}; remove it from the data set, or choose another --toolkit.'
      )
    measured.append(conventions.measure(convention, frames))
  return measured


def _numbers(
  measured: list[Measured], sequences: list[Sequence], convention: Convention
) -> dict[str, Any]:
  """Returns the numbers and curves of a tracker, as values for JSON."""
  total = conventions.combine(convention, measured)
  numbers = {**convention.numbers, **convention.sequence_numbers}
  return {
    'summary': conventions.in_percent(convention.numbers, total),
    'sequences': {
      sequence.name: conventions.in_percent(numbers, each)
      for sequence, each in zip(sequences, measured, strict=True)
    },
    'curves': {name: (100 * curve).tolist() for name, curve in total.curves.items()},
  }


def _plot(
  content: Mapping[str, Any], convention: Convention, folder: pathlib.Path
) -> list[pathlib.Path]:
  """Writes a plot of each curve; the legend has the number that papers report of it."""
  with os_errors_as_user_errors(f'{folder} cannot be written', 'give another folder.'):
    folder.mkdir(parents=True, exist_ok=True)
  trackers = {content['tracker']: content, **content['others']}
  # Success is reported under several names, which come first; other curves have that of the number.
  numbers = {'success': next(iter(convention.numbers))}
  paths = []
  for name, curve in convention.curves.items():
    number = numbers.get(name, name)
    lines = [
      plots.Line(tracker, np.array(each['curves'][name]), each['summary'][number])
      for tracker, each in trackers.items()
    ]
    what = name if number == name else f'{name}, {number}'
    title = f'{what}; {content["benchmark"]}, {content["num_sequences"]} sequences'
    image = plots.draw(title, convention.toolkit, curve.label, curve.thresholds, lines)
    paths.append(folder / f'{name}.png')
    plots.save(image, paths[-1])
  return paths


def table(content: Mapping[str, Any]) -> Iterator[str]:
  """Yields the lines of a table with a row for each tracker, and above it whose rules they are."""
  yield f'{content["toolkit"]}: {content["rules"]}'
  yield (
    f'{content["benchmark"]}, {content["num_sequences"]} sequences, {content["num_frames"]} frames,'
    ' in percent'
  )
  rows = {content['tracker']: content, **content['others']}
  width = max(map(len, rows))
  columns = {name: max(8, len(name)) for name in content['summary']}
  yield ' '.join([' ' * width, *(f'{name:>{size}}' for name, size in columns.items())])
  for tracker, each in rows.items():
    shown = (f'{each["summary"][name]:>{size}.2f}' for name, size in columns.items())
    yield ' '.join([f'{tracker:<{width}}', *shown])
