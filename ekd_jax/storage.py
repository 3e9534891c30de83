"""Where runs are kept: a folder, or a bucket (gs://BUCKET/FOLDER).

`etils.epath` makes the two look alike. What it cannot hide is said here: a
bucket has no append, no lock and no fsync, and its objects appear whole.

And one place to turn what a full disk says, whoever says it, into one line.
"""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Callable, Iterator

from etils import epath

from ekd_jax.errors import StorageError, UserError

TEMPORARY = ".tmp"
LOCK = ".lock"

# Of the reasons why a file cannot be written, those that are not bugs.
_REASONS = {
  errno.ENOSPC: "no space is left on the device",
  errno.EDQUOT: "the quota is used up",
  errno.EFBIG: "a file would be larger than is allowed here",
  errno.EROFS: "it is read-only now",
  errno.EACCES: "writing is not permitted",
  errno.EPERM: "writing is not permitted",
}
# Libraries that write for us pass on the system's words, not its numbers.
_WORDS = {os.strerror(number): number for number in _REASONS}
_ANY_WORDS = re.compile("|".join(map(re.escape, _WORDS)))


def is_remote(where: str | os.PathLike) -> bool:
  """Whether a path is in a bucket."""
  return "://" in os.fspath(where)


def path(where: str | os.PathLike) -> epath.Path:
  """A path, local or remote.

  Raises:
    UserError: it is remote, and what reads such paths is not installed.
  """
  try:
    return epath.Path(where)
  except (ImportError, ValueError) as error:
    raise _no_reader(where, error) from error


@contextlib.contextmanager
def reached(where: str | os.PathLike, flag: str) -> Iterator[None]:
  """Makes one line of whatever goes wrong in a bucket's first use.

  Args:
    where: the path that is used.
    flag: the option it came from.

  Raises:
    UserError: it is remote and cannot be reached.
  """
  if not is_remote(where):
    yield
    return
  try:
    yield
  except UserError:
    raise
  except ImportError as error:
    raise _no_reader(where, error) from error
  except Exception as error:  # Each client of a bucket has errors of its own.
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    raise UserError(
      f"{flag} {os.fspath(where)} cannot be reached ({reason}): check the "
      "name of the bucket, the network, and that this account may use it"
    ) from error


def write_atomically(target: epath.Path, content: str | bytes) -> None:
  """Writes a file so that a reader sees the old one or the new one."""
  if isinstance(content, str):
    content = content.encode()
  if is_remote(target):
    target.write_bytes(content)
    return
  temporary = target.with_name(target.name + TEMPORARY)
  with open(temporary, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, target)


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
  """Keeps other processes out of a run directory while this one is in it.

  The lock is the operating system's: it goes with the process, however that
  ends. A bucket has none: two runs on one remote directory are not noticed.

  Args:
    directory: a run directory; made if it does not exist.

  Raises:
    UserError: another process is in it.
  """
  if is_remote(directory):
    yield
    return
  import filelock

  folder = pathlib.Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  lock = filelock.FileLock(folder / LOCK)
  try:
    lock.acquire(timeout=0)
  except filelock.Timeout:
    owner = (folder / LOCK).read_text(encoding="utf-8").strip()
    raise UserError(
      f"--run-dir {folder} is in use by {owner or 'another process'}: wait "
      "for it to end, or name another directory"
    ) from None
  try:
    words = f"process {os.getpid()} on {socket.gethostname()}\n"
    (folder / LOCK).write_text(words, encoding="utf-8")
    yield
  finally:
    lock.release()


@contextlib.contextmanager
def failures_told(
  directory: str | os.PathLike,
  *,
  needed_bytes: int | None = None,
  kept: Callable[[], str] = lambda: "",
) -> Iterator[None]:
  """Makes a `StorageError` of every failure to write in the context.

  Args:
    directory: where is being written.
    needed_bytes: what a checkpoint takes, if that is known.
    kept: says in a clause what is safe, such as the last checkpoint.

  Raises:
    StorageError: the disk is full, or the directory may not be written to.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    number = reason_in(error)
    if number is None:
      raise
    raise StorageError(
      _failure(directory, number, needed_bytes, kept())
    ) from error


def require_room(
  directory: str | os.PathLike, needed_bytes: int, kept: Callable[[], str]
) -> None:
  """Refuses to begin a file that will not fit.

  Raises:
    StorageError: fewer bytes are free.
  """
  if is_remote(directory):
    return
  if shutil.disk_usage(directory).free < needed_bytes:
    raise StorageError(_failure(directory, errno.ENOSPC, needed_bytes, kept()))


def reason_in(error: BaseException | None) -> int | None:
  """The errno of a failure to write that an exception stands for, if any."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in _REASONS:
      return error.errno
    if found := _ANY_WORDS.search(str(error)):
      return _WORDS[found[0]]
    error = error.__cause__ or error.__context__
  return None


def _failure(
  directory: str | os.PathLike,
  number: int,
  needed_bytes: int | None,
  kept: str,
) -> str:
  needs = ""
  if needed_bytes is not None:
    needs = f"; a checkpoint takes about {_megabytes(needed_bytes)}"
    if number in (errno.ENOSPC, errno.EDQUOT) and not is_remote(directory):
      free = shutil.disk_usage(directory).free
      needs += f" and {_megabytes(free)} are free"
  return (
    f"{os.fspath(directory)} cannot be written to: {_REASONS[number]}{needs}"
    f"{'; ' + kept if kept else ''}. Make it writable, with room, and run the "
    "same command again"
  )


def _megabytes(count: int) -> str:
  return f"{count / 1e6:.3g} MB"


def _no_reader(where: str | os.PathLike, error: Exception) -> UserError:
  reason = " ".join(str(error).split())[:200]
  return UserError(
    f"{os.fspath(where)} cannot be used ({reason}): for gs:// paths, pip "
    "install 'ekd-jax[gs]'"
  )
