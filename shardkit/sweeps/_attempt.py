"""One case tried: compiled, held to its memory and to one device's numbers, as a row."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._core.errors import ShardkitError
from ..planner import Network, estimate_step
from ..step import CompiledStep, StepSpec
from ..targets import TargetCompileError, UserCodeError
from ._case import SweepCase
from ._circumstances import read_provenance
from ._compilers import CaseCompiler, CompiledCase
from ._parity import ParityChecker
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

# What XLA's allocators and compilers say, on every platform.
_NO_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class CaseRunner:
    """Tries one case after the other; whatever goes wrong is a row.

    Attributes:
      compiler: here, or for an absent target.
      verify: whether steps are compared with one device.
      batches: host batches for that; None for made-up ones.
      estimate: case → modelled bytes per device; None for those of a plan's model.
    """

    compiler: CaseCompiler
    verify: bool = False
    batches: Sequence[Any] | None = None
    estimate: Callable[[SweepCase], float] | None = None

    @functools.cached_property
    def _parity(self) -> ParityChecker:
        return ParityChecker(self.batches)

    def _by_plan(self, case: SweepCase, made: CompiledCase) -> dict[str, Any]:
        if self.estimate:
            return user_figures(self.estimate, case)
        return plan_figures(case, made.spec, self.compiler.network)

    def try_case(
        self, case: SweepCase, old: SweepRow | None = None
    ) -> tuple[SweepRow, CompiledStep | None]:
        """Returns the row of a case, and its step where it is legal and was compiled here.

        Args:
          case: what is tried.
          old: its row of before, whose proof holds where it is one of the same code.
        """
        blank = SweepRow(case, FAILED, self.compiler.on, circumstances=read_provenance())
        try:
            made = self.compiler.compile(case)
        except Exception as error:
            return fail_row(blank, error), None
        report = made.report
        row = dataclasses.replace(
            blank,
            status=OK,
            on={**blank.on, "platform": report.platform, "device_kind": report.device_kind},
            compiled=compiled_figures(report),
            measured={"compile_seconds": {"whole": made.seconds, **report.seconds}},
            modelled=modelled_figures(report) | self._by_plan(case, made),
        )
        if why := describe_shortage(report):
            return dataclasses.replace(row, status=MEMORY, reason=why), None
        row = keep_measurements(row, old)
        if not self.verify or made.step is None or is_verified(old, row.circumstances):
            return row, made.step
        try:
            return _add_verdict(row, self._parity.verdict(made.step)), made.step
        except Exception as error:
            return fail_row(row, error), None


def user_figures(estimate: Callable[[SweepCase], float], case: SweepCase) -> dict[str, Any]:
    """What a user's own model says of a case; or how it failed, which costs no row."""
    try:
        return {"memory": float(estimate(case))}
    except Exception as error:
        return {"not_modelled": summarize_error(f"estimate raised {type(error).__name__}: {error}")}


def plan_figures(case: SweepCase, spec: StepSpec, network: Network | None) -> dict[str, Any]:
    """What a plan would say of a case, as plain values; or why it says nothing."""
    try:
        found = estimate_step(spec, case.sizes, network)
    except Exception as error:  # the walk goes through a user's code
        return {"not_modelled": summarize_error(f"{type(error).__name__}: {error}")}
    seconds = {} if found.seconds is None else {"plan_seconds": found.seconds}
    figures = {"memory": found.total, "wire": sum(found.wire.values()), "axes": dict(found.wire)}
    return {**figures, **seconds, "problems": list(found.problems)}


def fail_row(row: SweepRow, error: Exception) -> SweepRow:
    """The row of a case that an error ended; what was found out before stays in it."""
    text = f"{error}" if isinstance(error, ShardkitError) else f"{type(error).__name__}: {error}"
    illegal = isinstance(error, ShardkitError) and not isinstance(
        error, TargetCompileError | UserCodeError
    )
    status = MEMORY if _NO_MEMORY in text else ILLEGAL if illegal else FAILED
    why = summarize_error(error.raised if isinstance(error, UserCodeError) else text)
    return dataclasses.replace(row, status=status, reason=why, error=text)


def summarize_error(message: str) -> str:
    r"""The first line of a message, and the first leaf or axis at fault behind it.

    >>> reason("1 leaf cannot be laid out.\n  w f32[3]   dim 0 (3)\nFix: tensor=1")
    '1 leaf cannot be laid out: w f32[3] dim 0 (3)'
    """
    head, *rest = message.splitlines() or [""]
    if not rest or not rest[0].startswith("  "):
        return head
    return f"{head.rstrip('.:')}: {' '.join(rest[0].split())}"


def keep_measurements(new: SweepRow, old: SweepRow | None) -> SweepRow:
    """A row that was made again, with what was only measured or proved the time before.

    Of other code or versions nothing is taken over: it would stand under the wrong commit.
    """
    if old is None or {old.status, new.status} != {OK} or not _same_code(old, new):
        return new
    return dataclasses.replace(
        new,
        measured={**old.measured, **new.measured},
        verified=old.verified if new.verified is None else new.verified,
    )


def is_done(row: SweepRow | None, *, prove: bool, timed: bool) -> bool:
    """Whether a row of a file holds all that is asked now.

    What failed or was refused is tried again, and so are wrong numbers where they can be seen: the
    code behind it may be mended.
    """
    if row is None or row.status in (FAILED, ILLEGAL):
        return False
    if row.status != OK:
        return row.status == MEMORY or not prove
    return (row.verified is not None or not prove) and (row.seconds is not None or not timed)


def is_verified(old: SweepRow | None, now: Mapping[str, Any]) -> bool:
    """Whether a row tells that just this code gives one device's numbers.

    Args:
      old: the row that is there.
      now: circumstances of this process.
    """
    if old is None or old.status != OK or not (old.verified or {}).get("ok"):
        return False
    commit = now["commit"]
    return (
        bool(commit)
        and not commit.endswith("-dirty")
        and _code_version(old.circumstances) == _code_version(now)
    )


def _same_code(one: SweepRow, other: SweepRow) -> bool:
    return _code_version(one.circumstances) == _code_version(other.circumstances)


def _code_version(said: Mapping[str, Any]) -> tuple[Any, Any]:
    return said.get("commit"), said.get("versions")


def _add_verdict(row: SweepRow, verdict: dict[str, Any]) -> SweepRow:
    wrong = verdict["ok"] is False
    why: Sequence[str] = verdict["why"].splitlines() or [""]
    status = WRONG if wrong else row.status
    return dataclasses.replace(
        row, status=status, verified=verdict, reason=why[0] if wrong else row.reason
    )
