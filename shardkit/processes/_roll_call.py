"""`RollCall`: which processes of a cluster have come; JAX knows while it waits, and does not say.

Until JAX has connected them, the processes share no secret. So they exchange nothing but numbers
below their count, which decide only whom the message at the start timeout names:

    process 2 of 4   "2"  →    process 0, at the HOST:PORT of JAX's coordinator, by UDP
                     ← "1 3"   the first that have not come
"""

import contextlib
import os
import socket
import threading
from collections.abc import Mapping
from typing import Self

from ._cluster import coordinator_address, host_of_process
from ._failure import Failure

# Seconds between two calls, processes that are named, and bytes of an answer with their numbers.
_EVERY, _NAMED, _LONGEST = 0.3, 8, 128


class RollCall:
    """Calls the roll in a thread, while the block waits for all processes to join."""

    def __init__(
        self, index: int, count: int, seconds: float, environment: Mapping[str, str] = os.environ
    ) -> None:
        """Opens the socket.

        Without one, as where no variable says the address, nobody is named. The message says for
        how many `seconds` the block waits.
        """
        self._index, self._count, self._seconds = index, count, seconds
        self._environment = environment
        self._address = coordinator_address(environment)
        self._socket = None
        if self._address is not None:
            with contextlib.suppress(OSError):
                self._socket = _open(*self._address, listens=self._index == 0)
        # Processes that have not come; process 0 has not, until it answers.
        self._missing = {0} if index else set(range(1, count))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardkit-roll-call", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._socket is not None:
            self._socket.close()

    def failure(self) -> Failure:
        """Returns who has not come in time, or that this process waits if nobody knows."""
        missing = sorted(self._missing) if self._socket is not None else []
        if not missing:
            why = f"has waited {self._seconds:g} s for all processes to join"
            why += "; one that writes no such line has not started, or does not reach the others"
            return Failure(self._index, self._count, 0, why)
        host, port = self._address or ("", 0)
        first, *others = missing[:_NAMED]
        why = f"has not joined within {self._seconds:g} s"
        if others:
            more = ", …" if len(missing) > _NAMED else ""
            why += f", nor have {', '.join(map(str, others))}{more}"
        why += f"; it has not started, or {host}:{port} is not reached"
        name = host_of_process(first, self._environment)
        return Failure(first, self._count, 0, f"{why}. Its host is {name}" if name else why)

    def _run(self) -> None:
        while self._socket is not None and not self._closed.is_set():
            try:
                if self._index == 0:
                    self._answer(self._socket)
                else:
                    self._socket.send(str(self._index).encode())
                    self._missing = self._read(self._socket.recv(_LONGEST))
                    self._closed.wait(_EVERY)
            except TimeoutError:
                continue
            except OSError:  # nobody listens yet
                self._closed.wait(_EVERY)

    def _answer(self, listener: socket.socket) -> None:
        received, sender = listener.recvfrom(_LONGEST)
        came = self._read(received)
        self._missing -= came
        if came:
            missing = sorted(self._missing)[: _NAMED + 1]
            listener.sendto(" ".join(map(str, missing)).encode(), sender)

    def _read(self, datagram: bytes) -> set[int]:
        """Reads numbers of processes; from other bytes, none."""
        words = datagram.split()
        return {int(word) for word in words if word.isdigit()} & set(range(self._count))


def _open(host: str, port: int, *, listens: bool) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    opened = socket.socket(family, kind, protocol)
    opened.settimeout(_EVERY)
    try:
        (opened.bind if listens else opened.connect)(address)
    except OSError:
        opened.close()
        raise
    return opened
