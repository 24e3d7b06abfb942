"""Compares what a program sends over a mesh axis with the textbook minimum of the axis's kind.

The minima are methods of the kinds in `parallel/`. In all of them `n` is the size of the mesh axis,
and sizes are bytes on one device, as the device would hold them without this axis: weights W in the
dtype they are gathered in, gradients G in the dtype they are reduced in, one
`[batch, length, embed]` activation A.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from .._placed_leaf import PlacedLeaf
from .._program import AxisKind, Program
from ._ledger import Ledger, LedgerRow


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The textbook minimum of one mesh axis, and what the program sends.

    Attributes:
      axis: the mesh axis.
      kind: kind of parallelism on it; `data by specs` where it follows from specs alone.
      bytes: fewest wire bytes per device and step.
      wire: what is sent over the axis; see `axis_wire_bytes`.
      excess: (reason, bytes) of traffic beyond the minimum, as far as findings and rows explain it.
    """

    axis: str
    kind: str
    bytes: float
    wire: int
    excess: tuple[tuple[str, int], ...] = ()

    @property
    def ratio(self) -> float | None:
        """`wire` ÷ `bytes`; None if the minimum is 0."""
        return self.wire / self.bytes if self.bytes else None

    @property
    def unexplained(self) -> float:
        """Bytes beyond the minimum for which `excess` has no reason; 0 below 2 % of it."""
        unexplained = self.wire - self.bytes - sum(size for _, size in self.excess)
        return unexplained if unexplained > 0.02 * self.bytes else 0.0


def compute_minima(program: Program) -> tuple[Minimum, ...]:
    """Returns the minimum of each mesh axis whose kind is declared, or follows from specs."""
    minima = (_compare_to_minimum(program, kind) for kind in judging_kinds(program).values())
    return tuple(minimum for minimum in minima if minimum is not None)


def judging_kinds(program: Program) -> dict[str, AxisKind]:
    """The kind of each mesh axis whose minimum counts: the declared one, or one from specs."""
    declared = program.declared
    return {kind.axis: kind for kind in (*declared.by_specs, *declared.kinds)}


def axis_wire_bytes(
    ledger: Ledger, axis: str, sizes: Mapping[str, int], splitting: Collection[str]
) -> int:
    """Wire bytes over one axis, with its share of collectives that span several.

    Collectives of the optimizer's own arithmetic are left out, but for moves of whole matrices:
    no textbook minimum has them.
    """
    rows = comparable_rows(ledger, axis)
    return sum(divide_row(row, sizes, splitting)[axis] for row in rows)


def divide_row(
    row: LedgerRow, sizes: Mapping[str, int], splitting: Collection[str]
) -> dict[str, int]:
    """Divides a row's wire bytes among its mesh axes; they add up to all of them.

    A reduction or gather of V over axes of sizes a and b sends as much as one of V over a and then
    one of V/a over b:

        all-gather of 1 MiB over (fsdp=4, data=2)   wire 7/8 MiB = fsdp 3/4 + data 1/8

    The axes that split parameters come first, as for gradients that are scattered before they are
    reduced over the other axes.

    Args:
      row: of the ledger.
      sizes: mesh axis → devices along it.
      splitting: mesh axes that split parameters.
    """
    if not row.axes:
        return {"": row.wire_bytes}
    ordered = sorted(row.axes, key=lambda name: name not in splitting)
    ways = [math.prod(sizes[name] for name in ordered[:n]) for n in range(len(ordered) + 1)]
    # Rounded on the running sum, so that no byte is lost or counted twice.
    whole = 1 - 1 / ways[-1] or 1
    ends = [round(row.wire_bytes * (1 - 1 / n) / whole) for n in ways]
    return {name: end - at for name, at, end in zip(ordered, ends, ends[1:], strict=False)}


def _compare_to_minimum(program: Program, kind: AxisKind) -> Minimum | None:
    """Returns the minimum of an axis and its traffic; None if its kind has no minimum."""
    least, axis = kind.minimum(program), kind.axis
    if least is None:
        return None
    least += dict(program.declared.owned).get(axis, 0.0)
    wire = axis_wire_bytes(program.ledger, axis, program.sizes, weight_axes(program.leaves))
    name = f"{kind.name} by specs" if kind in program.declared.by_specs else kind.name
    return Minimum(axis, name, least, wire)


def comparable_rows(ledger: Ledger, axis: str) -> list[LedgerRow]:
    """The collectives over an axis that a minimum can count: not the optimizer's own arithmetic."""
    return [row for row in ledger.where(axis) if not row.by_optimizer or row.moves_matrices]


def weight_axes(leaves: Sequence[PlacedLeaf]) -> set[str]:
    """Mesh axes that split parameters."""
    return {axis for leaf in leaves if leaf.part == "params" for axis in leaf.axes()}
