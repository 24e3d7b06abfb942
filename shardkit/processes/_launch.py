"""`launch`: several processes of one command on this machine, on loopback, for tests."""

import dataclasses
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from .._errors import Problem, ProcessError, raise_all
from ._failure import STOPPED, Failure
from ._line import Closed, Line, address_of, listen
from ._membership import VARIABLE, Membership

_TICK = 0.05
# The processes themselves say within this time at which step the first one failed, and what.
_SAY = 0.3
# Seconds from the first failure to SIGTERM and to SIGKILL for those that have not ended.
_TERMINATE, _KILL = 0.8, 1.4
_LOOPBACK = "127.0.0.1"


def launch(command: Sequence[str], processes: int, devices: int | None = None) -> int:
    """Runs a command in several processes that know of each other; returns when all have ended.

    The output of process 0 passes through, lines of the others carry their number. Errors come
    half a second late, so that the first line can say which process failed, at what step and why.

    Args:
      command: words of the command, the same for every process.
      processes: how many.
      devices: CPU devices that each simulates; None leaves that to the command.

    Returns:
      0 when all processes returned 0; otherwise the code of the first that failed, 128 + n if
      signal n ended it, or 75 when they were told to stop and did; 130 after Ctrl-C.

    Raises:
      ProcessError: there is nothing to start, or it cannot be started.
    """
    _check(command, processes, devices)
    children = list(_start(command, processes, devices))
    return _Group(children).wait()


def _check(command: Sequence[str], processes: int, devices: int | None) -> None:
    problems = []
    if processes < 1:
        problems.append(Problem(f"-n {processes}", "must be at least 1", "-n 2"))
    if devices is not None and devices < 1:
        problems.append(Problem(f"--devices {devices}", "must be at least 1", "--devices 4"))
    if not command:
        why = "there is none behind --"
        problems.append(Problem("command", why, "shardkit launch -n 2 -- shardkit train CONFIG"))
    elif shutil.which(command[0]) is None:
        problems.append(Problem(command[0], "is no command here", "a command on the PATH"))
    raise_all(ProcessError, "Nothing can be started.", problems)


@dataclasses.dataclass
class _Child:
    """One process.

    Attributes:
      index: its number.
      process: the system's.
      control: on which it tells its step and its end.
      step: last update that it told of.
      held: lines of its errors with the time they came, not shown yet.
    """

    index: int
    process: subprocess.Popen[bytes]
    control: Line
    step: int = 0
    held: list[tuple[float, bytes]] = dataclasses.field(default_factory=list)

    def close(self) -> None:
        """Closes what connects it."""
        self.control.close()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def _start(command: Sequence[str], count: int, devices: int | None) -> Iterator[_Child]:
    listener = listen(_LOOPBACK)
    with listen(_LOOPBACK) as port:  # free now; nothing here is in a hurry to take it
        coordinator = address_of(port)
    token = secrets.token_hex()
    with listener:
        for index in range(count):
            ours, theirs = socket.socketpair()
            place = Membership(
                index,
                count,
                coordinator,
                address_of(listener),
                token,
                theirs.fileno(),
                listener.fileno() if index == 0 else None,
                devices,
            )
            kept = (theirs.fileno(), *((listener.fileno(),) if index == 0 else ()))
            with theirs:
                process = _popen(command, place, kept)
            yield _Child(index, process, Line(ours))


def _popen(
    command: Sequence[str], place: Membership, kept: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env={**_environment(place.devices), VARIABLE: place.to_text()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if place.index else None,
        stderr=subprocess.PIPE,
        pass_fds=kept,
        # Ctrl-C comes to the launcher alone, which passes on what ends a run in order.
        start_new_session=True,
    )


def _environment(devices: int | None) -> dict[str, str]:
    if devices is None:
        return dict(os.environ)
    flags = os.environ.get("XLA_FLAGS", "")
    kept = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    simulated = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": kept}
    return {**os.environ, **simulated}


class _Group:
    """The processes while they run."""

    def __init__(self, children: Sequence[_Child]) -> None:
        self._children = children
        self._selector = selectors.DefaultSelector()
        for child in children:
            self._selector.register(child.control, selectors.EVENT_READ, (child, None))
            for pipe, out in ((child.process.stderr, 2), (child.process.stdout, 1)):
                if pipe is not None:
                    self._selector.register(pipe, selectors.EVENT_READ, (child, out))
        self._rest: dict[tuple[int, int], bytes] = {}
        self._first: _Child | None = None
        self._failed_at: float | None = None
        self._line: str | None = None
        self._own = False
        self._said = self._interrupted = False
        self._signals = 0

    def wait(self) -> int:
        """Passes output on until all processes have ended; returns the code for all of them."""
        before = {one: signal.signal(one, self._pass_on) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            while any(child.process.poll() is None for child in self._children):
                self._select(_TICK)
                self._look()
            while self._select(0.0):
                pass
            self._look()
            if self._failed_at is not None:
                self._say()
            self._show(time.monotonic())
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
            for child in self._children:
                self._signal(child, signal.SIGKILL)
                child.close()
            self._selector.close()
        return self._code()

    def _select(self, timeout: float) -> bool:
        ready = self._selector.select(timeout)
        for key, _ in ready:
            child, out = key.data
            try:
                if out is None:
                    for message in child.control.receive():
                        self._hear(child, message)
                else:
                    self._output(child, out, os.read(key.fd, 2**16))
            except Closed:
                self._selector.unregister(key.fileobj)
        return bool(ready)

    def _hear(self, child: _Child, message: dict) -> None:
        if message["kind"] == "at":
            child.step = message["step"]
        elif message["kind"] == "end" and (self._line is None or message["own"]):
            self._fails(self._children[message["process"]])
            self._line, self._own = message["line"], message["own"]

    def _output(self, child: _Child, out: int, got: bytes) -> None:
        whole, newline, rest = (self._rest.pop((child.index, out), b"") + got).rpartition(b"\n")
        if not got:  # the end, perhaps in the middle of a line
            whole, newline, rest = rest, b"\n" if rest else b"", b""
        if rest:
            self._rest[child.index, out] = rest
        for line in whole.split(b"\n") if newline else ():
            marked = f"[{child.index}] ".encode() + line + b"\n"
            if out == 2:
                child.held.append((time.monotonic(), marked))
            else:
                sys.stdout.buffer.write(marked)
                sys.stdout.flush()
        if not got:
            raise Closed

    def _look(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.process.poll() not in (None, 0, STOPPED):
                self._fails(child)
        if self._failed_at is None:
            self._show(now - _SAY)
            return
        since = now - self._failed_at
        if since > _SAY:
            self._say()
            self._show(now)
        for limit, one in ((_TERMINATE, signal.SIGTERM), (_KILL, signal.SIGKILL)):
            if since > limit:
                for child in self._children:
                    self._signal(child, one)

    def _fails(self, child: _Child) -> None:
        if self._failed_at is None:
            self._failed_at, self._first = time.monotonic(), child

    def _say(self) -> None:
        """Prints, before anything else, which process failed first."""
        if self._said or self._first is None:
            return
        self._said = True
        first, code = self._first, self._first.process.poll() or 0
        signalled = code < 0 and not self._own  # what the others take for a lost connection
        how = f"killed by {signal.Signals(-code).name}" if signalled else f"ended with code {code}"
        own = str(Failure(first.index, len(self._children), first.step, how))
        sys.stderr.write(f"{own if signalled or self._line is None else self._line}\n")
        sys.stderr.flush()

    def _show(self, until: float) -> None:
        """Writes the lines of errors that are older than a time."""
        lines = [pair for child in self._children for pair in child.held if pair[0] <= until]
        for child in self._children:
            child.held = [pair for pair in child.held if pair[0] > until]
        for _, line in sorted(lines, key=lambda pair: pair[0]):
            sys.stderr.buffer.write(line)
        sys.stderr.flush()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks all to end in order, the second ends them."""
        self._signals += 1
        self._interrupted |= number == signal.SIGINT
        for child in self._children:
            self._signal(child, signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

    def _signal(self, child: _Child, one: signal.Signals) -> None:
        if child.process.poll() is None:
            os.killpg(child.process.pid, one)

    def _code(self) -> int:
        codes = [child.process.wait() for child in self._children]
        if self._first is not None:
            codes = [self._first.process.wait(), *codes]
        code = next((code for code in codes if code), 0)
        if self._interrupted and code in (0, STOPPED):
            return 130
        return code if code >= 0 else 128 - code
