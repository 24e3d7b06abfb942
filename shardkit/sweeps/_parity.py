"""Compares the steps of cases with one device."""

from collections.abc import Sequence
from typing import Any

import jax

from .._core.errors import VerificationError
from .._core.types import Batch
from ..parity import ParityInputs, ReferenceResults, format_error, make_random_batches
from ..step import CompiledStep

_STEPS = 2  # the second one shows whether anything recompiles


class ParityChecker:
    """Verdicts on many steps; cases with the same micro-batches share one reference."""

    def __init__(self, batches: Sequence[Batch] | None) -> None:
        """Takes host batches; None for generated ones."""
        self.batches = batches
        self._standards: dict[int, ReferenceResults] = {}

    def verdict(self, step: CompiledStep) -> dict[str, Any]:
        """Compares a step with one device: `ok`, and the check nearest to its limit.

        If the step cannot be compared, `ok` is None and `why` has the reason.
        """
        try:
            rows = self._standard(step).compare(step)
        except VerificationError as error:
            return {"ok": None, "why": str(error)}
        worst = max(rows, key=lambda row: (not row.ok, row.error / (row.threshold or 1.0)))
        why = worst.why or f"{worst.leaf} is off by {format_error(worst.error)}"
        limit = f"at most {format_error(worst.threshold)}"
        return {
            "ok": all(row.ok for row in rows),
            "checks": len(rows),
            "failed": [row.check for row in rows if not row.ok],
            "check": worst.check,
            "leaf": worst.leaf,
            "error": worst.error,
            "threshold": worst.threshold,
            "why": "" if worst.ok else f"{worst.check}: {why}, {limit}",
        }

    def _standard(self, step: CompiledStep) -> ReferenceResults:
        micro = step.spec.accumulate.micro_batches
        if micro not in self._standards:
            batches = make_random_batches(step) if self.batches is None else self.batches
            device = step.mesh.devices.flat[0]
            trial = ParityInputs(batches, _STEPS, jax.random.key(0))
            self._standards[micro] = ReferenceResults(
                step.spec, device, trial, step.layout.row_dims
            )
        return self._standards[micro]
