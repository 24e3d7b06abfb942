"""What a run has written, as curves: all its lives as one."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .._errors import ConfigError, Problem, count, did_you_mean, raise_all
from ._folder import METRICS, read_rows

_SPEED, _NATS = "_per_second", math.log(2)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Numbers by update; NaN where one was not finite."""

    steps: Sequence[int]
    values: Sequence[float]


@dataclasses.dataclass(frozen=True)
class History:
    """The rows of one run.

    Attributes:
      name: tells it from the runs beside it.
      rows: of its metrics, in order.
      broken: lines of the file that are no whole rows.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    broken: Sequence[int] = ()

    def column(self, name: str) -> Curve:
        """A number of every update; of an update that was made twice, the later one."""
        found = {row["step"]: row[name] for row in self._of("step") if name in row}
        values = [math.nan if found[step] is None else found[step] for step in sorted(found)]
        return Curve(sorted(found), values)

    @property
    def evaluations(self) -> Curve:
        """Held-out losses in nats, where an evaluation tells them, be it in bits."""
        known = {row["step"]: _nats(row) for row in self._of("eval")}
        found = {step: value for step, value in known.items() if value is not None}
        return Curve(list(found), list(found.values()))

    @property
    def unit(self) -> str:
        """What its speed counts: `tokens` or `rows`."""
        for row in self._of("step"):
            for name in row:
                if name.endswith(_SPEED):
                    return name.removesuffix(_SPEED)
        return ""

    @property
    def speed(self) -> Curve:
        """Tokens or rows per second, without the updates with which a life warms up."""
        curve = self.column(f"{self.unit}{_SPEED}")
        warming = {step + 1 for step in (0, *self.resumed)}
        kept = [i for i, step in enumerate(curve.steps) if step not in warming]
        return Curve([curve.steps[i] for i in kept], [curve.values[i] for i in kept])

    @property
    def resumed(self) -> list[int]:
        """Updates from which it went on."""
        return [row["step"] for row in self._of("resumed")]

    @property
    def simulated(self) -> bool:
        """Whether its devices were threads of one CPU."""
        return any(row["device"]["simulated"] for row in self._of("start"))

    @property
    def note(self) -> str:
        """What the user should know of the file, or nothing."""
        if not self.broken:
            return ""
        lines = ", ".join(map(str, self.broken[:5]))
        return f"{self.name}: {count(len(self.broken), 'broken line')} left out ({lines})"

    def _of(self, kind: str) -> Iterable[dict[str, Any]]:
        return (row for row in self.rows if row["kind"] == kind)


def read_histories(folders: Sequence[Path]) -> list[History]:
    """Reads several runs.

    Args:
      folders: of runs, or their metrics files.

    Raises:
      ConfigError: naming every one that is no run, or has made no update yet.
    """
    runs = [path.parent if path.name == METRICS else path for path in folders]
    unique = len({run.name for run in runs}) == len(runs)
    found, problems = [], []
    for run in dict.fromkeys(runs):
        read = read_rows(run)
        history = History(run.name if unique else str(run), read.rows, read.broken)
        why = _unusable(run, history)
        if why is None:
            found.append(history)
        else:
            problems.append(Problem(str(run), why, _nearest(run)))
    headline = f"{count(len(problems), 'run')} cannot be drawn."
    raise_all(ConfigError, headline, problems)
    return found


def _unusable(run: Path, history: History) -> str | None:
    if run.is_file():
        return "is a file, not the folder of a run."
    if not run.is_dir():
        return f"there is no such folder.{did_you_mean(str(run), map(str, _around(run)))}"
    if not (run / METRICS).is_file():
        return f"holds no {METRICS}, so it is no folder of a run."
    if not history.column("loss").steps:
        return f"has told of no update yet: {METRICS} has {count(len(history.rows), 'row')}."
    return None


def _nearest(run: Path) -> str:
    near = [path for path in _around(run) if path != run]
    return f"shardkit plot {' '.join(map(str, near[:3]))}" if near else "shardkit train"


def _around(run: Path) -> list[Path]:
    """Runs beside a folder or in it."""
    places = (run, run.parent, Path("runs"))
    return sorted({path.parent for place in places for path in place.glob(f"*/{METRICS}")})


def _nats(row: dict[str, Any]) -> float | None:
    # Bits per token come first: where tokens have several bytes, the loss is one of tokens.
    for name, factor in (("loss", 1.0), ("bits_per_token", _NATS), ("bits_per_byte", _NATS)):
        if name in row:
            return row[name] * factor
    return None
