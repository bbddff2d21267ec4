"""What a run reports: progress on the terminal, log.txt, metrics.jsonl and TensorBoard scalars.

All modules log to the logger 'dropmae_jax'. A `Report` decides where its lines go while it is open;
before that, warnings go to the standard error, as Python does by default.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
import tqdm
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import RunFailed

_log = logging.getLogger('dropmae_jax')

# Called with the step and the numbers of every line of metrics.jsonl, on the first process. Append
# your own, for example for wandb.
METRICS_WRITERS: list[Callable[[int, Mapping[str, float]], None]] = []
PLATEAU_END = 1400
ON_PLATEAU = (
  'the loss may stay near 0.6 for some hundred steps: that of the published runs did until step 700'
  ' to 900, and was below 0.5 by step 1,400'
)
TENSORBOARD = 'tensorboard'  # In a workdir.


class NonFiniteLoss(RunFailed):
  """Loss or gradient became infinite or not a number; the message names the step.

  Attributes:
    step: number of the update.
  """

  is_everywhere = True

  def __init__(self, message: str, step: int) -> None:
    super().__init__(message)
    self.step = step


class _Output(logging.StreamHandler):
  """Writes lines to the standard output, for as long as that can be written."""

  def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
    """Goes on without the line: nobody reads the output any more, or its disk is full."""
    if isinstance(sys.exception(), BrokenPipeError):
      cli.discard_output()
    elif not isinstance(sys.exception(), OSError):
      super().handleError(record)


class _AboveBar(_Output):
  """Writes lines above the progress bar, except those that the bar itself shows."""

  def emit(self, record: logging.LogRecord) -> None:
    """Writes a line."""
    try:
      if not hasattr(record, 'is_in_bar'):
        tqdm.tqdm.write(self.format(record), file=self.stream)
    except Exception:
      self.handleError(record)


class _LogFile(logging.FileHandler):
  """Writes lines to a file, for as long as that can be written."""

  def __init__(self, path: pathlib.Path, tell_lost: Callable[[str, OSError], None]) -> None:
    super().__init__(path)
    self._tell_lost = tell_lost

  def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
    """Goes on without the line, and says so."""
    error = sys.exception()
    if isinstance(error, OSError):
      self._tell_lost('log.txt', error)
    else:
      super().handleError(record)

  def close(self) -> None:
    """Closes the file."""
    with contextlib.suppress(OSError):
      super().close()


class _EventFile:
  """A file of scalars for TensorBoard.

  TensorBoard's own writer writes in a thread, which does not survive that a disk is full.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    folder.mkdir(exist_ok=True)
    # TensorBoard reads the files of a folder in the order of their names, which begin like this.
    name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'
    self._file = (folder / name).open('wb')
    self._records = RecordWriter(self._file)
    self._write(Event(file_version='brain.Event:2'))

  def _write(self, event: Event) -> None:
    event.wall_time = time.time()
    self._records.write(event.SerializeToString())
    self._records.flush()

  def add(self, step: int, row: Mapping[str, float]) -> None:
    """Adds scalars of a step."""
    values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
    self._write(Event(step=step, summary=Summary(value=values)))

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class Report:
  """Follows a training run; the first process writes, and all check the loss.

  What is logged goes to log.txt and to the terminal on the first process. Other processes write
  warnings to their terminal, with their number in front.

  Lines of metrics.jsonl: `step`, `loss`, `learning_rate`, `gradient_norm` of that step; `loss_mean`
  over the steps since the last line; `pairs_per_second` and `data_wait` since then. `data_wait` is
  the share of the time in which the loop waited for a batch while the devices were idle. The scores
  of a step are another line, of `step` and SCORE/NAME.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    first_step: int,
    num_steps: int,
    batch_size: int,
    log_every: int,
    losses: Sequence[float] = (),
    plateau: tuple[float, float] | None = None,
  ) -> None:
    """Opens the files.

    Args:
      workdir: of the run.
      first_step: the one that the run starts from; lines of later ones are removed.
      num_steps: of the whole run.
      batch_size: pairs per step.
      log_every: steps between two lines.
      losses: of the steps before `first_step` since the line before it.
      plateau: a range of losses; that they are in it, as they are for long, is said once.
    """
    self._workdir, self._told_lost = workdir, set()
    self._num_steps = num_steps
    self._batch_size = batch_size
    self._log_every = log_every
    self._window: list[tuple[int, Any]] = []
    self._losses, self._plateau = list(losses), plateau
    self._writes = jax.process_index() == 0
    self._bar = tqdm.tqdm(
      total=num_steps,
      initial=min(first_step, num_steps),
      unit='step',
      disable=not (self._writes and sys.stderr.isatty()),
    )
    if self._writes:
      self._metrics = _open_metrics(workdir / 'metrics.jsonl', first_step)
      # After a restart TensorBoard may show repeated steps twice; their values are equal.
      self._scalars: _EventFile | None = _EventFile(workdir / TENSORBOARD)
    self._open_log(workdir)
    self._started = time.perf_counter()
    self._watcher = concurrent.futures.ThreadPoolExecutor(1)
    self._finished: concurrent.futures.Future | None = None
    self._restart_clock(first_step)

  def _open_log(self, workdir: pathlib.Path) -> None:
    if self._writes:
      timed = '%(asctime)s %(message)s'
      formats: dict[logging.Handler, str] = {_LogFile(workdir / 'log.txt', self._tell_lost): timed}
      if self._bar.disable:
        formats[_Output(sys.stdout)] = timed
      else:
        formats[_AboveBar(sys.stdout)] = '%(message)s'
    else:
      number = jax.process_index()
      formats = {logging.StreamHandler(sys.stderr): f'process {number}: %(message)s'}
    for handler, text in formats.items():
      handler.setFormatter(cli.LineFormatter(text))
      _log.addHandler(handler)
    self._handlers = list(formats)
    _log.setLevel(logging.INFO if self._writes else logging.WARNING)
    _log.propagate = False  # A handler of the root logger would show every line a second time.

  def _restart_clock(self, step: int) -> None:
    self._clock_step, self._clock, self._waited = step, time.perf_counter(), 0.0

  def compiled(self, step: int) -> None:
    """Restarts the clock after the first step, which took the time of the compiler."""
    _log.info(f'first step, compilation included: {time.perf_counter() - self._started:.1f} s')
    self._restart_clock(step)

  def batch_arrived(self, waiting_since: float) -> None:
    """Adds the time in which the loop waited for a batch and the devices were idle.

    Args:
      waiting_since: time.perf_counter() when the loop began to wait for the batch it has now.
    """
    if self._finished is not None and self._finished.done():
      began = max(waiting_since, self._finished.result(), self._clock)
      self._waited += time.perf_counter() - began

  def after_step(self, step: int, metrics: Any) -> None:
    """Stores a step's metrics, which stay on the device until a line is due."""
    self._window.append((step, metrics))
    self._finished = self._watcher.submit(_time_when_ready, metrics)
    with contextlib.suppress(OSError):  # The terminal may be gone.
      self._bar.update()
    if step % self._log_every == 0 or step == self._num_steps:
      self._write_line(step)

  def check_finite(self) -> None:
    """Stops the run if a step since the last check had no finite loss or gradient.

    The gradient is checked too, because a step's loss is computed before its update: parameters
    that an infinite gradient has destroyed must not be saved.

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
      self._losses.append(float(metrics.loss))
    self._window.clear()

  @property
  def losses(self) -> Sequence[float]:
    """Those of the steps since the last line, up to the last `check_finite`."""
    return tuple(self._losses)

  def _write_line(self, step: int) -> None:
    latest = jax.device_get(self._window[-1][1])
    self.check_finite()
    mean = float(np.mean(self._losses))
    self._losses.clear()
    if not self._writes:
      return
    seconds = max(time.perf_counter() - self._clock, 1e-9)
    row = {name: float(value) for name, value in latest._asdict().items()} | {'loss_mean': mean}
    row['pairs_per_second'] = self._batch_size * (step - self._clock_step) / seconds
    row['data_wait'] = self._waited / seconds
    left = (self._num_steps - step) * seconds / max(step - self._clock_step, 1)
    self._restart_clock(step)
    self._write_row(step, row)
    text = (
      f'loss {row["loss"]:.4f} (mean {mean:.4f})  lr {row["learning_rate"]:.2e}'
      f'  grad {row["gradient_norm"]:.3f}  {row["pairs_per_second"]:.1f} pairs/s'
      f'  data wait {row["data_wait"]:.0%}'
    )
    with contextlib.suppress(OSError):
      self._bar.set_postfix_str(text)
    line = f'step {step}/{self._num_steps}  {text}  left {left:.0f} s'
    _log.info(line, extra={'is_in_bar': True})
    if self._plateau and step < PLATEAU_END and self._plateau[0] < mean < self._plateau[1]:
      self._plateau = None
      _log.info(ON_PLATEAU)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time inside out of the rate of the next line."""
    began = time.perf_counter()
    yield
    self._clock += time.perf_counter() - began

  def write_scores(self, step: int, numbers: Mapping[str, float]) -> None:
    """Writes the scores of a step as a line of their own."""
    if numbers:
      self._write_row(step, numbers)
      _log.info(f'step {step}  ' + '  '.join(f'{name} {x:.4f}' for name, x in numbers.items()))

  def _write_row(self, step: int, row: Mapping[str, float]) -> None:
    """Writes a line of metrics.jsonl and the scalars of TensorBoard, if there is room."""
    try:
      self._metrics.write(json.dumps({'step': step, **row}) + '\n')
      self._metrics.flush()
    except OSError as error:
      self._tell_lost('metrics.jsonl', error)
    try:
      # After an error the rest of a file would not be read, so there is another one.
      scalars, self._scalars = self._scalars or _EventFile(self._workdir / TENSORBOARD), None
      scalars.add(step, row)
      self._scalars = scalars
    except OSError as error:
      self._tell_lost('tensorboard', error)
    for write in METRICS_WRITERS:
      try:
        write(step, row)
      except Exception:
        _log.exception(f'a metrics writer has failed at step {step}; training goes on')

  def _tell_lost(self, name: str, error: OSError) -> None:
    """Says once that a file of the workdir lacks what was to be written to it."""
    if name not in self._told_lost:
      self._told_lost.add(name)
      reason = error.strerror or error
      _log.warning(
        f'{self._workdir / name} cannot be written ({reason}); training goes on without.'
      )

  def close(self) -> None:
    """Flushes and closes everything."""
    self._watcher.shutdown()
    with contextlib.suppress(OSError):
      self._bar.close()
    for each in (self._metrics, self._scalars) if self._writes else ():
      with contextlib.suppress(OSError):
        if each:
          each.close()
    for handler in self._handlers:
      _log.removeHandler(handler)
      handler.close()
    _log.setLevel(logging.NOTSET)
    _log.propagate = True


def _time_when_ready(metrics: Any) -> float:
  jax.block_until_ready(metrics)
  return time.perf_counter()


def _open_metrics(path: pathlib.Path, first_step: int) -> TextIO:
  """Opens metrics.jsonl to append, without the lines of steps that will be repeated."""
  if path.exists():
    # A disk that was full, or a power cut, may leave bytes that are no text.
    whole = path.read_text(errors='replace').splitlines()
    lines = [line for line in whole if _step_of(line) <= first_step]
    temporary = path.with_suffix('.partial')
    temporary.write_text(''.join(f'{line}\n' for line in lines))
    os.replace(temporary, path)
  return path.open('a')


def _step_of(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return float('inf')  # A line cut short when the process was killed.
