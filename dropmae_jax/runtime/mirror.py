"""The files of a run, those of its checkpoints aside, where the workdir is in a bucket.

Nothing can be appended to an object of a bucket, nor can it be mapped to memory. So log.txt,
metrics.jsonl and the like are written to a folder of this machine, and whole files are copied to
the bucket: every PUSH_SECONDS, before each checkpoint, and at the end.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator

import jax

from dropmae_jax.runtime import multihost, workdir_lock
from dropmae_jax.runtime.errors import first_line
from dropmae_jax.runtime.paths import Path, client_errors_as_os_errors, is_remote

PUSH_SECONDS = 30.0
# The beginning of what `check_bucket` writes, and the list of the videos that are left out.
CHECK, LEFT_OUT = '.check-', 'left_out.json'
# Of one process each: they are open or mapped while it runs. The next start looks at them.
OF_PROCESS = 'crash-{}.txt', 'reading-{}.bin'

_log = logging.getLogger('dropmae_jax')


def check_bucket(workdir: Path) -> None:
  """Checks that a bucket can be read and written, before anything is made in it.

  Raises:
    OSError: it cannot be.
  """
  if not is_remote(workdir):
    return
  with client_errors_as_os_errors(workdir):
    probe = workdir / f'{CHECK}{jax.process_index()}'
    probe.write_text('dropmae_jax')
    probe.read_text()
    probe.unlink()


class Mirror:
  """Where the files of a run are written; of a workdir of this machine, it is the workdir.

  Attributes:
    workdir: of the run, as users know it.
    folder: of this machine; files are written to it.
  """

  def __init__(self, workdir: Path) -> None:
    self.workdir = workdir
    self.folder = _folder_of(workdir) if is_remote(workdir) else workdir
    self._pushed: dict[pathlib.Path, tuple[int, int]] = {}
    self._pushing, self._is_over = threading.Lock(), threading.Event()
    self._has_failed = False

  @property
  def _copies(self) -> bool:
    return is_remote(self.workdir) and jax.process_index() == 0

  @contextlib.contextmanager
  def opened(self) -> Iterator[None]:
    """Begins with the files that the bucket has, and copies what is written inside to it.

    All processes of a run call this together; the first one copies.

    Raises:
      OSError: the bucket cannot be read, or the folder not be written.
    """
    if is_remote(self.workdir):
      self._share_crashes()
    if not self._copies:
      yield
      return
    self._fetch()
    thread = threading.Thread(target=self._push_again_and_again, name='mirror', daemon=True)
    thread.start()
    try:
      yield
    finally:
      self._is_over.set()
      self._push()

  def _share_crashes(self) -> None:
    """Moves what this process left of a crash to the bucket, as the first one looks at it."""
    with client_errors_as_os_errors(self.workdir):
      if jax.process_index():
        for name in (each.format(jax.process_index()) for each in OF_PROCESS):
          if (self.folder / name).exists():
            (self.workdir / name).write_bytes((self.folder / name).read_bytes())
            (self.folder / name).unlink()
    multihost.wait_for_all('crashes are shared')

  def _fetch(self) -> None:
    """Reads the files of the bucket, which another machine may have written to.

    A file that goes on here stays: its end was not copied any more when the run was killed. If the
    bucket has nothing of the run, nothing stays, as somebody has removed it.
    """
    with client_errors_as_os_errors(self.workdir):
      # A folder that the console of a bucket makes is an object in it, of its own name.
      ignored = multihost.FAILURE_FILE, self.workdir.name
      listed = self.workdir.iterdir() if self.workdir.exists() else ()
      found = [
        each for each in listed if each.name not in ignored and not each.name.startswith(CHECK)
      ]
      names = {each.name for each in found if not _is_of_process(each.name)}
      for path in _files(self.folder):
        # Users remove the list of what is left out.
        if not names or (path.name == LEFT_OUT and LEFT_OUT not in names):
          path.unlink()
      for stored in found:
        if stored.is_dir():
          continue
        content, path = stored.read_bytes(), self.folder / stored.name
        if not (path.exists() and path.read_bytes().startswith(content)):
          partial = path.with_suffix('.partial')
          partial.write_bytes(content)
          partial.replace(path)
        if _is_of_process(stored.name):
          stored.unlink()

  def _push_again_and_again(self) -> None:
    while not self._is_over.wait(PUSH_SECONDS):
      self._push()

  def push(self) -> None:
    """Copies files that have changed to the bucket; not while that fails, which takes a minute."""
    if self._copies and not self._has_failed:
      self._push()

  def _push(self) -> None:
    """Copies files that have changed; a failure is said once, until one succeeds."""
    with self._pushing:
      try:
        for path in _files(self.folder):
          self._push_file(path)
      except Exception as error:  # Clients raise errors of many types.
        if not self._has_failed:
          reason = getattr(error, 'strerror', None) or first_line(error)
          _log.warning(
            f'log.txt, metrics.jsonl and the like cannot be copied to {self.workdir}'
            f' ({reason}); training goes on, they are in {self.folder}, and'
            f' copying is tried again every {PUSH_SECONDS:g} s.'
          )
        self._has_failed = True
      else:
        if self._has_failed:
          _log.warning(f'log.txt, metrics.jsonl and the like are copied to {self.workdir} again.')
        self._has_failed = False

  def _push_file(self, path: pathlib.Path) -> None:
    try:
      status = path.stat()
      version = status.st_mtime_ns, status.st_size
      content = path.read_bytes() if self._pushed.get(path) != version else None
    except FileNotFoundError:  # It is removed or renamed meanwhile.
      return
    if content is not None:
      with client_errors_as_os_errors(self.workdir):
        (self.workdir / path.relative_to(self.folder)).write_bytes(content)
      self._pushed[path] = version

  def notes(self) -> list[str]:
    """Returns lines for the log of a run."""
    if not is_remote(self.workdir):
      return []
    return [
      f'log.txt, metrics.jsonl and the like are written to {self.folder}, and copied to'
      f' {self.workdir} every {PUSH_SECONDS:g} s',
      f'{self.workdir} cannot be locked for other machines, as it is in a bucket; start no second'
      ' run with this --workdir there while this one runs.',
    ]


def _folder_of(workdir: Path) -> pathlib.Path:
  """Returns the folder of this machine for a workdir; the same for each start of a run."""
  digest = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
  folder = pathlib.Path(tempfile.gettempdir(), f'dropmae_jax-{os.getuid()}', digest)
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  return folder


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a folder that are copied."""
  return sorted(
    path
    for path in folder.rglob('*')
    if path.is_file()
    and path.name != workdir_lock.FILE
    and path.suffix != '.partial'
    and not _is_of_process(path.name)
  )


def _is_of_process(name: str) -> bool:
  return any(pathlib.PurePath(name).match(each.format('*')) for each in OF_PROCESS)
