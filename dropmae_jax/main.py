"""Trains: python -m dropmae_jax.main --config=configs/NAME.py --workdir=DIR [--config.field=...].

Exit status: 0 when the last step is reached, 1 when training diverged or the loader failed, 2 for
bad input, 69 when a step or the loader hung, 75 when a signal stopped the run after a checkpoint
(after both, the same command goes on from the last one).
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from dropmae_jax import command_line, recipe
from dropmae_jax.command_line import BadInput

STOPPED = os.EX_TEMPFAIL

_CONFIG = config_flags.DEFINE_config_file('config', help_string='A file in configs/.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints and reports go.')
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Join the processes that a TPU pod, SLURM or the like has started.'
)
_COORDINATOR = flags.DEFINE_string('coordinator_address', None, 'HOST:PORT of process 0.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Of the whole run.', lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Of this one, from 0.', lower_bound=0)
_ALLOW_CHANGES = flags.DEFINE_bool(
  'allow_changes', False, 'Go on from a checkpoint with other data or another objective.'
)
flags.mark_flags_as_required(['config', 'workdir'])


def parse(argv: list[str]) -> list[str]:
  """Parses the command line; what is wrong with it becomes one sentence."""
  try:
    rest = flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    raise _misplaced_override(argv, str(error)) from error
  except OSError as error:
    raise BadInput(
      f'--config cannot be read: {_last_line(error)}; configs/ has examples.'
    ) from error
  except flags.Error as error:
    raise BadInput(_last_line(error)) from error
  if rest[1:]:
    raise BadInput(
      f'argument {rest[1]!r} is not understood; fields are set as --config.FIELD=VALUE.'
    )
  return rest


def _last_line(error: Exception) -> str:
  return str(error).strip().splitlines()[-1].strip()


def _misplaced_override(argv: list[str], error: str) -> BadInput:
  """Says which --config.FIELD=VALUE the config file does not have."""
  arguments = (argument.lstrip('-').partition('=')[0] for argument in argv)
  names = [name.removeprefix('config.') for name in arguments if name.startswith('config.')]
  for name in names:
    if name not in recipe.known_fields():
      return recipe.unknown_field(name)
  absent = next((name for name in names if name.rpartition('.')[2] in error), error)
  return BadInput(f'the config file does not set {absent!r}; add it there, then override it.')


def main(_: list[str]) -> int:
  """Reads the config, trains, and returns the exit status."""
  try:
    checked = recipe.from_config(_CONFIG.value.to_dict())
  except OSError as error:
    raise BadInput(
      f'--config cannot be read: {_last_line(error)}; configs/ has examples.'
    ) from error
  logging.set_verbosity(logging.WARNING)
  # What goes wrong in orbax comes as exceptions too, which become a sentence.
  logging.get_absl_logger().addFilter(lambda record: '/orbax/' not in record.pathname)
  # After the checks, which then answer at once.
  import jax

  from dropmae_jax import feed, hosts, report, run_checkpoints, train

  hosts.join(
    distributed=_DISTRIBUTED.value,
    coordinator_address=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
  )
  try:
    workdir = pathlib.Path(_WORKDIR.value)
    finished = train.train(checked, workdir, allow_changes=_ALLOW_CHANGES.value)
    status = 0 if finished else STOPPED
  except (report.NonFiniteLoss, run_checkpoints.NotSaved, feed.LoaderFailed) as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    status = getattr(error, 'exit_status', 1)
  if status and jax.process_count() == 1:
    sys.stdout.flush()
    # Not sys.exit, which waits for threads that may hang in the loader.
    os._exit(status)
  return status


if __name__ == '__main__':
  command_line.run(lambda: app.run(main, flags_parser=parse))
