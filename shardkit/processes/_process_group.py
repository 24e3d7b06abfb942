"""`ProcessGroup`: the processes of one program, which all end soon after one of them fails."""

import atexit
import faulthandler
import json
import math
import os
import selectors
import threading
import time
from typing import Any, Self

import jax

from .._core.errors import Problem, ProcessError, format_problems
from .._core.interrupts import INTERRUPTED
from ._agree import differences
from ._coordinator import LONGEST_MESSAGE, Coordinator
from ._failure import CONNECTION_CLOSED, PEER_FAILED, STUCK, Failure, code_of
from ._message_stream import Closed, Message, MessageStream

_TICK = 0.1
_LEAVE = "leave"
# JAX raises in a process whose collective lost another process. Within this time the coordinator
# says which process that was.
_ECHO_WAIT = 0.7
# From a process's own failure to its exit, which it may not reach while it waits for a device.
_EXIT_DELAY = 0.4
# JAX aborts a process whose coordination service, in process 0, is gone; so process 0 ends last.
_SERVICE_DELAY = 0.6
# The coordinator answers a "stalled" report within this time, unless process 0 itself hangs.
_ANSWER_TIMEOUT = 1.5


class ProcessGroup:
    """The processes that run one program together, seen from one of them.

    `sk.distributed` makes it. Every process is connected to process 0. When one dies, raises or
    hangs, each of the others writes one line with its number, step and cause, and exits with code
    69, even while it waits for a device.

    Attributes:
      index: number of this process; process 0 prints and writes files.
      count: number of processes.
      failure: what ends this process; None while nothing has failed.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        stream: MessageStream | None = None,
        coordinator: Coordinator | None = None,
        token: str = "",
        launcher: MessageStream | None = None,
        step_timeout: float = 0.0,
    ) -> None:
        """See `sk.distributed`; without a stream to the coordinator nothing is watched."""
        self.index, self.count = index, count
        self._stream, self._coordinator, self._launcher = stream, coordinator, launcher
        self._timeout = step_timeout
        self._step = self._events = self._first_step = 0
        self._last_event: float | None = None  # None outside the training loop
        self._reported_events, self._reported_at = 0, 0.0
        # Often enough that the step of a killed process is known, seldom enough for process 0 to
        # read the reports of all: 1,000 processes report once a second.
        self._report_interval = max(0.02, count / 1000)
        self._stalled_at: float | None = None
        self._exit_at: float | None = None
        self._exit_code = 1
        self._left = False
        self._saved = -1.0  # the last update of which nothing has to be saved
        self._answers: dict[str, list[Any]] = {}
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self.failure: Failure | None = None
        if stream is not None:
            stream.present(token)
            stream.send("hello", process=index)
            atexit.register(self._at_exit)
            self._watchdog = threading.Thread(
                target=self._watch, name="shardkit-watchdog", daemon=True
            )
            self._watchdog.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        """Leaves with the others, or tells them that this process cannot continue."""
        if error is None:
            self.leave()
        else:
            self.fail(error)

    def gather(self, topic: str, value: Any, *, patient: bool = False) -> list[Any]:
        """Returns the values of all processes, by process number; waits for all of them.

        A process that does not give its value within `start_timeout` seconds counts as stuck.

        Args:
          topic: the same word in every process; it can be used again afterwards.
          value: plain JSON values.
          patient: wait without a limit.

        Raises:
          ProcessError: the value takes more than 16 MiB.
        """
        if self._stream is None:
            return [value]
        size = len(json.dumps(value))
        if size >= LONGEST_MESSAGE:
            problem = Problem(topic, f"takes {size:,} bytes; at most {LONGEST_MESSAGE:,} are sent")
            fix = "jax.experimental.multihost_utils.process_allgather for arrays"
            raise ProcessError(format_problems("A value is too large to gather.", [problem], fix))
        self._stream.send("gather", topic=topic, value=value, patient=patient)
        with self._changed:
            self._changed.wait_for(lambda: topic in self._answers)
            return self._answers.pop(topic)

    def agree(self, topic: str, **facts: Any) -> None:
        """Raises in every process unless all of them give the same facts.

        Args:
          topic: the same word in every process.
          **facts: plain JSON values, mappings among them.

        Raises:
          ProcessError: lists each difference, with the processes on each side.
        """
        problems = differences(self.gather(topic, facts))
        if problems:
            error = ProcessError(problems)
            self.leave()  # every process raises the same
            self._announce(self._describe(error), code_of(error))
            raise error

    def begin(self, step: float = math.inf) -> None:
        """Says that nothing has to be saved until an update after this one is dispatched.

        Ctrl-C of `shardkit launch` then ends this process at once, also while it compiles.
        """
        self._saved = step

    def report_step(self, step: int) -> None:
        """Reports that an update was dispatched; the first one starts the step timeout."""
        self._step = step
        self.report_progress()

    def report_progress(self) -> None:
        """Reports an event of the loop: a step's metrics, an evaluation or a save."""
        self._events += 1
        self._last_event = time.monotonic()
        if self._last_event - self._reported_at > self._report_interval:
            self._report()

    def stop_watching(self) -> None:
        """Ends the step timeout; what follows may take any time."""
        self._last_event = None

    def leave(self) -> None:
        """Disconnects once all processes have called this."""
        if self._left:
            return
        self.stop_watching()
        self.gather(_LEAVE, None, patient=True)
        for stream in self._streams():
            stream.send("bye")
        if self._coordinator is not None:
            self._coordinator.close()
        if self._stream is not None:
            self._stopped.set()
            self._watchdog.join(2 * _TICK)
            atexit.unregister(self._at_exit)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process cannot continue.

        An exception alone would leave the others waiting for the devices of this process, and
        the interpreter of this process waiting for the others.

        Args:
          error: what was raised. If it only follows from the failure of another process, that
            failure is reported.
        """
        if self._stream is None or self._left:
            return
        if self.count == 1:  # nobody waits for this process, which may handle the error
            self.leave()
            return
        if _may_be_echo(error):
            with self._changed:
                self._changed.wait_for(lambda: self.failure is not None, _ECHO_WAIT)
            if self.failure is not None and self.failure.process != self.index:
                self._watchdog.join(2 * _SERVICE_DELAY)  # its line is written, and it exits
        if self.failure is None:
            failure, self._exit_code = self._describe(error), code_of(error)
            self._announce(failure, self._exit_code)
            self._stream.send("failed", step=failure.step, cause=failure.cause)
            self._exit_at = time.monotonic() + _EXIT_DELAY

    def _describe(self, error: BaseException) -> Failure:
        first_line = (str(error).splitlines() or [""])[0]
        name = type(error).__name__
        cause = f"{name}: {first_line}" if first_line else name
        return Failure(self.index, self.count, self._step, cause)

    def _streams(self) -> list[MessageStream]:
        return [stream for stream in (self._stream, self._launcher) if stream is not None]

    # --- the watchdog thread
    #
    # It ends the process while the main thread waits for a device. With step_timeout=60:
    #
    #   another process is killed         this process hangs           process 0 hangs, with its
    #                                                                  coordinator
    #   0.0  its connection closes        0    its last event          0     last event
    #   0.0  the coordinator sends "end"  60   every process sends     60    "stalled" is sent
    #        to all                            "stalled"               61.5  no answer in time:
    #   0.1  _end: one line, exit 69      60.3 "end" names this one:         _end, exit 69
    #   0.6  process 0 exits 69, last          stacks of its threads,
    #        (_SERVICE_DELAY)                  exit 70
    #
    # A closed connection to the coordinator means that process 0 has died, and one to the launcher
    # that the launcher has: this process then exits at once.

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for stream in self._streams():
                selector.register(stream, selectors.EVENT_READ, stream)
            while not self._stopped.is_set():
                for key, _ in selector.select(_TICK):
                    try:
                        for message in key.data.receive():
                            self._handle(message)
                    except Closed:
                        selector.unregister(key.data)
                        self._handle_closed(key.data)
                self._check_time()

    def _handle(self, message: Message) -> None:
        match message.pop("kind"):
            case "at":
                self._first_step = message["step"]
            case "gathered":
                with self._changed:
                    self._left |= message["topic"] == _LEAVE
                    self._answers[message["topic"]] = message["values"]
                    self._changed.notify_all()
            case "interrupt" if self._step <= self._saved:
                self._left, self._exit_code = True, INTERRUPTED  # the others end too, unnamed
                self._exit_at = time.monotonic() + (_TICK if self.index else 4 * _TICK)
            case "end":
                self._end(Failure(**message))

    def _handle_closed(self, stream: MessageStream) -> None:
        if self._left or self.failure:
            return
        if stream is self._launcher:
            os._exit(PEER_FAILED)
        self._end_with_first(CONNECTION_CLOSED)

    def _end_with_first(self, cause: str) -> None:
        """Ends this process because of process 0."""
        self._end(Failure(0, self.count, self._first_step, cause))

    def _check_time(self) -> None:
        now = time.monotonic()
        changed = self._reported_events != self._events
        if changed and now - self._reported_at > self._report_interval:
            self._report()
        if self._exit_at is not None and now > self._exit_at:
            os._exit(self._exit_code)
        if self._timeout and self._last_event and now - self._last_event > self._timeout:
            self._report_stall(now)
        else:
            self._stalled_at = None

    def _report_stall(self, now: float) -> None:
        assert self._stream is not None
        if self._stalled_at is None:
            self._stalled_at = now
            self._stream.send("stalled", seconds=self._timeout)
        elif now - self._stalled_at > _ANSWER_TIMEOUT:
            self._end_with_first(f"stuck: it has not answered for {_ANSWER_TIMEOUT:g} s")

    def _report(self) -> None:
        self._reported_events, self._reported_at = self._events, time.monotonic()
        for stream in self._streams():
            stream.send("at", step=self._step, events=self._events)

    def _end(self, failure: Failure) -> None:
        """Ends this process, unless it is about to exit because of its own failure."""
        if self.failure is not None or self._left:
            return
        own = failure.process == self.index
        code = STUCK if own else PEER_FAILED
        self._announce(failure, code)
        if own:  # it is alive and stuck: the stacks show where
            faulthandler.dump_traceback(2)
        if self.index == 0 and not own:
            time.sleep(_SERVICE_DELAY)
        os._exit(code)

    def _announce(self, failure: Failure, code: int) -> None:
        """Writes any process's failure to standard error and to the launcher, once.

        The process exits with `code`, unless the launcher has to kill it.
        """
        with self._changed:
            if self.failure is not None:
                return
            self.failure = failure
            self._changed.notify_all()
        os.write(2, f"{failure}\n".encode())
        if self._launcher is not None:
            own = failure.process == self.index
            line = str(failure)
            self._launcher.send("end", process=failure.process, line=line, own=own, code=code)

    def _at_exit(self) -> None:
        """Exits before JAX's own exit handler, which would wait for processes that are gone."""
        if self._exit_at is not None:
            os._exit(self._exit_code)


def _may_be_echo(error: BaseException) -> bool:
    """Whether an error can be the consequence of another process's failure."""
    errors = (error, error.__cause__)
    return any(isinstance(e, jax.errors.JaxRuntimeError) for e in errors)
