"""Formats a sweep for a terminal: ranked rows, and the other ones with their reasons."""

import collections
import statistics
from collections.abc import Sequence

from .._core.errors import count
from .._core.io._table import Column, Table, fold_text, text_width
from .._core.tree import format_bytes
from ._row import SweepRow

# Wide enough for three axes; further ones continue on the next line.
_MESH = Column("mesh", most=24)


def format_sweep(
    title: str, ranked: Sequence[SweepRow], unranked: Sequence[SweepRow], by: str
) -> str:
    """Formats a sweep as text of at most 100 columns; `ranked` rows are ok, the best first."""
    lines = fold_text(title, text_width())
    if ranked:
        lines += [f"Ranked by {by}.", _ranked_table(ranked).to_text(text_width())]
        lines += [line for note in _write_notes(ranked) for line in fold_text(note, text_width())]
    if unranked:
        lines.append(f"\nNot ranked: {len(unranked)} of {len(ranked) + len(unranked)}")
        lines.append(_unranked_table(unranked).to_text(text_width()))
    return "\n".join(lines)


def format_seconds(value: float) -> str:
    """Returns `12.3 ms`, or `2.10 s`.

    >>> format_seconds(0.01234), format_seconds(2.1)
    ('12.3 ms', '2.10 s')
    """
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _ranked_table(rows: Sequence[SweepRow]) -> Table:
    timed = any(_format_time(row) for row in rows)
    numbers = ["step"] * timed + ["memory", "wire", "compile", "finds"]
    columns = [Column("", right=True), _MESH, "acc.", "remat"]
    columns += [*(Column(name, right=True) for name in numbers), "÷ minimum"]
    table = []
    for place, row in enumerate(rows, 1):
        compiled = row.compiled or {}
        cells = [str(place), row.case.shown, str(row.case.accumulate), row.case.remat]
        cells += [_format_time(row)] * timed
        cells += [format_bytes(row.total) if row.total is not None else "?"]
        compile_seconds = row.measured["compile_seconds"]["whole"]
        cells += [format_bytes(row.wire or 0), f"{compile_seconds:.1f} s"]
        findings = sum(counted["count"] for counted in compiled.get("findings", {}).values())
        cells += [str(findings), _format_ratios(row)]
        table.append(cells)
    return Table(columns, table, gap=1)


def _format_time(row: SweepRow) -> str:
    """`12.3 ms ±1.2` with half the distance of the quartiles, or `~12.3 ms` if it is modelled."""
    if timed := row.measured.get("step_seconds"):
        spread = 1e3 * (timed["high"] - timed["low"]) / 2
        return f"{format_seconds(timed['median'])} ±{spread:.2g}"
    modelled = row.modelled.get("step_seconds")
    return "" if modelled is None else f"~{format_seconds(modelled)}"


def describe_measurement(rows: Sequence[SweepRow]) -> str:
    """The devices that times were measured on, with numbers of rows if there are several."""
    places = collections.Counter(row.measured["where"] for row in rows if "where" in row.measured)
    if len(places) < 2:
        return "".join(places)
    return "; ".join(f"{place} ({count(n, 'row')})" for place, n in places.items())


def _format_ratios(row: SweepRow) -> str:
    axes = (row.compiled or {}).get("axes", {})
    known = {axis: sent["ratio"] for axis, sent in axes.items() if sent["ratio"] is not None}
    return " ".join(
        f"{axis} {ratio:.2f}" for axis, ratio in known.items() if row.case.sizes.get(axis, 1) > 1
    )


def _unranked_table(rows: Sequence[SweepRow]) -> Table:
    table = []
    for row in rows:
        case = row.case
        table.append((case.shown, str(case.accumulate), case.remat, row.status, row.reason))
    return Table([_MESH, "acc.", "remat", "status", "why"], table, gap=1)


def _write_notes(rows: Sequence[SweepRow]) -> list[str]:
    """Notes below the table: the origin of the figures, and what differs between rows."""
    notes = ["Memory and wire are compiled, bytes per device and step; compile seconds measured."]
    timed = [row.measured["step_seconds"]["samples"] for row in rows if row.seconds is not None]
    if timed:
        spread = f"median of {int(statistics.median(timed))} updates ± half the quartiles' distance"
        notes.append(f"Step: {spread}, {describe_measurement(rows)}.")
    if any("step_seconds" in row.modelled and row.seconds is None for row in rows):
        notes.append(
            "Step: modelled (~), from the compiled program and the chip's links and peaks."
        )
    if verdicts := [row.verified["ok"] for row in rows if row.verified is not None]:
        equal = sum(ok is True for ok in verdicts)
        notes.append(f"{equal} of {len(verdicts)} ranked rows give the numbers of one device.")
    known = [row for row in rows if row.total and "memory" in row.modelled]
    if known:
        ratios = sorted(row.modelled["memory"] / (row.total or 1) for row in known)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        number = f", of {count(len(known), 'row')}" if len(known) < len(rows) else ""
        notes.append(
            f"Modelled by a plan, memory is {statistics.median(ratios):.2f} times the compiled one "
            f"in the median, {spread} at the ends{number}."
        )
    if unknown := dict.fromkeys(why for row in rows if (why := row.modelled.get("not_modelled"))):
        notes.append(f"Not modelled: {'; '.join(unknown)}.")
    commits = dict.fromkeys(str(row.provenance.get("commit")) for row in rows)
    if len(commits) > 1:
        notes.append(f"Rows of several commits: {', '.join(commits)}.")
    return notes
