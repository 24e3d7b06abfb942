"""Goodput: how much of a run's wall time made updates that count, and where the rest went.

Everything is read from the rows of `metrics.jsonl`, over all lives of a run: a killed process
leaves no summary behind, but its rows, each with its time.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._units import duration

_Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Wall time of a run by what it went into.

    Attributes:
      wall: seconds from the beginning of the first life to the last row.
      steps: seconds of updates that count, without the wait for their batches.
      rest: seconds by cause: `compile`, `init`, `restore`, `data` (waited for), `evaluate`,
        `save` (what a save kept updates waiting), `lost` (updates that a kill made void), `idle`
        (between lives) and `other`.
    """

    wall: float
    steps: float
    rest: Mapping[str, float]

    @property
    def share(self) -> float:
        """Useful step time over wall time."""
        return self.steps / self.wall if self.wall else 0.0

    def text(self) -> str:
        """Returns one line for people, causes by size.

        >>> print(Goodput(200.0, 150.0, {"compile": 30.0, "other": 20.0, "idle": 0.0}).text())
        goodput 75.0% of 3 min 20 s; compile 15.0%, other 10.0%
        """
        causes = sorted(self.rest.items(), key=lambda item: -item[1])
        told = [f"{name} {spent / self.wall:.1%}" for name, spent in causes if spent > 0]
        behind = f"; {', '.join(told)}" if told else ""
        return f"goodput {self.share:.1%} of {duration(self.wall)}{behind}"

    def row(self) -> dict[str, Any]:
        """Returns what the metrics say of it, in seconds."""
        return {"goodput": self.share, "wall": self.wall, "useful": self.steps, **self.rest}


_CAUSES = ("compile", "init", "restore", "data", "evaluate", "save", "lost", "idle")


def goodput(rows: Iterable[_Row], now: float) -> Goodput:
    """Adds up the rows of a run's metrics.

    Args:
      rows: in the order of the file, the first of them a `start`.
      now: seconds since 1970.
    """
    rest, steps, began = dict.fromkeys(_CAUSES, 0.0), 0.0, None
    for row in rows:
        kind = row["kind"]
        if kind in ("start", "resumed"):
            began = row["began"] if began is None else began
            for cause, spent in row["seconds"].items():
                rest[cause] += spent
        elif kind == "step":
            rest["data"] += row["data_seconds"]
            steps += row["seconds"] - row["data_seconds"]
        elif kind in ("eval", "save", "finished"):
            rest["evaluate" if kind == "eval" else "save"] += row["seconds"]
    wall = now - (now if began is None else began)
    return Goodput(wall, steps, {**rest, "other": max(0.0, wall - steps - sum(rest.values()))})


def interruption(kept: Sequence[_Row], cut: Sequence[_Row], began: float) -> dict[str, float]:
    """Seconds that a kill cost a run which goes on.

    Args:
      kept: rows that stay.
      cut: rows of updates that will be made again.
      began: when the new life began, in seconds since 1970.

    Returns:
      `lost`: from the last row that stays to the last one that was written; `idle`: from there on.
    """
    if not kept:
        return {}
    stays = kept[-1]["time"]
    last = cut[-1]["time"] if cut else stays
    return {"lost": last - stays, "idle": max(0.0, began - last)}
