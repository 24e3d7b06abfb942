"""`Budget`: what a compiled step may cost, as data; `check` says what exceeds it, and why."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._core.errors import BudgetError, Problem, ReportError, count, did_you_mean, raise_all
from .._core.tree import format_bytes
from .communication._collectives import KINDS
from .communication._ledger import Row
from .communication._reductions import REDUCING
from .findings._findings import FINDINGS, FROM_LEDGER, FROM_MESSAGES

if TYPE_CHECKING:
    from ._report import Report

Key = str | tuple[str, str]

# One scalar in a hundred parameters more, as a loss that is reduced with them, is no reduction.
_SLACK = 0.01
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most that a compiled step may cost; None allows anything.

    A key of `wire_bytes` and `collectives` is a mesh axis (`"tensor"`: every row that spans it),
    a kind (`"all-gather"`), or both (`("tensor", "all-gather")`).

    Attributes:
      replicated_bytes: bytes per device of leaves that every device holds whole and that no rule
        declares so.
      reductions_per_step: mesh axis → how often each gradient may be reduced over it per step;
        see `reductions_per_step` of a report.
      involuntary_remat: number of involuntary full rematerializations.
      wire_bytes: key → bytes one device sends per step.
      collectives: key → collectives executed per step, all trips together.
      memory_bytes: most that is alive at once on a device.
      compiles: how often the step may have been compiled.
      findings: kind of finding → how many.

    >>> Budget(reductions_per_step={"data": 1}, wire_bytes={"tensor": 2**20}).replicated_bytes
    """

    replicated_bytes: int | None = None
    reductions_per_step: Mapping[str, float] = dataclasses.field(default_factory=dict)
    involuntary_remat: int | None = None
    wire_bytes: Mapping[Key, int] = dataclasses.field(default_factory=dict)
    collectives: Mapping[Key, int] = dataclasses.field(default_factory=dict)
    memory_bytes: int | None = None
    compiles: int | None = None
    findings: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what is no number, and keys that name nothing.

        Raises:
          ReportError: it names each such part.
        """
        wrong = list(_misformed(self))
        fix = "sk.Budget(memory_bytes=16 * 2**30, wire_bytes={'data': 2**20}, compiles=1)"
        raise_all(ReportError, "The budget cannot be read.", wrong, fix)


_BY_KEY = ("reductions_per_step", "wire_bytes", "collectives", "findings")
_WITH_KIND = ("wire_bytes", "collectives")


def _misformed(budget: Budget) -> Iterator[Problem]:
    """What of a budget is in no form that a report can be held to."""
    for field in dataclasses.fields(budget):
        name, value = field.name, getattr(budget, field.name)
        if name not in _BY_KEY:
            if value is not None:
                yield from _no_limit(name, value)
        elif not isinstance(value, Mapping):
            yield Problem(f"{name}={value!r}", "says no key", f"{name}={{KEY: {value!r}}}")
        else:
            for key, limit in value.items():
                yield from _no_key(f"{name}[{key!r}]", key, name in _WITH_KIND)
                yield from _no_limit(f"{name}[{key!r}]", limit)


def _no_limit(name: str, value: Any) -> Iterator[Problem]:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        yield Problem(f"{name}={value!r}", f"is a {type(value).__name__}, not a number")
    elif math.isnan(float(value)) or value < 0:
        yield Problem(f"{name}={value!r}", "is not a number of at least 0")


def _no_key(subject: str, key: Any, with_kind: bool) -> Iterator[Problem]:
    if isinstance(key, str):
        return
    if not with_kind:
        yield Problem(subject, "a key is one name")
    elif not (isinstance(key, tuple) and list(map(type, key)) == [str, str]):
        yield Problem(subject, "a key is an axis, a kind, or (axis, kind)")
    elif key[1].replace("_", "-") not in KINDS:
        kinds = f"(axis, kind), and {key[1]!r} is no kind.{did_you_mean(key[1], KINDS)}"
        yield Problem(subject, kinds)


def check(report: "Report", budget: Budget) -> None:
    """Holds a report to a budget.

    Args:
      report: of a compiled step.
      budget: what it may cost.

    Raises:
      BudgetError: with every part of the budget that is exceeded or cannot be told, what was
        expected, what was found, and the rows or leaves responsible.
      ReportError: it is no `Budget`, or names an axis, a kind or a finding that there is not.
    """
    if not isinstance(budget, Budget):
        what = f"A report is held to a Budget, not to a {type(budget).__name__}."
        raise ReportError(f"{what}\nFix: report.check(sk.Budget(memory_bytes=16 * 2**30))")
    problems = [problem for part in _PARTS for problem in part(report, budget)]
    mesh = ", ".join(f"{name}={size}" for name, size in report.mesh)
    over = count(len(problems), "budget")
    raise_all(BudgetError, f"{over} exceeded by the step compiled for mesh ({mesh}).", problems)


def _replicated(report: "Report", budget: Budget) -> Iterator[Problem]:
    found = [finding for finding in report.findings if finding.kind == "replicated"]
    yield from _at_most(
        "replicated_bytes",
        budget.replicated_bytes,
        sum(finding.bytes for finding in found),
        [f"{finding.leaf} {format_bytes(finding.bytes)}" for finding in found],
        found[0].fix if found else "",
        format_bytes,
    )


def _reductions(report: "Report", budget: Budget) -> Iterator[Problem]:
    for axis, most in budget.reductions_per_step.items():
        if axis not in report.reductions:
            why = f"at most {most}, but the batch is not split over it"
            yield Problem(f"reductions_per_step[{axis!r}]", why, f"budget {_batch_axes(report)}")
            continue
        found = report.reductions[axis]
        rows = [row for kind in REDUCING for row in report.ledger.where(axis, kind)]
        yield from _at_most(
            f"reductions_per_step[{axis!r}]",
            most if found > most + _SLACK else None,
            found,
            _lines(rows),
            'sk.Accumulate(k, reduce="end")',
            lambda number: f"{number:.4g}",
        )
        yield from _incomplete(report, f"reductions_per_step[{axis!r}]")


def _batch_axes(report: "Report") -> str:
    return " or ".join(map(repr, report.reductions)) or "no axis"


def _rematerializations(report: "Report", budget: Budget) -> Iterator[Problem]:
    if budget.involuntary_remat is None:
        return
    if not report.messages_complete:
        yield _unheard("involuntary_remat")
        return
    found = [finding for finding in report.findings if finding.kind == "involuntary_remat"]
    lines = [f"{finding.scope or 'the step'}: {finding.why}" for finding in found]
    fix = found[0].fix if found else ""
    yield from _at_most("involuntary_remat", budget.involuntary_remat, len(found), lines, fix)


def _wire(report: "Report", budget: Budget) -> Iterator[Problem]:
    for key, most in budget.wire_bytes.items():
        rows = _rows(report, key)
        total = sum(row.wire_bytes for row in rows)
        subject = f"wire_bytes[{key!r}]"
        yield from _at_most(subject, most, total, _lines(rows), "", format_bytes)
        yield from _incomplete(report, subject)


def _collectives(report: "Report", budget: Budget) -> Iterator[Problem]:
    for key, most in budget.collectives.items():
        rows = _rows(report, key)
        total = sum(1 if row.trips is None else row.trips for row in rows)
        yield from _at_most(f"collectives[{key!r}]", most, total, _lines(rows))
        yield from _incomplete(report, f"collectives[{key!r}]")


def _memory(report: "Report", budget: Budget) -> Iterator[Problem]:
    if budget.memory_bytes is None:
        return
    memory = report.memory
    if memory.total is None:
        why = "the compiler does not say what is alive at once"
        yield Problem("memory_bytes", why, "leave memory_bytes out for this target")
        return
    parts = {name: getattr(memory, name) for name in ("params", "opt_state", "batch", "temp")}
    lines = [f"{name} {format_bytes(size or 0)}" for name, size in parts.items()]
    fix = "split a part over more axes, accumulate, or a remat policy"
    yield from _at_most("memory_bytes", budget.memory_bytes, memory.total, lines, fix, format_bytes)


def _compiles(report: "Report", budget: Budget) -> Iterator[Problem]:
    fix = "keep shapes, dtypes and shardings of state and batch the same"
    yield from _at_most("compiles", budget.compiles, report.compiles, [], fix)


def _findings(report: "Report", budget: Budget) -> Iterator[Problem]:
    for kind, most in budget.findings.items():
        if kind not in FINDINGS:
            raise ReportError(f"no finding is called {kind!r}.{did_you_mean(kind, FINDINGS)}")
        found = [finding for finding in report.findings if finding.kind == kind]
        fix, subject = found[0].fix if found else "", f"findings[{kind!r}]"
        yield from _at_most(subject, most, len(found), [str(f) for f in found], fix)
        if kind in FROM_MESSAGES and not report.messages_complete:
            yield _unheard(subject)
        if kind in FROM_LEDGER:
            yield from _incomplete(report, subject)


_PARTS = (
    _replicated,
    _reductions,
    _rematerializations,
    _wire,
    _collectives,
    _memory,
    _compiles,
    _findings,
)


def _rows(report: "Report", key: Key) -> list[Row]:
    if isinstance(key, tuple):
        return report.ledger.where(*key)
    if key.replace("_", "-") in KINDS:
        return report.ledger.where(kind=key)
    return report.ledger.where(axis=key)


def _at_most(
    subject: str,
    most: float | None,
    found: float,
    responsible: Sequence[str] = (),
    fix: str = "",
    show: Callable[[Any], str] = str,
) -> Iterator[Problem]:
    """A problem where more is found than allowed, with what is responsible."""
    if most is None or found <= most:
        return
    lines = [f"      {line}" for line in responsible[:_SHOWN]]
    if len(responsible) > _SHOWN:
        lines.append(f"      and {len(responsible) - _SHOWN} more")
    yield Problem(subject, "\n".join([f"at most {show(most)}, found {show(found)}", *lines]), fix)


def _incomplete(report: "Report", subject: str) -> Iterator[Problem]:
    """What is counted from a ledger with gaps proves nothing."""
    if not report.ledger.complete:
        first = report.ledger.problems[0]
        yield Problem(subject, f"cannot be told, the ledger is incomplete: {first}", "")


def _unheard(subject: str) -> Problem:
    why = "the compiler's messages are not known: the program came from a cache"
    return Problem(subject, why, "compile with the persistent cache off")


def _lines(rows: Sequence[Row]) -> list[str]:
    """Rows, the most wire bytes first."""
    ordered = sorted(rows, key=lambda row: -row.wire_bytes)
    return [f"{row}, {format_bytes(row.wire_bytes)} on the wire" for row in ordered]
