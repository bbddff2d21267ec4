"""Ends a run that hangs: on a device, on another host, on a disk, or in native code.

Nothing can interrupt a thread that waits inside a call to a device or a network, and no thread of
this process runs while native code holds Python's lock (the GIL). So a process of its own, which
needs the standard library only, watches a heartbeat in shared memory. It sends SIGABRT, on which
`faulthandler` writes the stacks of all threads; the next start resumes.
"""

import contextlib
import faulthandler
import mmap
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time

# Least limit for what compiles or writes to storage.
SLOW_SECONDS = 1800.0
POLL_SECONDS = 0.5
# How long the message and the stacks may take, as what they are written to may hang too.
SAY_SECONDS, ABORT_SECONDS = 2.0, 5.0
REMEDY = 'If nothing hangs, raise config.step_stall_seconds.'
# How many activities began, the limit of the last one in seconds (0: none), its name, and the path
# of the file that has the stacks after a crash (none: they are on the standard error).
HEARTBEAT = struct.Struct('<Qd240s4096s')


class Watchdog:
  """Ends this process if an activity takes too long; the loop calls `watch` for each new one.

  The watchdog counts its own polls, and none while this process is stopped; so no time passes while
  either is suspended.
  """

  def __init__(self, seconds: float, *, remedy: str = REMEDY) -> None:
    """Starts the process; watches nothing so far.

    Args:
      seconds: how long an activity may take.
      remedy: what to do if nothing hangs; a sentence.
    """
    self._seconds, self._num_begun = seconds, 0
    self._limit, self._what, self._crash_file = 0.0, '', b''
    handle = os.memfd_create('watchdog')
    os.ftruncate(handle, HEARTBEAT.size)
    self._memory = mmap.mmap(handle, HEARTBEAT.size)
    faulthandler.enable(sys.__stderr__)
    # Isolated from the user's environment: it needs the standard library only.
    arguments = [str(os.getpid()), str(handle), str(POLL_SECONDS), remedy]
    self._process = subprocess.Popen(
      [sys.executable, '-I', '-S', __file__, *arguments],
      stdin=subprocess.DEVNULL,
      pass_fds=[handle],
    )
    os.close(handle)

  def watch(self, what: str, *, is_slow: bool = False, least: float = 0.0) -> None:
    """Starts to count from zero.

    Args:
      what: name of the activity, for the message.
      is_slow: it compiles or writes to storage, so its limit is at least SLOW_SECONDS.
      least: its limit is at least so many seconds.
    """
    self._num_begun += 1
    self._limit = max(self._seconds, SLOW_SECONDS if is_slow else 0.0, least)
    self._what = what
    self._write()

  def _write(self) -> None:
    text = self._what.encode()[:240], self._crash_file
    self._memory[:] = HEARTBEAT.pack(self._num_begun, self._limit, *text)

  def write_crashes_to(self, path: pathlib.Path | str) -> None:
    """Says where `faulthandler` writes, so that the watchdog shows it when this process has ended.

    Args:
      path: of the file; '': it writes to the standard error itself.
    """
    self._crash_file = os.fsencode(path and pathlib.Path(path).absolute())
    self._write()

  def close(self) -> None:
    """Ends the watchdog."""
    self._process.kill()
    self._process.wait()


def _watch_over(trainer: int, memory: mmap.mmap, poll_seconds: float, remedy: str) -> None:
  """The watchdog's own process: ends `trainer`, its parent, if that hangs."""
  previous, polls, hangs = b'', 0, False
  while os.getppid() == trainer:
    time.sleep(poll_seconds)
    heartbeat = memory[:]
    if heartbeat != previous:
      previous, polls = heartbeat, 0
    elif not _is_stopped(trainer):
      polls += 1
    _, limit, what, crash_file = HEARTBEAT.unpack(heartbeat)
    if limit and polls * poll_seconds >= limit and not hangs:
      hangs = True
      text = what.rstrip(b'\0').decode(errors='replace')
      _abort(trainer, f'{text} took more than {limit:g} s', crash_file.rstrip(b'\0'), remedy)
  crash_file = HEARTBEAT.unpack(memory[:])[-1].rstrip(b'\0')
  with contextlib.suppress(OSError):
    if crash_file:
      sys.stderr.write(pathlib.Path(os.fsdecode(crash_file)).read_text(errors='replace'))
      sys.stderr.flush()


def _is_stopped(pid: int) -> bool:
  """Whether a process is suspended, as by Ctrl-Z or a debugger (proc(5), field 3)."""
  try:
    status = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return False
  return status.rpartition(')')[2].split()[0] in 'Tt'


def _abort(trainer: int, reason: str, crash_file: bytes, remedy: str) -> None:
  text = (
    f'error: {reason}; the stacks of all threads below show where this process waits. Check'
    ' devices, storage and the other hosts; the same command resumes from the last checkpoint.'
    f' {remedy}\n'
  )
  # In a file, the stacks follow, which are not those of a crash then.
  texts = {sys.stderr.fileno(): text, crash_file: f'The watchdog ended this process: {reason}.\n'}
  saying = [
    threading.Thread(target=_append, args=each, daemon=True) for each in texts.items() if each[0]
  ]
  for each in saying:
    each.start()
  deadline = time.monotonic() + SAY_SECONDS
  for each in saying:
    each.join(max(0.0, deadline - time.monotonic()))
  for number in (signal.SIGABRT, signal.SIGKILL):
    if os.getppid() == trainer:
      os.kill(trainer, number)
    deadline = time.monotonic() + ABORT_SECONDS
    while os.getppid() == trainer and time.monotonic() < deadline:
      time.sleep(0.1)


def _append(file: int | bytes, text: str) -> None:
  """Writes to a file descriptor or a path, either of which may hang or be gone."""
  with contextlib.suppress(OSError), open(file, 'a', closefd=isinstance(file, bytes)) as opened:
    opened.write(text)


if __name__ == '__main__':
  # Schedulers send them to all processes of a job, and the end is to be watched too.
  for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(_number, signal.SIG_IGN)
  _, _trainer, _handle, _poll_seconds, _remedy = sys.argv
  _memory = mmap.mmap(int(_handle), HEARTBEAT.size)
  _watch_over(int(_trainer), _memory, float(_poll_seconds), _remedy)
