"""Who is told of a run while it goes: a few events, each with all that belongs to it.

A watcher sees values and never the loop itself, so neither its place among the others nor
what it keeps can change what is computed. To end a run it raises, or asks with `Run.stop`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..step import CompiledStep


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What is known of a finished update.

    Attributes:
      step: updates made.
      values: the step's metrics; `loss` and `grad_norm` among them. They may be not finite.
      seconds: wall time from the numbers before to these, without evaluations and saves.
      data_seconds: how much of that the loop waited for a batch.
      each: mean seconds of the last updates; None as long as only the first is known, which
        still warms up.
      data_each: mean of their `data_seconds`, or None.
      left: updates still to make.
    """

    step: int
    values: Mapping[str, float]
    seconds: float
    data_seconds: float
    each: float | None
    data_each: float | None
    left: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What a watcher may know of a run, and do to it.

    Attributes:
      folder: of the run.
      step: the compiled step.
      start: updates that were made before it was opened; 0 for a new run.
      steps: updates at its end.
      record: settings, as plain values.
      write: `write("spike", step=7, loss=3.1)` appends a row to the metrics.
      say: tells the user a line.
      stop: `stop("why")` asks the run to end in order after the next update, with its state
        saved; `Trainer.run` then returns as at the end.
      is_saved: whether a step that was saved is on the disk, whole.
    """

    folder: Path
    step: CompiledStep
    start: int
    steps: int
    record: Mapping[str, Any]
    write: Callable[..., None]
    say: Callable[[str], None]
    stop: Callable[[str], None]
    is_saved: Callable[[int], bool] = lambda step: False


class Watcher(Protocol):
    """Told of a run's events, in this order. Subclass it and override what matters.

    The state that a method is given is live until the next update is dispatched, which consumes
    it: what is to be kept longer is copied.
    """

    def begin(self, run: Run, state: Any) -> None:
        """Told once, before the first update, of the state that it begins with."""

    def dispatched(self, step: int, state: Any, batch: Any) -> None:
        """Told when update `step` is under way; reading its state or batch waits for it.

        Args:
          step: updates, this one included.
          state: what it makes.
          batch: what it reads, on the devices.
        """

    def read(self, numbers: Numbers) -> None:
        """Told of an update's numbers, in general while the next one is under way."""

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Told of an evaluation."""

    def saved(self, step: int) -> None:
        """Told that a save was begun; it is on the disk some time later."""

    def finished(self, state: Any) -> None:
        """Told when all updates are made, with the last state."""

    def end(self, error: BaseException | None) -> None:
        """Told last, whatever happened: what ended the run, or None."""


@dataclasses.dataclass(frozen=True)
class Watchers(Watcher):
    """Several watchers as one, told in order."""

    each: Sequence[Watcher]

    @contextlib.contextmanager
    def told(self, run: Run, state: Any) -> Iterator[None]:
        """Tells of the beginning and, to each that was told of it, of the end."""
        with contextlib.ExitStack() as stack:
            for one in self.each:
                one.begin(run, state)
                stack.push(lambda kind, error, trace, one=one: one.end(error))
            yield

    def dispatched(self, step: int, state: Any, batch: Any) -> None:
        """Passed on."""
        for one in self.each:
            one.dispatched(step, state, batch)

    def read(self, numbers: Numbers) -> None:
        """Passed on."""
        for one in self.each:
            one.read(numbers)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Passed on."""
        for one in self.each:
            one.evaluated(step, values)

    def saved(self, step: int) -> None:
        """Passed on."""
        for one in self.each:
            one.saved(step)

    def finished(self, state: Any) -> None:
        """Passed on."""
        for one in self.each:
            one.finished(state)
