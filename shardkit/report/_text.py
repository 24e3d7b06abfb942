"""A report as text of at most 100 columns, as one line, and as a card of a notebook."""

from collections.abc import Iterator, Mapping, Sequence

from .._core.io._notebook import notebook_html
from .._core.io._table import Column, Table, fold_text, text_width
from .._core.tree import format_bytes
from ._data import ReportData
from .communication._axis_traffic import AxisTraffic
from .communication._ledger import Ledger
from .communication._minimum import Minimum
from .findings._finding import SMALL
from .memory._memory import MEMORY_CLASSES
from .time._flops import Flops
from .time._timeline import format_seconds

_NO_TIME = "Time per step: not modelled, {} is not in the hardware table."
_ROWS, _FINDINGS, _SCOPES, _BUFFERS = 12, 12, 8, 5
# Findings in a card.
_FIRST = 5
_NUMBERS = {
    "measured",
    "modelled",
    "bytes",
    "wire",
    "sent",
    "hidden",
    "optimizer",
    "trips",
    "ratio",
    "FLOPs",
    "share",
}


def to_text(report: ReportData) -> str:
    """Returns the report as plain text."""
    return "\n".join(
        part.to_text(text_width())
        if isinstance(part, Table)
        else "\n".join(fold_text(part, text_width(), "    "))
        for part in _text_parts(report)
    )


_Part = str | Table


def _text_parts(report: ReportData) -> Iterator[_Part]:
    kind = report.device_kind or report.platform
    of = f" of {report.name}" if report.name else ""
    what = f"Step{of} compiled for {kind}, mesh ({report.mesh_text})."
    yield f"{what} All sizes per device, as compiled."
    yield from (f"Note: {note}" for note in report.notes)
    for problem in report.problems:
        yield f"INCOMPLETE: {problem}"
    yield from _finding_parts(report)
    yield f"\n{report.timeline or _NO_TIME.format(kind)}"
    yield from (f"{table}." for table in report.ticks)
    yield from _axis_parts(report)
    yield from _memory_parts(report)
    yield from _peak_parts(report)
    yield from (f"To fit: {text}" for text in report.memory_suggestions)
    yield from _collective_parts(report)
    yield from _flops_parts(report)


def _finding_parts(report: ReportData) -> Iterator[_Part]:
    if not report.messages_complete:
        yield "The compiler's messages are unknown: involuntary remats may be missing."
    if report.findings:
        yield from _finding_table(report)
    else:
        yield "Findings: none."
    for one in report.kept[:_FIRST]:
        where = one.source or one.leaf or one.scope
        what = f"{one.kind} {format_bytes(one.bytes)}{f', {where}' if where else ''}"
        yield f"Kept, since no fix is known to send less: {what}."
    if len(report.kept) > _FIRST:
        yield f"and {len(report.kept) - _FIRST} more that are kept"


def _finding_table(report: ReportData) -> Iterator[_Part]:
    yield f"\nFindings ({len(report.findings)})"
    rows = []
    for finding in report.findings[:_FINDINGS]:
        about = [finding.leaf or _abbreviate_scopes(finding.scope), str(finding.source or "")]
        end = "" if finding.why.endswith((".", "?")) else "."
        why = f"{finding.why}{end}\n{finding.fix_title}: {finding.fix}"
        what = "\n".join(filter(None, (finding.kind, *about)))
        rows.append((what, format_bytes(finding.bytes), why))
    yield _build_table({"finding": 28, "bytes": 9, "why; fix": 60}, rows)
    if len(report.findings) > _FINDINGS:
        yield f"and {len(report.findings) - _FINDINGS} more findings"


def _axis_parts(report: ReportData) -> Iterator[_Part]:
    """Wire bytes per mesh axis, next to its minimum."""
    yield f"\nSent per step: {_lower_bound_mark(report.ledger)}{format_bytes(report.sent)}"
    columns = {"axis": 20, "sent": 11, "hidden": 9, "optimizer": 9, "axis minimum": 24}
    columns |= {"ratio": 7, "reductions": 10}
    if not any(row.by_optimizer and row.payload_bytes > SMALL for row in report.ledger):
        del columns["optimizer"]
    traffic = sorted(report.traffic, key=lambda axis: -axis.sent)
    cells = [_axis_cells(report, axis) for axis in traffic if axis.collectives]
    yield _build_table(columns, [[row[name] for name in columns] for row in cells])
    yield from _set_parts(report)
    for least in report.minima:
        if least.excess or least.unexplained:
            yield _format_excess(least)
    if axes := _axes_without_minimum(report):
        needs = "it takes a strategy that has one, and a model that marks its layers."
        yield f"No textbook minimum for {', '.join(axes)}: {needs}"
    if report.ledger.upper_bound:
        yield "Branches of conditionals count as taken: totals are upper bounds."


def _set_parts(report: ReportData) -> Iterator[_Part]:
    """The bytes of collectives over several axes, which the table divides among them."""
    several = {axes: wire for axes, wire in report.ledger.by_axes().items() if len(axes) > 1}
    if several:
        sizes = "; ".join(f"{', '.join(axes)} {format_bytes(n)}" for axes, n in several.items())
        yield f"Of it in collectives over several axes, divided among these: {sizes}."


def _axes_without_minimum(report: ReportData) -> list[str]:
    """Axes with traffic and without a known minimum."""
    sizes = dict(report.mesh)
    return [
        traffic.axis
        for traffic in report.traffic
        if traffic.collectives and traffic.minimum is None and sizes.get(traffic.axis, 1) > 1
    ]


def _format_excess(least: Minimum) -> str:
    parts = [f"{format_bytes(size)} {what}" for what, size in least.excess]
    if least.unexplained:
        parts.append(f"{format_bytes(least.unexplained)} for reasons unknown")
    over = format_bytes(least.wire - least.bytes)
    return f"{least.axis} sends {over} more than its minimum: {'; '.join(parts)}."


def _axis_cells(report: ReportData, traffic: AxisTraffic) -> dict[str, str]:
    mark = "" if report.ledger.complete else "≥ "
    times, least = traffic.reductions, traffic.minimum
    exact = "" if traffic.reductions_complete else "≥ "
    return {
        "axis": traffic.axis or "(none)",
        "sent": f"{mark}{format_bytes(traffic.sent)}",
        "hidden": format_bytes(traffic.hidden),
        "optimizer": format_bytes(traffic.optimizer),
        "axis minimum": "" if least is None else f"{format_bytes(least)} ({traffic.kind})",
        "ratio": "" if traffic.ratio is None else f"{mark}{traffic.ratio:.2f}",
        "reductions": "" if times is None else f"{exact}{times:.3g}",
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
    columns = {"kind": 18, "axes": 12, "payload": 13, "trips": 5, "sent": 9, "phase": 9}
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
    yield from _measured_parts(report)


def _measured_parts(report: ReportData) -> Iterator[_Part]:
    """The measured time of the collectives that take longest, beside the modelled one."""
    if report.measured is None:
        return
    known = report.timeline.collectives if report.timeline else ()
    modelled = known or (None,) * len(report.ledger)
    rows = [
        (took or 0.0, str(row), expected)
        for row, took, expected in zip(
            report.ledger, report.measured.collectives, modelled, strict=True
        )
    ]
    yield f"\nSeconds per step and device, measured by the profile {report.measured.path}"
    longest = sorted(rows, key=lambda row: -row[0])[:_ROWS]
    cells = [
        (what, format_seconds(took) if took else "", "" if n is None else format_seconds(n))
        for took, what, n in longest
    ]
    yield _build_table({"collective": 70, "measured": 10, "modelled": 10}, cells)


def _flops_parts(report: ReportData) -> Iterator[_Part]:
    flops = report.flops
    if flops is None:
        return
    total = flops.total or 1
    extra = f", {flops.recompute / flops.model:.1%} more recomputed" if flops.model else ""
    extra += f", {flops.update:.4g} by the optimizer" if flops.update else ""
    yield f"\nFLOPs per step, all devices: {_lower_bound_mark(flops)}{flops.model:.4g} model{extra}"
    rows = [
        (scope or "(no scope)", phase, f"{number:.4g}", f"{number / total:.1%}")
        for (scope, phase), number in list(flops.by_scope.items())[:_SCOPES]
    ]
    yield _build_table({"scope": 48, "phase": 12, "FLOPs": 12, "share": 8}, rows)
    rows = [
        (str(source) if source else "(no line)", f"{number:.4g}", f"{number / total:.1%}")
        for source, number in flops.by_source[:_SCOPES]
    ]
    if rows:  # reports of older versions have none
        yield _build_table({"line": 61, "FLOPs": 12, "share": 8}, rows)


def _abbreviate_scopes(scopes: str) -> str:
    """Up to two scopes of one instruction; of more, the first and the number of the others.

    >>> _abbreviate_scopes("mlp, embedding"), _abbreviate_scopes("a, b, c, d")
    ('mlp, embedding', 'a and 3 more')
    """
    first, *others = scopes.split(", ")
    return scopes if len(others) < 2 else f"{first} and {len(others)} more"


def _lower_bound_mark(counted: Ledger | Flops) -> str:
    return "" if counted.complete else "at least "


def _build_table(columns: Mapping[str, int], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose columns are given as name → maximal width."""
    return Table([Column(name, name in _NUMBERS, most) for name, most in columns.items()], rows)


def one_line(report: ReportData) -> str:
    """Returns `Report(nano, cpu, data=4, tensor=2: 2.81 MiB sent, 3.56 MiB memory, 3 findings)`."""
    kind = report.device_kind or report.platform
    what = ", ".join(filter(None, (report.name, kind, report.mesh_text)))
    memory = report.memory.total
    figures = [f"{format_bytes(report.sent)} sent"]
    figures += [] if memory is None else [f"{format_bytes(memory)} memory"]
    return f"Report({what}: {', '.join(figures)}, {len(report.findings)} findings)"


def summary_html(report: ReportData) -> str:
    """The headline figures, what is sent over each mesh axis, and the first findings."""
    kind, memory, flops = report.device_kind or report.platform, report.memory, report.flops
    fits = {None: "", True: ", fits", False: ", DOES NOT FIT"}[memory.fits]
    total = "" if memory.total is None else format_bytes(memory.total)
    least = "" if report.ledger.complete else "at least "
    facts = {
        "mesh": report.mesh_text,
        "sent per step": f"{least}{format_bytes(report.sent)} by each device",
        "memory": f"{total} alive at once{fits}" if total else "",
        "time": f"{format_seconds(report.timeline.high)} modelled" if report.timeline else "",
        "model FLOPs": f"{flops.model:.4g}" if flops else "",
        "incomplete": "; ".join(report.problems),
    }
    title = f"Step{f' of {report.name}' if report.name else ''} compiled for {kind}"
    more = f"{len(report.findings)} findings." if report.findings else "No findings."
    more += " print(report) shows all; report.to_html() is a page with pictures."
    return notebook_html(title, facts, _axes_table(report), _findings_table(report), more)


def _axes_table(report: ReportData) -> Table:
    names = ("sent", "by the optimizer", "minimum", "ratio")
    rows = [
        (
            one.axis or "(none)",
            format_bytes(one.sent),
            format_bytes(one.optimizer),
            "" if one.minimum is None else format_bytes(one.minimum),
            "" if one.ratio is None else f"{one.ratio:.2f}",
        )
        for one in report.traffic
    ]
    return Table(["axis", *(Column(name, right=True) for name in names)], rows)


def _findings_table(report: ReportData) -> Table | str:
    rows = [
        (one.kind, str(one.source or one.leaf or one.scope), format_bytes(one.bytes), one.why)
        for one in report.findings[:_FIRST]
    ]
    return Table(["finding", "where", Column("bytes", right=True), "why"], rows) if rows else ""
