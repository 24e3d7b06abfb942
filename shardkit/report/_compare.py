"""What changed between two reports, the most important first."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from .._core.errors import count
from .._core.io._notebook import text_html
from .._core.io._table import Column, Table, fold_text, text_width
from .._core.tree import format_bytes
from ._by_source import SourceCost, group_by_source
from ._data import ReportData
from ._saved import LeafLayout
from .communication._ledger import Ledger
from .findings._finding import Finding
from .memory._memory import MEMORY_CLASSES
from .time._timeline import format_seconds

_ROWS, _FINDINGS, _LAYOUTS, _PARTS = 12, 12, 12, 3
_COLUMNS = ("", Column("before", right=True), Column("after", right=True), "change")


@dataclasses.dataclass(frozen=True)
class Change:
    """One number that differs.

    Attributes:
      name: what it measures: `sent per step`, `all-gather over fsdp in mlp (forward)`.
      before: its value in the first report, in `unit`; None where the report has none.
      after: its value in the second.
      unit: `"bytes"`, `"seconds"`, `"FLOPs"` or `"times"`.
      note: shown instead of the change in percent: `×4 → ×1`, `added`.
      parts: of a source line the collectives whose bytes changed there, the largest change first.
    """

    name: str
    before: float | None
    after: float | None
    unit: str
    note: str = ""
    parts: tuple["Change", ...] = ()

    @property
    def ratio(self) -> float | None:
        """The second over the first; None where one is missing or the first is 0."""
        return self.after / self.before if self.before and self.after is not None else None

    def __str__(self) -> str:
        """Returns `sent per step: 1.00 KiB → 2.00 KiB, +100.0%`."""
        name, before, after, change = self.cells()
        return f"{name}: {before} → {after}{', ' * bool(change)}{change}"

    def cells(self) -> tuple[str, str, str, str]:
        """The name, both values, and the change or the note, as text."""
        show, ratio = _UNITS[self.unit], "" if self.ratio is None else f"{self.ratio - 1:+.1%}"
        return self.name, show(self.before), show(self.after), self.note or ratio


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The differences of two reports; false where there are none.

    Attributes:
      target: what the step was compiled for, `(what, before, after)`.
      layouts: arrays of the step's input whose layout changed, or that one report lacks: `(leaf,
        before, after)`, the largest first.
      headlines: step time, bytes sent, memory, FLOPs.
      new: findings that only the second report has; the first keeps none of them, either.
      gone: findings that only the first has.
      details: bytes sent by axes and by kind, with their ratio to the minimum; memory by class;
        reductions; findings whose bytes changed.
      rows: collectives, grouped by kind, axes, phase and scope; the largest change first.
      sources: bytes sent by line of code, the largest change first, each with its collectives. A
        line that moved is the same line while its function and its text are.
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
    sources: tuple[Change, ...] = ()

    def __bool__(self) -> bool:
        numbers = (self.headlines, self.details, self.rows, self.sources)
        return any((self.target, self.layouts, self.new, self.gone, *numbers))

    def __repr__(self) -> str:
        changes = (*self.headlines, *self.details, *self.rows)
        return f"Comparison({count(len(changes), 'change')}, {len(self.sources)} by source line)"

    def _repr_html_(self) -> str:
        return text_html(str(self))

    def __str__(self) -> str:
        """At most 100 columns, the most important first; `Nothing changed.` if nothing did."""
        if not self:
            return "\n".join(["Nothing changed.", *self.caveats])
        lines = [f"{what}: {old} → {new}" for what, old, new in self.target]
        rows: list[tuple[str, ...] | str] = [change.cells() for change in self.headlines]
        rows += [f"new:  {finding}" for finding in self.new[:_FINDINGS]]
        rows += [f"gone: {finding}" for finding in self.gone[:_FINDINGS]]
        left = len(self.new[_FINDINGS:]) + len(self.gone[_FINDINGS:])
        rows += [f"and {left} more findings new or gone"] if left else []
        rows += [f"{leaf}: {old} → {new}" for leaf, old, new in self.layouts[:_LAYOUTS]]
        left = len(self.layouts[_LAYOUTS:])
        rows += [f"and {left} more arrays with another layout"] if left else []
        rows += [change.cells() for change in self.details]
        if self.rows:
            rows += [
                "collectives, sent per step:",
                *(change.cells() for change in self.rows[:_ROWS]),
            ]
        left = len(self.rows[_ROWS:])
        rows += [f"and {left} more groups of collectives"] if left else []
        if self.sources:
            lines_changed = self.sources[:_ROWS]
            parts = (one for line in lines_changed for one in (line, *line.parts[:_PARTS]))
            rows += ["sent per step, by source line:", *(one.cells() for one in parts)]
        left = len(self.sources[_ROWS:])
        rows += [f"and {left} more lines of code"] if left else []
        table = [Table(_COLUMNS, rows).to_text(text_width())] if rows else []
        return "\n".join([*_fold_lines(lines), *table, *_fold_lines(self.caveats)])


def _fold_lines(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in fold_text(text, text_width(), "    ")]


def compare(before: ReportData, after: ReportData) -> Comparison:
    """Compares two reports.

    Args:
      before: the first report, perhaps reopened with `Report.from_json`.
      after: the second.

    Returns:
      What differs; `str()` of it is a table.
    """
    return Comparison(
        target=tuple(_compare_targets(before, after)),
        headlines=_drop_equal(Change(name, f(before), f(after), u) for name, f, u in _HEADLINES),
        new=_findings_only_in(after, before),
        gone=_findings_only_in(before, after),
        details=_drop_equal(_compare_details(before, after)),
        rows=_compare_rows(before.ledger, after.ledger),
        caveats=tuple(_find_caveats(before, after)),
        layouts=_compare_layouts(before, after),
        sources=_compare_sources(before.ledger, after.ledger),
    )


def _compare_targets(before: ReportData, after: ReportData) -> Iterator[tuple[str, str, str]]:
    pairs = (
        ("device", before.device_kind or before.platform, after.device_kind or after.platform),
        ("mesh", before.mesh_text, after.mesh_text),
    )
    yield from ((what, old, new) for what, old, new in pairs if old != new)


def _compare_layouts(before: ReportData, after: ReportData) -> tuple[tuple[str, str, str], ...]:
    """Arrays whose type or spec differs: the cause of most other changes."""
    if not (before.leaves and after.leaves):  # A report of a program's text alone has none.
        return ()
    sides = [{(leaf.part, leaf.path): leaf for leaf in one.leaves} for one in (before, after)]
    old, new = sides
    leaves = sorted(
        dict.fromkeys([*old, *new]),
        key=lambda leaf: -max(side[leaf].device_bytes for side in sides if leaf in side),
    )
    shown = (
        (leaf, _format_layout(old.get(leaf)), _format_layout(new.get(leaf))) for leaf in leaves
    )
    return tuple((f"{part} {path}", was, now) for (part, path), was, now in shown if was != now)


def _format_layout(layout: LeafLayout | None) -> str:
    """Returns `f32[64,256] P(None, 'tensor')`, or `not there` for None."""
    if layout is None:
        return "not there"
    dims = [dim[0] if len(dim) == 1 else dim or None for dim in layout.spec]
    while dims and dims[-1] is None:
        dims.pop()
    shape = ",".join(map(str, layout.shape))
    return f"{layout.dtype}[{shape}] P({', '.join(map(repr, dims))})"


_HEADLINES: tuple[tuple[str, Callable[[ReportData], float | None], str], ...] = (
    ("step, modelled", lambda x: x.timeline and x.timeline.high, "seconds"),
    ("communication exposed, modelled", lambda x: x.timeline and x.timeline.exposed, "seconds"),
    ("sent per step", lambda x: x.sent, "bytes"),
    ("memory, alive at once", lambda x: x.memory.total, "bytes"),
    ("model FLOPs", lambda x: x.flops and x.flops.model, "FLOPs"),
    ("recomputed FLOPs", lambda x: x.flops and x.flops.recompute, "FLOPs"),
)


def _compare_details(before: ReportData, after: ReportData) -> Iterator[Change]:
    old, new = before.ledger, after.ledger
    sent = [{axis.axis: axis.sent for axis in report.traffic} for report in (before, after)]
    for axis in dict.fromkeys([*sent[0], *sent[1]]):
        name = f"  sent over {axis or 'no axis'}"
        yield Change(name, sent[0].get(axis, 0), sent[1].get(axis, 0), "bytes")
    least = [{one.axis: one.ratio for one in report.minima} for report in (before, after)]
    for axis in dict.fromkeys([*least[0], *least[1]]):
        ratios = least[0].get(axis), least[1].get(axis)
        yield Change(f"  over {axis}, to its minimum", *ratios, "times")
    for kind in dict.fromkeys(row.kind for row in (*old, *new)):
        yield Change(f"  sent by {kind}", old.total(kind=kind), new.total(kind=kind), "bytes")
    yield Change("  hidden behind compute", _hidden_bytes(old), _hidden_bytes(new), "bytes")
    for part in MEMORY_CLASSES:
        sizes = getattr(before.memory, part), getattr(after.memory, part)
        yield Change(f"  memory {part}", *sizes, "bytes")
    for axis in dict.fromkeys([*before.reductions, *after.reductions]):
        times = before.reductions.get(axis), after.reductions.get(axis)
        yield Change(f"  gradient reductions over {axis}", *times, "times")
    yield Change("  compiles", before.compiles, after.compiles, "times")
    yield Change("  capacity", before.memory.capacity, after.memory.capacity, "bytes")
    was, now = ({_finding_identity(x): x.bytes for x in r.findings} for r in (before, after))
    for identity in (one for one in was if one in now):
        name = f"  finding {_format_identity(identity)}"
        yield Change(name, was[identity], now[identity], "bytes")


def _hidden_bytes(ledger: Ledger) -> int:
    return sum(row.wire_bytes for row in ledger if row.overlapped)


def _compare_rows(before: Ledger, after: Ledger) -> tuple[Change, ...]:
    """Groups of collectives that one report lacks, or whose bytes or executions changed."""
    old, new = _group_rows(before), _group_rows(after)
    changes = []
    for name in dict.fromkeys([*old, *new]):
        old_bytes, old_times = old.get(name, _ABSENT)
        new_bytes, new_times = new.get(name, _ABSENT)
        if (old_bytes, old_times) == (new_bytes, new_times):
            continue
        note = f"×{old_times} → ×{new_times}" if old_times and new_times != old_times else ""
        note = "added" if name not in old else "removed" if name not in new else note
        changes.append(Change(name, old_bytes, new_bytes, "bytes", note))
    return _largest_first(changes)


def _compare_sources(before: Ledger, after: Ledger) -> tuple[Change, ...]:
    """Lines of code whose bytes changed, each with the collectives that changed there."""
    old, new = _costs_by_line(before), _costs_by_line(after)
    old = _follow_moved_files(old, new)
    changes = []
    for line in dict.fromkeys([*old, *new]):
        was, now = old.get(line, []), new.get(line, [])
        name = (now or was)[0].name
        sent, sends = (sum(cost.bytes for cost in costs) for costs in (was, now))
        changes.append(Change(name, sent, sends, "bytes", parts=_compare_parts(was, now)))
    return _largest_first(change for change in changes if change.before != change.after)


_Line = tuple[str, str, str]


def _costs_by_line(ledger: Ledger) -> dict[_Line, list[SourceCost]]:
    """What stays of a line when others move it (file, function, text) → what it sends."""
    lines: dict[_Line, list[SourceCost]] = {}
    for cost in group_by_source(ledger):
        source = cost.source
        text = (source.file, source.function, source.code or str(source.line)) if source else None
        lines.setdefault(text or (cost.name, "", ""), []).append(cost)
    return lines


def _follow_moved_files(
    old: Mapping[_Line, list[SourceCost]], new: Mapping[_Line, list[SourceCost]]
) -> dict[_Line, list[SourceCost]]:
    """Renames lines whose file is in another folder now, as in another checkout.

    A line follows its file's name where one line alone, on each side, has the same name, function
    and text; otherwise it is told as removed and added.
    """
    gone, come = [[*(a.keys() - b.keys())] for a, b in ((old, new), (new, old))]
    names = [Counter(map(_without_folder, lines)) for lines in (gone, come)]
    unique = {name for name, n in names[0].items() if n == names[1][name] == 1}
    moved = {name: line for line in come if (name := _without_folder(line)) in unique}
    lines = {line: moved.get(_without_folder(line), line) for line in gone}
    return {lines.get(line, line): costs for line, costs in old.items()}


def _without_folder(line: _Line) -> _Line:
    return os.path.basename(line[0]), *line[1:]


def _compare_parts(was: Iterable[SourceCost], now: Iterable[SourceCost]) -> tuple[Change, ...]:
    """The collectives of one line whose bytes changed."""
    old, new = _bytes_by_collective(was), _bytes_by_collective(now)
    changes = (
        Change(f"  {what}", old.get(what), new.get(what), "bytes") for what in {**old, **new}
    )
    return _largest_first(change for change in changes if change.before != change.after)


def _bytes_by_collective(costs: Iterable[SourceCost]) -> Counter[str]:
    sums = Counter[str]()
    for part in (part for cost in costs for part in cost.parts):
        sums[f"{part.row.kind} over {', '.join(part.row.axes) or 'no axis'}"] += part.bytes
    return sums


def _largest_first(changes: Iterable[Change]) -> tuple[Change, ...]:
    return tuple(sorted(changes, key=lambda one: -abs((one.after or 0) - (one.before or 0))))


_ABSENT = (None, 0)


def _group_rows(ledger: Ledger) -> dict[str, tuple[int, int]]:
    """Group of collectives → bytes sent and executions, per step."""
    groups: dict[str, tuple[int, int]] = {}
    for row in ledger:
        where = f" in {row.scope}" if row.scope else ""
        axes = ", ".join(row.axes) or "no axis"
        name = f"{row.kind} of {row.dtype} over {axes}{where} ({row.phase})"
        sent, times = groups.get(name, (0, 0))
        groups[name] = (sent + row.wire_bytes, times + row.counted_trips)
    return groups


def _find_caveats(before: ReportData, after: ReportData) -> Iterator[str]:
    for name, report in (("first", before), ("second", after)):
        if report.problems:
            yield f"The {name} report is incomplete: {report.problems[0]}"


def _drop_equal(changes: Iterable[Change]) -> tuple[Change, ...]:
    """Changes that exceed the rounding of a sum."""
    return tuple(
        change
        for change in changes
        if change.before is None
        or change.after is None
        or not math.isclose(change.before, change.after)
        if change.before != change.after
    )


def _findings_only_in(report: ReportData, other: ReportData) -> tuple[Finding, ...]:
    """Findings of one report that the other neither has nor keeps; their bytes do not matter."""
    known = {_finding_identity(finding) for finding in (*other.findings, *other.kept)}
    return tuple(finding for finding in report.findings if _finding_identity(finding) not in known)


def _finding_identity(finding: Finding) -> tuple[str, str, str, tuple[str, ...]]:
    return finding.kind, finding.leaf, finding.scope, finding.axes


def _format_identity(identity: tuple[str, str, str, tuple[str, ...]]) -> str:
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
