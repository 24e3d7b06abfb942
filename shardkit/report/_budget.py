"""`Budget`: what a compiled step may cost, as data; `check` reports what exceeds it, and why."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .._core.errors import BudgetError, Problem, ReportError, count, did_you_mean, raise_all
from .._core.tree import format_bytes
from ._data import ReportData
from .communication._collectives import KINDS
from .communication._ledger import LedgerRow
from .communication._reductions import REDUCING
from .findings._findings import FINDINGS, FROM_LEDGER, FROM_MESSAGES

Key = str | tuple[str, str]

# A loss that is reduced together with gradients adds elements, but not a reduction: with 100
# parameters and one loss, 1.01 gradients are reduced per step.
_SLACK = 0.01
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most that a compiled step may cost; None allows anything.

    A key of `wire_bytes` and `collectives` is a mesh axis (`"tensor"`: every row that spans it),
    a kind (`"all-gather"`), or both (`("tensor", "all-gather")`).

    Attributes:
      replicated_bytes: bytes per device of leaves that every device holds whole though no rule
        declares them replicated.
      reductions_per_step: mesh axis → how often each gradient may be reduced over it per step.
      involuntary_remat: number of involuntary full rematerializations.
      wire_bytes: key → bytes one device sends per step.
      collectives: key → collectives executed per step, all trips together.
      memory_bytes: peak bytes of memory on a device.
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
        """Raises ReportError with every limit that is no number and key of unknown form."""
        wrong = list(_find_malformed(self))
        fix = "sk.Budget(memory_bytes=16 * 2**30, wire_bytes={'data': 2**20}, compiles=1)"
        raise_all(ReportError, "The budget cannot be read.", wrong, fix)


_BY_KEY = ("reductions_per_step", "wire_bytes", "collectives", "findings")
_WITH_KIND = ("wire_bytes", "collectives")


def _find_malformed(budget: Budget) -> Iterator[Problem]:
    """Fields whose value is not a limit, or whose key cannot name anything in a report."""
    for field in dataclasses.fields(budget):
        name, value = field.name, getattr(budget, field.name)
        if name not in _BY_KEY:
            if value is not None:
                yield from _check_limit(name, value)
        elif not isinstance(value, Mapping):
            yield Problem(
                f"{name}={value!r}", "is a limit without a key", f"{name}={{KEY: {value!r}}}"
            )
        else:
            for key, limit in value.items():
                yield from _check_key(f"{name}[{key!r}]", key, name in _WITH_KIND)
                yield from _check_limit(f"{name}[{key!r}]", limit)


def _check_limit(name: str, value: Any) -> Iterator[Problem]:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        yield Problem(f"{name}={value!r}", f"is a {type(value).__name__}, not a number")
    elif math.isnan(float(value)) or value < 0:
        yield Problem(f"{name}={value!r}", "is not a number of at least 0")


def _check_key(subject: str, key: Any, with_kind: bool) -> Iterator[Problem]:
    if isinstance(key, str):
        return
    if not with_kind:
        yield Problem(subject, "a key is one name")
    elif not (isinstance(key, tuple) and list(map(type, key)) == [str, str]):
        yield Problem(subject, "a key is an axis, a kind, or (axis, kind)")
    elif key[1].replace("_", "-") not in KINDS:
        kinds = f"{key[1]!r} is not a kind of collective.{did_you_mean(key[1], KINDS)}"
        yield Problem(subject, kinds)


def check(report: ReportData, budget: Budget) -> None:
    """Holds a report to a budget.

    Args:
      report: of a compiled step.
      budget: what it may cost.

    Raises:
      BudgetError: it lists every limit that is exceeded or cannot be checked, with the limit,
        the value, and the rows or leaves responsible.
      ReportError: `budget` is not a `Budget`, or names an axis, a kind or a finding that does not
        exist.
    """
    if not isinstance(budget, Budget):
        what = f"report.check takes a Budget, not a {type(budget).__name__}."
        raise ReportError(f"{what}\nFix: report.check(sk.Budget(memory_bytes=16 * 2**30))")
    problems = [problem for find in _CHECKS for problem in find(report, budget)]
    over = count(len(problems), "budget")
    raise_all(
        BudgetError,
        f"{over} exceeded by the step compiled for mesh ({report.mesh_text}).",
        problems,
    )


def _check_replicated(report: ReportData, budget: Budget) -> Iterator[Problem]:
    findings = [finding for finding in report.findings if finding.kind == "replicated"]
    yield from _check_at_most(
        "replicated_bytes",
        budget.replicated_bytes,
        sum(finding.bytes for finding in findings),
        responsible=[f"{finding.leaf} {format_bytes(finding.bytes)}" for finding in findings],
        fix=findings[0].fix if findings else "",
        show=format_bytes,
    )


def _check_reductions(report: ReportData, budget: Budget) -> Iterator[Problem]:
    for axis, limit in budget.reductions_per_step.items():
        subject = f"reductions_per_step[{axis!r}]"
        if axis not in report.reductions:
            axes = " or ".join(map(repr, report.reductions)) or "no axis"
            why = f"at most {limit}, but the batch is not split over it"
            yield Problem(subject, why, f"budget {axes}")
            continue
        times = report.reductions[axis]
        rows = [row for kind in REDUCING for row in report.ledger.where(axis, kind)]
        yield from _check_at_most(
            subject,
            limit if times > limit + _SLACK else None,
            times,
            responsible=_describe_rows(rows),
            fix='sk.Accumulate(k, reduce="end")',
            show="{:.4g}".format,
        )
        yield from _check_complete(report, subject)


def _check_rows(report: ReportData, budget: Budget) -> Iterator[Problem]:
    for key, limit in budget.wire_bytes.items():
        rows, subject = _select_rows(report, key), f"wire_bytes[{key!r}]"
        total, lines = sum(row.wire_bytes for row in rows), _describe_rows(rows)
        yield from _check_at_most(subject, limit, total, responsible=lines, show=format_bytes)
        yield from _check_complete(report, subject)
    for key, limit in budget.collectives.items():
        rows, subject = _select_rows(report, key), f"collectives[{key!r}]"
        total = sum(row.counted_trips for row in rows)
        yield from _check_at_most(subject, limit, total, responsible=_describe_rows(rows))
        yield from _check_complete(report, subject)


def _check_memory(report: ReportData, budget: Budget) -> Iterator[Problem]:
    if budget.memory_bytes is None:
        return
    memory = report.memory
    if memory.total is None:
        why = "the compiler does not report the peak"
        yield Problem("memory_bytes", why, "leave memory_bytes out for this target")
        return
    classes = {name: getattr(memory, name) for name in ("params", "opt_state", "batch", "temp")}
    yield from _check_at_most(
        "memory_bytes",
        budget.memory_bytes,
        memory.total,
        responsible=[f"{name} {format_bytes(size or 0)}" for name, size in classes.items()],
        fix="shard a class over more axes, accumulate, or use a remat policy",
        show=format_bytes,
    )


def _check_compiles(report: ReportData, budget: Budget) -> Iterator[Problem]:
    fix = "keep shapes, dtypes and shardings of state and batch the same"
    yield from _check_at_most("compiles", budget.compiles, report.compiles, fix=fix)


def _check_findings(report: ReportData, budget: Budget) -> Iterator[Problem]:
    limits = {f"findings[{kind!r}]": (kind, limit) for kind, limit in budget.findings.items()}
    if budget.involuntary_remat is not None:
        limits["involuntary_remat"] = ("involuntary_remat", budget.involuntary_remat)
    for subject, (kind, limit) in limits.items():
        if kind not in FINDINGS:
            raise ReportError(f"There is no finding {kind!r}.{did_you_mean(kind, FINDINGS)}")
        findings = [finding for finding in report.findings if finding.kind == kind]
        fix, lines = findings[0].fix if findings else "", list(map(str, findings))
        yield from _check_at_most(subject, limit, len(findings), responsible=lines, fix=fix)
        if kind in FROM_MESSAGES and not report.messages_complete:
            why = "unknown: the program came from the compilation cache, without messages"
            yield Problem(subject, why, "compile with the persistent cache off")
        if kind in FROM_LEDGER:
            yield from _check_complete(report, subject)


_CHECKS = (
    _check_replicated,
    _check_reductions,
    _check_rows,
    _check_memory,
    _check_compiles,
    _check_findings,
)


def _select_rows(report: ReportData, key: Key) -> list[LedgerRow]:
    if isinstance(key, tuple):
        return report.ledger.where(*key)
    if key.replace("_", "-") in KINDS:
        return report.ledger.where(kind=key)
    return report.ledger.where(axis=key)


def _check_at_most(
    subject: str,
    limit: float | None,
    value: float,
    responsible: Sequence[str] = (),
    fix: str = "",
    show: Callable[[Any], str] = str,
) -> Iterator[Problem]:
    """A problem with the rows or leaves responsible, if the value exceeds the limit."""
    if limit is None or value <= limit:
        return
    lines = [f"      {line}" for line in responsible[:_SHOWN]]
    if len(responsible) > _SHOWN:
        lines.append(f"      and {len(responsible) - _SHOWN} more")
    yield Problem(subject, "\n".join([f"at most {show(limit)}, found {show(value)}", *lines]), fix)


def _check_complete(report: ReportData, subject: str) -> Iterator[Problem]:
    """A count within its limit proves nothing if rows are missing."""
    if not report.ledger.complete:
        first = report.ledger.problems[0]
        yield Problem(subject, f"unknown, since the ledger is incomplete: {first}", "")


def _describe_rows(rows: Sequence[LedgerRow]) -> list[str]:
    """Rows, the most wire bytes first."""
    ordered = sorted(rows, key=lambda row: -row.wire_bytes)
    return [f"{row}, {format_bytes(row.wire_bytes)} on the wire" for row in ordered]
