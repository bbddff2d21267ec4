"""Tracks all sequences of a data set, and writes their results; goes on where it was stopped."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import tqdm

from dropmae_jax.evaluation import results_folder
from dropmae_jax.runtime import workdir_lock
from dropmae_jax.tracking.crops import CropOptions
from dropmae_jax.tracking.follow import track
from dropmae_jax.tracking.follow.track import Locate, Source
from dropmae_jax.tracking.sequences import result_files
from dropmae_jax.tracking.sequences.sequence import Sequence


def run(
  benchmark: str,
  sequences: list[Sequence],
  locate: Locate,
  options: CropOptions,
  output: pathlib.Path,
  *,
  settings: Mapping[str, Any],
  batch_size: int = 1,
) -> pathlib.Path:
  """Tracks the sequences that have no results yet, and archives those of a test set for its server.

  Args:
    benchmark: a name in `benchmarks.BENCHMARKS`.
    sequences: of the data set.
    locate: the network.
    options: of the crops.
    output: the folder; new, or of an earlier run with the same settings.
    settings: what the boxes depend on, as values for JSON.
    batch_size: sequences that are followed at a time.

  Returns:
    The folder with the results, in the layout of the benchmark's toolkit.

  Raises:
    UserError: the data, or the output folder, cannot be used.
    WorkdirInUse: another run writes to the folder.
  """
  results_folder.make(output)
  with workdir_lock.held(output, '--output'):
    results_folder.claim(output, settings)
    results_folder.remove_partial(output)
    folder = output / 'results'
    waiting = {
      sequence.name: sequence
      for sequence in sequences
      if not result_files.is_written(benchmark, folder, sequence)
    }
    if len(waiting) < len(sequences):
      done = len(sequences) - len(waiting)
      results_folder.log_line(output, f'{done} of {len(sequences)} sequences were finished before')
    total = sum(sequence.num_frames for sequence in waiting.values())
    began, num_frames = time.perf_counter(), 0
    with tqdm.tqdm(total=total, unit='frame', leave=False, disable=None) as progress:

      def count_frame() -> None:
        nonlocal num_frames
        num_frames += 1
        progress.update()

      sources = (
        Source(each.name, each.first_box, map(each.frame, range(each.num_frames)))
        for each in waiting.values()
      )
      followed = track.follow(sources, locate, options, batch_size=batch_size, on_frame=count_frame)
      for number, (source, result) in enumerate(followed, 1):
        sequence = waiting[source.name]
        result_files.write(benchmark, folder, sequence, result.boxes, result.seconds)
        rate = num_frames / (time.perf_counter() - began)
        results_folder.log_line(
          output,
          f'{number}/{len(waiting)} {source.name}: {sequence.num_frames} frames; in all'
          f' {rate:.1f} frames/s, left {(total - num_frames) / rate:.0f} s',
        )
    # Servers have the truth of what is withheld, and take no other results.
    if benchmark in result_files.ARCHIVES and all(each.is_withheld for each in sequences):
      archive = output / f'{benchmark}.zip'
      result_files.make_archive(benchmark, folder, sequences, archive)
      results_folder.log_line(output, f'{archive}: for the server of {benchmark}')
  return folder
