"""Draws a sweep: time, memory, communication, scaling, and compiled against modelled memory.

matplotlib is the `[plot]` extra, so it is imported only to draw.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._core.io._files import write_atomic
from .._core.io._palette import axis_colors
from ..report import MEMORY_CLASSES
from ._journal import sweep_file_errors
from ._result import COMPILED, MEASURED, Sweep, rank_value
from ._row import SweepRow
from ._show import describe_measurement

_MAX_ROWS = 24
_MIB = 2**20


def draw_plots(swept: Sweep) -> list[Path]:
    """Draws the rows of a sweep into its folder, each plot as PNG and as SVG.

    `memory` and `communication` of the best rows; `time`, if rows have one; `scaling`, if meshes
    have several sizes; `model`, if rows have an estimate of their memory.

    Args:
      swept: the sweep; its first 24 ranked rows are drawn.

    Returns:
      The files.

    >>> draw_plots(Sweep((), Path("nowhere"), "nothing"))
    []
    """
    if not swept.ranked:
        return []
    rows, by = swept.ranked[:_MAX_ROWS], swept.ranked_by
    drawn = {
        "memory": _Picture(_draw_memory, rows),
        "communication": _Picture(_draw_communication, rows),
    }
    if by != COMPILED:
        drawn["time"] = _Picture(functools.partial(_draw_time, by=by), rows, by)
    best = _best_by_devices(swept.ranked)
    if len(best) > 1:
        drawn["scaling"] = _Picture(functools.partial(_draw_scaling, by=by), best, by, bars=False)
    estimated = [row for row in swept.ranked if "memory" in row.modelled]
    if estimated:
        drawn["model"] = _Picture(_draw_model, estimated, bars=False)
    return [path for name, picture in drawn.items() for path in _save(swept, name, picture)]


@dataclasses.dataclass(frozen=True)
class _Picture:
    """One plot: the function that draws it, its rows, their origin, and whether rows are bars."""

    draw: Callable[[Any, Sequence[SweepRow]], None]
    rows: Sequence[SweepRow]
    by: str = COMPILED
    bars: bool = True


def _save(swept: Sweep, name: str, picture: _Picture) -> list[Path]:
    # pyplot would have global state and ask for a display.
    from matplotlib.figure import Figure

    tall = 1.8 + 0.28 * len(picture.rows) if picture.bars else 4.5
    drawing = Figure(figsize=(9, tall), layout="constrained")
    axes = drawing.subplots()
    picture.draw(axes, picture.rows)
    axes.spines[["top", "right"]].set_visible(False)
    note = describe_sources(picture.rows, picture.by)
    if picture.bars and len(picture.rows) < len(swept.ranked):
        note += f"; the best {len(picture.rows)} of {len(swept.ranked)}"
    drawing.supxlabel(note, fontsize=7, color="0.4")
    paths = [swept.folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        with sweep_file_errors(path), write_atomic(path) as part:
            drawing.savefig(part, format=path.suffix[1:], dpi=140)
    return paths


def describe_sources(rows: Sequence[SweepRow], by: str) -> str:
    """The origin of a plot's figures in one line, written into the plot."""
    provenances = [row.provenance for row in rows]
    where = (
        describe_measurement(rows)
        if by == MEASURED
        else f"{by.split()[0]} for {_describe_devices(rows)}"
    )
    versions = {f"jax {p.get('versions', {}).get('jax')}": None for p in provenances}
    commits = dict.fromkeys(str(p.get("commit")) for p in provenances)
    last = max(p.get("date", "")[:10] for p in provenances)
    return f"{where}; {', '.join(versions)}, commit {', '.join(commits)}, {last}"


def _describe_devices(rows: Sequence[SweepRow]) -> str:
    kinds = dict.fromkeys(str(row.on.get("device_kind") or row.on.get("target")) for row in rows)
    simulated = any(row.on.get("platform") == "cpu" and row.case.devices > 1 for row in rows)
    return f"{', '.join(kinds)}{' devices, simulated' if simulated else ''}"


def _format_case(row: SweepRow) -> str:
    case = row.case
    micro = f" ×{case.accumulate}" if case.accumulate > 1 else ""
    return f"{case.shown}{micro}{'' if case.remat == 'none' else f' {case.remat}'}"


@dataclasses.dataclass(frozen=True)
class _Part:
    """One part of stacked bars: its widths, one per row, and how it is drawn."""

    name: str
    widths: Sequence[float]
    style: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _draw_bars(axes: Any, rows: Sequence[SweepRow], parts: Sequence[_Part]) -> None:
    """Stacked horizontal bars, one per row, the best at the top."""
    places, left = list(range(len(rows))), [0.0] * len(rows)
    for part in parts:
        if any(part.widths):
            axes.barh(places, part.widths, left=left, label=part.name, height=0.7, **part.style)
            left = [a + b for a, b in zip(left, part.widths, strict=True)]
    axes.set_yticks(places, [_format_case(row) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _draw_memory(axes: Any, rows: Sequence[SweepRow]) -> None:
    memories = [row.compiled["memory"] for row in rows if row.compiled]
    parts = [_Part(name, [(m[name] or 0) / _MIB for m in memories]) for name in MEMORY_CLASSES]
    _draw_bars(axes, rows, parts)
    totals = [(m["total"] or 0) / _MIB for m in memories]
    axes.plot(totals, range(len(rows)), "k|", markersize=12, label="alive at once")
    axes.set_xlabel("compiled MiB per device")
    axes.set_title("Memory by mesh, the best rows first")
    axes.legend(fontsize=8)


def _draw_communication(axes: Any, rows: Sequence[SweepRow]) -> None:
    """Bars as long as the table's wire bytes; the optimizer's part of each axis is hatched."""
    sent = [row.compiled["axes"] for row in rows if row.compiled]
    names = list(dict.fromkeys(axis for by_axis in sent for axis in by_axis))
    colors, parts = axis_colors(names), []
    for name in names:
        over = [by_axis.get(name, {"wire": 0, "optimizer": 0}) for by_axis in sent]
        model = [(n["wire"] - n["optimizer"]) / _MIB for n in over]
        style = {"color": colors[name]}
        parts.append(_Part(name or "no axis", model, style))
        hatched = {**style, "hatch": "////", "edgecolor": "white", "linewidth": 0}
        optimizer = [n["optimizer"] / _MIB for n in over]
        parts.append(_Part(f"{name or 'no axis'}, by the optimizer", optimizer, hatched))
    _draw_bars(axes, rows, parts)
    least = [sum(over["minimum"] or 0 for over in by.values()) / _MIB for by in sent]
    if any(least):
        axes.plot(least, range(len(rows)), "k|", markersize=12, label="textbook minima")
    axes.set_xlabel("compiled MiB sent by one device in a step")
    axes.set_title("Communication by mesh axis")
    axes.legend(fontsize=8)


def _draw_time(axes: Any, rows: Sequence[SweepRow], by: str) -> None:
    values = [1e3 * rank_value(row, by) for row in rows]
    _draw_bars(axes, rows, [_Part(by, values)])
    if by == MEASURED:
        spans = [row.measured["step_seconds"] for row in rows]
        below = [v - 1e3 * span["low"] for v, span in zip(values, spans, strict=True)]
        above = [1e3 * span["high"] - v for v, span in zip(values, spans, strict=True)]
        axes.errorbar(values, range(len(rows)), xerr=(below, above), fmt="none", ecolor="0.2")
    axes.set_xlabel(f"ms, {by}" + (", median and quartiles" if by == MEASURED else ""))
    axes.set_title("Step time by mesh")


def _best_by_devices(ranked: Sequence[SweepRow]) -> list[SweepRow]:
    """The best row of each number of devices, by that number."""
    best: dict[int, SweepRow] = {}
    for row in ranked:
        best.setdefault(row.case.devices, row)
    return [best[n] for n in sorted(best)]


def _draw_scaling(axes: Any, rows: Sequence[SweepRow], by: str) -> None:
    """The best row of each number of devices, and what a perfect split of the first would be."""
    counts = [row.case.devices for row in rows]
    timed = by != COMPILED
    scale = 1e3 if timed else 1 / _MIB
    values = [scale * rank_value(row, by) for row in rows]
    axes.plot(counts, values, "o-", label="the best mesh of each size")
    for row, n, value in zip(rows, counts, values, strict=True):
        above = {"textcoords": "offset points", "xytext": (0, 9), "ha": "center", "fontsize": 8}
        ground = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8}
        axes.annotate(_format_case(row), (n, value), bbox=ground, **above)
    if timed:
        ideal = [values[0] * counts[0] / n for n in counts]
        axes.plot(counts, ideal, "--", color="0.6", label="the first, split evenly")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_xlabel("devices")
    axes.set_ylabel(f"{'ms' if timed else 'MiB'}, {by}")
    axes.margins(x=0.08, y=0.15)
    axes.set_ylim(bottom=0)
    axes.set_title("Scaling with devices, the global batch fixed")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.1), ncol=2)  # off the points


def _draw_model(axes: Any, rows: Sequence[SweepRow]) -> None:
    modelled = [row.modelled["memory"] / _MIB for row in rows]
    compiled = [(row.total or 0) / _MIB for row in rows]
    most = max(*modelled, *compiled)
    axes.plot([0, most], [0, most], "--", color="0.6", label="equal")
    axes.plot(modelled, compiled, "o")
    axes.set_xlabel("modelled MiB per device, before compiling")
    axes.set_ylabel("compiled MiB per device")
    axes.set_title("Memory: compiled against modelled")
    axes.legend(fontsize=8)
