"""Stopping a run cleanly, after the update under way and with a checkpoint."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

from jax.experimental import multihost_utils

from .._core.errors import Stopped
from .._core.interrupts import INTERRUPTED, InterruptGuard, active_guard, send_again, signal_thread

_SHOW_CURSOR = "\x1b[?25h"


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request that the loop reads after each update.

    The second Ctrl-C ends the process at once, even one that waits for a device, perhaps forever.
    So a thread counts the signals that the interpreter's C handler receives:

        host runs Python:   Ctrl-C → _handle_signal restores SIG_DFL · Ctrl-C → the system kills
        host waits in C++:  Ctrl-C → thread counts 1 · Ctrl-C → thread counts 2, and exits

    Between updates (`raise_at_once`) the first one ends the run at once: an evaluation and a
    compilation are not waited for.

    Attributes:
      signal: the one that was received, or None.
      why: the reason that a callback gave to `RunContext.stop`, or None.
    """

    def __init__(self, several: bool = False) -> None:
        """Installs no handler yet; `several` says whether other processes make the same updates.

        Then JAX's own service handles SIGTERM in whichever process receives it, and stops all of
        them after the same update.
        """
        self._several = several
        self.signal: signal.Signals | None = None
        self.why: str | None = None
        self._handlers: dict[signal.Signals, Any] = {}  # those to restore
        self._stack = contextlib.ExitStack()
        self._remaining = 2
        self._asked = 0  # how often all processes have called `is_requested`
        self._guard: InterruptGuard | None = None
        self._at_once = False

    def __enter__(self) -> Self:
        """Installs the handlers; outside the main thread Python cannot, and signals stay as is."""
        if threading.current_thread() is threading.main_thread():
            self._guard = active_guard()
            ours = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
            for number in ours:
                self._handlers[number] = signal.signal(number, self._handle_signal)
            self._stack.enter_context(signal_thread(self._exit_at_second))
        return self

    def __exit__(self, *_: object) -> None:
        """Restores all handlers, and ends the thread."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._stack.close()

    @contextlib.contextmanager
    def raise_at_once(self, save: Callable[[], str]) -> Iterator[None]:
        """Raises for a signal as soon as it comes; one of several processes waits for the others.

        Ctrl-C is left to the handler of before, so that of the command line also ends a process
        that compiles (`InterruptGuard`). `save` saves what is not on the disk yet; its message
        becomes a note of the KeyboardInterrupt, or of Stopped after SIGTERM.
        """
        if self._several or not self._handlers:
            yield
            return
        guard = self._guard
        try:
            self._at_once = True
            if guard is not None:
                signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])
                self._stack.close()  # so that the guard hears of signals again
            leaving = guard.leaving(save) if guard is not None else contextlib.nullcontext()
            with leaving, send_again(Stopped, signal.SIGTERM, self._handle_again):
                self._raise()  # for one that came just before
                yield
        except (KeyboardInterrupt, Stopped) as stop:
            stop.add_note(save())
            raise
        finally:
            self._at_once = False
            if guard is not None:
                signal.signal(signal.SIGINT, self._handle_signal)
                self._stack.enter_context(signal_thread(self._exit_at_second))

    def request(self, why: str) -> None:
        """Requests the end as a signal does; `raise_for_signal` then raises nothing."""
        self.why = why

    def is_requested(self) -> bool:
        """Whether to stop after this update; of several processes all must call this."""
        self._asked += 1
        if self._several and multihost_utils.reached_preemption_sync_point(self._asked):
            self.signal = signal.SIGTERM
        return self.signal is not None or self.why is not None

    def raise_for_signal(self, finish_saving: Callable[[], str]) -> None:
        """Raises KeyboardInterrupt for Ctrl-C, Stopped for SIGTERM, noting what is saved."""
        try:
            self._raise()
        except (KeyboardInterrupt, Stopped) as stop:
            stop.add_note(finish_saving())
            raise

    def _raise(self) -> None:
        if self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise Stopped("Stopped by SIGTERM.")

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = signal.Signals(number)
        if self._at_once:
            self._raise()
        if sys.stdout.isatty():
            text = "Stopping after this step. Press Ctrl-C again to exit at once."
            os.write(1, f"{_SHOW_CURSOR}\n{text}\n".encode())

    def _handle_again(self) -> None:
        signal.signal(signal.SIGTERM, self._handle_signal)

    def _exit_at_second(self, number: int) -> None:
        """Exits at the second Ctrl-C, if Python did not get to handle the first one."""
        self._remaining -= number == signal.SIGINT
        if self._remaining <= 0:
            if sys.stdout.isatty():
                os.write(1, _SHOW_CURSOR.encode())
            os._exit(INTERRUPTED)
