"""What a run tells: progress on the terminal, log.txt, metrics.jsonl and TensorBoard scalars."""

import concurrent.futures
import json
import logging
import os
import pathlib
import sys
import time
from typing import Any, TextIO

import jax
import numpy as np
import tqdm
from tensorboard.summary import Writer

from dropmae_jax.runtime.errors import RunFailed

_log = logging.getLogger('dropmae_jax')


class NonFiniteLoss(RunFailed):
  """Loss or gradient became infinite or not a number; the message names the step.

  Attributes:
    step: number of the update.
  """

  is_everywhere = True

  def __init__(self, message: str, step: int) -> None:
    super().__init__(message)
    self.step = step


class Report:
  """Follows a training run; writes on the first process only, checks the loss on all.

  Lines of metrics.jsonl: `step`, `loss`, `learning_rate`, `gradient_norm` of that step;
  `pairs_per_second` and `data_wait` since the last line. `data_wait` is the share of time in
  which the loop waited for a batch while the devices had nothing queued.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    first_step: int,
    num_steps: int,
    batch_size: int,
    log_every: int,
  ) -> None:
    self._num_steps = num_steps
    self._batch_size = batch_size
    self._log_every = log_every
    self._window: list[tuple[int, Any]] = []
    self._writes = jax.process_index() == 0
    self._show = tqdm.tqdm(
      total=num_steps,
      initial=first_step,
      unit='step',
      disable=not (self._writes and sys.stderr.isatty()),
    )
    if self._writes:
      self._handlers = [logging.FileHandler(workdir / 'log.txt')]
      if self._show.disable:
        self._handlers.append(logging.StreamHandler(sys.stdout))
      for handler in self._handlers:
        handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
        _log.addHandler(handler)
      _log.setLevel(logging.INFO)
      _log.propagate = False  # absl would show every line a second time.
      self._metrics = _open_metrics(workdir / 'metrics.jsonl', first_step)
      # After a restart TensorBoard may show the steps that are done anew twice; they are equal.
      self._scalars = Writer(str(workdir / 'tensorboard'))
    self._started = time.perf_counter()
    self._watcher = concurrent.futures.ThreadPoolExecutor(1)
    self._finished: concurrent.futures.Future | None = None
    self._restart_clock(first_step)

  def _restart_clock(self, step: int) -> None:
    self._clock_step, self._clock, self._waited = step, time.perf_counter(), 0.0

  def say(self, text: str) -> None:
    """Shows a line on the terminal and keeps it in log.txt."""
    if self._writes:
      self._show.clear()
      if not self._show.disable:
        tqdm.tqdm.write(text)
      _log.info(text)

  def warn(self, text: str) -> None:
    """Says what went wrong, on whichever process it did."""
    self.say(text)
    if not self._writes:
      print(f'process {jax.process_index()}: {text}', file=sys.stderr, flush=True)

  def compiled(self, step: int) -> None:
    """Starts the clock anew after the first step, whose time is that of the compiler."""
    self.say(f'first step, compilation included: {time.perf_counter() - self._started:.1f} s')
    self._restart_clock(step)

  def batch_arrived(self, asked: float) -> None:
    """Counts the time since `asked` in which the devices had nothing left to do.

    Args:
      asked: time.perf_counter() when the loop asked for the batch that it has now.
    """
    if self._finished is not None and self._finished.done():
      began = max(asked, self._finished.result(), self._clock)
      self._waited += time.perf_counter() - began

  def after_step(self, step: int, metrics: Any) -> None:
    """Takes a step's metrics, which stay on the device until a line is due."""
    self._window.append((step, metrics))
    self._finished = self._watcher.submit(_time_when_ready, metrics)
    self._show.update()
    if step % self._log_every == 0 or step == self._num_steps:
      self._write_line(step)

  def check_finite(self) -> None:
    """Stops the run if a step since the last check had no finite loss or gradient.

    The gradient counts because a step's loss is from before its update: parameters that a bad
    gradient has ruined must not be saved.

    Raises:
      NonFiniteLoss: names the first such step.
    """
    fetched = jax.device_get([metrics for _, metrics in self._window])
    for (step, _), metrics in zip(self._window, fetched, strict=True):
      for name in ('loss', 'gradient_norm'):
        value = getattr(metrics, name)
        if not np.isfinite(value):
          raise NonFiniteLoss(
            f'the {name} of step {step} is {value}; the last checkpoint is from before it. Lower'
            ' config.optimizer.base_learning_rate or look at the data.',
            step,
          )
    self._window.clear()

  def _write_line(self, step: int) -> None:
    latest = jax.device_get(self._window[-1][1])
    self.check_finite()
    if not self._writes:
      return
    seconds = max(time.perf_counter() - self._clock, 1e-9)
    row = {name: float(value) for name, value in latest._asdict().items()}
    row['pairs_per_second'] = self._batch_size * (step - self._clock_step) / seconds
    row['data_wait'] = self._waited / seconds
    left = (self._num_steps - step) * seconds / max(step - self._clock_step, 1)
    self._restart_clock(step)
    self._metrics.write(json.dumps({'step': step, **row}) + '\n')
    self._metrics.flush()
    for name, value in row.items():
      self._scalars.add_scalar(name, value, step)
    text = (
      f'loss {row["loss"]:.4f}  lr {row["learning_rate"]:.2e}  grad {row["gradient_norm"]:.3f}'
      f'  {row["pairs_per_second"]:.1f} pairs/s  data wait {row["data_wait"]:.0%}'
    )
    self._show.set_postfix_str(text)
    _log.info(f'step {step}/{self._num_steps}  {text}  left {left:.0f} s')

  def close(self) -> None:
    """Writes out and closes everything."""
    self._watcher.shutdown()
    self._show.close()
    if self._writes:
      self._metrics.close()
      self._scalars.close()
      for handler in self._handlers:
        _log.removeHandler(handler)
        handler.close()


def _time_when_ready(metrics: Any) -> float:
  jax.block_until_ready(metrics)
  return time.perf_counter()


def _open_metrics(path: pathlib.Path, first_step: int) -> TextIO:
  """Opens metrics.jsonl to append, without the lines of steps that are done anew."""
  if path.exists():
    lines = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
    temporary = path.with_suffix('.partial')
    temporary.write_text(''.join(f'{line}\n' for line in lines))
    os.replace(temporary, path)
  return path.open('a')


def _step_of(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return float('inf')  # A line that a kill cut short.
