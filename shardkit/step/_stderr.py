"""Copies what XLA prints to file descriptor 2 while it compiles, without withholding it.

If descriptor 2 is a file, the copy is read from that file. Otherwise descriptor 2 becomes a pipe to
a child process, which writes everything to the old descriptor 2 and to a copy:

    XLA → fd 2 (pipe) → tee → the old fd 2
                          └→  temporary file

A child process, not a thread, so that the reason of a crash still reaches the user if the compiler
aborts this process: it is in the pipe. Several threads can compile at once; whenever one starts or
ends, a new pipe replaces the last one, whose copy is then complete.
"""

import contextlib
import dataclasses
import fcntl
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

# XLA's lines begin `W0512 12:34:56.789012  4711 spmd_partitioner.cc:630]`; 4711 is the thread.
_HEADER = re.compile(r"[IWEF]\d{4} [\d:.]+\s+(\d+) ")
# Seconds to wait for the end of a pipe, which comes late if a child of the user inherited it.
_DRAIN_TIMEOUT = 5.0
_COPY = (
    "import os, sys\nout = os.open(sys.argv[1], os.O_WRONLY)\nwhile text := os.read(0, 65536):\n"
)
_COPY += "    for to in (1, out):\n        rest = text\n        while rest:\n"
_COPY += "            rest = rest[os.write(to, rest) :]\n"


@dataclasses.dataclass(eq=False)
class Messages:
    """What was printed during one compile; complete after the `with` block."""

    thread: int  # native id of the compiling thread
    # native ids of threads that compiled meanwhile, whose lines are left out
    others: set[int] = dataclasses.field(default_factory=set)
    printed: list[str] = dataclasses.field(default_factory=list)  # chunks of text, in order

    @property
    def text(self) -> str:
        """The lines of this thread, and lines that name no thread."""
        kept, ours = [], True
        for line in "".join(self.printed).splitlines(keepends=True):
            if header := _HEADER.match(line):
                ours = int(header[1]) not in self.others
            kept += [line] if ours else []
        return "".join(kept)


class _Pipe:
    """A pipe, and the child process that copies what comes out of it."""

    def __init__(self, destination: int) -> None:
        self._copy: IO[bytes] = tempfile.TemporaryFile()
        out, self.entry = os.pipe()
        try:
            self.process = self._start(out, destination)
        except BaseException:
            os.close(self.entry)
            self._copy.close()
            raise
        finally:
            os.close(out)

    def _start(self, out: int, destination: int) -> subprocess.Popen[bytes]:
        copy = self._copy.fileno()
        for command in (["tee"], [sys.executable, "-ISc", _COPY]):
            with contextlib.suppress(FileNotFoundError):
                return subprocess.Popen(
                    [*command, f"/dev/fd/{copy}"],
                    stdin=out,
                    stdout=destination,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[copy],
                    start_new_session=True,  # Ctrl-C must not end it before the caller has printed
                )
        raise FileNotFoundError(sys.executable)

    def drain(self) -> str:
        """Closes the pipe and returns everything that went through it."""
        os.close(self.entry)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_DRAIN_TIMEOUT)
        with self._copy:
            self._copy.seek(0)
            return self._copy.read().decode(errors="replace")


class _Descriptor2:
    """Descriptor 2 of this process, and the compiles that read it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: list[Messages] = []
        self._piped: list[Messages] = []  # those of them that read from the pipe, not from a file
        self._pipe: _Pipe | None = None
        self._original = -1  # a duplicate of the original descriptor 2 while a pipe replaces it
        self._children: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def read(self) -> Iterator[Messages]:
        """Reads what is printed during the block."""
        reader = Messages(threading.get_native_id())
        with self._lock:
            file = None if self._pipe else _open_stderr_file()
            if file is None:
                self._add_piped(reader)
            for other in self._readers:
                other.others |= {reader.thread} - {other.thread}
                reader.others |= {other.thread} - {reader.thread}
            self._readers.append(reader)
        start = _write_position(2) if file is not None else 0
        try:
            yield reader
        finally:
            _flush_stderr()
            with self._lock:
                self._readers.remove(reader)
                if file is None:
                    self._remove_piped(reader)
                else:
                    reader.printed.append(_read_between(file, start, _write_position(2)))

    def _add_piped(self, reader: Messages) -> None:
        original = self._original if self._piped else os.dup(2)
        try:
            pipe = _Pipe(original)
        except OSError:
            if not self._piped:
                os.close(original)
            raise
        self._original = original
        self._switch(pipe, [*self._piped, reader])

    def _remove_piped(self, reader: Messages) -> None:
        remaining = [other for other in self._piped if other is not reader]
        pipe = None
        if remaining:
            with contextlib.suppress(OSError):  # the others then read nothing more
                pipe = _Pipe(self._original)
        self._switch(pipe, remaining)
        if not remaining:
            os.close(self._original)

    def _switch(self, pipe: _Pipe | None, readers: list[Messages]) -> None:
        """Makes descriptor 2 a new pipe, or for None the original one; drains the last pipe."""
        _flush_stderr()
        before, self._pipe = self._pipe, pipe
        os.dup2(pipe.entry if pipe else self._original, 2)
        if before is not None:
            text = before.drain()
            for reader in self._piped:
                reader.printed.append(text)
            self._children.append(before.process)
        self._children = [child for child in self._children if child.poll() is None]
        self._piped = readers


def _flush_stderr() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()


def _open_stderr_file() -> int | None:
    """Opens the file that descriptor 2 is; None if it is not a file, or cannot be read."""
    if not stat.S_ISREG(os.fstat(2).st_mode):
        return None
    try:
        return os.open("/proc/self/fd/2", os.O_RDONLY)
    except OSError:
        return None


def _write_position(descriptor: int) -> int:
    """Offset at which the next byte is written to a file."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
        return os.fstat(descriptor).st_size
    return os.lseek(descriptor, 0, os.SEEK_CUR)


def _read_between(file: int, start: int, end: int) -> str:
    """Reads a part of a file and closes it; from its start if it was truncated meanwhile."""
    start = start if start <= end else 0
    with open(file, "rb") as opened:
        opened.seek(start)
        return opened.read(end - start).decode(errors="replace")


_DESCRIPTOR_2 = _Descriptor2()


def copied_stderr() -> contextlib.AbstractContextManager[Messages]:
    """Copies what is written to descriptor 2 during a block, as XLA's C++ does with its warnings.

    Everything still reaches the user, immediately, even if this process crashes.
    """
    return _DESCRIPTOR_2.read()
