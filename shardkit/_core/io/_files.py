"""Files that are complete or absent, whatever ends the process while it writes."""

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import Problem, ShardkitError, format_problems

_PART = ".part"


def append_atomic(file: int, text: str, *, sync: bool = False) -> None:
    """Appends text to an open file: all of it, or nothing if there is no room for all.

    Args:
      file: descriptor that is open for appending, of a file with one writer.
      text: written as UTF-8.
      sync: whether to return only when the text is on the disk.

    Raises:
      OSError: the system refuses; the file is as it was.
    """
    size, rest = os.fstat(file).st_size, text.encode()
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
        if sync:
            os.fsync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


@contextlib.contextmanager
def write_atomic(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to, which takes the name `path` when the block ends.

    If the block raises, `path` is what it was and the temporary file is deleted. Writers of one
    path do not meet: each has its own temporary file, and the last to end wins. A file that is
    replaced keeps its permissions, a new one has those of the umask, and a link stays a link. What
    is not a regular file (`/dev/stdout`, a pipe) cannot be replaced and is written to directly.

    Args:
      path: the file; its folder exists.
      sync: whether to return only when the file and its name are on the disk.

    Raises:
      OSError: the system refuses.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{secrets.token_hex(8)}{_PART}")
    try:
        # An early refusal: a folder in the place of the file, or a folder without room or rights.
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory", str(path))
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE((path if path.exists() else part).stat().st_mode)
        yield part
        # A library that replaces the temporary file by one of its own has chosen a mode too.
        if stat.S_IMODE(part.stat().st_mode) != mode:
            part.chmod(mode)
        if sync:
            _sync(part)
        os.replace(part, path)
        if sync:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    _sync(folder)


class FileInUseError(Exception):
    """Another process holds the lock of a file."""


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[int]:
    """Holds a file, made if there is none, for one process; the lock ends with the process.

    Yields:
      A descriptor of the file, open for reading and appending.

    Raises:
      FileInUseError: another process holds it.
      OSError: it cannot be opened, or this file system has no locks.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileInUseError(str(path)) from None
        yield file
    finally:
        os.close(file)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file now."""
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def os_errors_as(
    kind: type[ShardkitError], headline: str, path: str | Path, fix: str
) -> Iterator[None]:
    """Raises what the system refuses inside the block as an error that names the path and a fix.

    Args:
      kind: type of the error.
      headline: what failed.
      path: the file or folder that is written.
      fix: what to do.

    Raises:
      ShardkitError: of type `kind`, in place of any `OSError`.

    >>> try:
    ...     with os_errors_as(ShardkitError, "Nothing is saved.", "a.csv", "another folder"):
    ...         raise PermissionError(13, "Permission denied")
    ... except ShardkitError as error:
    ...     print(error)
    Nothing is saved.
      a.csv  Permission denied.
    Fix: another folder
    """
    try:
        yield
    except OSError as error:
        why = str(error.strerror or error)
        # Code of the caller's that runs in the block may have failed on a file of its own.
        other = Path(error.filename) if isinstance(error.filename, str) else None
        if other is not None and other.suffix != _PART and other != Path(path):
            why += f": {other}"
        raise kind(format_problems(headline, [Problem(str(path), f"{why}.", fix)])) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
