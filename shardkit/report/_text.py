"""Prints a report as tables of at most 100 columns, the most important first."""

from collections.abc import Iterator, Mapping, Sequence

from .._core.io._table import Column, Table, fold_text
from .._core.tree import format_bytes
from ._data import ReportData
from .communication._ledger import Ledger
from .communication._minimum import Minimum
from .findings._finding import SMALL
from .memory._memory import MEMORY_CLASSES
from .time._flops import Flops

_WIDTH = 100
_NO_TIME = "Time per step: not modelled, {} is not in the hardware table."
_ROWS, _FINDINGS, _SCOPES, _BUFFERS = 12, 12, 8, 5
_NUMBERS = {"bytes", "wire", "hidden", "optimizer", "trips", "ratio", "FLOPs", "share"}


def to_text(report: ReportData) -> str:
    """Returns the report as plain text."""
    return "\n".join(
        part.to_text(_WIDTH)
        if isinstance(part, Table)
        else "\n".join(fold_text(part, _WIDTH, "    "))
        for part in _text_parts(report)
    )


_Part = str | Table


def _text_parts(report: ReportData) -> Iterator[_Part]:
    kind = report.device_kind or report.platform
    yield f"Step compiled for {kind}, mesh ({report.mesh_text}). All sizes per device, as compiled."
    yield from (f"Note: {note}" for note in report.notes)
    for problem in report.problems:
        yield f"INCOMPLETE: {problem}"
    yield from _finding_parts(report)
    yield f"\n{report.timeline or _NO_TIME.format(kind)}"
    yield from _axis_parts(report)
    yield from _memory_parts(report)
    yield from _peak_parts(report)
    yield from (f"To fit: {text}" for text in report.memory_suggestions)
    yield from _collective_parts(report)
    yield from _flops_parts(report)


def _finding_parts(report: ReportData) -> Iterator[_Part]:
    if not report.messages_complete:
        yield "The compiler's messages are unknown: involuntary remats may be missing."
    if not report.findings:
        yield "Findings: none."
        return
    yield f"\nFindings ({len(report.findings)})"
    rows = []
    for finding in report.findings[:_FINDINGS]:
        about = [finding.leaf or _abbreviate_scopes(finding.scope), str(finding.source or "")]
        end = "" if finding.why.endswith((".", "?")) else "."
        why = f"{finding.why}{end}\nFix: {finding.fix}"
        what = "\n".join(filter(None, (finding.kind, *about)))
        rows.append((what, format_bytes(finding.bytes), why))
    yield _build_table({"finding": 28, "bytes": 9, "why; fix": 60}, rows)
    if len(report.findings) > _FINDINGS:
        yield f"and {len(report.findings) - _FINDINGS} more findings"


def _axis_parts(report: ReportData) -> Iterator[_Part]:
    """Wire bytes per set of axes, next to the minimum of each axis."""
    total = f"{_lower_bound_mark(report.ledger)}{format_bytes(report.ledger.total())}"
    columns = {"axes": 20, "wire": 11, "hidden": 9, "optimizer": 9, "axis minimum": 24}
    columns |= {"ratio": 7, "reductions": 10}
    if not any(row.by_optimizer and row.payload_bytes > SMALL for row in report.ledger):
        del columns["optimizer"]
    cells = (_axes_cells(report, *row) for row in report.ledger.by_axes().items())
    yield f"\nSent per step: {total}"
    yield _build_table(columns, [[row[name] for name in columns] for row in cells])
    yield from (_format_excess(minimum) for minimum in report.minima if minimum.excess)
    if axes := _axes_without_minimum(report):
        needs = "it takes a strategy that has one, and a model that marks its layers."
        yield f"No textbook minimum for {', '.join(axes)}: {needs}"
    if report.ledger.upper_bound:
        yield "Branches of conditionals count as taken: totals are upper bounds."


def _axes_without_minimum(report: ReportData) -> list[str]:
    """Axes with traffic and without a known minimum."""
    known = {minimum.axis for minimum in report.minima}
    sent = {name for axes in report.ledger.by_axes() for name in axes}
    return [name for name, size in report.mesh if size > 1 and name in sent - known]


def _format_excess(least: Minimum) -> str:
    parts = "; ".join(f"{format_bytes(size)} {what}" for what, size in least.excess)
    over = format_bytes(least.wire - least.bytes)
    return f"{least.axis} sends {over} more than its minimum: {parts}."


def _axes_cells(report: ReportData, axes: tuple[str, ...], wire: int) -> dict[str, str]:
    rows = report.ledger.where(axes)
    alone = axes[0] if len(axes) == 1 else ""
    least = next((minimum for minimum in report.minima if minimum.axis == alone), None)
    ratio = least.ratio if least else None
    times = report.reductions.get(alone)
    mark = "" if report.ledger.complete else "≥ "
    return {
        "axes": ", ".join(axes) or "(none)",
        "wire": f"{mark}{format_bytes(wire)}",
        "hidden": format_bytes(sum(row.wire_bytes for row in rows if row.overlapped)),
        "optimizer": format_bytes(sum(row.wire_bytes for row in rows if row.by_optimizer)),
        "axis minimum": f"{format_bytes(least.bytes)} ({least.kind})" if least else "",
        "ratio": "" if ratio is None else f"{mark}{ratio:.2f}",
        "reductions": "" if times is None else f"{_reductions_mark(report, alone)}{times:.4g}",
    }


def _memory_parts(report: ReportData) -> Iterator[_Part]:
    memory = report.memory
    title = "Memory"
    if memory.total is not None:
        title += f": {format_bytes(memory.total)} alive at once"
    if memory.capacity is not None and memory.margin is not None:
        fits = "fits" if memory.fits else "DOES NOT FIT"
        title += f" of {format_bytes(memory.capacity)}: {fits}, {format_bytes(memory.margin)} left"
    sizes = [getattr(memory, name) for name in MEMORY_CLASSES]
    yield f"\n{title}"
    cells = ["?" if size is None else format_bytes(size) for size in sizes]
    yield _build_table(dict.fromkeys(MEMORY_CLASSES, 9), [cells])


def _peak_parts(report: ReportData) -> Iterator[_Part]:
    """The classes at the peak, and its largest buffers."""
    peak = report.peak
    if peak is None:
        yield "What is alive at the peak is unknown: the program has no schedule to follow."
        return
    yield str(peak)
    rows = []
    for buffer in peak.largest[:_BUFFERS]:
        where = str(buffer.source or buffer.scope or buffer.name)
        where += f" ({buffer.phase})" if buffer.phase else ""
        rows.append((format_bytes(buffer.bytes), buffer.kind, buffer.shape, where))
    if rows:
        yield Table([Column("", right=True), "", "", ""], rows, indent=2)


def _collective_parts(report: ReportData) -> Iterator[_Part]:
    rows = sorted(report.ledger, key=lambda row: -row.wire_bytes)
    if not rows:
        yield "Collectives: none."
        return
    yield f"\nCollectives ({len(rows)})"
    columns = {"kind": 18, "axes": 12, "payload": 13, "trips": 5, "wire": 9, "phase": 9}
    columns |= {"source or scope": 24, "": 6}
    cells = []
    for row in rows[:_ROWS]:
        marks = ["hidden"] * row.overlapped + ["branch"] * row.conditional
        marks += [f"× {row.taken:.0%}"] * (row.taken < 1)
        marks += ["part"] * (not row.full_axes)
        over = ", ".join(row.axes) + (" between slices" if row.dcn else "")
        payload = f"{row.dtype} {format_bytes(row.payload_bytes)}"
        trips = "?" if row.trips is None else str(row.trips)
        sent = format_bytes(row.wire_bytes)
        where = str(row.source or _abbreviate_scopes(row.scope))
        cells.append((row.kind, over, payload, trips, sent, row.phase, where, " ".join(marks)))
    yield _build_table(columns, cells)
    if len(rows) > _ROWS:
        others = sum(row.wire_bytes for row in rows[_ROWS:])
        yield f"and {len(rows) - _ROWS} more collectives, {format_bytes(others)} together"


def _flops_parts(report: ReportData) -> Iterator[_Part]:
    flops = report.flops
    if flops is None:
        return
    extra = f", {flops.recompute / flops.model:.1%} more recomputed" if flops.model else ""
    extra += f", {flops.update:.4g} by the optimizer" if flops.update else ""
    yield f"\nFLOPs per step, all devices: {_lower_bound_mark(flops)}{flops.model:.4g} model{extra}"
    rows = [
        (scope or "(no scope)", phase, f"{number:.4g}", f"{number / flops.total:.1%}")
        for (scope, phase), number in list(flops.by_scope.items())[:_SCOPES]
    ]
    yield _build_table({"scope": 48, "phase": 12, "FLOPs": 12, "share": 8}, rows)


def _abbreviate_scopes(scopes: str) -> str:
    """Up to two scopes of one instruction; of more, the first and the number of the others.

    >>> _abbreviate_scopes("mlp, embedding"), _abbreviate_scopes("a, b, c, d")
    ('mlp, embedding', 'a and 3 more')
    """
    first, *others = scopes.split(", ")
    return scopes if len(others) < 2 else f"{first} and {len(others)} more"


def _reductions_mark(report: ReportData, axis: str) -> str:
    """A lower-bound mark where windowed permutes may reduce gradients too."""
    rows = report.ledger.where(axis)
    hidden = any(row.windowed and row.phase in ("backward", "recompute") for row in rows)
    return "≥ " if hidden or not report.ledger.complete else ""


def _lower_bound_mark(counted: Ledger | Flops) -> str:
    return "" if counted.complete else "at least "


def _build_table(columns: Mapping[str, int], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose columns are given as name → maximal width."""
    return Table([Column(name, name in _NUMBERS, most) for name, most in columns.items()], rows)
