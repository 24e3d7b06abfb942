"""What XLA prints to descriptor 2 while it compiles, read on its way to the user.

Where descriptor 2 is a file, that file is read. Elsewhere a pipe takes its place, and a process of
its own hands on all that comes, and keeps a copy. It is a process, not a thread, so that nothing
is lost where the compiler aborts this one: the last words are in the pipe, and still come out.

Several threads may compile at once. Whenever one begins or ends, another pipe takes over, so that
the one before comes to its end and its copy is complete.
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
# How long a copy is waited for, in seconds, where a process of the user's has inherited the pipe.
_PATIENCE = 5.0
_COPY = (
    "import os, sys\nout = os.open(sys.argv[1], os.O_WRONLY)\nwhile text := os.read(0, 65536):\n"
)
_COPY += "    for to in (1, out):\n        rest = text\n        while rest:\n"
_COPY += "            rest = rest[os.write(to, rest) :]\n"


@dataclasses.dataclass(eq=False)
class Messages:
    """What was printed during one compile; complete when its block has ended.

    Attributes:
      thread: the system's number of the thread that compiles.
      others: of threads that compiled meanwhile: their lines are left out.
      printed: as it was read, piece by piece.
    """

    thread: int
    others: set[int] = dataclasses.field(default_factory=set)
    printed: list[str] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        """The lines of this thread's compile, and those of which nobody can tell."""
        kept, ours = [], True
        for line in "".join(self.printed).splitlines(keepends=True):
            if header := _HEADER.match(line):
                ours = int(header[1]) not in self.others
            kept += [line] if ours else []
        return "".join(kept)


class _Pipe:
    """A pipe, and the process that hands on what comes out of it."""

    def __init__(self, destination: int) -> None:
        self._copy: IO[bytes] = tempfile.TemporaryFile()
        out, self.entry = os.pipe()
        try:
            self.process = self._started(out, destination)
        except BaseException:
            os.close(self.entry)
            self._copy.close()
            raise
        finally:
            os.close(out)

    def _started(self, out: int, destination: int) -> subprocess.Popen[bytes]:
        copy = self._copy.fileno()
        for command in (["tee"], [sys.executable, "-ISc", _COPY]):
            with contextlib.suppress(FileNotFoundError):
                return subprocess.Popen(
                    [*command, f"/dev/fd/{copy}"],
                    stdin=out,
                    stdout=destination,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[copy],
                    start_new_session=True,  # Ctrl-C is for the caller, who may still print
                )
        raise FileNotFoundError(sys.executable)

    def emptied(self) -> str:
        """Closes the pipe and returns all that went through it."""
        os.close(self.entry)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_PATIENCE)
        with self._copy:
            self._copy.seek(0)
            return self._copy.read().decode(errors="replace")


class _Descriptor2:
    """Descriptor 2 of this process, and who reads along."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[Messages] = []
        self._piped: list[Messages] = []
        self._pipe: _Pipe | None = None
        self._own = -1  # a copy of descriptor 2 as it was, while a pipe stands in its place
        self._inherited: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def read(self) -> Iterator[Messages]:
        """Reads what is printed during the block."""
        one = Messages(threading.get_native_id())
        with self._lock:
            file = None if self._pipe else _open_stderr_file()
            if file is None:
                self._enter(one)
            for other in self._all:
                other.others |= {one.thread} - {other.thread}
                one.others |= {other.thread} - {one.thread}
            self._all.append(one)
        start = _write_position(2) if file is not None else 0
        try:
            yield one
        finally:
            _flush_stderr()
            with self._lock:
                self._all.remove(one)
                if file is None:
                    self._leave(one)
                else:
                    one.printed.append(_read_between(file, start, _write_position(2)))

    def _enter(self, one: Messages) -> None:
        own = self._own if self._piped else os.dup(2)
        try:
            pipe = _Pipe(own)
        except OSError:
            if not self._piped:
                os.close(own)
            raise
        self._own = own
        self._pass_to(pipe, [*self._piped, one])

    def _leave(self, one: Messages) -> None:
        readers = [other for other in self._piped if other is not one]
        pipe = None
        if readers:
            with contextlib.suppress(OSError):  # who stays reads no more, but all get away
                pipe = _Pipe(self._own)
        self._pass_to(pipe, readers)
        if not readers:
            os.close(self._own)

    def _pass_to(self, pipe: _Pipe | None, readers: list[Messages]) -> None:
        """Puts a pipe in the place of descriptor 2, or for none what it was; empties the last."""
        _flush_stderr()
        before, self._pipe = self._pipe, pipe
        os.dup2(pipe.entry if pipe else self._own, 2)
        if before is not None:
            text = before.emptied()
            for one in self._piped:
                one.printed.append(text)
            self._inherited.append(before.process)
        self._inherited = [one for one in self._inherited if one.poll() is None]
        self._piped = readers


def _flush_stderr() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()


def _open_stderr_file() -> int | None:
    """Opens the file that descriptor 2 is; None where it is none, or may not be read."""
    if not stat.S_ISREG(os.fstat(2).st_mode):
        return None
    try:
        return os.open("/proc/self/fd/2", os.O_RDONLY)
    except OSError:
        return None


def _write_position(descriptor: int) -> int:
    """Where the next byte that is written to a file goes."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
        return os.fstat(descriptor).st_size
    return os.lseek(descriptor, 0, os.SEEK_CUR)


def _read_between(file: int, start: int, end: int) -> str:
    """Reads a part of a file and closes it; from its beginning where it was cut meanwhile."""
    start = start if start <= end else 0
    with open(file, "rb") as opened:
        opened.seek(start)
        return opened.read(end - start).decode(errors="replace")


_DESCRIPTOR_2 = _Descriptor2()


def copied_stderr() -> contextlib.AbstractContextManager[Messages]:
    """Reads what is written to descriptor 2 during a block, where XLA's C++ prints its warnings.

    All of it reaches the user, at once and whatever becomes of this process.
    """
    return _DESCRIPTOR_2.read()
