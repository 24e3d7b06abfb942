"""`TickTable`: the schedule of a pipeline as a report shows it, one text per stage and tick."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TickTable:
    """What each place along a mesh axis does in each tick of a step: a pipeline's schedule.

    Attributes:
      axis: the mesh axis.
      name: of the schedule.
      rows: for each place a text per tick: `F0` is the forward pass of micro-batch 0, `B0` its
        backward pass, `W0` its half for weights; `""` is idle.

    >>> table = TickTable("pipe", "gpipe", (("F0", "B0", ""), ("", "F0", "B0")))
    >>> print(table)
    pipe runs gpipe: 3 ticks, 33% idle
    """

    axis: str
    name: str
    rows: tuple[tuple[str, ...], ...]

    @property
    def idle(self) -> float:
        """Share of the ticks in which a place does nothing: the bubble."""
        cells = [cell for row in self.rows for cell in row]
        return cells.count("") / len(cells)

    def __str__(self) -> str:
        """Returns `pipe runs 1f1b: 10 ticks, 20% idle`."""
        ticks = len(self.rows[0])
        return f"{self.axis} runs {self.name}: {ticks} ticks, {self.idle:.0%} idle"
