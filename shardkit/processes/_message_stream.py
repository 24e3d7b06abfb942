"""Messages between processes: JSON objects, one a line, over a stream socket."""

import json
import socket
import threading
from typing import Any

Message = dict[str, Any]


class Closed(Exception):
    """The other end is gone, or does not speak this protocol."""


class MessageStream:
    """One end of a connection. Any thread may send; one thread receives."""

    def __init__(self, connected: socket.socket) -> None:
        """Takes ownership of a connected socket."""
        self._socket, self._incomplete, self._sending = connected, b"", threading.Lock()

    def fileno(self) -> int:
        """Returns the file descriptor, for selectors."""
        return self._socket.fileno()

    def send(self, kind: str, **fields: Any) -> None:
        """Sends a message; that the other end is gone shows when receiving."""
        try:
            with self._sending:
                self._socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[Message]:
        """Waits for bytes, and returns the messages that are complete, possibly none.

        Raises:
          Closed: no further message will come.
        """
        try:
            received = self._socket.recv(2**16)
            *lines, self._incomplete = (self._incomplete + received).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise Closed from error
        if not received:
            raise Closed
        return messages

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()


def connect(address: str, timeout: float) -> MessageStream:
    """Connects to `host:port`.

    Raises:
      OSError: no process listens there.
    """
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
