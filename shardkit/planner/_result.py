"""`Plan`: ranked layouts, what would change the ranking, and the reason of each left out."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .._core.io._notebook import text_html
from .._core.tree import format_bytes
from ._candidate import Candidate
from ._plot import plot_front


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every layout of a model on a target, ranked.

    Attributes:
      target: the devices.
      rows: the layouts that fit, fastest first.
      tight: the layouts that are legal and do not fit, fastest first.
      rejected: reason → number of layouts, and an example.
      considered: number of layouts, legal or not.
      took: seconds of the search.
      changes: what would change the answer.
      sensitivity: (what changes, the layout that then wins, its seconds).
      assumptions: of the estimates.
      problems: what could not be costed; with any, estimates are lower bounds.
    """

    target: str
    rows: tuple[Candidate, ...]
    tight: tuple[Candidate, ...]
    rejected: Mapping[str, tuple[int, str]]
    considered: int
    took: float
    changes: tuple[str, ...] = ()
    sensitivity: tuple[tuple[str, str, float], ...] = ()
    assumptions: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate:
        """The fastest layout that fits."""
        return self.rows[0]

    def pareto(self) -> list[Candidate]:
        """The Pareto front of time and memory, fastest first; also layouts that do not fit."""
        return pareto_front((*self.rows, *self.tight))

    def plot(self, path: str | Path) -> Path:
        """Draws memory against time: every layout, the Pareto front labelled, and the capacity.

        Args:
          path: `.png` or `.svg`; an existing file is replaced.

        Raises:
          ConfigError: the file cannot be written, or matplotlib (`shardkit[plot]`) is missing.
        """
        caption = (
            f"{self.considered} layouts of one step on {self.target}; modelled, nothing was run"
        )
        return plot_front(Path(path), self.rows, self.tight, self.pareto(), caption)

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(dataclasses.asdict(self), default=float, indent=1)

    def __repr__(self) -> str:
        first = f", first {self.best.layout}" if self.rows else ""
        return f"Plan({self.target}: {len(self.rows)} of {self.considered} layouts fit{first})"

    def _repr_html_(self) -> str:
        return text_html(str(self))

    def __str__(self) -> str:
        """A page of text: the first 8 layouts, the code of the first, what would change it."""
        rate = self.considered / self.took if self.took else 0.0
        lines = [
            f"{self.considered} layouts on {self.target} in {self.took:.1f} s ({rate:.0f}/s): "
            f"{len(self.rows)} fit, {len(self.tight)} do not. All figures modelled unless marked."
        ]
        for place, candidate in enumerate(self.rows[:8], 1):
            lines.append(f"{place:3}. {candidate}")
            if compiled := candidate.compiled:
                milliseconds, total = compiled["seconds"] * 1e3, format_bytes(compiled["total"])
                lines.append(f"     compiled: {milliseconds:.4g} ms by its schedule, {total}")
            if candidate.failed:
                lines.append(f"     not compiled: {candidate.failed}")
        lines += ["Code of the first:", *self.best.declaration.splitlines()]
        if self.changes:
            lines += ["What would change the answer:", *(f"  {text}" for text in self.changes)]
        lines += [f"  {what}: {row}" for what, row, _ in self.sensitivity]
        lines += ["Left out:"] if self.rejected else []
        lines += [f"  {n} for {why}; as {row}" for why, (n, row) in self.rejected.items()]
        lines += [f"  lower bound: {text}" for text in self.problems]
        lines.append(f"Assumed: {'; '.join(self.assumptions)}")
        return "\n".join(lines)


def pareto_front(rows: Iterable[Candidate]) -> list[Candidate]:
    """The layouts to which no other is both faster and smaller, fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(rows, key=lambda c: (c.seconds, c.total)):
        if not front or candidate.total < front[-1].total:
            front.append(candidate)
    return front
