"""The thread in process 0 that every process is connected to, and that sees who is missing."""

import dataclasses
import selectors
import socket
import threading
import time
from typing import Any

from ._failure import Failure
from ._message_stream import Closed, Message, MessageStream

_TICK = 0.1
# A process that hangs keeps the others from going on too: the last one to say so has said so by
# then, and who is behind is who hangs.
_STRAGGLE = 0.3
_LOST = "killed, or cut off: its connection has closed"


@dataclasses.dataclass
class _Member:
    """What is known of one process.

    Attributes:
      line: connection to it.
      step: last update that it began.
      events: of its loop, counted; every process has the same ones in the same order.
    """

    line: MessageStream
    step: int = 0
    events: int = 0


class Coordinator:
    """Collects what processes say, and tells all of them when one cannot go on.

    Attributes:
      line: connection of process 0 itself.
    """

    def __init__(
        self, listener: socket.socket | None, count: int, token: str, patience: float
    ) -> None:
        """Starts the thread.

        Args:
          listener: where the others connect; None where there are none.
          count: how many processes there are.
          token: what a connection has to know.
          patience: seconds that the first waits for the last.
        """
        self._listener, self._count = listener, count
        self._token, self._patience = token, patience
        self._selector = selectors.DefaultSelector()
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ, listener)
        self._members: dict[int, _Member] = {}
        self._gathers: dict[str, dict[int, Any]] = {}
        self._since: dict[str, float] = {}
        self._stalled: tuple[float, float] | None = None
        self._ended: Failure | None = None
        self._closing = False
        own, theirs = socket.socketpair()
        self._admit(MessageStream(own))
        self.line = MessageStream(theirs)
        self._thread = threading.Thread(target=self._run, name="shardkit-hub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits until the others have left; they end by themselves, so not for long."""
        self._closing = True
        self._thread.join(2.0)

    def _run(self) -> None:
        while not (self._closing and not self._members):
            for key, _ in self._selector.select(_TICK):
                if isinstance(key.data, MessageStream):
                    self._read(key.data)
                else:
                    self._admit(MessageStream(key.data.accept()[0]))
            if self._ended is None:
                self._look()
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.data.close()
        self._selector.close()

    def _admit(self, line: MessageStream) -> None:
        self._selector.register(line, selectors.EVENT_READ, line)

    def _read(self, line: MessageStream) -> None:
        process = next((p for p, one in self._members.items() if one.line is line), None)
        try:
            for message in line.receive():
                process = self._greet(line, message) if process is None else process
                self._hear(process, message)
        except (Closed, KeyError):
            self._selector.unregister(line)
            line.close()
            if process in self._members:
                self._end(process, _LOST)
                del self._members[process]

    def _greet(self, line: MessageStream, message: Message) -> int:
        """Makes a connection a member; whoever does not know the token is a stranger."""
        if message["kind"] != "hello" or message["token"] != self._token:
            raise Closed
        if message["process"] in self._members:
            raise Closed
        self._members[message["process"]] = _Member(line)
        if self._ended is not None:
            line.send("end", **dataclasses.asdict(self._ended))
        return message["process"]

    def _hear(self, process: int, message: Message) -> None:
        member = self._members[process]
        match message.pop("kind"):
            case "at":
                member.step, member.events = message["step"], message["events"]
                if process == 0:
                    self._tell("at", step=member.step)
            case "gather":
                self._gather(process, **message)
            case "failed":
                member.step = message["step"]
                self._end(process, message["cause"])
            case "stalled":
                self._stalled = self._stalled or (time.monotonic(), message["seconds"])
            case "bye":
                del self._members[process]

    def _gather(self, process: int, topic: str, value: Any, patient: bool) -> None:
        values = self._gathers.setdefault(topic, {})
        if not patient:
            self._since.setdefault(topic, time.monotonic())
        values[process] = value
        if len(values) == self._count:
            self._tell("gathered", topic=topic, values=[values[p] for p in range(self._count)])
            del self._gathers[topic]
            self._since.pop(topic, None)

    def _look(self) -> None:
        """What time alone brings about."""
        now = time.monotonic()
        for topic, since in self._since.items():
            if now - since > self._patience:
                late = min(set(range(self._count)) - set(self._gathers[topic]))
                self._end(late, f"has not come to {topic!r} within {self._patience:g} s", True)
        if self._members and self._stalled and now - self._stalled[0] > _STRAGGLE:
            seconds = self._stalled[1]
            behind = min(self._members, key=lambda p: (self._members[p].events, p))
            events = {member.events for member in self._members.values()}
            among = "; no process is ahead of the others" if len(events) == 1 < self._count else ""
            cause = f"stuck: nothing has moved for {seconds:g} s, the declared step timeout{among}"
            self._end(behind, cause, True)

    def _end(self, process: int, cause: str, stuck: bool = False) -> None:
        """Tells everybody, once: what follows from the first failure is no other failure."""
        if self._ended is not None:
            return
        member = self._members.get(process)
        step = member.step if member else 0
        self._ended = Failure(process, self._count, step, cause, stuck)
        self._tell("end", **dataclasses.asdict(self._ended))

    def _tell(self, kind: str, **fields: Any) -> None:
        for member in self._members.values():
            member.line.send(kind, **fields)
