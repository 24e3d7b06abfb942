"""Compares what a program sends over a mesh axis with the textbook minimum of the axis's kind.

The minima are methods of the kinds in `parallel/`. In all of them `n` is the size of the mesh axis,
and sizes are bytes on one device, as the device would hold them without this axis: weights W in the
dtype they are gathered in, gradients G in the dtype they are reduced in, one
`[batch, length, embed]` activation A.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from .._program import AxisKind, PlacedLeaf, Program
from ._ledger import Ledger, LedgerRow

# A ratio up to this needs no explanation.
_SPARE = 1.1
# Parts of the excess below this share of the minimum are left out.
_WORTH = 0.01
_RECOMPUTATION = "sent again by recomputation", 1.0


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The textbook minimum of one mesh axis, and what the program sends.

    Attributes:
      axis: the mesh axis.
      kind: kind of parallelism on it; `data by specs` where it follows from specs alone.
      bytes: fewest wire bytes per device and step.
      wire: what is sent over the axis; see `axis_wire_bytes`.
      excess: (reason, bytes) of traffic beyond the minimum, as far as the rows explain it.
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


def compute_minima(program: Program) -> tuple[Minimum, ...]:
    """Returns the minimum of each mesh axis whose kind is declared, or follows from specs."""
    declared = program.declared
    kinds = {kind.axis: kind for kind in (*declared.by_specs, *declared.kinds)}
    minima = (_compare_to_minimum(program, kind) for kind in kinds.values())
    return tuple(minimum for minimum in minima if minimum is not None)


def axis_wire_bytes(
    ledger: Ledger, axis: str, sizes: Mapping[str, int], leaves: Sequence[PlacedLeaf]
) -> int:
    """Wire bytes over one axis, with its share of collectives that span several.

    Collectives of the optimizer's own arithmetic are left out: no textbook minimum has them.

    A reduction or gather of V over axes of sizes a and b sends as much as one of V over a and then
    one of V/a over b. The axes that split parameters come first, as for gradients that are
    scattered before they are reduced over the other axes.
    """
    share = _axis_shares(axis, sizes, leaves)
    return round(sum(share(row) for row in _comparable_rows(ledger, axis)))


def _compare_to_minimum(program: Program, kind: AxisKind) -> Minimum | None:
    """Returns the minimum of an axis and its traffic; None if its kind has no minimum."""
    least, axis = kind.minimum(program), kind.axis
    if least is None:
        return None
    wire = axis_wire_bytes(program.ledger, axis, program.sizes, program.leaves)
    excess = _explain_excess(program, kind, least) if wire > _SPARE * least else ()
    name = f"{kind.name} by specs" if kind in program.declared.by_specs else kind.name
    return Minimum(axis, name, least, wire, excess)


def _explain_excess(program: Program, kind: AxisKind, least: float) -> tuple[tuple[str, int], ...]:
    """Returns (reason, bytes) of traffic beyond a minimum, the most first; no byte counts twice."""
    rows = _comparable_rows(program.ledger, kind.axis)
    share = _axis_shares(kind.axis, program.sizes, program.leaves)
    excess: dict[str, float] = {}
    for row in rows:
        recomputed = row.phase == "recompute"
        for reason, part in [_RECOMPUTATION] if recomputed else kind.excess(row, rows, program):
            excess[reason] = excess.get(reason, 0.0) + part * share(row)
    ordered = sorted(excess.items(), key=lambda item: -item[1])
    return tuple((reason, round(size)) for reason, size in ordered if size > _WORTH * least)


def _comparable_rows(ledger: Ledger, axis: str) -> list[LedgerRow]:
    return [row for row in ledger.where(axis) if not row.by_optimizer]


def _axis_shares(
    axis: str, sizes: Mapping[str, int], leaves: Sequence[PlacedLeaf]
) -> Callable[[LedgerRow], float]:
    splitting = {name for leaf in leaves if leaf.part == "params" for name in leaf.axes()}
    return functools.partial(_axis_share, axis=axis, sizes=sizes, splitting=splitting)


def _axis_share(row: LedgerRow, axis: str, sizes: Mapping[str, int], splitting: set[str]) -> float:
    if row.kind not in ("all-reduce", "all-gather", "reduce-scatter") or not row.full_axes:
        return row.wire_bytes
    ordered = sorted(row.axes, key=lambda name: name not in splitting)
    before = math.prod(sizes[name] for name in ordered[: ordered.index(axis)])
    own = (sizes[axis] - 1) / sizes[axis] / before
    return row.wire_bytes * own / (1 - 1 / row.group)
