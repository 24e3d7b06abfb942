"""What a plan says: ranked layouts, why each is where it is, and what was left out and why."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .._core.tree import format_bytes
from ._candidate import Candidate
from ._plot import plot_front


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer to: which mesh?

    Attributes:
      target: the devices.
      rows: the layouts that fit, fastest first.
      tight: the layouts that are legal and do not fit, fastest first.
      rejected: reason → number of layouts, and an example.
      considered: number of layouts looked at.
      took: seconds that looking took.
      changes: what would change the answer.
      sensitivity: (what, the layout that then wins, its seconds).
      assumptions: what the estimates take for granted.
      problems: what could not be read; with any, estimates are lower bounds.
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
        """Layouts than which none is both faster and smaller, the fastest first.

        Those that do not fit are among them.
        """
        return pareto_front((*self.rows, *self.tight))

    def plot(self, path: str | Path) -> Path:
        """Draws memory against time: every layout, the front's by name, and the capacity.

        Args:
          path: `.png` or `.svg`; a file that is there is replaced.

        Raises:
          ConfigError: nothing can be written there, or matplotlib (`shardkit[plot]`) is missing.
        """
        caption = (
            f"{self.considered} layouts of one step on {self.target}; modelled, nothing was run"
        )
        return plot_front(Path(path), self.rows, self.tight, self.pareto(), caption)

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(dataclasses.asdict(self), default=float, indent=1)

    def __str__(self) -> str:
        """A page of text: the shortlist, the declaration to paste, what would change it."""
        rate = self.considered / self.took if self.took else 0.0
        lines = [
            f"{self.considered} layouts on {self.target} in {self.took:.1f} s ({rate:.0f}/s): "
            f"{len(self.rows)} fit, {len(self.tight)} do not. All figures modelled unless marked."
        ]
        for place, one in enumerate(self.rows[:8], 1):
            lines.append(f"{place:3}. {one}")
            if one.compiled:
                lines.append(
                    f"     compiled: {one.compiled['seconds'] * 1e3:.4g} ms by its schedule, "
                    f"{format_bytes(one.compiled['total'])}"
                )
            if one.failed:
                lines.append(f"     not compiled: {one.failed}")
        lines += ["Declaration of the first:", *self.best.declaration.splitlines()]
        if self.changes:
            lines += ["What would change the answer:", *(f"  {text}" for text in self.changes)]
        lines += [f"  {what}: {row}" for what, row, _ in self.sensitivity]
        lines += ["Left out:"] if self.rejected else []
        lines += [f"  {n} for {why}; as {one}" for why, (n, one) in self.rejected.items()]
        lines += [f"  lower bound: {text}" for text in self.problems]
        lines.append(f"Assumed: {'; '.join(self.assumptions)}")
        return "\n".join(lines)


def pareto_front(rows: Iterable[Candidate]) -> list[Candidate]:
    """Layouts than which none is both faster and smaller, the fastest first."""
    front: list[Candidate] = []
    for one in sorted(rows, key=lambda c: (c.seconds, c.total)):
        if not front or one.total < front[-1].total:
            front.append(one)
    return front
