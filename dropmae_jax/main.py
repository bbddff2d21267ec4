"""Trains: python -m dropmae_jax.main --config=NAME|FILE --workdir=DIR [--config.FIELD=VALUE ...].

The exit status is one of `runtime/errors.ExitStatus`; after 69 and 75, the same command resumes
from the last checkpoint.
"""

import os
import pathlib
import sys

from absl import flags, logging

from dropmae_jax import config_file
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import ExitStatus, RunFailed


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog='dropmae-train',
    usage='%(prog)s --config=NAME|FILE --workdir=DIR [--config.FIELD=VALUE ...]',
    description='Pre-trains a model; the same command resumes it from the last checkpoint.',
  )
  add = parser.add_argument
  add('--workdir', required=True, type=pathlib.Path, help='where checkpoints and reports go')
  add('--allow_changes', action='store_true', help='resume with other data or another objective')
  processes = parser.add_argument_group('several processes')
  add = processes.add_argument
  add('--distributed', action='store_true', help='join those that a pod or SLURM starts')
  add('--coordinator_address', metavar='HOST:PORT', help='of process 0')
  add('--num_processes', type=int, help='of the whole run')
  add('--process_id', type=int, help='of this one, from 0')
  config_file.add_arguments(parser)
  return parser


def main() -> int:
  """Reads the config, trains, and returns the exit status."""
  arguments = _parser().parse_args()
  config = config_file.from_arguments(arguments)
  # The worker processes of grain read absl's flags, which nothing else here has.
  flags.FLAGS.mark_as_parsed()
  logging.set_verbosity(logging.WARNING)
  # What goes wrong in orbax comes as exceptions too, which become a sentence.
  logging.get_absl_logger().addFilter(lambda record: '/orbax/' not in record.pathname)
  # After the checks, which are then answered at once.
  import jax

  from dropmae_jax import train
  from dropmae_jax.runtime import multihost

  multihost.join(
    distributed=arguments.distributed,
    coordinator_address=arguments.coordinator_address,
    num_processes=arguments.num_processes,
    process_id=arguments.process_id,
  )
  try:
    finished = train.train(config, arguments.workdir, allow_changes=arguments.allow_changes)
    status = ExitStatus.DONE if finished else ExitStatus.STOPPED
  except RunFailed as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    status = error.exit_status
  if status and jax.process_count() == 1:
    sys.stdout.flush()
    # Not sys.exit, which waits for threads that may hang in the loader.
    os._exit(status)
  return status


def command() -> None:
  """The entry point dropmae-train."""
  cli.run(main)


if __name__ == '__main__':
  command()
