"""Messages between processes: JSON objects, one a line, over a stream socket.

A port of the network is open to strangers. So a stream that was accepted there first reads a line
that must be the token of this run; until then nothing is parsed, and no more bytes are kept than
the token has.
"""

import contextlib
import hmac
import json
import socket
import threading
from typing import Any

Message = dict[str, Any]


class Closed(Exception):
    """The other end is gone, or does not speak this protocol."""


class MessageStream:
    """One end of a connection. Any thread may send; one thread receives."""

    def __init__(
        self, connected: socket.socket, token: str | None = None, limit: int | None = None
    ) -> None:
        """Takes ownership of a connected socket.

        The other end must present the token first, if any; `limit` is bytes of the longest message
        that is read.
        """
        self._socket, self._incomplete, self._sending = connected, bytearray(), threading.Lock()
        self._awaited = None if token is None else token.encode()
        self._limit = limit

    def fileno(self) -> int:
        """Returns the file descriptor, for selectors."""
        return self._socket.fileno()

    def present(self, token: str) -> None:
        """Sends the token, before the first message."""
        self._send_line(token.encode())

    def send(self, kind: str, **fields: Any) -> None:
        """Sends a message; that the other end is gone shows when receiving."""
        self._send_line(json.dumps({"kind": kind, **fields}).encode())

    def _send_line(self, line: bytes) -> None:
        with contextlib.suppress(OSError), self._sending:
            self._socket.sendall(line + b"\n")

    @property
    def is_admitted(self) -> bool:
        """Whether the other end is known, or has presented the token."""
        return self._awaited is None

    def receive(self) -> list[Message]:
        """Waits for bytes; returns complete messages, possibly none; Closed if none will come."""
        try:
            received = self._socket.recv(2**16)
        except OSError as error:
            raise Closed from error
        self._incomplete += received
        if not (self.is_admitted or self._read_token()):
            if not received:
                raise Closed
            return []
        lines: list[bytes] = []
        if b"\n" in received:  # a long line comes in hundreds of pieces
            *lines, rest = bytes(self._incomplete).split(b"\n")
            self._incomplete = bytearray(rest)
        if self._limit is not None and len(self._incomplete) > self._limit:
            raise Closed
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise Closed from error
        if not received or not all(isinstance(m, dict) and "kind" in m for m in messages):
            raise Closed
        return messages

    def _read_token(self) -> bool:
        """Whether the token has come; a line that is another, or is longer, closes the stream."""
        assert self._awaited is not None
        line, newline, rest = self._incomplete.partition(b"\n")
        if not newline and len(line) <= len(self._awaited):
            return False
        if not hmac.compare_digest(line, self._awaited):
            raise Closed
        self._awaited, self._incomplete = None, rest
        return True

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()


def connect(address: str, timeout: float) -> MessageStream:
    """Connects to `host:port`; raises OSError where no process listens."""
    host, _, port = address.rpartition(":")
    connected = socket.create_connection((host, int(port)), timeout)
    connected.settimeout(None)
    # Messages are a few bytes that another process waits for, so they must not be collected.
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return MessageStream(connected)


def listen(host: str) -> socket.socket:
    """Listens on a free port of one of the machine's addresses."""
    return socket.create_server((host, 0), backlog=1024)


def address_of(listener: socket.socket) -> str:
    """Returns `host:port` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"{host}:{port}"
