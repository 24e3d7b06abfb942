"""Times several steps interleaved, so that a busy moment of the machine affects all of them."""

import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from .._core.types import Batch
from ..parity import make_random_batches
from ..step import CompiledStep
from ._case_runner import fail_row
from ._row import SweepRow

SIMULATED = "measured on simulated devices, not a speed claim"


@dataclasses.dataclass
class StepTimes:
    """Times of one step so far."""

    # seconds of the first update of each repeat
    warm_up: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)  # seconds of every later update
    error: Exception | None = None  # exception that ended it; it is not timed any further

    def figures(self) -> dict[str, Any]:
        """Median and quartiles, and the median of the warm-up, as plain values."""
        low, median, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        spread = {"median": median, "low": low, "high": high, "samples": len(self.seconds)}
        return {"step_seconds": spread, "warm_up_seconds": statistics.median(self.warm_up)}


def time_rows(
    rows: Mapping[str, SweepRow],
    steps: Mapping[str, CompiledStep],
    batches: Sequence[Batch] | None,
    repeats: int,
    steps_per_repeat: int,
) -> list[SweepRow]:
    """Times steps on the first batch; returns their rows with the times or the error.

    They run in the order A B C A B C …, with one state alive at a time. One repeat makes
    `steps_per_repeat` timed updates after one that warms up; with `repeats` at least 2 in all.
    """
    times = {name: StepTimes() for name in steps}
    first = {name: (batches or make_random_batches(step))[0] for name, step in steps.items()}
    for _ in range(repeats):
        for name, step in steps.items():
            if times[name].error is None:
                _time_once(step, first[name], steps_per_repeat, times[name])
    return [_add_times(rows[name], steps[name], times[name]) for name in times]


def _time_once(step: CompiledStep, batch: Batch, steps_per_repeat: int, times: StepTimes) -> None:
    """One repeat. A step that runs out of memory becomes a row, so its error is not raised."""
    try:
        state, placed = step.init(jax.random.key(0)), step.shard_batch(batch)
        for update in range(1 + steps_per_repeat):
            start = time.perf_counter()
            state, metrics = step(state, placed)
            jax.block_until_ready((state, metrics))
            seconds = time.perf_counter() - start
            (times.seconds if update else times.warm_up).append(seconds)
    except Exception as error:
        times.error = error


def _add_times(row: SweepRow, step: CompiledStep, times: StepTimes) -> SweepRow:
    if times.error is not None:
        return fail_row(row, times.error)
    device = step.mesh.devices.flat[0]
    simulated = step.mesh.size > 1 and device.platform == "cpu"
    where = SIMULATED if simulated else f"measured on {device.device_kind}"
    machine = {"where": where, "load": os.getloadavg()[0]}
    return dataclasses.replace(row, measured={**row.measured, **times.figures(), **machine})
