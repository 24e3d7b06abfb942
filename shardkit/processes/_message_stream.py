"""Messages between processes: JSON objects, one a line, over a stream socket."""

import json
import socket
import threading
from typing import Any

Message = dict[str, Any]


class Closed(Exception):
    """The other side is gone, or speaks something else."""


class MessageStream:
    """One end of a connection; any thread may send, one thread receives."""

    def __init__(self, end: socket.socket) -> None:
        """Takes a connected socket over."""
        self._socket, self._rest, self._sending = end, b"", threading.Lock()

    def fileno(self) -> int:
        """File descriptor, for selectors."""
        return self._socket.fileno()

    def send(self, kind: str, **fields: Any) -> None:
        """Sends a message. That the other side is gone is learned by who receives."""
        try:
            with self._sending:
                self._socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[Message]:
        """Waits for bytes and returns the messages that are whole now, perhaps none.

        Raises:
          Closed: there will be no more.
        """
        try:
            got = self._socket.recv(2**16)
            *whole, self._rest = (self._rest + got).split(b"\n")
            messages = [json.loads(one) for one in whole]
        except (OSError, ValueError) as error:
            raise Closed from error
        if not got:
            raise Closed
        return messages

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()


def connect(address: str, timeout: float) -> MessageStream:
    """Connects to `host:port`.

    Raises:
      OSError: nobody answers there.
    """
    host, _, port = address.rpartition(":")
    end = socket.create_connection((host, int(port)), timeout)
    end.settimeout(None)
    # A message is a few bytes that somebody waits for.
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return MessageStream(end)


def listen(host: str) -> socket.socket:
    """Listens on a free port of one of the machine's addresses."""
    return socket.create_server((host, 0), backlog=1024)


def address_of(listener: socket.socket) -> str:
    """`host:port` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"{host}:{port}"
