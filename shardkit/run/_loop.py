"""The loop itself: dispatch an update, then read the numbers of the one before."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from .._errors import DataError, Problem, StepError, format_problems
from ._clock import Clock
from ._config import TrainConfig
from ._source import Evaluate
from ._watch import Numbers, Watchers

# What a row of metrics holds beside the step's own.
_TAKEN = frozenset({"kind", "step", "time", "seconds", "data_seconds", "mfu"})


class Step(Protocol):
    """What the loop needs of a compiled step."""

    @property
    def rows(self) -> Any:
        """Rows of a global batch that this process feeds, as an index of its arrays."""
        ...

    def put(self, batch: Any) -> Any:
        """Lays a host batch out on the mesh."""
        ...

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Mapping[str, Any]]:
        """Consumes a state; returns the next one and scalar metrics."""
        ...

    def evaluate(self, state: Any, batch: Any) -> Mapping[str, Any]:
        """Returns scalar metrics and changes nothing."""
        ...


class Saver(Protocol):
    """Who keeps states for a run that is to go on."""

    def due(self, done: int) -> bool:
        """Whether the state after `done` updates is to be kept."""
        ...

    def save(self, done: int, state: Any, metrics: Mapping[str, float]) -> None:
        """Keeps it, with the metrics of its evaluation, if it was evaluated."""
        ...

    def finish(self) -> str:
        """Waits until what was asked for is kept, and says what that is."""
        ...


class Stop(Protocol):
    """Who may ask a run to end."""

    def asked(self, done: int) -> bool:
        """Whether the run is to end after `done` updates."""
        ...

    def raise_if_told(self, saved: str) -> None:
        """Ends the run, with a word about what is saved, unless a watcher asked for the end."""
        ...


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a loop is made of.

    Attributes:
      step: the update.
      config: how many, and when to evaluate.
      clock: times them.
      watch: who is told.
      write: appends a row to the metrics.
      rates: what a row says of the speed, from the seconds of an update.
      stop: may ask for the end.
      evaluate: scores a state; None for never.
      saver: keeps states; None where none is kept.
    """

    step: Step
    config: TrainConfig
    clock: Clock
    watch: Watchers
    write: Callable[..., None]
    rates: Callable[[float], Mapping[str, float]]
    stop: Stop
    evaluate: Evaluate | None = None
    saver: Saver | None = None

    def run(self, state: Any, batches: Iterator[Any], start: int = 0) -> Any:
        """Makes updates `start + 1` to `config.steps` and returns the last state.

        The numbers of an update are read when the next one is under way, so devices never wait
        for the host. An evaluation and a save wait: the metrics are to hold every update of a
        checkpoint.
        """
        late: tuple[int, Mapping[str, Any]] | None = None
        for done in range(start + 1, self.config.steps + 1):
            with self.clock.waiting():
                batch = self.step.put(self._next(batches, done))
            state, metrics = self.step(state, batch)
            self.watch.dispatched(done, state, batch)
            if late is not None:
                self._tell(*late)
            late = (done, metrics)
            leaving = self.stop.asked(done)
            if not (self._to_evaluate(done) or self._to_save(done, leaving) or leaving):
                continue
            self._tell(*late)
            late = None
            scores = self._evaluate(done, state) if self._to_evaluate(done) else {}
            if self._to_save(done, leaving):
                self._save(done, state, scores)
            if leaving:
                self.stop.raise_if_told(self.saver.finish() if self.saver else "Nothing is saved.")
                return state
        if late is not None:
            self._tell(*late)
        return state

    def _to_evaluate(self, done: int) -> bool:
        every = self.config.eval_every if self.evaluate else 0
        return bool(every) and done % every == 0 and done < self.config.steps

    def _to_save(self, done: int, leaving: bool) -> bool:
        return self.saver is not None and (leaving or self.saver.due(done))

    def _next(self, batches: Iterator[Any], done: int) -> Any:
        try:
            return next(batches)
        except StopIteration:
            why = f"gave {done - 1} batches, and the run is to make {self.config.steps} updates"
            fix = f"TrainConfig(steps={done - 1}), or data that begins anew"
            problem = Problem("the data", why, fix)
            raise DataError(format_problems("The data has come to its end.", [problem])) from None

    def _tell(self, done: int, metrics: Mapping[str, Any]) -> None:
        numbers = self.clock.tick(done, {name: float(x) for name, x in metrics.items()})
        self.write("step", step=done, **_row(numbers), **self.rates(numbers.seconds))
        self.watch.read(numbers)

    def _evaluate(self, done: int, state: Any) -> Mapping[str, float]:
        assert self.evaluate is not None
        with self.clock.apart() as spent:
            values = {name: float(x) for name, x in self.evaluate(self.step, state).items()}
        self.write("eval", step=done, **values, **spent)
        self.watch.evaluated(done, values)
        return values

    def _save(self, done: int, state: Any, scores: Mapping[str, float]) -> None:
        assert self.saver is not None
        with self.clock.apart() as spent:
            self.saver.save(done, state, scores)
        self.write("save", step=done, **spent)
        self.watch.saved(done)


def _row(numbers: Numbers) -> dict[str, float | None]:
    """Values as JSON has them, where what is not finite has no number."""
    if taken := _TAKEN & numbers.values.keys():
        problems = [Problem(name, "is a column of metrics.jsonl already") for name in sorted(taken)]
        fix = 'another name in the metrics that the loss returns: {"my_seconds": ...}'
        raise StepError(format_problems("Metrics of the loss need other names.", problems, fix))
    values = {name: x if math.isfinite(x) else None for name, x in numbers.values.items()}
    return {**values, "seconds": numbers.seconds, "data_seconds": numbers.data_seconds}
