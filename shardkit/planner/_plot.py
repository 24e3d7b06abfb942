"""A plan as a picture: memory against time, with the front and the capacity.

matplotlib is the `[plot]` extra, so it is imported when something is drawn.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .._core.io._outputs import check_figure_path, figure_file
from ._candidate import Candidate

_GIB = 2**30
_CODE = 'plan.plot("{}")'
_MAX_LABELS = 40
"""Rows of the front that there is room to name."""
_LOG_RATIO = 8
"""From such a ratio on an axis is logarithmic."""


def plot_front(
    out: Path,
    rows: Sequence[Candidate],
    tight: Sequence[Candidate],
    front: Sequence[Candidate],
    caption: str,
) -> Path:
    """Draws layouts by their modelled time and memory into a file.

    Args:
      out: `.png` or `.svg`.
      rows: layouts that fit.
      tight: layouts that do not.
      front: those of both that are named, the fastest first.
      caption: where the figures are from.

    Raises:
      ConfigError: nothing can be written there, or matplotlib is missing.
    """
    check_figure_path(out, code=_CODE)
    with figure_file(out, _CODE) as part:
        figure = _draw(rows, tight, front, caption)
        figure.savefig(part, format=out.suffix[1:], dpi=140)
    return out


def _draw(
    rows: Sequence[Candidate],
    tight: Sequence[Candidate],
    front: Sequence[Candidate],
    caption: str,
) -> Any:
    # No pyplot: nothing global, no display.
    from matplotlib.figure import Figure

    named = _pick_labelled(front)
    made = Figure(figsize=(12, max(5.0, 1.8 + 0.19 * len(named))), layout="constrained")
    axes = made.subplots()
    # Thousands of marks would each be an element of an SVG file.
    marks = {"linestyle": "", "markersize": 4, "rasterized": True}
    if tight:
        axes.plot(*_points(tight), "x", color="0.75", label="does not fit", **marks)
    axes.plot(*_points(rows), ".", color="C0", alpha=0.5, label="fits", **marks)
    axes.plot(*_points(front), "o-", color="C1", drawstyle="steps-post", label="front")
    stages = [c.compiled for c in rows if c.compiled]
    if stages:
        spots = [c["seconds"] * 1e3 for c in stages], [c["total"] / _GIB for c in stages]
        axes.plot(*spots, "*", color="C3", markersize=11, label="the same, compiled")
    capacity = front[0].capacity / _GIB
    axes.axhline(capacity, color="0.3", linestyle="--", label=f"capacity, {capacity:.4g} GiB")
    _set_scales(axes, [*rows, *tight], capacity)
    _label_front(axes, named)
    axes.set_title("Memory against time, modelled")
    axes.legend(fontsize=8)
    text = f"{caption}; stars by the target's compiler" if stages else caption
    text += f"; {len(named)} of {len(front)} of the front named" if len(named) < len(front) else ""
    made.supxlabel(text, fontsize=7, color="0.4")
    return made


def _points(of: Iterable[Candidate]) -> tuple[list[float], list[float]]:
    """Milliseconds and GiB."""
    listed = list(of)
    return [c.seconds * 1e3 for c in listed], [c.total / _GIB for c in listed]


def _pick_labelled(front: Sequence[Candidate]) -> list[Candidate]:
    """As many rows as there is room for, the first and the last among them."""
    if len(front) <= _MAX_LABELS:
        return list(front)
    steps = (len(front) - 1) / (_MAX_LABELS - 1)
    return [front[round(i * steps)] for i in range(_MAX_LABELS)]


def _set_scales(axes: Any, of: Sequence[Candidate], capacity: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    times, sizes = _points(of)
    for which, values in (("x", times), ("y", [*sizes, capacity])):
        if max(values) > _LOG_RATIO * min(values):
            getattr(axes, f"set_{which}scale")("log")
            axis = getattr(axes, f"{which}axis")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("modelled ms per step")
    axes.set_ylabel("modelled GiB per device")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_front(axes: Any, named: Sequence[Candidate]) -> None:
    """Names in a column beside the picture, from top to bottom as memory goes down the front."""
    for i, one in enumerate(named):
        height = 1 - (i + 0.5) / len(named)
        fits = "" if one.margin >= 0 else ", does not fit"
        axes.annotate(
            f"{one.layout}{fits}",
            (one.seconds * 1e3, one.total / _GIB),
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
