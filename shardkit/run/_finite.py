"""What follows when the numbers of an update are not finite."""

import math
from pathlib import Path
from typing import Any

from .._errors import CheckpointError, Problem, StepError, format_problems
from ..guards import write_dump
from ..step import SKIPPED, released
from ._watch import Numbers, Run, Watcher

_LOWER = "a lower learning rate (optimizer.lr=...), or clipping (optimizer.grad_clip_norm=1.0)"


class WatchFinite(Watcher):
    """Counts the updates that a step skipped, or ends the run and keeps what it failed on.

    The compiled step has decided already (`compile_step(on_nonfinite=...)`); this is told an
    update later. A stopped step changes nothing more, so its state is still there to be kept.
    """

    def __init__(self, limit: int) -> None:
        """Takes how many updates in a row may be skipped."""
        self._limit = limit
        self._run: Run | None = None
        self._in_row = self._skipped = 0
        self._state: Any = None
        self._batches: dict[int, Any] = {}

    def begin(self, run: Run, state: Any) -> None:
        """Learns what the step does of itself."""
        self._run = run

    def dispatched(self, step: int, state: Any, batch: Any) -> None:
        """Holds the last two batches, one of which the next numbers belong to."""
        if self._stops:
            self._state = state
            self._batches = {
                step: batch,
                **{s: b for s, b in self._batches.items() if s == step - 1},
            }

    def read(self, numbers: Numbers) -> None:
        """Looks at every metric; of a step that skips, at what it says of itself.

        Raises:
          StepError: a number is not finite, or too many updates in a row were skipped.
        """
        if SKIPPED in numbers.values and not self._stops:
            return self._count(numbers)
        bad = {name: x for name, x in numbers.values.items() if not math.isfinite(x)}
        if bad:
            named = ", ".join(f"{name} is {value}" for name, value in bad.items())
            why, fix = self._kept(numbers, named)
            raise StepError(
                format_problems(
                    "The run has diverged.", [Problem(f"step {numbers.step}", why, fix)]
                )
            )
        return None

    def finished(self, state: Any) -> None:
        """Says how many updates were not made."""
        if self._skipped and self._run:
            count = f"{self._skipped} of {self._run.steps - self._run.start} updates"
            self._run.say(f"{count} were skipped: their loss or gradients were not finite.")

    @property
    def _stops(self) -> bool:
        return self._run is not None and self._run.step.declaration.on_nonfinite == "stop"

    def _count(self, numbers: Numbers) -> None:
        assert self._run is not None
        if not numbers.values[SKIPPED]:
            self._in_row = 0
            return
        self._skipped, self._in_row = self._skipped + 1, self._in_row + 1
        shown = {name: str(numbers.values[name]) for name in ("loss", "grad_norm")}
        self._run.write("skipped", step=numbers.step, in_row=self._in_row, values=shown)
        said = ", ".join(f"{name} {value}" for name, value in shown.items())
        self._run.say(f"step {numbers.step} skipped: {said}")
        if self._in_row >= self._limit:
            why = f"and the {self._limit - 1} updates before it were not finite, and skipped"
            problem = Problem(f"step {numbers.step}", why, _LOWER)
            raise StepError(format_problems("The run makes no progress.", [problem]))

    def _kept(self, numbers: Numbers, named: str) -> tuple[str, str]:
        """What is said of a step that failed, with its dump where there is one, and a fix."""
        if not self._stops or not numbers.values.get(SKIPPED):
            return named, f'{_LOWER}; compile_step(on_nonfinite="stop") keeps what it failed on'
        try:
            dump = self._dump(numbers)
        except CheckpointError as error:
            return f"{named}; what it failed on could not be kept: {error}", _LOWER
        return f"{named}; its state and batch are in {dump}", f"shardkit replay {dump}, or {_LOWER}"

    def _dump(self, numbers: Numbers) -> Path:
        run = self._run
        assert run is not None
        state, batch = released(self._state), self._batches[numbers.step]
        dump = write_dump(run.folder, numbers.step, state, batch, numbers.values, run.record)
        run.write("dumped", step=numbers.step, folder=str(dump))
        return dump
