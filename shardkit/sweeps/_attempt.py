"""One case tried: compiled, held to its memory and to one device's numbers, as a row."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._core.errors import ShardkitError
from ..planner import Network, modelled
from ..step import CompiledStep, StepSpec
from ..targets import NotCompiled, OwnFailure
from ._case import Case
from ._circumstances import circumstances
from ._compilers import Compiler, Made
from ._parity import Parity
from ._row import (
    FAILED,
    ILLEGAL,
    MEMORY,
    OK,
    WRONG,
    Row,
    compiled_figures,
    misfit,
    modelled_figures,
)

# What XLA's allocators and compilers say, on every platform.
_NO_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class Attempts:
    """Tries one case after the other; whatever goes wrong is a row.

    Attributes:
      compiler: here, or for an absent target.
      verify: whether steps are compared with one device.
      batches: host batches for that; None for made-up ones.
      estimate: case → modelled bytes per device; None for those of a plan's model.
    """

    compiler: Compiler
    verify: bool = False
    batches: Sequence[Any] | None = None
    estimate: Callable[[Case], float] | None = None

    @functools.cached_property
    def _parity(self) -> Parity:
        return Parity(self.batches)

    def _by_plan(self, case: Case, made: Made) -> dict[str, Any]:
        if self.estimate:
            return estimated(self.estimate, case)
        return by_plan(case, made.spec, self.compiler.network)

    def try_case(self, case: Case, old: Row | None = None) -> tuple[Row, CompiledStep | None]:
        """Returns the row of a case, and its step where it is legal and was compiled here.

        Args:
          case: what is tried.
          old: its row of before, whose proof holds where it is one of the same code.
        """
        blank = Row(case, FAILED, self.compiler.on, circumstances=circumstances())
        try:
            made = self.compiler.compile(case)
        except Exception as error:
            return ended(blank, error), None
        report = made.report
        row = dataclasses.replace(
            blank,
            status=OK,
            on={**blank.on, "platform": report.platform, "device_kind": report.device_kind},
            compiled=compiled_figures(report),
            measured={"compile_seconds": {"whole": made.seconds, **report.seconds}},
            modelled=modelled_figures(report) | self._by_plan(case, made),
        )
        if why := misfit(report):
            return dataclasses.replace(row, status=MEMORY, reason=why), None
        row = carried_over(row, old)
        if not self.verify or made.step is None or is_proved(old, row.circumstances):
            return row, made.step
        try:
            return _proved(row, self._parity.verdict(made.step)), made.step
        except Exception as error:
            return ended(row, error), None


def estimated(estimate: Callable[[Case], float], case: Case) -> dict[str, Any]:
    """What a user's own model says of a case; or how it failed, which costs no row."""
    try:
        return {"memory": float(estimate(case))}
    except Exception as error:
        return {"not_modelled": reason(f"estimate raised {type(error).__name__}: {error}")}


def by_plan(case: Case, spec: StepSpec, network: Network | None) -> dict[str, Any]:
    """What a plan would say of a case, as plain values; or why it says nothing."""
    try:
        found = modelled(spec, case.sizes, network)
    except Exception as error:  # the walk goes through a user's code
        return {"not_modelled": reason(f"{type(error).__name__}: {error}")}
    seconds = {} if found.seconds is None else {"plan_seconds": found.seconds}
    figures = {"memory": found.total, "wire": sum(found.wire.values()), "axes": dict(found.wire)}
    return {**figures, **seconds, "problems": list(found.problems)}


def ended(row: Row, error: Exception) -> Row:
    """The row of a case that an error ended; what was found out before stays in it."""
    text = f"{error}" if isinstance(error, ShardkitError) else f"{type(error).__name__}: {error}"
    illegal = isinstance(error, ShardkitError) and not isinstance(error, NotCompiled | OwnFailure)
    status = MEMORY if _NO_MEMORY in text else ILLEGAL if illegal else FAILED
    why = reason(error.raised if isinstance(error, OwnFailure) else text)
    return dataclasses.replace(row, status=status, reason=why, error=text)


def reason(message: str) -> str:
    r"""The first line of a message, and the first leaf or axis at fault behind it.

    >>> reason("1 leaf cannot be laid out.\n  w f32[3]   dim 0 (3)\nFix: tensor=1")
    '1 leaf cannot be laid out: w f32[3] dim 0 (3)'
    """
    head, *rest = message.splitlines() or [""]
    if not rest or not rest[0].startswith("  "):
        return head
    return f"{head.rstrip('.:')}: {' '.join(rest[0].split())}"


def carried_over(new: Row, old: Row | None) -> Row:
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


def is_done(row: Row | None, *, prove: bool, timed: bool) -> bool:
    """Whether a row of a file holds all that is asked now.

    What failed or was refused is tried again, and so are wrong numbers where they can be seen: the
    code behind it may be mended.
    """
    if row is None or row.status in (FAILED, ILLEGAL):
        return False
    if row.status != OK:
        return row.status == MEMORY or not prove
    return (row.verified is not None or not prove) and (row.seconds is not None or not timed)


def is_proved(old: Row | None, now: Mapping[str, Any]) -> bool:
    """Whether a row tells that just this code gives one device's numbers.

    Args:
      old: the row that is there.
      now: circumstances of this process.
    """
    if old is None or old.status != OK or not (old.verified or {}).get("ok"):
        return False
    commit = now["commit"]
    return bool(commit) and not commit.endswith("-dirty") and _code(old.circumstances) == _code(now)


def _same_code(one: Row, other: Row) -> bool:
    return _code(one.circumstances) == _code(other.circumstances)


def _code(said: Mapping[str, Any]) -> tuple[Any, Any]:
    return said.get("commit"), said.get("versions")


def _proved(row: Row, verdict: dict[str, Any]) -> Row:
    wrong = verdict["ok"] is False
    why: Sequence[str] = verdict["why"].splitlines() or [""]
    status = WRONG if wrong else row.status
    return dataclasses.replace(
        row, status=status, verified=verdict, reason=why[0] if wrong else row.reason
    )
