"""`Peers`: a process among several that know within moments when one of them cannot go on."""

import atexit
import faulthandler
import os
import selectors
import threading
import time
from types import TracebackType
from typing import Any, Self

import jax

from .._errors import ProcessError
from ._agree import differences
from ._failure import PEER_FAILED, STUCK, Failure, code_of
from ._hub import Hub
from ._line import Closed, Line, Message

_TICK = 0.1
_LEAVE = "leave"
# What a step raises may be the echo of a process that died: its end is known within this time.
_ECHO = 0.7
# Time to say what went wrong; a process that still waits for a device then never ends by itself.
_LAST_WORDS = 0.4
# JAX aborts a process whose coordinator, process 0, is gone; so that one leaves last.
_COORDINATE = 0.6
# The hub answers a process that has stalled within moments, unless it is what hangs.
_ANSWER = 1.5


class Peers:
    """This process among those that run one program together. Made by `sk.distributed`.

    Every process is connected to process 0. When one of them dies, raises or hangs, each of the
    others writes one line that says which, at what step and why, and ends with code 69, also
    when it waits for a device that will never answer.

    Attributes:
      index: number of this process; process 0 prints and writes files.
      count: how many processes there are.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        line: Line | None = None,
        hub: Hub | None = None,
        token: str = "",
        launcher: Line | None = None,
        step_timeout: float = 0.0,
    ) -> None:
        """See `sk.distributed`; without a line there is nobody to watch."""
        self.index, self.count = index, count
        self._line, self._hub, self._launcher = line, hub, launcher
        self._timeout = step_timeout
        self._step = self._events = self._hub_step = 0
        self._moved: float | None = None
        self._told = (0, 0.0)
        # Often enough that a death is told with its step, and for process 0 to keep up with all.
        self._beat = max(0.02, count / 1000)
        self._stalled: float | None = None
        self._leave_by: float | None = None
        self._code = 1
        self._left = False
        self._answers: dict[str, list[Any]] = {}
        self._heard = threading.Condition()
        self._gone = threading.Event()
        self.failure: Failure | None = None
        if line is not None:
            line.send("hello", process=index, token=token)
            atexit.register(self._at_exit)
            self._watcher = threading.Thread(target=self._watch, name="shardkit-watch", daemon=True)
            self._watcher.start()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves with the others, or tells them that this process cannot go on."""
        if error is None:
            self.leave()
        else:
            self.fail(error)

    def gather(self, topic: str, value: Any, *, patient: bool = False) -> list[Any]:
        """Returns the values of all processes, by their number; waits until each has given one.

        A process that does not come counts as stuck after `start_timeout` seconds.

        Args:
          topic: the same word in every process; each is gathered once at a time.
          value: plain JSON values.
          patient: wait for as long as it takes.
        """
        if self._line is None:
            return [value]
        self._line.send("gather", topic=topic, value=value, patient=patient)
        with self._heard:
            self._heard.wait_for(lambda: topic in self._answers)
            return self._answers.pop(topic)

    def agree(self, topic: str, **facts: Any) -> None:
        """Stops every process unless all of them say the same.

        Args:
          topic: the same word in every process.
          **facts: plain JSON values, mappings among them.

        Raises:
          ProcessError: in every process, with each difference and who says what.
        """
        problems = differences(self.gather(topic, facts))
        if problems:
            error = ProcessError(problems)
            self.leave()  # the others know already
            self._say(self._own(error))
            raise error

    def began(self, step: int) -> None:
        """Tells that an update was dispatched; from the first one on the step timeout counts."""
        self._step = step
        self.moved()

    def moved(self) -> None:
        """Tells that something was finished: a step's numbers, an evaluation, a save."""
        self._events += 1
        self._moved = time.monotonic()
        if self._moved - self._told[1] > self._beat:
            self._tell()

    def rest(self) -> None:
        """Ends the watch over steps: what follows may take as long as it wants."""
        self._moved = None

    def leave(self) -> None:
        """Ends in order, when all the others come to do so too."""
        if self._left:
            return
        self.rest()
        self.gather(_LEAVE, None, patient=True)
        for line in (self._line, self._launcher):
            if line is not None:
                line.send("bye")
        if self._hub is not None:
            self._hub.close()
        if self._line is not None:
            self._gone.set()
            self._watcher.join(2 * _TICK)
            atexit.unregister(self._at_exit)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process cannot go on.

        Raising alone would leave them waiting for its devices, and the interpreter for them.

        Args:
          error: what was raised; if it is but an echo of another's end, that is what is told.
        """
        if self._line is None or self._left:
            return
        if _may_be_echo(error):
            with self._heard:
                self._heard.wait_for(lambda: self.failure is not None, _ECHO)
        if self.failure is None:
            own = self._own(error)
            self._say(own)
            self._line.send("failed", step=own.step, cause=own.cause)
            self._code = code_of(error)
            self._leave_by = time.monotonic() + _LAST_WORDS

    def _own(self, error: BaseException) -> Failure:
        first = (str(error).splitlines() or [""])[0]
        cause = f"{type(error).__name__}: {first}" if first else type(error).__name__
        return Failure(self.index, self.count, self._step, cause)

    # --- the thread

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for line in (self._line, self._launcher):
                if line is not None:
                    selector.register(line, selectors.EVENT_READ, line)
            while not self._gone.is_set():
                for key, _ in selector.select(_TICK):
                    try:
                        for message in key.data.receive():
                            self._hear(message)
                    except Closed:
                        selector.unregister(key.data)
                        self._lost(key.data)
                self._look()

    def _hear(self, message: Message) -> None:
        match message.pop("kind"):
            case "at":
                self._hub_step = message["step"]
            case "gathered":
                with self._heard:
                    self._left |= message["topic"] == _LEAVE
                    self._answers[message["topic"]] = message["values"]
                    self._heard.notify_all()
            case "end":
                self._end(Failure(**message))

    def _lost(self, line: Line) -> None:
        if self._left or self.failure:
            return
        if line is self._launcher:
            os._exit(PEER_FAILED)
        self._end(self._about_hub("killed, or cut off: its connection has closed"))

    def _about_hub(self, cause: str) -> Failure:
        return Failure(0, self.count, self._hub_step, cause)

    def _look(self) -> None:
        now = time.monotonic()
        if self._told[0] != self._events and now - self._told[1] > self._beat:
            self._tell()
        if self._leave_by is not None and now > self._leave_by:
            os._exit(self._code)
        if self._timeout and self._moved and now - self._moved > self._timeout:
            self._stall(now)
        else:
            self._stalled = None

    def _stall(self, now: float) -> None:
        assert self._line is not None
        if self._stalled is None:
            self._stalled = now
            self._line.send("stalled", seconds=self._timeout)
        elif now - self._stalled > _ANSWER:
            self._end(self._about_hub(f"stuck: it has not answered for {_ANSWER:g} s"))

    def _tell(self) -> None:
        self._told = self._events, time.monotonic()
        for line in (self._line, self._launcher):
            if line is not None:
                line.send("at", step=self._step, events=self._events)

    def _end(self, failure: Failure) -> None:
        """Ends this process, unless it is about to end by the error that it told of itself."""
        if self.failure is not None or self._left:
            return
        self._say(failure)
        own = failure.process == self.index
        if own:  # alive and stuck: where?
            faulthandler.dump_traceback(2)
        if self.index == 0 and not own:
            time.sleep(_COORDINATE)
        os._exit(STUCK if own else PEER_FAILED)

    def _say(self, failure: Failure) -> None:
        with self._heard:
            if self.failure is not None:
                return
            self.failure = failure
            self._heard.notify_all()
        os.write(2, f"{failure}\n".encode())
        if self._launcher is not None:
            own = failure.process == self.index
            self._launcher.send("end", process=failure.process, line=str(failure), own=own)

    def _at_exit(self) -> None:
        """Ends without JAX's own farewell, which would wait for processes that are gone."""
        if self._leave_by is not None:
            os._exit(self._code)


def _may_be_echo(error: BaseException) -> bool:
    return any(
        isinstance(one, jax.errors.JaxRuntimeError) for one in (error, error.__cause__) if one
    )
