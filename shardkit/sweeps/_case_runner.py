"""Runs one case: compiles it, checks its memory and its numbers, and returns a row."""

import dataclasses
import functools
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .._core.errors import ShardkitError, VerificationError
from .._core.types import Batch
from .._core.versions import package_versions, utc_time
from ..parity import ParityInputs, ReferenceResults, format_error, make_random_batches
from ..planner import Network, estimate_step
from ..step import CompiledStep, StepSpec
from ..targets import TargetCompileError, UserCodeError
from ._case import SweepCase
from ._compilers import CaseCompiler, CompiledCase
from ._row import (
    FAILED,
    ILLEGAL,
    MEMORY,
    OK,
    WRONG,
    SweepRow,
    compiled_figures,
    describe_shortage,
    modelled_figures,
)

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


# What XLA's allocators and compilers say, on every platform.
_NO_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class CaseRunner:
    """Runs one case after the other; every error becomes a row."""

    compiler: CaseCompiler  # for this process's devices, or for an absent target
    verify: bool = False  # whether steps are compared with one device
    batches: Sequence[Batch] | None = None  # host batches for that; None for generated ones
    # case → modelled bytes per device; None for the model of `sk.plan`
    estimate: Callable[[SweepCase], float] | None = None

    @functools.cached_property
    def _parity(self) -> ParityChecker:
        return ParityChecker(self.batches)

    def _plan_figures(self, case: SweepCase, compiled: CompiledCase) -> dict[str, Any]:
        if self.estimate:
            return user_figures(self.estimate, case)
        return plan_figures(case, compiled.spec, self.compiler.network)

    def run_case(
        self, case: SweepCase, old: SweepRow | None = None
    ) -> tuple[SweepRow, CompiledStep | None]:
        """Returns the row of a case, and its step if it is legal and was compiled here.

        The verdict of its old row holds if the code is the same.
        """
        blank = SweepRow(case, FAILED, self.compiler.device_info, provenance=read_provenance())
        try:
            compiled = self.compiler.compile(case)
        except Exception as error:
            return fail_row(blank, error), None
        report = compiled.report
        device = {"platform": report.platform, "device_kind": report.device_kind}
        row = dataclasses.replace(
            blank,
            status=OK,
            on={**blank.on, **device},
            compiled=compiled_figures(report),
            measured={"compile_seconds": {"whole": compiled.seconds, **report.seconds}},
            modelled=modelled_figures(report) | self._plan_figures(case, compiled),
        )
        if shortage := describe_shortage(report):
            return dataclasses.replace(row, status=MEMORY, reason=shortage), None
        row = keep_measurements(row, old)
        if not self.verify or compiled.step is None or is_verified(old, row.provenance):
            return row, compiled.step
        try:
            return _add_verdict(row, self._parity.verdict(compiled.step)), compiled.step
        except Exception as error:
            return fail_row(row, error), None


def read_provenance() -> dict[str, Any]:
    """Commit of the working folder (None outside of a checkout), date and versions."""
    return {"commit": _git_commit(), "date": utc_time(), "versions": package_versions()}


def _git_commit() -> str | None:
    """Short hash of the checkout, with `-dirty` behind it if files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # git is not installed
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def user_figures(estimate: Callable[[SweepCase], float], case: SweepCase) -> dict[str, Any]:
    """The bytes that a user's own model estimates; or how it failed, which costs no row."""
    try:
        return {"memory": float(estimate(case))}
    except Exception as error:
        why = f"estimate raised {type(error).__name__}: {error}"
        return {"not_modelled": summarize_error(why)}


def plan_figures(case: SweepCase, spec: StepSpec, network: Network | None) -> dict[str, Any]:
    """The estimate of a plan for a case, as plain values; or why there is none."""
    try:
        step = estimate_step(spec, case.sizes, network)
    except Exception as error:  # the loss is a user's code
        return {"not_modelled": summarize_error(f"{type(error).__name__}: {error}")}
    seconds = {} if step.seconds is None else {"plan_seconds": step.seconds}
    figures = {"memory": step.total, "wire": sum(step.wire.values()), "axes": dict(step.wire)}
    return {**figures, **seconds, "problems": list(step.problems)}


def fail_row(row: SweepRow, error: Exception) -> SweepRow:
    """The row of a case that an error ended; its figures so far stay in it."""
    text = f"{error}" if isinstance(error, ShardkitError) else f"{type(error).__name__}: {error}"
    not_illegal = isinstance(error, TargetCompileError | UserCodeError)
    illegal = isinstance(error, ShardkitError) and not not_illegal
    status = MEMORY if _NO_MEMORY in text else ILLEGAL if illegal else FAILED
    why = summarize_error(error.raised if isinstance(error, UserCodeError) else text)
    return dataclasses.replace(row, status=status, reason=why, error=text)


def summarize_error(message: str) -> str:
    r"""The first line of a message, and the first leaf or axis at fault behind it.

    >>> summarize_error("1 leaf cannot be laid out.\n  w f32[3]   dim 0 (3)\nFix: tensor=1")
    '1 leaf cannot be laid out: w f32[3] dim 0 (3)'
    """
    head, *lines = message.splitlines() or [""]
    if not lines or not lines[0].startswith("  "):
        return head
    return f"{head.rstrip('.:')}: {' '.join(lines[0].split())}"


def keep_measurements(new: SweepRow, old: SweepRow | None) -> SweepRow:
    """A new row of a case, with the times and the verdict of its old row.

    Nothing is kept from other code or versions: it would be under the wrong commit.
    """
    if old is None or {old.status, new.status} != {OK}:
        return new
    if _code_version(old.provenance) != _code_version(new.provenance):
        return new
    return dataclasses.replace(
        new,
        measured={**old.measured, **new.measured},
        verified=old.verified if new.verified is None else new.verified,
    )


def is_done(row: SweepRow | None, *, prove: bool, timed: bool) -> bool:
    """Whether a row of a file has all figures that are requested now.

    Failed and illegal cases run again, since their code can be fixed by now; cases with wrong
    numbers too, if numbers are verified.
    """
    if row is None or row.status in (FAILED, ILLEGAL):
        return False
    if row.status != OK:
        return row.status == MEMORY or not prove
    return (row.verified is not None or not prove) and (row.seconds is not None or not timed)


def is_verified(old: SweepRow | None, provenance: Mapping[str, Any]) -> bool:
    """Whether a row of the file shows that just this code gives one device's numbers."""
    if old is None or old.status != OK or not (old.verified or {}).get("ok"):
        return False
    commit = provenance["commit"]
    same_code = _code_version(old.provenance) == _code_version(provenance)
    return bool(commit) and not commit.endswith("-dirty") and same_code


def _code_version(provenance: Mapping[str, Any]) -> tuple[Any, Any]:
    return provenance.get("commit"), provenance.get("versions")


def _add_verdict(row: SweepRow, verdict: dict[str, Any]) -> SweepRow:
    if verdict["ok"] is not False:
        return dataclasses.replace(row, verified=verdict)
    reason = verdict["why"].partition("\n")[0]
    return dataclasses.replace(row, status=WRONG, verified=verdict, reason=reason)
