"""Writes the shards by an Apache Beam runner, in place of workers.py, on a Beam cluster.

Every machine must see the videos and the data directory under the same paths. Apache Beam is the
extra `beam`; it brings older versions of protobuf and pyarrow than a plain installation.
"""

import multiprocessing
import pathlib
import shlex
from typing import Any

from tfds_kinetics import shards
from tfds_kinetics.messages import BadInput, ProgramError
from tfds_kinetics.shards import ShardJob
from tfds_kinetics.video import MachineFault
from tfds_kinetics.workers import KilledAgain, ShardProcess

try:
  import apache_beam as beam
  from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
  raise BadInput(
    "--beam_runner needs Apache Beam; install it with pip install -e '.[beam]', or leave"
    ' the flag out: all cores of this machine work without it.'
  ) from error


class WriteShard(beam.DoFn):
  """Writes the shard of each job into the folder; emits the name of the shard."""

  def __init__(self, folder: str) -> None:
    self._folder = folder

  def setup(self) -> None:
    """Makes the process that reads videos, so that no video can end the worker."""
    never = multiprocessing.get_context('spawn').Event()
    self._process = ShardProcess(pathlib.Path(self._folder), never)

  def process(self, job: ShardJob) -> list[str]:
    """Writes one shard."""
    self._process.write(job)
    return [job.name]

  def teardown(self) -> None:
    """Ends the process."""
    self._process.close()


def runner_options(runner: str, options: str) -> PipelineOptions:
  """Returns the pipeline options of a runner.

  Args:
    runner: name of a Beam runner, such as 'DirectRunner'.
    options: the runner's flags, as on a command line.

  Raises:
    BadInput: the flags have an unclosed quotation.
  """
  try:
    flags = shlex.split(options)
  except ValueError as error:
    raise BadInput(f'--beam_options={options} has {str(error).lower()}; close it.') from error
  return PipelineOptions(flags, runner=runner, save_main_session=False)


def write_shards(
  jobs: list[ShardJob], folder: pathlib.Path, options: PipelineOptions
) -> dict[ShardJob, dict[str, Any]]:
  """Writes the shards that do not exist yet; returns the tables of all.

  Args:
    jobs: all shards.
    folder: of the shards; every worker must see it.
    options: see `runner_options`.

  Raises:
    BadInput: Beam does not know the runner, or a shard could not be written.
    ProgramError: a bug in a program. Runners that pass on errors of workers as text raise a
      RuntimeError that names this class.
  """
  shards.remove_leftovers(jobs, folder)
  left = [job for job in jobs if shards.finished_table(job, folder) is None]
  runner = options.get_all_options()['runner']
  try:
    with beam.Pipeline(options=options) as pipeline:
      _ = (
        pipeline
        | beam.Create(left)
        | beam.Reshuffle()
        | beam.ParDo(WriteShard(str(folder.absolute())))
      )
  except (KilledAgain, MachineFault, OSError, RuntimeError, ValueError) as error:
    if ProgramError.__name__ in str(error):
      raise
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise BadInput(
      f'--beam_runner={runner} ended early ({reason}); what is finished is kept, and the same'
      ' command resumes from there.'
    ) from error
  tables = {job: shards.finished_table(job, folder) for job in jobs}
  lacking = [job.name for job, table in tables.items() if table is None]
  if lacking:
    raise BadInput(
      f'--beam_runner={runner} ended, but {len(lacking)} shards are not in {folder}; its workers'
      ' must see the same paths as this machine.'
    )
  return tables
