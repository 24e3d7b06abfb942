"""Before the first update: does the compiled gradient agree with the loss?"""

import math
from typing import Any

from ._callback import Callback, RunContext


class SelfCheckCallback(Callback):
    """Calls `step.self_check` before updates, prints its line, and ends the run if it fails.

    Unlike the other callbacks it waits for the devices; `metrics.jsonl` has its time in a row
    `check`, and goodput counts it apart.
    """

    def __init__(self, every: float) -> None:
        """Takes the updates between two checks, infinite for the first update alone."""
        self._every = every

    def on_start(self, run: RunContext, state: Any) -> None:
        self._run = run

    def on_batch(self, step: int, state: Any, batch: Any) -> None:
        """Checks the first update of the process, and every so many after it.

        Raises:
          VerificationError: a check failed; nothing was updated.
        """
        if (step - 1 - self._run.start) % self._every:
            return
        result = self._run.step.self_check(state, batch)
        self._run.write(
            "check",
            step=step - 1,
            ok=result.ok,
            verdicts={check.name: check.verdict for check in result.checks},
            gaps={check.name: check.gap for check in result.checks if math.isfinite(check.gap)},
            leaf=result.worst_leaf,
            evaluations=result.evaluations,
            seconds=result.seconds,
            compile_seconds=result.compile_seconds,
        )
        self._run.say(f"self check before step {step} {result.line}")
        result.check()
