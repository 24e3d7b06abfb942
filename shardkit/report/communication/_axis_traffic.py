"""What one device sends over each mesh axis: the one definition behind every table and picture.

A collective over several axes is divided among them (see `divide_row`), so that the axes add up to
the ledger's total. The optimizer's own collectives are part of it, and are told apart.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from ._ledger import Ledger, LedgerRow
from ._minimum import Minimum, divide_row


@dataclasses.dataclass(frozen=True)
class AxisTraffic:
    """What one device sends over one mesh axis in a step.

    Attributes:
      axis: the mesh axis; "" for collectives that span none.
      sent: wire bytes, the optimizer's among them; its share of collectives over several axes.
      optimizer: bytes of `sent` for the optimizer's own arithmetic, which no minimum has.
      hidden: bytes of `sent` while the device computes.
      collectives: number of rows of the ledger that span the axis.
      kind: kind of parallelism on it; "" where no minimum is known.
      minimum: the textbook minimum in bytes; None if unknown.
      ratio: `(sent − optimizer) ÷ minimum`; None if that is unknown or 0.
      reductions: how often each gradient is reduced over it; None if it does not split the batch.
      reductions_complete: whether no permute may hide a reduction that is not counted.
    """

    axis: str
    sent: int
    optimizer: int
    hidden: int
    collectives: int
    kind: str = ""
    minimum: float | None = None
    ratio: float | None = None
    reductions: float | None = None
    reductions_complete: bool = True


def measure_traffic(
    ledger: Ledger,
    splitting: Collection[str],
    minima: Sequence[Minimum] = (),
    reductions: Mapping[str, float] | None = None,
) -> tuple[AxisTraffic, ...]:
    """Adds up what is sent over each mesh axis, in mesh order; `sent` sums to `ledger.total()`.

    `splitting` are the axes that split parameters. "" is the axis of collectives that span none.
    """
    known = {minimum.axis: minimum for minimum in minima}
    return tuple(
        _measure_axis(axis, rows, known.get(axis), (reductions or {}).get(axis), ledger.complete)
        for axis, rows in _divide_ledger(ledger, splitting).items()
    )


def _divide_ledger(
    ledger: Ledger, splitting: Collection[str]
) -> dict[str, list[tuple[LedgerRow, int]]]:
    """Mesh axis → its rows, each with the axis's share of the bytes."""
    sizes = dict(ledger.mesh)
    parts: dict[str, list[tuple[LedgerRow, int]]] = {axis: [] for axis in sizes}
    for row in ledger:
        for axis, sent in divide_row(row, sizes, splitting).items():
            parts.setdefault(axis, []).append((row, sent))
    return parts


def _measure_axis(
    axis: str,
    rows: Sequence[tuple[LedgerRow, int]],
    least: Minimum | None,
    reductions: float | None,
    complete: bool,
) -> AxisTraffic:
    # Windowed permutes may reduce gradients too.
    hidden = any(row.windowed and row.phase in ("backward", "recompute") for row, _ in rows)
    return AxisTraffic(
        axis=axis,
        sent=sum(sent for _, sent in rows),
        optimizer=sum(sent for row, sent in rows if row.by_optimizer),
        hidden=sum(sent for row, sent in rows if row.overlapped),
        collectives=len(rows),
        kind=least.kind if least else "",
        minimum=least.bytes if least else None,
        ratio=least.ratio if least else None,
        reductions=reductions,
        reductions_complete=complete and not hidden,
    )
