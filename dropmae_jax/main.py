"""Trains: python -m dropmae_jax.main --config=NAME|FILE --workdir=DIR [--config.FIELD=VALUE ...].

The exit status is one of `runtime/errors.ExitStatus`; above 2, the same command resumes from the
last checkpoint.
"""

import argparse
import contextlib
import os
import sys
from typing import NoReturn

import jax
from absl import logging

from dropmae_jax import config_file
from dropmae_jax.config import Config
from dropmae_jax.data.loader import MOST_THREADS
from dropmae_jax.runtime import cli, local_processes, multihost, profile
from dropmae_jax.runtime.errors import ExitStatus, RunFailed, UserError, first_line
from dropmae_jax.runtime.watchdog import Watchdog
from tfds_kinetics.messages import one_line

COMMAND = [sys.executable, '-m', 'dropmae_jax.main']
# How long a process may take to end: libraries wait for threads, and JAX for the other processes.
END_SECONDS = 120.0


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog='dropmae-train',
    usage='%(prog)s --config=NAME|FILE --workdir=DIR [--config.FIELD=VALUE ...]',
    description='Pre-trains a model; the same command resumes it from the last checkpoint.',
  )
  add = parser.add_argument
  add('--workdir', type='workdir', help='where checkpoints and reports go')
  add('--allow_changes', action='store_true', help='resume with other data or another objective')
  add(
    '--profile_steps', metavar='FIRST:LAST', help='trace these steps for TensorBoard, as in 10:13'
  )
  dry = parser.add_argument_group('what a run would need')
  add = dry.add_argument
  add(
    '--dry_run',
    nargs='?',
    const='estimate',
    choices=('estimate', 'compile'),
    help='print it and do not train; with "compile", memory is by the compiler, not estimated',
  )
  add('--target', metavar='DEVICES', help='of devices that are not here: 8xh100, v5e-16, rtx4090')
  add('--num_videos', type=int, metavar='N', help='of the dataset, if it is not here')
  add('--pairs_per_second', type=float, metavar='N', help='of all devices, for the hours it takes')
  processes = parser.add_argument_group('several processes')
  add = processes.add_argument
  add(
    '--local_processes', type=int, default=1, metavar='N', help='start N, one per GPU of this box'
  )
  add('--distributed', action='store_true', help='join those that a pod or SLURM starts')
  add('--coordinator_address', metavar='HOST:PORT', help='of process 0')
  add('--num_processes', type=int, help='of the whole run')
  add('--process_id', type=int, help='of this one, from 0')
  add('--local_device_ids', metavar='I[,J...]', help='devices of its host that it uses (all)')
  config_file.add_arguments(parser)
  return parser


def main() -> int:
  """Reads the config, trains, and returns the exit status."""
  arguments = _parser().parse_args()
  config = config_file.from_arguments(arguments)
  if arguments.dry_run:
    return _dry_run(arguments, config)
  _check_no_dry_run(arguments)
  steps = arguments.profile_steps
  profile_steps = None if steps is None else profile.parse_steps(steps)
  if arguments.local_processes != 1:
    return _run_local_processes(arguments, config)
  if os.getpid() == 1:
    # The kernel lets no signal end the first process of a container, so it only starts another.
    return local_processes.run([COMMAND + sys.argv[1:]])
  logging.set_verbosity(logging.WARNING)
  # What goes wrong in orbax comes as exceptions too, which become a sentence.
  logging.get_absl_logger().addFilter(lambda record: '/orbax/' not in record.pathname)
  # After the checks, which are then answered at once.
  from dropmae_jax import train

  multihost.join(
    distributed=arguments.distributed,
    coordinator_address=arguments.coordinator_address,
    num_processes=arguments.num_processes,
    process_id=arguments.process_id,
    local_device_ids=arguments.local_device_ids,
  )
  _find_devices()
  try:
    finished = train.train(
      config,
      arguments.workdir,
      allow_changes=arguments.allow_changes,
      profile_steps=profile_steps,
    )
    status = ExitStatus.DONE if finished else ExitStatus.STOPPED
  except RunFailed as error:
    cli.print_error(str(error))
    status = error.exit_status
  return status


def _dry_run(arguments: argparse.Namespace, config: Config) -> int:
  from dropmae_jax import dry_run

  for name in ('num_videos', 'pairs_per_second'):
    value = getattr(arguments, name)
    if value is not None and not 0 < value < 1e12:
      raise UserError(f'--{name}={value} is out of range; give a number above 0.')
  _find_devices()
  for line in dry_run.lines(
    config,
    workdir=arguments.workdir,
    target=arguments.target or '',
    compiles=arguments.dry_run == 'compile',
    num_videos=arguments.num_videos,
    pairs_per_second=arguments.pairs_per_second,
  ):
    print(one_line(line), flush=True)
  return ExitStatus.DONE


def _check_no_dry_run(arguments: argparse.Namespace) -> None:
  for name in ('target', 'num_videos', 'pairs_per_second'):
    if (value := getattr(arguments, name)) is not None:
      raise UserError(f'--{name}={value} is for --dry_run; add that, or leave this out.')
  if arguments.workdir is None:
    raise UserError('the following arguments are required: --workdir; --help lists what there is.')


def _find_devices() -> None:
  try:
    jax.devices()
  except Exception as error:  # RuntimeError, or one of its assertions.
    raise UserError(
      f'JAX finds no device ({first_line(error)}); install the extra cuda or tpu of this'
      ' project, or correct JAX_PLATFORMS.'
    ) from error


def _run_local_processes(arguments: argparse.Namespace, config: Config) -> int:
  count = arguments.local_processes
  if count < 1:
    raise UserError(f'--local_processes={count} is not a number of processes; give 1 or more.')
  connected = 'coordinator_address', 'num_processes', 'process_id', 'local_device_ids'
  if arguments.distributed or any(getattr(arguments, name) is not None for name in connected):
    raise UserError(
      f'--local_processes={count} starts all processes of a run itself; give it alone, or a'
      ' launcher of your own with --distributed or --coordinator_address.'
    )
  multihost.check_not_launched()
  # They share the cores.
  cores = len(os.sched_getaffinity(0))
  num_threads = config.data.num_threads or max(1, min(MOST_THREADS, cores // count))
  more = ['--local_processes=1', f'--config.data.num_threads={num_threads}']
  return local_processes.run(local_processes.connected(COMMAND + sys.argv[1:] + more, count))


def _end(status: int) -> NoReturn:
  """Ends the process and its part of a run of several.

  Not by sys.exit, which waits for threads: after a failed save, some of orbax's wait 300 s for
  another one that has failed, and nothing public cancels them.
  """
  Watchdog(END_SECONDS, remedy='').watch('the end of the process')
  # Waits for the other processes; what became of this one is known already.
  with contextlib.suppress(RuntimeError):
    jax.distributed.shutdown()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):
      stream.flush()
  os._exit(status)


def command() -> None:
  """The entry point dropmae-train."""
  cli.run(main, end=_end)


if __name__ == '__main__':
  command()
