"""Traces some steps of a run with jax.profiler, for TensorBoard's profile plugin or Perfetto."""

import logging
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax

from dropmae_jax.runtime.errors import UserError, first_line

_log = logging.getLogger('dropmae_jax')


def parse_steps(text: str) -> tuple[int, int]:
  """Returns the first and the last step of `FIRST:LAST`.

  Raises:
    UserError: it is not that.
  """
  numbers = re.fullmatch(r'(\d{1,10}):(\d{1,10})', text)
  first, last = map(int, numbers.groups()) if numbers else (0, 0)
  if not 0 < first <= last:
    raise UserError(
      f'--profile_steps={text} is not FIRST:LAST, two steps from 1; give for example 10:13.'
    )
  return first, last


class Profile:
  """A trace of the steps `first` to `last`; every process writes that of its own devices.

  A trace that cannot be written is said, and training goes on.
  """

  def __init__(self, folder: pathlib.Path, steps: tuple[int, int] | None) -> None:
    """Traces nothing if `steps` is None; `folder` is that of TensorBoard."""
    # Processes of one machine would write files of the same name.
    several = jax.process_count() > 1
    self._folder = folder / f'process_{jax.process_index()}' if several else folder
    self._first, self._last = steps or (0, 0)
    self._runs, self._traced = False, 0

  def before(self, step: int, previous: Any) -> None:
    """Starts the trace if this is its first step, when the arrays `previous` are computed."""
    if step == self._first:
      jax.block_until_ready(previous)
      self._runs = self._try(lambda: jax.profiler.start_trace(self._folder))

  def after(self, step: int, arrays: Any) -> None:
    """Ends the trace if this was its last step, when its arrays are computed."""
    self._traced += self._runs
    if step == self._last and self._runs:
      jax.block_until_ready(arrays)
      self.close()

  def close(self) -> None:
    """Ends the trace, also if the run ends before its last step, and says where it is."""
    if self._runs and self._try(jax.profiler.stop_trace):
      last = self._first + self._traced - 1
      _log.info(
        f'steps {self._first} to {last} are traced in {self._folder}/plugins/profile; look at them'
        f' by: tensorboard --logdir={self._folder} (needs tensorboard-plugin-profile)'
      )
    elif self._first and not self._traced:
      _log.info(f'--profile_steps={self._first}:{self._last}: step {self._first} was not taken')
    self._runs, self._first = False, 0

  def _try(self, act: Callable[[], None]) -> bool:
    try:
      act()
    except (OSError, RuntimeError) as error:
      _log.warning(
        f'the trace of --profile_steps cannot be written in {self._folder} ({first_line(error)});'
        ' training goes on without.'
      )
      return False
    return True
