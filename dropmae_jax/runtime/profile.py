"""Traces some steps of a run with jax.profiler, for TensorBoard's profile plugin or Perfetto."""

import logging
import pathlib
import re
from typing import Any

import jax

from dropmae_jax.runtime.errors import UserError

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
  """A trace of the steps `first` to `last`; every process writes that of its own devices."""

  def __init__(self, folder: pathlib.Path, steps: tuple[int, int] | None) -> None:
    """Traces nothing if `steps` is None; `folder` is that of TensorBoard."""
    self._folder = folder
    self._first, self._last = steps or (0, 0)
    self._runs = False

  def before(self, step: int, previous: Any) -> None:
    """Starts the trace if this is its first step, when the arrays `previous` are computed."""
    if step == self._first:
      jax.block_until_ready(previous)
      jax.profiler.start_trace(self._folder)
      self._runs = True

  def after(self, step: int, arrays: Any) -> None:
    """Ends the trace if this was its last step, when its arrays are computed."""
    if step == self._last and self._runs:
      jax.block_until_ready(arrays)
      self.close()
      _log.info(
        f'steps {self._first} to {self._last} are traced in {self._folder}/plugins/profile; look'
        f' at them by: tensorboard --logdir={self._folder} (needs tensorboard-plugin-profile)'
      )

  def close(self) -> None:
    """Ends the trace, if the run ends before its last step."""
    if self._runs:
      self._runs = False
      jax.profiler.stop_trace()
