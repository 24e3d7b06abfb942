"""Loss and speed of runs as a figure: PNG, SVG, or a self-contained HTML page."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._core.io._outputs import check_figure_path, figure_file
from ._history import Curve, History, read_histories

SUFFIXES = (".png", ".svg", ".html")
# From so many updates on, the values are drawn faintly behind their running median.
_MANY = 60


def plot_runs(folders: Sequence[Path], out: Path) -> list[str]:
    """Plots runs into a file, which is overwritten.

    Args:
      folders: of runs.
      out: `.png`, `.svg` or `.html`.

    Returns:
      Warnings about broken lines in the files that were read.

    Raises:
      ConfigError: a folder has nothing to plot, or the file cannot be written.
    """
    check_figure_path(out, SUFFIXES)
    histories = read_histories(folders)
    figure = _draw_figure(histories)
    with figure_file(out) as part:
        if out.suffix == ".html":
            part.write_text(_render_page(figure, histories), "utf-8")
        else:
            figure.savefig(part, format=out.suffix[1:], dpi=150)
    return [history.note for history in histories if history.note]


def _draw_figure(histories: Sequence[History]) -> Any:
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, speed = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for number, history in enumerate(histories):
        color = f"C{number}"
        _draw_curve(loss, history.column("loss"), color, history.name)
        _draw_curve(speed, history.speed, color)
        validation = history.evaluations
        loss.plot(validation.steps, validation.values, "o", color=color, markeredgecolor="white")
        for axes in (loss, speed):
            for step in history.resumed:
                axes.axvline(step, color=color, linestyle=":", linewidth=1)
    _label_axes(loss, speed, histories)
    return figure


def _label_axes(loss: Any, speed: Any, histories: Sequence[History]) -> None:
    """Adds names, units, and a legend for the marks that occur."""
    if any(history.evaluations.steps for history in histories):
        loss.plot([], [], "o", color="0.4", markeredgecolor="white", label="validation")
    if any(history.resumed for history in histories):
        loss.plot([], [], ":", color="0.4", label="resumed")
    loss.set_ylabel("loss (nats)")
    loss.legend(frameon=False)
    units = " or ".join(dict.fromkeys(f"{history.unit}/s" for history in histories))
    simulated = any(history.simulated for history in histories)
    speed.set_ylabel(f"{units}\n(simulated CPU devices)" if simulated else units)
    speed.set_xlabel("step")
    speed.set_ylim(bottom=0)
    for axes in (loss, speed):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Any, curve: Curve, color: str, label: str | None = None) -> None:
    if len(curve.steps) < _MANY:
        axes.plot(curve.steps, curve.values, color=color, label=label)
        return
    axes.plot(curve.steps, curve.values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(curve.steps, _running_median(curve.values), color=color, label=label)


def _running_median(values: Sequence[float]) -> np.ndarray:
    """Returns the running median over about a fortieth of a curve, robust against outliers."""
    half = max(2, len(values) // 80)
    padded = np.pad(np.asarray(values, float), half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return np.median(windows, axis=1)


def _render_page(figure: Any, histories: Sequence[History]) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    picture = buffer.getvalue()
    names = html.escape(", ".join(history.name for history in histories))
    notes = "".join(f"<p>{html.escape(h.note)}</p>" for h in histories if h.note)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{names}</title>'
        "<style>body{font:14px sans-serif;margin:2em}svg{max-width:100%;height:auto}</style>"
        f"<h1>{names}</h1>{picture[picture.index('<svg') :]}{notes}</html>\n"
    )
