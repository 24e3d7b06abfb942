"""What a run proves of itself: equal copies of state and batch, a gradient that fits the loss."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax

from ..._core.errors import BatchError, StateError, format_problems, raise_all
from ...processes import ProcessGroup
from .._metrics_file import read_metrics
from ..guards._replicas import Mismatch, ReplicaComparison
from ._callback import Callback, RunContext, StepMetrics


class ReplicaCheck(Callback):
    """Compares checksums of the copies of each leaf, and stops or warns when they differ.

    The checksums are dispatched behind an update and read together with its metrics, so that
    nothing waits for them.
    """

    def __init__(self, every: int, on_mismatch: Literal["stop", "continue"]) -> None:
        """Takes the updates between two comparisons, and what to do when copies differ."""
        self._every, self._on_mismatch = every, on_mismatch
        self._comparison: ReplicaComparison | None = None
        self._checksums: dict[int, jax.Array] = {}
        self._equal_at: int | None = None

    def on_start(self, run: RunContext, state: Any) -> None:
        self._run = run
        comparison = ReplicaComparison(state)
        if comparison.leaves:
            self._comparison = comparison
        else:
            run.say("train.replica_check_every: no leaf has a second copy, nothing is compared")

    def on_dispatch(self, step: int, state: Any, batch: Any) -> None:
        if self._comparison and step % self._every == 0:
            self._checksums[step] = self._comparison.checksums(state)

    def on_step(self, metrics: StepMetrics) -> None:
        """Reads an update's checksums; if they differ, raises StateError or warns."""
        checksums = self._checksums.pop(metrics.step, None)
        if checksums is None or self._comparison is None:
            return
        if mismatches := self._comparison.mismatches(checksums):
            self._report(metrics.step, mismatches)
        else:
            self._equal_at = metrics.step

    def _report(self, step: int, mismatches: Sequence[Mismatch]) -> None:
        rows = [
            {
                "leaf": mismatch.leaf,
                "device": str(mismatch.device),
                "place": dict(mismatch.place),
                "checksum": mismatch.checksum,
                "expected": mismatch.expected,
            }
            for mismatch in mismatches
        ]
        self._run.write("replicas", step=step, differ=rows)
        agreed = f"after step {self._equal_at}" if self._equal_at else "at the start"
        newest = self._equal_at or self._run.start
        fix = f"resume from a checkpoint no newer than step {newest}"
        headline = f"Copies of the state differ at step {step}; they agreed {agreed}."
        text = format_problems(headline, [mismatch.problem for mismatch in mismatches], fix)
        if self._on_mismatch == "stop":
            raise StateError(text)
        self._run.say(f"{text}\nTraining continues (train.on_replica_mismatch=continue).")


class BatchCheck(Callback):
    """Compares the rows that several processes read alike, before the first update and later ones.

    Each process reads its own files, so copies of a batch on devices of several processes can
    differ, and would train copies of the parameters apart.
    """

    def __init__(self, every: int) -> None:
        """Takes the updates between two comparisons."""
        self._every = every
        self._types: list[Any] = []  # of the batch that the comparison was compiled for

    def on_start(self, run: RunContext, state: Any) -> None:
        self._start = run.start

    def on_batch(self, step: int, state: Any, batch: Any) -> None:
        """Raises BatchError before the update of a batch whose copies differ."""
        if (step - 1 - self._start) % self._every:
            return
        types = [(x.shape, x.dtype) for x in jax.tree.leaves(batch)]
        if types != self._types:
            self._types, self._comparison = types, ReplicaComparison(batch)
        comparison = self._comparison
        if not comparison.leaves:
            return
        if mismatches := comparison.mismatches(comparison.checksums(batch)):
            headline = f"Processes read different batches for update {step}."
            rows = [
                dataclasses.replace(mismatch.problem, subject=f"batch/{mismatch.leaf}")
                for mismatch in mismatches
            ]
            fix = "the same files and seed for the data of every process"
            raise_all(BatchError, headline, rows, fix)


class SelfCheckCallback(Callback):
    """Calls `step.self_check` before updates, prints its line, and ends the run if it fails.

    Unlike the other callbacks it waits for the devices; `metrics.jsonl` has its time in a row
    `check`, and goodput counts it apart.
    """

    def __init__(self, every: float, process_group: ProcessGroup) -> None:
        """Takes the updates between two checks, infinite for the first alone, and the processes."""
        self._every, self._process_group = every, process_group

    def on_start(self, run: RunContext, state: Any) -> None:
        self._run = run

    def on_batch(self, step: int, state: Any, batch: Any) -> None:
        """Checks before the first update and every so many; raises VerificationError on failure."""
        if (step - 1 - self._run.start) % self._every:
            return
        if (passed := self._find_passed(step)) is not None:
            self._run.say(
                f"self check passed before step {passed + 1}, with this very executable "
                '(train.check="every N" repeats it)'
            )
            return
        # The first check compiles, which the step timeout should not count.
        self._process_group.stop_watching()
        if step - 1 == self._run.start:
            self._run.say(
                "self check: compiling the loss and its gradient, then six evaluations ..."
            )
        result = self._run.step.self_check(state, batch)
        self._process_group.report_step(step - 1)
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
            executable=self._run.step.program.kept_as,
        )
        self._run.say(f"self check before step {step} {result.line}")
        result.check()

    def _find_passed(self, step: int) -> int | None:
        """Returns the updates before which an earlier start of the run checked this executable.

        None if the check is due. An executable that was compiled anew is checked again, even one
        of the same name: a compiler that had a fault may have another one.
        """
        program = self._run.step.program
        resumes = step - 1 == self._run.start and self._process_group.count == 1
        if not (resumes and program.kept_as and program.from_cache):
            return None
        checks = (row for row in read_metrics(self._run.folder) if row["kind"] == "check")
        same = (row for row in checks if row["ok"] and row.get("executable") == program.kept_as)
        return next((row["step"] for row in same), None)
