"""Metrics of a run as curves, over all processes that it had one after another."""

import dataclasses
import glob
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .._core.errors import ConfigError, Problem, count, did_you_mean, raise_all
from .._core.io._files import local_path, path_problem
from .._core.io._notebook import notebook_html
from ._metrics_file import METRICS, read_rows

_SPEED, _NATS = "_per_second", math.log(2)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values by update; NaN for one that was not finite."""

    steps: Sequence[int]
    values: Sequence[float]


@dataclasses.dataclass(frozen=True)
class History:
    """The rows of one run."""

    name: str  # unique among the runs that are read together
    rows: Sequence[dict[str, Any]]  # of its metrics file, in order
    broken: Sequence[int] = ()  # numbers of the lines of the file that are not rows

    def column(self, name: str) -> Curve:
        """Returns a metric of every update; of an update made twice, the later value."""
        rows = [row for row in self._rows_of("step") if _is_number_or_none(row, name)]
        column = {row["step"]: row[name] for row in rows}
        values = [math.nan if column[step] is None else column[step] for step in sorted(column)]
        return Curve(sorted(column), values)

    @property
    def evaluations(self) -> Curve:
        """Validation losses in nats, of the evaluations that report a loss or bits."""
        evaluations = (row for row in self._rows_of("eval") if "step" in row)
        losses = {row["step"]: _loss_in_nats(row) for row in evaluations}
        known = {step: value for step, value in losses.items() if value is not None}
        return Curve(list(known), list(known.values()))

    @property
    def unit(self) -> str:
        """What the speed counts: `tokens` or `rows`."""
        for row in self._rows_of("step"):
            for name in row:
                if name.endswith(_SPEED):
                    return name.removesuffix(_SPEED)
        return ""

    @property
    def speed(self) -> Curve:
        """Tokens or rows per second, without the first update of each process, which warms up."""
        curve = self.column(f"{self.unit}{_SPEED}")
        warming = {step + 1 for step in (0, *self.resumed)}
        kept = [i for i, step in enumerate(curve.steps) if step not in warming]
        return Curve([curve.steps[i] for i in kept], [curve.values[i] for i in kept])

    @property
    def resumed(self) -> list[int]:
        """Updates from which the run resumed."""
        return [row["step"] for row in self._rows_of("resumed") if "step" in row]

    @property
    def simulated(self) -> bool:
        """Whether the devices were threads of one CPU."""
        return any(row.get("device", {}).get("simulated") for row in self._rows_of("start"))

    @property
    def note(self) -> str:
        """A warning about broken lines of the file, or ""."""
        if not self.broken:
            return ""
        lines = ", ".join(map(str, self.broken[:5]))
        return f"{self.name}: {count(len(self.broken), 'broken line')} skipped ({lines})"

    def describe(self) -> dict[str, str]:
        """Updates, the first and the last loss, speed and evaluations, as text."""
        loss, speed, evaluations = self.column("loss"), self.speed, self.evaluations
        losses = [f"{value:.4g}" for value in (*loss.values[:1], *loss.values[-1:])]
        median = f"{statistics.median(speed.values):.4g} {self.unit}/s" if speed.values else ""
        simulated = ", simulated devices" if self.simulated else ""
        last = evaluations.values[-1:]
        return {
            "updates": str(len(loss.steps)),
            "loss": " → ".join(dict.fromkeys(losses)),
            "validation": f"{last[0]:.4g} after update {evaluations.steps[-1]}" if last else "",
            "speed, median": f"{median}{simulated}" if median else "",
            "resumed from": ", ".join(map(str, self.resumed)),
            "note": self.note,
        }

    def __repr__(self) -> str:
        about = self.describe()
        loss = f", loss {about['loss']}" if about["loss"] else ""
        return f"History({self.name}: {about['updates']} updates{loss})"

    def _repr_html_(self) -> str:
        return notebook_html(f"Run {self.name}", self.describe())

    def _rows_of(self, kind: str) -> Iterable[dict[str, Any]]:
        return (row for row in self.rows if row["kind"] == kind)


def read_history(folder: str | os.PathLike[str]) -> History:
    """Reads the metrics of the newest run of a trainer, of all processes that it had.

    Args:
      folder: as given to the trainer; later runs are in `folder-2`, `folder-3`, ….

    Raises:
      ConfigError: no run has finished an update yet.
    """
    folder = local_path(folder, ConfigError, "The metrics cannot be read.")
    runs = [folder, *folder.parent.glob(f"{glob.escape(folder.name)}-[0-9]*")]
    written = [run for run in runs if (run / METRICS).is_file()]
    newest = max(written, key=lambda run: (run / METRICS).stat().st_mtime, default=folder)
    return read_histories([newest])[0]


def read_histories(folders: Sequence[Path]) -> list[History]:
    """Reads runs, or their metrics files; raises ConfigError with each that has no update yet."""
    paths = [path if path_problem(path) else local_path(path, ConfigError) for path in folders]
    runs = [path.parent if path.name == METRICS else path for path in paths]
    unique = len({run.name for run in runs}) == len(runs)
    histories, problems = [], []
    for run in dict.fromkeys(runs):
        if no_path := path_problem(run):
            problems.append(no_path)
            continue
        parsed = read_rows(run)
        history = History(run.name if unique else str(run), parsed.rows, parsed.broken)
        why = _explain_unusable(run, history)
        if why is None:
            histories.append(history)
        else:
            problems.append(Problem(str(run), why, _suggest_command(run)))
    headline = f"{count(len(problems), 'run')} cannot be plotted."
    raise_all(ConfigError, headline, problems)
    return histories


def _explain_unusable(run: Path, history: History) -> str | None:
    if run.is_file():
        return "is a file, not the folder of a run."
    if not run.is_dir():
        return f"does not exist.{did_you_mean(str(run), map(str, _list_nearby(run)))}"
    if not (run / METRICS).is_file():
        return f"has no {METRICS}, so it is not a run folder."
    if not history.column("loss").steps:
        return f"has finished no update yet: {METRICS} has {count(len(history.rows), 'row')}."
    return None


def _suggest_command(run: Path) -> str:
    near = [path for path in _list_nearby(run) if path != run]
    return f"shardkit plot {' '.join(map(str, near[:3]))}" if near else "shardkit train"


def _list_nearby(run: Path) -> list[Path]:
    """Returns the folders of runs in a folder, beside it, and in `runs`."""
    parents = (run, run.parent, Path("runs"))
    return sorted({path.parent for parent in parents for path in parent.glob(f"*/{METRICS}")})


def _is_number_or_none(row: dict[str, Any], name: str) -> bool:
    """Whether a row of an update has a column of numbers, in which None means not finite."""
    return "step" in row and isinstance(row.get(name, ""), int | float | None)


def _loss_in_nats(row: dict[str, Any]) -> float | None:
    # Bits per token come before bits per byte: the loss of an update is one of tokens.
    for name, factor in (("loss", 1.0), ("bits_per_token", _NATS), ("bits_per_byte", _NATS)):
        if isinstance(row.get(name), int | float):
            return row[name] * factor
    return None
