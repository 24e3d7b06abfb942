"""Ctrl-C while the interpreter does not run: it compiles, or waits for a device.

Python handles a signal between two of its own instructions only. A thread hears of it at once, by
the descriptor that the interpreter's C handler writes to.
"""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

INTERRUPTED = 128 + signal.SIGINT
# Within this time Python handles a signal, unless it waits for C++.
_PATIENCE = 0.7
# Until Ctrl-C is tried again whose exception Python has swallowed.
_AGAIN = 0.05
# Threads of this name write a checkpoint, for which the end of the process waits.
SAVING = "shardkit-save"


@contextlib.contextmanager
def signal_thread(call: Callable[[int], None]) -> Iterator[None]:
    """Calls a function in a thread with the number of each signal that has a handler of Python."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def run() -> None:
        with reader:
            while numbers := reader.recv(64):  # one byte per signal, its number
                for number in numbers:
                    call(number)

    thread = threading.Thread(target=run, name="shardkit-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # which the thread reads as the end
        thread.join()


@contextlib.contextmanager
def send_again(
    kind: type[BaseException], number: int, prepare: Callable[[], object]
) -> Iterator[None]:
    """Sends a signal again if Python swallows the exception `kind` that its handler raises.

    It does in a finalizer and in a callback of its garbage collector; JAX has one. Before that it
    calls `prepare`.
    """
    hook = sys.unraisablehook

    def handle(swallowed: Any) -> None:
        if not issubclass(swallowed.exc_type, kind):
            hook(swallowed)
            return
        prepare()
        # In this thread, it would be raised inside of the callback again.
        again = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    sys.unraisablehook = handle
    try:
        yield
    finally:
        sys.unraisablehook = hook


class InterruptGuard:
    """Ends a program at Ctrl-C: by `KeyboardInterrupt`, or at once if that cannot be raised.

    Where a run handles signals itself (`StopRequest`), the guard does nothing.

        0.0  Ctrl-C, while XLA compiles for 20 s
        0.7  no Python instruction has run: a run saves its state (`leaving`), exit 130

    Attributes:
      interrupted: whether `KeyboardInterrupt` was raised, which code may have replaced by another
        exception: modules that are being imported do.
    """

    def __init__(self) -> None:
        """Installs nothing yet."""
        self._raised, self._stack = threading.Event(), contextlib.ExitStack()
        self._leave: Callable[[], str] | None = None
        self._leaving = threading.RLock()  # a handler may interrupt another one
        self._exits = False

    def __enter__(self) -> Self:
        """Installs the handler; outside the main thread Python cannot."""
        if threading.current_thread() is threading.main_thread():
            before: Any = signal.signal(signal.SIGINT, self._raise)
            self._stack.callback(signal.signal, signal.SIGINT, before)
            self._stack.enter_context(signal_thread(self._exit_unless_raised))
            again = send_again(KeyboardInterrupt, signal.SIGINT, self._raised.clear)
            self._stack.enter_context(again)
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the handler, and ends the thread."""
        self._stack.close()

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._raised.is_set()

    @contextlib.contextmanager
    def leaving(self, leave: Callable[[], str]) -> Iterator[None]:
        """Calls a function in another thread before the block is ended at once.

        It saves what must not be lost, and returns a message for the user.
        """
        self._leave = leave
        try:
            yield
        finally:
            self._leave = None

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        """Ends the process at Ctrl-C in the block, which imports, and has nothing to save.

        An exception in the middle of an import is lost where a module tries another one in its
        place, and one in the middle of an extension of C++ can crash the process.
        """
        self._exits = True
        try:
            yield
        finally:
            self._exits = False

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._exits:
            os.write(2, b"Interrupted.\n")
            exit_now(INTERRUPTED)
        with self._leaving:  # not while the thread ends the process
            self._raised.set()
        raise KeyboardInterrupt

    def _exit_unless_raised(self, number: int) -> None:
        is_ours = number == signal.SIGINT and signal.getsignal(number) == self._raise
        if not is_ours or self._raised.wait(_PATIENCE):
            return
        with self._leaving:
            if not self._raised.is_set():
                lines = ["Interrupted."]
                try:
                    lines += [self._leave()] if self._leave else []
                except Exception as error:
                    lines.append(str(error))
                os.write(2, "".join(f"{line}\n" for line in lines).encode())
                exit_now(INTERRUPTED)


def active_guard() -> InterruptGuard | None:
    """Returns the guard that handles Ctrl-C now, if one does."""
    owner = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    return owner if isinstance(owner, InterruptGuard) else None


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Lets Ctrl-C in the block, which compiles, end a script at once, unless the script handles it.

    The exception comes at once (in jax 0.12 when the compiler is done, as in plain JAX), but XLA's
    threads go on compiling: the interpreter would wait for them for seconds and often crash
    (`exit_now`). So once it was raised, one that nobody handles ends the process behind its
    traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not _is_interactive():
            sys.excepthook = functools.partial(_show_and_exit, sys.excepthook)
        raise


def _show_and_exit(show: Callable[..., object], kind: type[BaseException], *error: Any) -> None:
    show(kind, *error)
    if issubclass(kind, KeyboardInterrupt):
        exit_now(INTERRUPTED)


def _is_interactive() -> bool:
    """Whether a prompt or a notebook goes on after an exception."""
    return bool(getattr(sys, "ps1", None) or sys.flags.interactive or "ipykernel" in sys.modules)


def guard_script() -> contextlib.AbstractContextManager[object]:
    """Returns an `InterruptGuard` for a script that leaves Ctrl-C to Python.

    A prompt or a notebook must go on after Ctrl-C, and a handler of the caller's own stays.
    """
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return InterruptGuard() if plain and not _is_interactive() else contextlib.nullcontext()


def exit_now(code: int) -> None:
    """Ends the process when a pending checkpoint is on disk, without the exit handlers of others.

    XLA's threads go on compiling while the interpreter ends, for seconds or into a crash.
    """
    for thread in threading.enumerate():
        if thread.name.startswith(SAVING):
            thread.join()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # a handler may interrupt it
            stream.flush()
    os._exit(code)
