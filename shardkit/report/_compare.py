"""What changed between two reports, the most important first."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

from .._core.io._table import Column, Table, fold_text
from .._core.tree import format_bytes
from ._report import Report
from .communication._ledger import Ledger
from .findings._findings import Finding
from .memory._layouts import Layout
from .time._timeline import format_seconds

_PARTS = ("params", "opt_state", "model_state", "batch", "rest", "padding", "output", "temp")
_ROWS, _FINDINGS, _LAYOUTS, _WIDTH = 12, 12, 12, 100
_COLUMNS = ("", Column("before", right=True), Column("after", right=True), "change")


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing that differs.

    Attributes:
      name: what it is: `sent per step`, `memory temp`, `all-gather over fsdp in mlp (forward)`.
      before: its size in the first report, in `unit`; None where it is not there.
      after: its size in the second.
      unit: `"bytes"`, `"seconds"`, `"FLOPs"` or `"times"`.
      note: what else is to be said, `×4 → ×1`.
    """

    name: str
    before: float | None
    after: float | None
    unit: str
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The second over the first; None where one is missing or the first is nothing."""
        return self.after / self.before if self.before and self.after is not None else None

    def __str__(self) -> str:
        """Returns `sent per step: 1.00 KiB → 2.00 KiB, +100.0%`."""
        name, before, after, change = self.cells()
        return f"{name}: {before} → {after}{', ' * bool(change)}{change}"

    def cells(self) -> tuple[str, str, str, str]:
        """Its name, both sizes, and the change or the note as text."""
        show, ratio = _UNITS[self.unit], "" if self.ratio is None else f"{self.ratio - 1:+.1%}"
        return self.name, show(self.before), show(self.after), self.note or ratio


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The differences of two reports; false where there are none.

    Attributes:
      target: what the step was compiled for, `(what, before, after)`.
      layouts: arrays of the step's input that lie otherwise, came or went: `(leaf, before,
        after)`, the largest first.
      headlines: step time, bytes sent, memory, FLOPs.
      new: findings that only the second report has.
      gone: findings that only the first has.
      details: bytes sent by axes and by kind, with their ratio to the minimum; memory by class;
        reductions; findings that both have, of other size.
      rows: collectives, grouped by kind, axes, phase and scope; the largest change first.
      caveats: why numbers may be lower bounds.
    """

    target: tuple[tuple[str, str, str], ...]
    headlines: tuple[Change, ...]
    new: tuple[Finding, ...]
    gone: tuple[Finding, ...]
    details: tuple[Change, ...]
    rows: tuple[Change, ...]
    caveats: tuple[str, ...] = ()
    layouts: tuple[tuple[str, str, str], ...] = ()

    def __bool__(self) -> bool:
        numbers = (self.headlines, self.details, self.rows)
        return any((self.target, self.layouts, self.new, self.gone, *numbers))

    def __str__(self) -> str:
        """At most 100 columns, the most important first; `Nothing changed.` where so."""
        if not self:
            return "\n".join(["Nothing changed.", *self.caveats])
        lines = [f"{what}: {old} → {new}" for what, old, new in self.target]
        rows: list[tuple[str, ...] | str] = [one.cells() for one in self.headlines]
        rows += [f"new:  {finding}" for finding in self.new[:_FINDINGS]]
        rows += [f"gone: {finding}" for finding in self.gone[:_FINDINGS]]
        left = len(self.new[_FINDINGS:]) + len(self.gone[_FINDINGS:])
        rows += [f"and {left} more findings new or gone"] if left else []
        rows += [f"{leaf}: {old} → {new}" for leaf, old, new in self.layouts[:_LAYOUTS]]
        left = len(self.layouts[_LAYOUTS:])
        rows += [f"and {left} more arrays that lie otherwise"] if left else []
        rows += [one.cells() for one in self.details]
        if self.rows:
            rows += ["collectives, sent per step:", *(one.cells() for one in self.rows[:_ROWS])]
        left = len(self.rows[_ROWS:])
        rows += [f"and {left} more groups of collectives"] if left else []
        table = [Table(_COLUMNS, rows).to_text(_WIDTH)] if rows else []
        return "\n".join([*_folded(lines), *table, *_folded(self.caveats)])


def _folded(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in fold_text(text, _WIDTH, "    ")]


def compare(before: Report, after: Report) -> Comparison:
    """Compares two reports.

    Args:
      before: the first report, perhaps reopened with `Report.from_json`.
      after: the second.

    Returns:
      What differs; `str()` of it is for people.
    """
    return Comparison(
        target=tuple(_target(before, after)),
        headlines=_changed(_headlines(before, after)),
        new=_only(after, before),
        gone=_only(before, after),
        details=_changed(_details(before, after)),
        rows=_rows(before.ledger, after.ledger),
        caveats=tuple(_caveats(before, after)),
        layouts=_layouts(before, after),
    )


def _target(before: Report, after: Report) -> Iterator[tuple[str, str, str]]:
    def mesh(report: Report) -> str:
        return ", ".join(f"{name}={size}" for name, size in report.mesh)

    pairs = (
        ("device", before.device_kind or before.platform, after.device_kind or after.platform),
        ("mesh", mesh(before), mesh(after)),
    )
    yield from ((what, old, new) for what, old, new in pairs if old != new)


def _layouts(before: Report, after: Report) -> tuple[tuple[str, str, str], ...]:
    """Arrays whose type or spec is not the same: the cause of most else that differs."""
    if not (before.leaves and after.leaves):  # Of a program's text alone they are not known.
        return ()
    old, new = ({(one.part, one.path): one for one in report.leaves} for report in (before, after))
    leaves = sorted(
        dict.fromkeys([*old, *new]),
        key=lambda leaf: -max(one[leaf].device_bytes for one in (old, new) if leaf in one),
    )
    shown = ((leaf, _lies(old.get(leaf)), _lies(new.get(leaf))) for leaf in leaves)
    return tuple((f"{part} {path}", was, now) for (part, path), was, now in shown if was != now)


def _lies(layout: Layout | None) -> str:
    """`f32[64,256] P(None, 'tensor')`, or that it is not there."""
    if layout is None:
        return "not there"
    dims = [dim[0] if len(dim) == 1 else dim or None for dim in layout.spec]
    while dims and dims[-1] is None:
        dims.pop()
    shape = ",".join(map(str, layout.shape))
    return f"{layout.dtype}[{shape}] P({', '.join(map(repr, dims))})"


def _headlines(before: Report, after: Report) -> Iterator[Change]:
    old, new = before.timeline, after.timeline
    yield Change("step, modelled", old.high if old else None, new.high if new else None, "seconds")
    yield Change(
        "communication exposed, modelled",
        old.exposed if old else None,
        new.exposed if new else None,
        "seconds",
    )
    yield Change("sent per step", before.ledger.total(), after.ledger.total(), "bytes")
    yield Change("memory, alive at once", before.memory.total, after.memory.total, "bytes")
    was, now = before.flops, after.flops
    yield Change("model FLOPs", was.model if was else None, now.model if now else None, "FLOPs")
    yield Change(
        "recomputed FLOPs", was.recompute if was else None, now.recompute if now else None, "FLOPs"
    )


def _details(before: Report, after: Report) -> Iterator[Change]:
    old, new = before.ledger, after.ledger
    by_old, by_new = old.by_axes(), new.by_axes()
    for axes in dict.fromkeys([*by_old, *by_new]):
        name = f"  sent over {', '.join(axes) or 'no axis'}"
        yield Change(name, by_old.get(axes, 0), by_new.get(axes, 0), "bytes")
    least = [{one.axis: one.ratio for one in report.minima} for report in (before, after)]
    for axis in dict.fromkeys([*least[0], *least[1]]):
        ratios = least[0].get(axis), least[1].get(axis)
        yield Change(f"  over {axis}, to its minimum", *ratios, "times")
    for kind in dict.fromkeys(row.kind for row in (*old, *new)):
        yield Change(f"  sent by {kind}", old.total(kind=kind), new.total(kind=kind), "bytes")
    yield Change("  hidden behind compute", _hidden(old), _hidden(new), "bytes")
    for part in _PARTS:
        sizes = getattr(before.memory, part), getattr(after.memory, part)
        yield Change(f"  memory {part}", *sizes, "bytes")
    for axis in dict.fromkeys([*before.reductions, *after.reductions]):
        times = before.reductions.get(axis), after.reductions.get(axis)
        yield Change(f"  gradient reductions over {axis}", *times, "times")
    yield Change("  compiles", before.compiles, after.compiles, "times")
    yield Change("  capacity", before.memory.capacity, after.memory.capacity, "bytes")
    sizes = [{_identity(one): one.bytes for one in report.findings} for report in (before, after)]
    for identity, size in sizes[0].items():
        if identity in sizes[1]:
            yield Change(f"  finding {_called(identity)}", size, sizes[1][identity], "bytes")


def _hidden(ledger: Ledger) -> int:
    return sum(row.wire_bytes for row in ledger if row.overlapped)


def _rows(before: Ledger, after: Ledger) -> tuple[Change, ...]:
    """Groups of collectives that came, went, or changed their bytes or executions."""
    old, new = _groups(before), _groups(after)
    found = []
    for name in dict.fromkeys([*old, *new]):
        (old_bytes, old_times), (new_bytes, new_times) = old.get(name, _NONE), new.get(name, _NONE)
        if (old_bytes, old_times) == (new_bytes, new_times):
            continue
        note = f"×{old_times} → ×{new_times}" if old_times and new_times != old_times else ""
        note = "added" if name not in old else "removed" if name not in new else note
        found.append(Change(name, old_bytes, new_bytes, "bytes", note))
    return tuple(sorted(found, key=lambda one: -abs((one.after or 0) - (one.before or 0))))


_NONE = (None, 0)


def _groups(ledger: Ledger) -> dict[str, tuple[int, int]]:
    """Group of collectives → bytes sent and executions, per step."""
    found: dict[str, tuple[int, int]] = {}
    for row in ledger:
        where = f" in {row.scope}" if row.scope else ""
        axes = ", ".join(row.axes) or "no axis"
        name = f"{row.kind} of {row.dtype} over {axes}{where} ({row.phase})"
        sent, times = found.get(name, (0, 0))
        found[name] = (sent + row.wire_bytes, times + (1 if row.trips is None else row.trips))
    return found


def _caveats(before: Report, after: Report) -> Iterator[str]:
    for which, report in (("first", before), ("second", after)):
        if report.problems:
            yield f"The {which} report is incomplete: {report.problems[0]}"


def _changed(all_of_them: Iterable[Change]) -> tuple[Change, ...]:
    """Changes that are more than the rounding of a sum."""
    return tuple(
        one
        for one in all_of_them
        if one.before is None or one.after is None or not math.isclose(one.before, one.after)
        if one.before != one.after
    )


def _only(one: Report, other: Report) -> tuple[Finding, ...]:
    """Findings of one report that the other has not, whatever their bytes."""
    known = {_identity(finding) for finding in other.findings}
    return tuple(finding for finding in one.findings if _identity(finding) not in known)


def _identity(finding: Finding) -> tuple[str, str, str, tuple[str, ...]]:
    return finding.kind, finding.leaf, finding.scope, finding.axes


def _called(identity: tuple[str, str, str, tuple[str, ...]]) -> str:
    kind, leaf, scope, axes = identity
    return " ".join(filter(None, [kind, leaf or scope, f"over {', '.join(axes)}" if axes else ""]))


def _or_dash(show: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda number: "-" if number is None else show(number)


_UNITS = {
    "bytes": _or_dash(format_bytes),
    "seconds": _or_dash(format_seconds),
    "FLOPs": _or_dash("{:.4g}".format),
    "times": _or_dash("{:.4g}".format),
}
