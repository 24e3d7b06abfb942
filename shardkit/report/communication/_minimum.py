"""What a program sends over a mesh axis beside the textbook minimum of the axis's kind.

The minima themselves stand beside each strategy, in `parallel/`. In all of them `n` is the size of
the mesh axis, and sizes are bytes on one device, as the device would hold them without this axis:
weights W in the dtype they are gathered in, gradients G in the dtype they are reduced in, one
`[batch, length, embed]` activation A.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from .._axis_kind import AxisKind
from .._program import Placed, Program
from ._ledger import Ledger, Row

# A ratio up to this needs no explanation.
_SPARE = 1.1
# Parts of the excess below this share of the minimum are left out.
_WORTH = 0.01
_AGAIN = "sent again by recomputation", 1.0


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The textbook minimum of one mesh axis, beside what the program sends.

    Attributes:
      axis: the mesh axis.
      kind: kind of parallelism on it; `data by specs` where the strategy names none and the specs
        tell.
      bytes: fewest wire bytes per device and step.
      wire: what is sent over the axis; see `wire_over`.
      excess: (what, bytes) of what goes beyond the minimum, as far as the rows tell.
    """

    axis: str
    kind: str
    bytes: float
    wire: int
    excess: tuple[tuple[str, int], ...] = ()

    @property
    def ratio(self) -> float | None:
        """How many times the minimum is sent; None where the minimum is nothing."""
        return self.wire / self.bytes if self.bytes else None


def minima(program: Program, ledger: Ledger) -> tuple[Minimum, ...]:
    """The minimum of every mesh axis whose kind is declared, or told by specs, and has one."""
    declared = program.declared
    kinds = {kind.axis: kind for kind in (*declared.by_specs, *declared.kinds)}
    found = (_beside(program, ledger, kind) for kind in kinds.values())
    return tuple(one for one in found if one is not None)


def wire_over(ledger: Ledger, axis: str, sizes: Mapping[str, int], leaves: Sequence[Placed]) -> int:
    """Wire bytes over one axis, with the share of collectives that span several.

    What the optimizer's own arithmetic sends is in no textbook and left out.

    A reduction or gather over axes of sizes a and b sends what one over a of V and then one over
    b of V/a send together. The axes that split parameters come first, as for gradients that are
    scattered before they are reduced over the rest.
    """
    share = _shares(axis, sizes, leaves)
    return round(sum(share(row) for row in _counted(ledger, axis)))


def _beside(program: Program, ledger: Ledger, kind: AxisKind) -> Minimum | None:
    """The minimum of an axis beside what a program sends over it; None where there is none."""
    least, axis = kind.minimum(program), kind.axis
    if least is None:
        return None
    wire = wire_over(ledger, axis, program.sizes, program.leaves)
    more = _excess(program, ledger, kind, least) if wire > _SPARE * least else ()
    name = f"{kind.name} by specs" if kind in program.declared.by_specs else kind.name
    return Minimum(axis, name, least, wire, more)


def _excess(
    program: Program, ledger: Ledger, kind: AxisKind, least: float
) -> tuple[tuple[str, int], ...]:
    """(what, bytes) of what goes beyond a minimum, the most first; each byte in one at most."""
    rows = _counted(ledger, kind.axis)
    share = _shares(kind.axis, program.sizes, program.leaves)
    found: dict[str, float] = {}
    for row in rows:
        again = row.phase == "recompute"
        for what, part in [_AGAIN] if again else kind.excess(row, rows, program):
            found[what] = found.get(what, 0.0) + part * share(row)
    worth = {what: size for what, size in found.items() if size > _WORTH * least}
    return tuple((what, round(size)) for what, size in sorted(worth.items(), key=lambda x: -x[1]))


def _counted(ledger: Ledger, axis: str) -> list[Row]:
    return [row for row in ledger.where(axis) if not row.by_optimizer]


def _shares(
    axis: str, sizes: Mapping[str, int], leaves: Sequence[Placed]
) -> Callable[[Row], float]:
    splitting = {name for leaf in leaves if leaf.part == "params" for name in leaf.axes()}
    return functools.partial(_share, axis=axis, sizes=sizes, splitting=splitting)


def _share(row: Row, axis: str, sizes: Mapping[str, int], splitting: set[str]) -> float:
    if row.kind not in ("all-reduce", "all-gather", "reduce-scatter") or not row.whole:
        return row.wire_bytes
    ordered = sorted(row.axes, key=lambda name: name not in splitting)
    before = math.prod(sizes[name] for name in ordered[: ordered.index(axis)])
    own = (sizes[axis] - 1) / sizes[axis] / before
    return row.wire_bytes * own / (1 - 1 / row.group)
