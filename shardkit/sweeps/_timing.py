"""Step times of several steps, in turns, so that a busy moment of the machine hits all of them."""

import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ..parity import make_random_batches
from ..step import CompiledStep
from ._attempt import ended
from ._row import Row

SIMULATED = "measured on simulated devices, not a speed claim"


@dataclasses.dataclass
class Seen:
    """What was measured of one step so far.

    Attributes:
      warm_up: seconds of the first update of each turn.
      seconds: of every later one.
      failed: what ended it, and then nothing more is timed.
    """

    warm_up: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    failed: Exception | None = None

    def figures(self) -> dict[str, Any]:
        """Median and quartiles, the warm-up apart, as plain values."""
        low, median, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        spread = {"median": median, "low": low, "high": high, "samples": len(self.seconds)}
        return {"step_seconds": spread, "warm_up_seconds": statistics.median(self.warm_up)}


def in_turns(
    steps: Mapping[str, CompiledStep],
    batches: Mapping[str, Any],
    repeats: int,
    steps_per_repeat: int,
) -> dict[str, Seen]:
    """Times steps in turns A B C A B C …, with one state alive at a time.

    Args:
      steps: what is timed, by name.
      batches: host batch of each.
      repeats: how often each has its turn.
      steps_per_repeat: timed updates of one turn, after one that warms up; with `repeats` at
        least 2 in all.
    """
    seen = {name: Seen() for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            if seen[name].failed is None:
                _turn(step, batches[name], steps_per_repeat, seen[name])
    return seen


def _turn(step: CompiledStep, batch: Any, steps_per_repeat: int, seen: Seen) -> None:
    """One turn. A step that runs out of memory is a row, so its error is kept, not raised."""
    try:
        state, placed = step.init(jax.random.key(0)), step.shard_batch(batch)
        for update in range(1 + steps_per_repeat):
            start = time.perf_counter()
            state, metrics = step(state, placed)
            jax.block_until_ready((state, metrics))
            taken = time.perf_counter() - start
            (seen.seconds if update else seen.warm_up).append(taken)
    except Exception as error:
        seen.failed = error


def time_all(
    rows: Mapping[str, Row],
    steps: Mapping[str, CompiledStep],
    batches: Sequence[Any] | None,
    repeats: int,
    steps_per_repeat: int,
) -> list[Row]:
    """Times every step that was compiled and gives the rows back, with times or the error.

    Args:
      rows: key of a case → its row.
      steps: those to time.
      batches: host batches, of which the first is used; None for made-up ones.
      repeats: see `in_turns`.
      steps_per_repeat: see `in_turns`.
    """
    given = {key: (batches or make_random_batches(step))[0] for key, step in steps.items()}
    found = in_turns(steps, given, repeats, steps_per_repeat)
    return [_timed(rows[key], steps[key], seen) for key, seen in found.items()]


def _timed(row: Row, step: CompiledStep, seen: Seen) -> Row:
    if seen.failed is not None:
        return ended(row, seen.failed)
    device = step.mesh.devices.flat[0]
    simulated = step.mesh.size > 1 and device.platform == "cpu"
    where = SIMULATED if simulated else f"measured on {device.device_kind}"
    circumstances = {"where": where, "load": os.getloadavg()[0]}
    return dataclasses.replace(row, measured={**row.measured, **seen.figures(), **circumstances})
