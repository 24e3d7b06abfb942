"""What happens when the loss or the gradients of an update are not finite."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ..._core.errors import CheckpointError, StepError
from ...step import SKIPPED
from ..guards._dump import write_dump
from ._callback import Callback, RunContext, StepMetrics

_LOWER = "a lower learning rate (optimizer.lr=...), or clipping (optimizer.grad_clip_norm=1.0)"


class FiniteCheck(Callback):
    """Counts the updates that a step skipped, or ends the run with a dump of its input.

    The compiled step has decided already (`compile_step(on_nonfinite=...)`); this callback learns
    of it one update later. A stopped step changes nothing more, so the state that it failed on
    is still there to be dumped.
    """

    def __init__(self, limit: int) -> None:
        """Takes how many updates in a row may be skipped."""
        self._limit = limit
        self._in_row = self._skipped = 0
        self._state: Any = None
        self._batches: dict[int, Any] = {}  # by update: the newest two

    def on_start(self, run: RunContext, state: Any) -> None:
        self._run, self._stops = run, run.step.spec.on_nonfinite == "stop"

    def on_dispatch(self, step: int, state: Any, batch: Any) -> None:
        """Keeps the last two batches; the metrics that come next belong to one of them."""
        if self._stops:
            before = {s: b for s, b in self._batches.items() if s == step - 1}
            self._state, self._batches = state, {step: batch, **before}

    def on_step(self, metrics: StepMetrics) -> None:
        """Raises StepError for a metric that is not finite, or too many skips in a row."""
        if SKIPPED in metrics.values and not self._stops:
            return self._count(metrics)
        bad = {name: x for name, x in metrics.values.items() if not math.isfinite(x)}
        if bad:
            values = ", ".join(f"{name} is {value}" for name, value in bad.items())
            why, fix = self._explain(metrics, values)
            raise StepError.of("The run has diverged.", f"step {metrics.step}", why, fix)
        return None

    def on_finish(self, state: Any) -> None:
        if self._skipped:
            count = f"{self._skipped} of {self._run.steps - self._run.start} updates"
            self._run.say(f"{count} were skipped: their loss or gradients were not finite.")

    def _count(self, metrics: StepMetrics) -> None:
        if not metrics.values[SKIPPED]:
            self._in_row = 0
            return
        self._skipped, self._in_row = self._skipped + 1, self._in_row + 1
        values = {name: str(metrics.values[name]) for name in ("loss", "grad_norm")}
        self._run.write("skipped", step=metrics.step, in_row=self._in_row, values=values)
        text = ", ".join(f"{name} {value}" for name, value in values.items())
        self._run.say(f"step {metrics.step} skipped: {text}")
        if self._in_row >= self._limit:
            why = f"and the {self._limit - 1} updates before it were not finite, and skipped"
            raise StepError.of("The run makes no progress.", f"step {metrics.step}", why, _LOWER)

    def _explain(self, metrics: StepMetrics, values: str) -> tuple[str, str]:
        """Returns why a step failed, with its dump if there is one, and a fix."""
        if not self._stops or not metrics.values.get(SKIPPED):
            return values, f'{_LOWER}; compile_step(on_nonfinite="stop") keeps its state and batch'
        try:
            dump = self._dump(metrics)
        except CheckpointError as error:
            return f"{values}; its state and batch could not be saved: {error}", _LOWER
        why = f"{values}; its state and batch are in {dump}"
        return why, f"shardkit replay {dump}, or {_LOWER}"

    def _dump(self, metrics: StepMetrics) -> Path:
        run = self._run
        dump = write_dump(
            run.folder,
            metrics.step,
            state=dataclasses.replace(self._state, halted=self._state.halted & False),
            batch=self._batches[metrics.step],
            values=metrics.values,
            config=run.record,
        )
        run.write("dumped", step=metrics.step, folder=str(dump))
        return dump
