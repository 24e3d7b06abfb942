"""Being asked to stop: after the step that is under way, with its state saved."""

import os
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from jax.experimental import multihost_utils

from .._errors import Stopped

_SHOW_CURSOR = "\x1b[?25h"


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request that the loop reads.

    The second Ctrl-C ends the process at once. Python reads a signal between two of its own
    instructions only, which a program that waits for a device, maybe for ever, does not come to; so
    a thread counts what the interpreter's C handler hears. Once the first was read, the system's
    own handler stands for the second.

    Attributes:
      signal: the one that came, or None.
      why: what a watcher ends the run for, or None.
    """

    def __init__(self, several: bool = False) -> None:
        """Takes nothing over yet.

        Args:
          several: whether other processes make the same updates. Then JAX's own service takes
            SIGTERM, of whichever process it comes to, and has all of them end after one update.
        """
        self._several = several
        self.signal: signal.Signals | None = None
        self.why: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._heard: tuple[socket.socket, socket.socket] | None = None
        self._heard_before = -1

    def __enter__(self) -> Self:
        """Takes the two signals over; elsewhere than in the main thread they are not Python's."""
        if threading.current_thread() is threading.main_thread():
            ours = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
            for one in ours:
                self._before[one] = signal.signal(one, self._note)
            self._heard = ears, mouth = socket.socketpair()
            mouth.setblocking(False)
            self._heard_before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
            self._listener = threading.Thread(target=_end_at_the_second, args=(ears,), daemon=True)
            self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the signals back to whoever had them, and ends the thread."""
        for one, handler in self._before.items():
            signal.signal(one, handler)
        if self._heard is not None:
            signal.set_wakeup_fd(self._heard_before)
            self._heard[1].close()  # which the thread reads as the end
            self._listener.join()

    def ask(self, why: str) -> None:
        """Asks for the end as a signal does, but as something that was meant to happen."""
        self.why = why

    def asked(self, done: int) -> bool:
        """Whether the run is to end after `done` updates; in several processes asked of each."""
        if self._several and multihost_utils.reached_preemption_sync_point(done):
            self.signal = signal.SIGTERM
        return self.signal is not None or self.why is not None

    def raise_if_told(self, saved: str) -> None:
        """Ends the loop if a signal came.

        Args:
          saved: what is on the disk, for the user.

        Raises:
          KeyboardInterrupt: it was Ctrl-C.
          Stopped: it was SIGTERM.
        """
        if self.signal is None:
            return
        stop = KeyboardInterrupt() if self.signal is signal.SIGINT else Stopped("Told to stop.")
        stop.add_note(saved)
        raise stop

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = signal.Signals(number)
        if sys.stdout.isatty():
            os.write(1, f"{_SHOW_CURSOR}\nStopping after this step; again ends at once.\n".encode())


def _end_at_the_second(ears: socket.socket) -> None:
    """Ends the process when two Ctrl-C were heard of which Python has not read the first."""
    left = 2
    with ears:
        while heard := ears.recv(64):
            left -= heard.count(signal.SIGINT)
            if left <= 0:
                if sys.stdout.isatty():
                    os.write(1, _SHOW_CURSOR.encode())
                os._exit(128 + signal.SIGINT)
