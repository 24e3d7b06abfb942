"""Files that are complete or absent, even if the process is killed while it writes."""

import contextlib
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import Problem, ShardkitError, format_problems

_TEMPORARY = ".part"
# Bytes of one name, and of a path without the zero at its end, on Linux.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def append_atomic(file: int, text: str, *, sync: bool = False) -> None:
    """Appends UTF-8 text to an open file with one writer: all of it, or none if the disk is full.

    `sync` waits until it is on disk. After an OSError the file is unchanged.
    """
    size, unwritten = os.fstat(file).st_size, text.encode()
    try:
        while unwritten:
            unwritten = unwritten[os.write(file, unwritten) :]
        if sync:
            os.fsync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


@contextlib.contextmanager
def write_atomic(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to, which is renamed to `path` when the block ends.

    If the block raises, `path` is unchanged and the temporary file is deleted. Concurrent writers
    of one path have a temporary file each, and the last to finish wins. A replaced file keeps its
    permissions, a new one has those of the umask, and a symbolic link stays one. A path that is not
    a regular file (`/dev/stdout`, a pipe) cannot be replaced and is written to directly. Its folder
    exists; `sync` waits until the file and its name are on disk.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{secrets.token_hex(8)}{_TEMPORARY}")
    try:
        # Fails before the block runs if `path` is a folder or its folder is full or read-only.
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory", str(path))
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        yield temporary
        # A library that writes by replacing the file chooses a mode of its own.
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def is_temporary(name: str) -> bool:
    """Whether a file is one that `write_atomic` writes to, or that a killed process left."""
    return name.startswith(".") and name.endswith(_TEMPORARY)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    _sync(folder)


def check_regular(path: Path) -> None:
    """Raises `OSError` for what is neither a file nor a folder: a pipe would be waited for."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise OSError(22, f"Is {kind}, not a file", str(path))


class FileInUseError(Exception):
    """Another process holds the lock of a file."""


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[int]:
    """Locks a file for this process, and creates it if needed; the lock ends with the process.

    Yields a descriptor, open for reading and appending. Raises FileInUseError if another process
    holds the lock, OSError if the file cannot be opened, or the file system has no locks.
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
    """Whether a process holds the lock of a file."""
    if not path.is_file():
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
    """Turns an `OSError` of the block into an error of a kind that names the path and a fix.

    >>> try:
    ...     with os_errors_as(ShardkitError, "Nothing was saved.", "a.csv", "another folder"):
    ...         raise PermissionError(13, "Permission denied")
    ... except ShardkitError as error:
    ...     print(error)
    Nothing was saved.
      a.csv  Permission denied.
    Fix: another folder
    """
    try:
        yield
    except OSError as error:
        why = str(error.strerror or error)
        # The block may run code of the caller, which failed on another file.
        other = Path(error.filename) if isinstance(error.filename, str) else None
        if other is not None and other.suffix != _TEMPORARY and other != Path(path):
            why += f": {other}"
        raise kind.of(headline, str(path), f"{why}.", fix) from error


def local_path(
    path: str | os.PathLike[str],
    kind: type[ShardkitError],
    headline: str = "Files are read and written on this machine only.",
    subject: str = "",
    fix: str = "",
) -> Path:
    """Returns a path with `~` expanded; refuses URLs, which would become folders here.

    Raises an error of type `kind` for a URL such as `s3://bucket/run`, or a path no system has. Its
    subject is the setting, by default the path itself; its fix, by default, another path.

    >>> local_path("runs/first", ShardkitError)
    PosixPath('runs/first')
    """
    if problem := path_problem(path, subject, fix):
        raise kind(format_problems(headline, [problem]))
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user
        return Path(path)


def path_problem(path: str | os.PathLike[str], subject: str = "", fix: str = "") -> Problem | None:
    """Returns what is wrong with a path before any file system is asked, or None."""
    fix = fix or _LOCAL
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        why = f"is {path!r}, of type {type(path).__name__}: a path is a text."
        return Problem(subject or "path", why, fix)
    if not text or "\0" in text:
        why = "is empty" if not text else "has a zero byte"
        return Problem(subject or repr(text), f"{why}: a path is needed.", fix)
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        return Problem(subject or repr(text), "has characters that no file has in its name", fix)
    if max(map(len, raw.split(b"/"))) > _LONGEST_NAME or len(raw) > _LONGEST_PATH:
        why = "File name too long."
        return Problem(subject or repr(f"{text[:40]}…"), why, fix)
    # A `Path` of the URL has one slash less.
    url = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    if url is None:
        return None
    why = f"is a URL ({url[1]}), not a path of a file system of this machine."
    fix = f"{fix}; or mount it, and give the path: /mnt/{text[url.end() :].strip('/')}"
    return Problem(subject or text, why, fix)


_LOCAL = "a path of this machine, such as ./first"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
