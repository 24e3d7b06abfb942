"""What changed between two reports: sizes side by side, findings that came and went."""

from collections.abc import Callable, Iterator

from .._tree import format_bytes
from ._findings import Finding
from ._report import Report

_PARTS = ("params", "opt_state", "extra", "batch", "temp", "total")
Line = tuple[str, float | None, float | None, Callable[[float], str]]


def compare(before: Report, after: Report) -> str:
    """Writes what differs between two reports, in at most 100 columns.

    Args:
      before: the first report, perhaps reopened with `Report.from_json`.
      after: the second.

    Returns:
      One line per number that differs, with its change; then findings gone and new.
    """
    lines = [f"{'':<34}{'before':>14}{'after':>14}{'change':>10}"]
    for name, old, new, show in _numbers(before, after):
        if old != new:
            lines.append(
                f"{name[:33]:<34}{_shown(old, show):>14}{_shown(new, show):>14}"
                f"{_change(old, new):>10}"
            )
    if len(lines) == 1:
        lines = ["No size, count or reduction differs."]
    lines += [f"gone: {text}" for text in _only(before, after)]
    lines += [f"new:  {text}" for text in _only(after, before)]
    if not (before.ledger.complete and after.ledger.complete):
        lines.append("One ledger is incomplete: what is sent is a lower bound there.")
    return "\n".join(lines)


def _numbers(before: Report, after: Report) -> Iterator[Line]:
    old, new = before.ledger, after.ledger
    yield "sent per step", old.total(), new.total(), format_bytes
    by_old, by_new = old.by_axes(), new.by_axes()
    for axes in dict.fromkeys([*by_old, *by_new]):
        name = f"  over {', '.join(axes)}"
        yield name, by_old.get(axes, 0), by_new.get(axes, 0), format_bytes
    yield "  hidden behind compute", _hidden(before), _hidden(after), format_bytes
    for axis in dict.fromkeys([*before.reductions, *after.reductions]):
        times = before.reductions.get(axis), after.reductions.get(axis)
        yield f"gradient reductions over {axis}", *times, "{:.4g}".format
    for part in _PARTS:
        sizes = getattr(before.memory, part), getattr(after.memory, part)
        yield f"memory {part}", *sizes, format_bytes
    if before.flops and after.flops:
        yield "model FLOPs", before.flops.model, after.flops.model, "{:.4g}".format
        yield "recomputed FLOPs", before.flops.recompute, after.flops.recompute, "{:.4g}".format


def _hidden(report: Report) -> int:
    return sum(row.wire_bytes for row in report.ledger if row.overlapped)


def _shown(number: float | None, show: Callable[[float], str]) -> str:
    return "-" if number is None else show(number)


def _change(old: float | None, new: float | None) -> str:
    return f"{new / old - 1:+.1%}" if old and new is not None else ""


def _only(one: Report, other: Report) -> list[str]:
    """Findings of one report that the other has not, whatever their bytes."""
    known = {_identity(finding) for finding in other.findings}
    return [str(finding)[:94] for finding in one.findings if _identity(finding) not in known]


def _identity(finding: Finding) -> tuple[str, str, str, tuple[str, ...]]:
    return finding.kind, finding.leaf, finding.scope, finding.axes
