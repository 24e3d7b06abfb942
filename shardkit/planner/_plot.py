"""Draws a plan: memory against time, with the Pareto front and the capacity.

matplotlib is the `[plot]` extra, so it is imported only to draw.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._core.io._outputs import check_figure_path, figure_file
from ._candidate import Candidate

_GIB = 2**30
_CODE = 'plan.plot("{}")'
_MAX_LABELS = 40
"""Number of layouts of the front that have room for a label."""
_LOG_RATIO = 8
"""Ratio of values from which an axis is logarithmic."""


def plot_front(
    out: Path,
    rows: Sequence[Candidate],
    tight: Sequence[Candidate],
    front: Sequence[Candidate],
    caption: str,
) -> Path:
    """Draws layouts by their modelled time and memory into a `.png` or `.svg` file.

    `rows` fit and `tight` do not; `front` is the Pareto front of both, the fastest first. A
    ConfigError says that the file cannot be written, or that matplotlib is missing.
    """
    check_figure_path(out, code=_CODE)
    with figure_file(out, _CODE) as part:
        figure = _draw(rows, tight, front, caption)
        figure.savefig(part, format=out.suffix[1:], dpi=140)
    return out


def _draw(
    rows: Sequence[Candidate], tight: Sequence[Candidate], front: Sequence[Candidate], caption: str
) -> Any:
    # pyplot would have global state and ask for a display.
    from matplotlib.figure import Figure

    labelled = _pick_labelled(front)
    drawing = Figure(figsize=(12, max(5.0, 1.8 + 0.19 * len(labelled))), layout="constrained")
    axes = drawing.subplots()
    # Each of thousands of marks would be an element of an SVG file.
    marks = {"linestyle": "", "markersize": 4, "rasterized": True}
    if tight:
        axes.plot(*_points(tight), "x", color="0.75", label="does not fit", **marks)
    axes.plot(*_points(rows), ".", color="C0", alpha=0.5, label="fits", **marks)
    axes.plot(*_points(front), "o-", color="C1", drawstyle="steps-post", label="front")
    compiled = [c.compiled for c in rows if c.compiled]
    if compiled:
        spots = [c["seconds"] * 1e3 for c in compiled], [c["total"] / _GIB for c in compiled]
        axes.plot(*spots, "*", color="C3", markersize=11, label="the same, compiled")
    capacity = front[0].capacity / _GIB
    axes.axhline(capacity, color="0.3", linestyle="--", label=f"capacity, {capacity:.4g} GiB")
    _set_scales(axes, [*rows, *tight], capacity)
    _label_front(axes, labelled)
    axes.set_title("Memory against time, modelled")
    axes.legend(fontsize=8)
    text = f"{caption}; stars by the target's compiler" if compiled else caption
    text += (
        f"; {len(labelled)} of {len(front)} of the front named"
        if len(labelled) < len(front)
        else ""
    )
    drawing.supxlabel(text, fontsize=7, color="0.4")
    return drawing


def _points(rows: Sequence[Candidate]) -> tuple[list[float], list[float]]:
    """Milliseconds and GiB of layouts."""
    return [c.seconds * 1e3 for c in rows], [c.total / _GIB for c in rows]


def _pick_labelled(front: Sequence[Candidate]) -> list[Candidate]:
    """At most 40 layouts of the front, the first and the last among them."""
    if len(front) <= _MAX_LABELS:
        return list(front)
    steps = (len(front) - 1) / (_MAX_LABELS - 1)
    return [front[round(i * steps)] for i in range(_MAX_LABELS)]


def _set_scales(axes: Any, rows: Sequence[Candidate], capacity: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    times, sizes = _points(rows)
    for name, values in (("x", times), ("y", [*sizes, capacity])):
        if max(values) > _LOG_RATIO * min(values):
            getattr(axes, f"set_{name}scale")("log")
            axis = getattr(axes, f"{name}axis")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("modelled ms per step")
    axes.set_ylabel("modelled GiB per device")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_front(axes: Any, labelled: Sequence[Candidate]) -> None:
    """Labels in a column beside the plot, from top to bottom as memory falls along the front."""
    for i, candidate in enumerate(labelled):
        height = 1 - (i + 0.5) / len(labelled)
        fits = "" if candidate.margin >= 0 else ", does not fit"
        axes.annotate(
            f"{candidate.layout}{fits}",
            (candidate.seconds * 1e3, candidate.total / _GIB),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color="0.5" if fits else "black",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.8",
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
            },
        )
