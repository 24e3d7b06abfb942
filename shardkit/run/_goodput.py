"""Goodput: the share of a run's wall time spent on updates that count, and where the rest went.

Everything is computed from the rows of `metrics.jsonl`, over all processes that a run had one
after another: a killed process leaves no summary, but its rows have their times.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._durations import format_duration

_Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Wall time of a run by what it was spent on."""

    # seconds from the start of the first process to now; at least the seconds of all causes, if a
    # clock was set back
    wall: float
    steps: float  # seconds of updates that count, without waiting for their batches
    # seconds by cause: `compile`, `init`, `restore`, `data` (waiting for batches), `check` (self
    # checks), `evaluate`, `baselines` and `sample` (at the end of a run on text), `save` (blocking
    # updates), `lost` (updates that had to be made again), `idle` (between two processes) and
    # `other`
    overhead: Mapping[str, float]

    @property
    def share(self) -> float:
        """`steps` over `wall`, from 0 to 1."""
        return self.steps / self.wall if self.wall else 0.0

    def text(self) -> str:
        """Returns one line, causes by size.

        >>> print(Goodput(200.0, 150.0, {"compile": 30.0, "other": 20.0, "idle": 0.0}).text())
        goodput 75.0% of 3 min 20 s; compile 15.0%, other 10.0%
        """
        causes = sorted(self.overhead.items(), key=lambda item: -item[1])
        shares = [f"{name} {spent / self.wall:.1%}" for name, spent in causes if spent > 0]
        suffix = f"; {', '.join(shares)}" if shares else ""
        return f"goodput {self.share:.1%} of {format_duration(self.wall)}{suffix}"

    def row(self) -> dict[str, Any]:
        """Returns the columns of its metrics row: `goodput` is a share, all others seconds."""
        return {"goodput": self.share, "wall": self.wall, "useful": self.steps, **self.overhead}


_CAUSE_OF_KIND = {"check": "check", "eval": "evaluate", "save": "save", "finished": "save"}
_CAUSE_OF_KIND |= {"baselines": "baselines", "sample": "sample"}
_CAUSES = ("compile", "init", "restore", "data", "lost", "idle", *_CAUSE_OF_KIND.values())


def goodput(rows: Iterable[_Row], now: float) -> Goodput:
    """Adds up the rows of a metrics file, of which the first is a `start`, until `now`."""
    overhead: dict[str, float] = dict.fromkeys(_CAUSES, 0.0)
    steps, began = 0.0, None
    for row in rows:
        kind, seconds = row["kind"], row.get("seconds", 0.0)
        if kind in ("start", "resumed") and isinstance(seconds, Mapping):
            began = row.get("began") if began is None else began
            for cause, spent in seconds.items():
                overhead[cause] = overhead.get(cause, 0.0) + spent
        elif not isinstance(seconds, Mapping):
            waited = row.get("data_seconds", 0.0)
            if kind == "step":
                overhead["data"] += waited
                steps += seconds - waited
            elif kind in _CAUSE_OF_KIND:
                overhead[_CAUSE_OF_KIND[kind]] += seconds
    known = steps + sum(overhead.values())
    wall = max(known, now - (now if began is None else began))
    other = wall - known
    return Goodput(wall, steps, {**overhead, "other": other})


def interruption(kept: Sequence[_Row], dropped: Sequence[_Row], began: float) -> dict[str, float]:
    """Returns the seconds that an interruption cost a run that resumes.

        kept rows        | dropped rows     | no process       | new process
        … step 4  save 4 | step 5    step 6 |                  | resumed  step 5 …
                         |<----- lost ----->|<----- idle ----->|
                                                             began

    Dropped rows are of updates that will be made again; times are in seconds since 1970. A run
    without kept rows has lost nothing.
    """
    if not kept:
        return {}
    last_kept = kept[-1].get("time", began)
    last = dropped[-1].get("time", began) if dropped else last_kept
    return {"lost": max(0.0, last - last_kept), "idle": max(0.0, began - last)}
