"""`FileTokens`: token ids in a file, read when they are sliced.

Not memory-mapped: a page of a file that was truncated meanwhile kills the process with SIGBUS,
without a word. A read says what happened.
"""

import os
import weakref
from pathlib import Path

import numpy as np

from .._core.errors import DataError


class FileTokens:
    """A range of a file as a one-dimensional array of integers.

    The file stays open, so that it may be deleted or replaced by another one of its name; whether
    it was changed itself is looked at before every read.
    """

    def __init__(
        self, path: Path, dtype: np.dtype, offset: int, count: int, *, file: int | None = None
    ) -> None:
        """Opens a regular file of `count` tokens from byte `offset`, or raises OSError.

        A descriptor `file` of the open file is copied; by default the path is opened.
        """
        self.dtype, self._path, self._offset, self._count = dtype, path, offset, count
        self._file = os.open(path, os.O_RDONLY) if file is None else os.dup(file)
        self._close = weakref.finalize(self, os.close, self._file)
        self._opened = _identity(self._file)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: slice) -> np.ndarray:
        """Reads a range of tokens."""
        start, stop, _ = index.indices(self._count)
        size = self.dtype.itemsize
        raw = self.read_bytes(start * size, max(0, stop - start) * size)
        return np.frombuffer(raw, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens."""
        return self._count * self.dtype.itemsize

    def cut(self, start: int, stop: int) -> "FileTokens":
        """Returns a range of tokens of the same open file without reading them."""
        offset = self._offset + start * self.dtype.itemsize
        part = FileTokens(self._path, self.dtype, offset, stop - start, file=self._file)
        part._opened = self._opened
        return part

    def read_bytes(self, start: int, n: int) -> bytes:
        """Reads bytes from the first token on; raises DataError if the file changed or fails."""
        try:
            if (now := _identity(self._file)) != self._opened:
                raise self._error(f"has changed: it had {self._opened[0]:,} bytes, now {now[0]:,}")
            parts, at, end = [], start, start + n
            while at < end and (part := os.pread(self._file, end - at, self._offset + at)):
                parts.append(part)
                at += len(part)
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror}") from error
        if at < end:
            raise self._error(f"ends {end - at:,} bytes too early")
        return b"".join(parts)

    def _error(self, why: str) -> DataError:
        fix = "the file as it was; then rerun the same command to resume"
        headline = "The data has changed during the run."
        return DataError.of(headline, str(self._path), why, fix)


def _identity(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns
