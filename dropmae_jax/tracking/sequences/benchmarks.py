"""The benchmarks by name; to add one, write a function like `folder.open_split` and add it here."""

import pathlib
from collections.abc import Callable

from dropmae_jax.runtime.errors import UserError, check_name, os_errors_as_user_errors
from dropmae_jax.tracking.sequences import folder, got10k, lasot, otb, trackingnet
from dropmae_jax.tracking.sequences.sequence import Sequence

BENCHMARKS: dict[str, Callable[[pathlib.Path, str | None], list[Sequence]]] = {
  'got10k': got10k.open_split,
  'lasot': lasot.open_split,
  'lasot_ext': lasot.open_extension,
  'trackingnet': trackingnet.open_split,
  'otb': otb.open_split,
  'folder': folder.open_split,
}


def open_sequences(benchmark: str, root: pathlib.Path, split: str | None = None) -> list[Sequence]:
  """Opens all sequences of a split of a data set, in the order of the data set.

  Args:
    benchmark: a name in BENCHMARKS.
    root: of the data set, as it is distributed.
    split: a name that the benchmark knows; None: its set for testing.

  Raises:
    UserError: the data set is not complete, or damaged; names the file and the remedy.
  """
  check_name('--dataset', benchmark, BENCHMARKS)
  if not root.is_dir():
    raise UserError(f'--root={root} is no folder; give the folder of the data set.')
  with os_errors_as_user_errors(f'--root={root} cannot be read', 'give a readable folder.'):
    return BENCHMARKS[benchmark](root, split)
