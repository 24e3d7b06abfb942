"""`Coordinator`: the thread in process 0 that all processes report to, and that finds failures."""

import dataclasses
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from .._core.options import matches_annotation
from ._failure import CONNECTION_CLOSED, Failure
from ._message_stream import Closed, Message, MessageStream

_TICK = 0.1
# Between the first report of a step timeout and the verdict. A process that hangs blocks the
# others too, so all of them report within this time; the one with the fewest events hangs.
_VERDICT_DELAY = 0.3


# Connections that may wait for their token besides those of the processes, and for how long.
_MOST_STRANGERS, _STRANGER_TIMEOUT = 64, 10.0
# Bytes of a gathered value; those of the other fields are few.
LONGEST_MESSAGE = 2**24
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "hello": {"process": int},
    "at": {"step": int, "events": int},
    "gather": {"topic": str, "value": object, "patient": bool},
    "failed": {"step": int, "cause": str},
    "stalled": {"seconds": float},
    "bye": {},
}


def _check(message: Message) -> None:
    """Raises `Closed` for a message that no process of this program sends."""
    fields = _FIELDS.get(str(message["kind"]))
    if fields is None or message.keys() != {"kind", *fields}:
        raise Closed
    if not all(matches_annotation(kind, message[name]) for name, kind in fields.items()):
        raise Closed


@dataclasses.dataclass
class _Member:
    """State of one process, as last reported."""

    stream: MessageStream  # connection to it
    step: int = 0  # last update that it dispatched
    # number of events of its loop; every process has the same ones in the same order
    events: int = 0


class Coordinator:
    """Collects the reports of all processes, and tells all of them when one cannot continue."""

    def __init__(
        self, listener: socket.socket | None, count: int, token: str, patience: float
    ) -> None:
        """Starts the thread.

        The listener is None if there are no other processes; a connection must present the secret
        token. The first process of a `gather` waits `patience` seconds for the last.
        """
        self._listener, self._count = listener, count
        self._token, self._patience = token, patience
        self._strangers: dict[MessageStream, float] = {}  # when each connected, oldest first
        self._selector = selectors.DefaultSelector()
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ, listener)
        self._members: dict[int, _Member] = {}
        self._gathers: dict[str, dict[int, Any]] = {}
        self._started: dict[str, float] = {}  # when the first value of each gather came
        self._stall: tuple[float, float] | None = None  # when it was reported, and the timeout
        self._failure: Failure | None = None
        self._closing = False
        end, other_end = socket.socketpair()
        self._register(end)  # no stranger, however late it presents the token
        self.stream = MessageStream(other_end)  # process 0's own end of its connection
        self._thread = threading.Thread(target=self._run, name="shardkit-coordinator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits up to two seconds until the other processes have disconnected."""
        self._closing = True
        self._thread.join(2.0)

    def _run(self) -> None:
        while not (self._closing and not self._members):
            for key, _ in self._selector.select(_TICK):
                if isinstance(key.data, MessageStream):
                    self._read(key.data)
                else:
                    self._accept_stranger(key.data)
            self._turn_away(_STRANGER_TIMEOUT, len(self._strangers))
            if self._failure is None:
                self._check_timeouts()
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.data.close()
        self._selector.close()

    def _accept_stranger(self, listener: socket.socket) -> None:
        try:
            self._strangers[self._register(listener.accept()[0])] = time.monotonic()
            self._turn_away(0.0, len(self._strangers) - self._count - _MOST_STRANGERS)
        except OSError:  # it has gone again, or this process has no descriptor left
            self._turn_away(0.0, len(self._strangers))

    def _register(self, connected: socket.socket) -> MessageStream:
        stream = MessageStream(connected, self._token, LONGEST_MESSAGE + 2**16)
        self._selector.register(stream, selectors.EVENT_READ, stream)
        return stream

    def _turn_away(self, older: float, most: int) -> None:
        """Closes the oldest connections that have not presented the token in so many seconds."""
        now = time.monotonic()
        for stream, since in list(self._strangers.items())[: max(0, most)]:
            if now - since >= older:
                self._close(stream)

    def _close(self, stream: MessageStream) -> None:
        self._strangers.pop(stream, None)
        self._selector.unregister(stream)
        stream.close()

    def _read(self, stream: MessageStream) -> None:
        if stream.fileno() < 0:  # it was turned away after it became readable
            return
        process = next((p for p, member in self._members.items() if member.stream is stream), None)
        try:
            for message in stream.receive():
                _check(message)
                process = self._admit(stream, message) if process is None else process
                self._handle(process, message)
        except Closed:
            self._close(stream)
            if process in self._members:
                self._fail(process, CONNECTION_CLOSED)
                del self._members[process]

    def _admit(self, stream: MessageStream, message: Message) -> int:
        """Makes a connection that has presented the token a member."""
        process = message["process"] if message["kind"] == "hello" else -1
        if process in self._members or process not in range(self._count):
            raise Closed
        self._strangers.pop(stream, None)
        self._members[process] = _Member(stream)
        if self._failure is not None:
            stream.send("end", **dataclasses.asdict(self._failure))
        return process

    def _handle(self, process: int, message: Message) -> None:
        member = self._members[process]
        match message.pop("kind"):
            case "at":
                member.step, member.events = message["step"], message["events"]
                if process == 0:
                    self._broadcast("at", step=member.step)
            case "gather":
                self._gather(process, **message)
            case "failed":
                member.step = message["step"]
                self._fail(process, message["cause"])
            case "stalled":
                self._stall = self._stall or (time.monotonic(), message["seconds"])
            case "bye":
                del self._members[process]

    def _gather(self, process: int, topic: str, value: Any, patient: bool) -> None:
        values = self._gathers.setdefault(topic, {})
        if not patient:
            self._started.setdefault(topic, time.monotonic())
        values[process] = value
        if len(values) == self._count:
            self._broadcast("gathered", topic=topic, values=[values[p] for p in range(self._count)])
            del self._gathers[topic]
            self._started.pop(topic, None)

    def _check_timeouts(self) -> None:
        """Fails a process that is late for a gather, or that the others wait for in a step.

        An example of the second with three processes and `step_timeout=60`, where process 1 hangs
        after its 41st event; the others have reported one event more when its collective blocks
        them as well:

            t = 0.0    events 42, 41, 42: nothing moves from here on
            t = 60.0   process 0 reports "stalled"; processes 1 and 2 do so by t = 60.1
            t = 60.3   verdict: process 1 has the fewest events, so it is stuck
        """
        now = time.monotonic()
        for topic, started in self._started.items():
            if now - started > self._patience:
                late = min(set(range(self._count)) - set(self._gathers[topic]))
                self._fail(late, f"has not reached {topic!r} within {self._patience:g} s", True)
        if self._members and self._stall and now - self._stall[0] > _VERDICT_DELAY:
            seconds = self._stall[1]
            behind = min(self._members, key=lambda p: (self._members[p].events, p))
            events = {member.events for member in self._members.values()}
            unclear = len(events) == 1 < self._count
            note = "; no process is ahead of the others" if unclear else ""
            cause = f"stuck: no progress for {seconds:g} s, the declared step timeout{note}"
            self._fail(behind, cause, True)

    def _fail(self, process: int, cause: str, stuck: bool = False) -> None:
        """Tells all processes about the first failure; later ones are its consequences."""
        if self._failure is not None:
            return
        member = self._members.get(process)
        step = member.step if member else 0
        self._failure = Failure(process, self._count, step, cause, stuck)
        self._broadcast("end", **dataclasses.asdict(self._failure))

    def _broadcast(self, kind: str, **fields: Any) -> None:
        for member in self._members.values():
            member.stream.send(kind, **fields)
