"""The loop itself: dispatch a step, then read the numbers of the one before."""

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from .._errors import Problem, StepError, format_problems
from ..data import Batch, Text
from ._config import TrainConfig
from ._folder import MetricsFile


class Step(Protocol):
    """What the loop needs of a compiled step."""

    def put(self, batch: Any) -> Any:
        """Lays a host batch out on the mesh."""
        ...

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Mapping[str, Any]]:
        """Consumes a state; returns the next one and scalar metrics."""
        ...

    def evaluate(self, state: Any, batch: Any) -> Mapping[str, Any]:
        """Returns scalar metrics and changes nothing."""
        ...


class Show(Protocol):
    """Who tells the user how the run is going."""

    def step(self, done: int, loss: float, rate: float | None, left: float | None) -> None:
        """Tells of `done` updates: loss in nats, bytes per second, seconds left."""
        ...

    def evaluation(self, done: int, bits: float, scored: int) -> None:
        """Tells of an evaluation: bits per byte over `scored` bytes."""
        ...


@dataclasses.dataclass
class Clock:
    """Time of the steps, without the first one, which still warms up.

    Attributes:
      steps: number of steps in the run.
      bytes_per_step: predicted bytes in one.
    """

    steps: int
    bytes_per_step: int
    _first: float | None = dataclasses.field(default=None, init=False)
    _paused: float = dataclasses.field(default=0.0, init=False)
    _done: int = dataclasses.field(default=0, init=False)

    def tick(self) -> tuple[float | None, float | None]:
        """Counts one step; returns bytes per second so far and seconds left, None at first."""
        now = time.perf_counter()
        self._done += 1
        if self._first is None:
            self._first = now
            return None, None
        each = (now - self._first - self._paused) / (self._done - 1)
        return self.bytes_per_step / each, each * (self.steps - self._done)

    def pause(self, seconds: float) -> None:
        """Leaves out time that went into something else than steps."""
        self._paused += seconds if self._first is not None else 0.0


class Saver(Protocol):
    """Who keeps states for a run that is to go on."""

    def due(self, done: int) -> bool:
        """Whether the state after `done` updates is to be kept."""
        ...

    def save(self, done: int, state: Any, metrics: Mapping[str, float]) -> None:
        """Keeps it; metrics hold `bits_per_byte` where the step was evaluated."""
        ...

    def finish(self) -> str:
        """Waits until what was asked for is kept, and says what that is."""
        ...


class Stop(Protocol):
    """Who may ask a run to end."""

    @property
    def signal(self) -> Any:
        """What asked for it, or None."""
        ...

    def raise_if_asked(self, saved: str) -> None:
        """Ends the run, with a word about what is saved, if it was asked to."""
        ...


def run_steps(
    step: Step,
    state: Any,
    text: Text,
    loop: TrainConfig,
    file: MetricsFile,
    show: Show,
    *,
    start: int = 0,
    saver: Saver | None = None,
    stop: Stop | None = None,
) -> Any:
    """Trains up to `loop.steps` updates and returns the last state.

    The numbers of a step are read when the next one is under way, so devices never wait for the
    host. An evaluation and a save wait: the metrics file is to hold every step of a checkpoint.

    Raises:
      StepError: the loss is not finite.
      CheckpointError: a save was lost, and the run is to stop then.
    """
    clock = Clock(loop.steps - start, text.config.batch * text.config.length)
    late: tuple[int, Mapping[str, Any]] | None = None

    def tell(late: tuple[int, Mapping[str, Any]]) -> None:
        done, values = late[0], {name: float(value) for name, value in late[1].items()}
        _check_finite(done, values, file)
        rate, left = clock.tick()
        file.write("step", step=done, **values, bytes_per_second=rate)
        show.step(done, values["loss"], rate, left)

    for done in range(start + 1, loop.steps + 1):
        state, metrics = step(state, step.put(text.batch(done - 1)))
        if late is not None:
            tell(late)
        late = (done, metrics)
        leaving = stop is not None and stop.signal is not None
        score = bool(loop.eval_every) and done % loop.eval_every == 0 and done < loop.steps
        keep = saver is not None and (saver.due(done) or (leaving and bool(loop.checkpoint_every)))
        if not (score or keep or leaving):
            continue
        tell(late)
        late, began, scores = None, time.perf_counter(), {}
        if score:
            scores["bits_per_byte"] = _evaluate(step, state, text, loop, file, show, done)
        if saver is not None and keep:
            saver.save(done, state, scores)
        clock.pause(time.perf_counter() - began)
        if stop is not None and leaving:
            stop.raise_if_asked(saver.finish() if saver is not None else "Nothing is saved.")
    if late is not None:
        tell(late)
    return state


def _evaluate(
    step: Step, state: Any, text: Text, loop: TrainConfig, file: MetricsFile, show: Show, done: int
) -> float:
    bits, scored = held_out_bits(step, state, text, spread(text, loop.eval_batches))
    file.write("eval", step=done, bits_per_byte=bits, bytes=scored, part="some")
    show.evaluation(done, bits, scored)
    return bits


def held_out_bits(step: Step, state: Any, text: Text, steps: Iterable[int]) -> tuple[float, int]:
    """Scores held-out batches.

    Each batch's loss is a mean over its own valid bytes; weighing it by their number makes the
    result the mean over all of them.

    Returns:
      Bits per byte, and the number of bytes scored.
    """
    scores: list[tuple[Any, int]] = []
    for i in steps:
        batch: Batch = text.held_out_batch(i)
        loss = step.evaluate(state, step.put(batch))["loss"]
        scores.append((loss, int(batch["weights"].sum())))
        if len(scores) > 1:
            float(scores[-2][0])  # one batch in flight, not the whole text
    scored = sum(weight for _, weight in scores)
    nats = sum(float(loss) * weight for loss, weight in scores) / scored
    return nats / math.log(2), scored


def spread(text: Text, count: int) -> list[int]:
    """Picks at most `count` held-out batches, evenly over all of them.

    They never hold the whole text, so what they say is for the way, not for the result.
    """
    batches = text.held_out_steps
    return [i * batches // min(count, batches) for i in range(min(count, batches))]


def _check_finite(done: int, values: Mapping[str, float], file: MetricsFile) -> None:
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        named = ", ".join(f"{name} is {value}" for name, value in bad.items())
        file.write("stopped", step=done, why=f"{named}")
        fix = "a lower --set optimizer.lr=..., or --set optimizer.clip=1.0"
        problem = Problem(f"step {done}", f"{named}. Metrics are in {file.path}.", fix)
        raise StepError(format_problems("The run has diverged.", [problem]))
