"""`launch`: runs a command in several processes of this machine, for tests."""

import contextlib
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

from .._core.errors import Problem, ProcessError, raise_all
from .._core.interrupts import INTERRUPTED
from ._failure import STOPPED, Failure
from ._membership import VARIABLE, Membership
from ._message_stream import Closed, Message, MessageStream, address_of, listen

_TICK = 0.05
# Within this time after a failure the other processes report its step and cause.
_REPORT_DELAY = 0.3
# Seconds from the first failure to SIGTERM and SIGKILL for processes that are still running.
_TERMINATE, _KILL = 0.8, 1.4
_LOOPBACK = "127.0.0.1"
# How processes end at Ctrl-C that have nothing to save, or have not joined yet.
_INTERRUPTED = (INTERRUPTED, -signal.SIGTERM)


def launch(command: Sequence[str], processes: int, devices: int | None = None) -> int:
    """Runs a command in several processes that `sk.distributed` joins; returns when all have ended.

    The output of process 0 passes through; lines of the others start with their number. Lines of
    standard error are delayed by 0.3 s, so that the first one names the process that failed.

    Args:
      command: words of the command, the same for every process.
      processes: number of processes.
      devices: CPU devices that each process simulates; None lets the command decide.

    Returns:
      0 if all processes returned 0; otherwise the code of the first that failed, or 128 + n if
      signal n ended it; 75 if all stopped after SIGTERM; 130 after Ctrl-C.

    Raises:
      ProcessError: the command or a number is not valid.
    """
    _check(command, processes, devices)
    children: list[_Child] = []
    try:
        children.extend(_start(command, processes, devices))
        with _killed_with_launcher(children):
            return _Supervisor(children).wait()
    except BaseException:  # as Ctrl-C while they start, before anything watches over them
        for child in children:
            child.signal(signal.SIGKILL)
            child.process.wait()
            child.close()
        raise


def _check(command: Sequence[str], processes: int, devices: int | None) -> None:
    problems = []
    if processes < 1:
        problems.append(Problem(f"-n {processes}", "must be at least 1", "-n 2"))
    if devices is not None and devices < 1:
        problems.append(Problem(f"--devices {devices}", "must be at least 1", "--devices 4"))
    if not command:
        why = "there is none after --"
        problems.append(Problem("command", why, "shardkit launch -n 2 -- shardkit train CONFIG"))
    elif shutil.which(command[0]) is None:
        problems.append(
            Problem(command[0], "is not a command on this machine", "a command on the PATH")
        )
    raise_all(ProcessError, "The processes cannot be started.", problems)


@dataclasses.dataclass
class _Child:
    """A process that was started."""

    index: int  # its number
    process: subprocess.Popen[bytes]  # handle of the operating system
    control: MessageStream  # connection on which it reports its step and its end
    step: int = 0  # last update that it reported
    # lines of its standard error that are not shown yet, each with its arrival time
    delayed: list[tuple[float, bytes]] = dataclasses.field(default_factory=list)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process and all that it has started, if it is running."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        """Closes the connection and the pipes."""
        self.control.close()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def _start(command: Sequence[str], count: int, devices: int | None) -> Iterator[_Child]:
    listener = listen(_LOOPBACK)
    with listen(_LOOPBACK) as port:  # a free port, which JAX's service takes in a moment
        jax_coordinator = address_of(port)
    token = secrets.token_hex()
    with listener:
        for index in range(count):
            ours, theirs = socket.socketpair()
            place = Membership(
                index=index,
                count=count,
                jax_coordinator=jax_coordinator,
                coordinator=address_of(listener),
                token=token,
                control=theirs.fileno(),
                listener=listener.fileno() if index == 0 else None,
                devices=devices,
            )
            inherited = (theirs.fileno(), *((listener.fileno(),) if index == 0 else ()))
            with theirs:
                process = _popen(command, place, inherited)
            yield _Child(index, process, MessageStream(ours))


def _popen(
    command: Sequence[str], place: Membership, inherited: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env={**_environment(place.devices), VARIABLE: place.to_text()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if place.index else None,
        stderr=subprocess.PIPE,
        pass_fds=inherited,
        # Ctrl-C reaches only the launcher, which sends SIGTERM, so that runs stop cleanly.
        start_new_session=True,
    )


@contextlib.contextmanager
def _killed_with_launcher(children: Sequence[_Child]) -> Iterator[None]:
    """Kills the processes of all children, whatever program they run, if this one is killed.

    A shell waits for the end of a pipe that only this process writes to.
    """
    groups = [f"-{child.process.pid}" for child in children]
    reaper = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; kill -s KILL -- "$@" 2>/dev/null', "reaper", *groups],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the launcher
    )
    with reaper:
        try:
            yield
        finally:
            reaper.kill()


def _environment(devices: int | None) -> dict[str, str]:
    if devices is None:
        return dict(os.environ)
    flags = os.environ.get("XLA_FLAGS", "")
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    simulated = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return {**os.environ, **simulated}


class _Supervisor:
    """Passes on output and signals of running processes, and ends them after a failure."""

    def __init__(self, children: Sequence[_Child]) -> None:
        self._children = children
        self._selector = selectors.DefaultSelector()
        for child in children:
            self._selector.register(child.control, selectors.EVENT_READ, (child, None))
            for pipe, out in ((child.process.stderr, 2), (child.process.stdout, 1)):
                if pipe is not None:
                    self._selector.register(pipe, selectors.EVENT_READ, (child, out))
        self._incomplete: dict[tuple[int, int], bytes] = {}  # last line of each pipe
        self._first_failed: _Child | None = None
        self._failed_at: float | None = None
        self._failure_line: str | None = None
        self._reported_by_itself = False
        self._own_code: int | None = None  # with which the first that failed was about to exit
        self._announced = self._interrupted = False
        self._signals = 0

    def wait(self) -> int:
        """Runs until all processes have ended; returns the exit code."""
        signals = (signal.SIGINT, signal.SIGTERM)
        # On a busy machine the thread of an `InterruptGuard` hears of a signal late: when the
        # guard's handler is back, and would take it for one that nothing has handled.
        heard = signal.set_wakeup_fd(-1)
        handlers = {number: signal.signal(number, self._forward_signal) for number in signals}
        try:
            while any(child.process.poll() is None for child in self._children):
                self._read(_TICK)
                self._check_children()
            while self._read(0.0):
                pass
            self._check_children()
            if self._failed_at is not None:
                self._announce_failure()
            self._show_errors(time.monotonic())
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(heard)
            for child in self._children:
                child.signal(signal.SIGKILL)
                child.close()
            self._selector.close()
        return self._exit_code()

    def _read(self, timeout: float) -> bool:
        """Handles what the processes have sent; returns whether there was anything."""
        ready = self._selector.select(timeout)
        for key, _ in ready:
            child, out = key.data
            try:
                if out is None:
                    for message in child.control.receive():
                        self._handle(child, message)
                else:
                    self._pass_on_output(child, out, os.read(key.fd, 2**16))
            except Closed:
                self._selector.unregister(key.fileobj)
        return bool(ready)

    def _handle(self, child: _Child, message: Message) -> None:
        if message["kind"] == "at":
            child.step = message["step"]
        elif message["kind"] == "end" and (self._failure_line is None or message["own"]):
            self._note_failure(self._children[message["process"]])
            self._failure_line, self._reported_by_itself = message["line"], message["own"]
            self._own_code = message["code"] if message["own"] else None

    def _pass_on_output(self, child: _Child, out: int, received: bytes) -> None:
        text = self._incomplete.pop((child.index, out), b"") + received
        if not received and text:
            text += b"\n"  # the pipe was closed in the middle of a line
        *lines, incomplete = text.split(b"\n")
        if incomplete:
            self._incomplete[child.index, out] = incomplete
        for line in lines:
            marked = f"[{child.index}] ".encode() + line + b"\n"
            if out == 2:
                child.delayed.append((time.monotonic(), marked))
            else:
                sys.stdout.buffer.write(marked)
                sys.stdout.flush()
        if not received:
            raise Closed

    def _check_children(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.process.poll() not in (None, 0, STOPPED):
                self._note_failure(child)
        if self._failed_at is None:
            self._show_errors(now - _REPORT_DELAY)
            return
        elapsed = now - self._failed_at
        if elapsed > _REPORT_DELAY:
            self._announce_failure()
            self._show_errors(now)
        for limit, number in ((_TERMINATE, signal.SIGTERM), (_KILL, signal.SIGKILL)):
            if elapsed > limit:
                for child in self._children:
                    child.signal(number)

    def _note_failure(self, child: _Child) -> None:
        if self._failed_at is None:
            self._failed_at, self._first_failed = time.monotonic(), child

    def _announce_failure(self) -> None:
        """Prints, before any other error, which process failed first."""
        if self._announced or self._first_failed is None:
            return
        self._announced = True
        first, code = self._first_failed, self._first_failed.process.poll() or 0
        # To the other processes a killed one is a closed connection; here its signal is known.
        killed = code < 0 and not self._reported_by_itself
        cause = f"killed by {signal.Signals(-code).name}" if killed else f"ended with code {code}"
        line = str(Failure(first.index, len(self._children), first.step, cause))
        if self._failure_line is not None and not killed:
            line = self._failure_line
        if self._interrupted and code in _INTERRUPTED:
            line = "Interrupted."
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def _show_errors(self, until: float) -> None:
        """Writes the lines of standard error that came before a time."""
        lines = [pair for child in self._children for pair in child.delayed if pair[0] <= until]
        for child in self._children:
            child.delayed = [pair for pair in child.delayed if pair[0] > until]
        for _, line in sorted(lines, key=lambda pair: pair[0]):
            sys.stderr.buffer.write(line)
        sys.stderr.flush()

    def _forward_signal(self, number: int, frame: FrameType | None) -> None:
        """Sends SIGTERM to all processes, so that they stop cleanly; SIGKILL the second time.

        At Ctrl-C those that have nothing to save need not wait for their first update.
        """
        self._signals += 1
        self._interrupted |= number == signal.SIGINT
        for child in self._children:
            if self._interrupted:
                child.control.send("interrupt")
            child.signal(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

    def _exit_code(self) -> int:
        codes = [child.process.wait() for child in self._children]
        if self._first_failed is not None:
            first = self._first_failed.process.wait()
            ended_here = first < 0 and self._own_code is not None
            codes = [self._own_code if ended_here else first, *codes]
        code = next((code for code in codes if code), 0)
        if self._interrupted and code in (0, STOPPED, *_INTERRUPTED):
            return INTERRUPTED
        return code if code >= 0 else 128 - code
