"""What a saved report keeps: the layouts of a step's arrays, and the schedules of pipelines."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """One array of the step's input and the part of it that a device holds."""

    # which part of the input it belongs to: `params`, `opt_state`, `model_state`, `batch` or `rest`
    part: str
    path: str  # its path in that part: `decoder/mlp/up/kernel`
    shape: tuple[int, ...]  # global shape
    dtype: str  # short name of the element type, `bf16`
    # logical axis name of each dim, None where it has none; None if no dim is named
    names: tuple[str | None, ...] | None
    # mesh axes that split each dim, the slowest first; empty for a dim that is whole
    spec: tuple[tuple[str, ...], ...]
    shard: tuple[int, ...]  # shape that one device holds
    device_bytes: int  # bytes that one device holds
    declared_replicated: bool  # the declaration says that every device holds all of it
    declared_by: str = ""  # the entry of the rule that decided its spec; "" if unknown


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
