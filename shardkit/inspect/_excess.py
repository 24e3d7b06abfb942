"""Why a program sends more over an axis than the textbook minimum, as far as its rows tell.

The minimum of tensor parallelism counts the column-row pairs of the layers. A table of tokens and a
head that are split over their vocabulary add one all-reduce forward and one backward: with L
layers 1/(2L) of the minimum, 1.13 times it with 4 layers and 1.02 times with 32.
"""

from collections.abc import Callable, Iterator, Sequence

from ._ledger import Row
from ._program import Declared

Share = Callable[[Row], float]
_WORTH = 0.01


def excess(
    rows: Sequence[Row], kind: str, least: float, declared: Declared, share: Share
) -> tuple[tuple[str, int], ...]:
    """Explains what goes beyond a minimum.

    Args:
      rows: what is sent over the axis.
      kind: the declared kind of parallelism on it, with its variant.
      least: the minimum, bytes per device and step.
      declared: layers and micro-batches.
      share: wire bytes of a row that belong to the axis.

    Returns:
      (what, bytes per device and step), the most first; each byte in one of them at most.
    """
    found: dict[str, float] = {}
    for row in rows:
        for what, part in _reasons(row, kind, rows, declared):
            found[what] = found.get(what, 0.0) + part * share(row)
    worth = {what: size for what, size in found.items() if size > _WORTH * least}
    return tuple((what, round(size)) for what, size in sorted(worth.items(), key=lambda x: -x[1]))


def _reasons(
    row: Row, kind: str, rows: Sequence[Row], declared: Declared
) -> Iterator[tuple[str, float]]:
    """What is in excess of a row, and which part of it."""
    if row.phase == "recompute":
        yield "sent again by recomputation", 1.0
    elif kind.startswith("tensor"):
        yield from _of_tensor(row, kind, rows, declared)
    elif kind == "data" and row.kind == "all-reduce" and not (row.whole or row.dcn):
        yield "of gradients all-reduced inside of each slice, where a reduce-scatter would do", 0.5
    elif kind in ("fsdp", "zero"):
        if row.kind == "all-reduce" and row.phase != "forward":
            yield "of gradients all-reduced, where a reduce-scatter would do", 0.5
        elif row.kind == "all-gather" and declared.accumulate > 1:
            k = declared.accumulate
            yield f"of weights gathered again in each of {k} micro-batches", 1 - 1 / k


def _of_tensor(
    row: Row, kind: str, rows: Sequence[Row], declared: Declared
) -> Iterator[tuple[str, float]]:
    # One that runs less often than there are layers stands outside of their loop.
    of_layers = (declared.layers or 1) * declared.accumulate
    if _runs(row) < of_layers and any(_runs(one) >= of_layers for one in rows):
        yield "outside of the layers, as embedding and loss", 1.0
        return
    left = 1.0
    if row.kind == "all-reduce" and row.phase == "backward":
        alike = max(map(row.operands.count, row.operands))
        left = 1 / alike
        if alike > 1:
            what = "of gradients reduced apart for each product that shares an input"
            yield what, 1 - left
    if row.kind == "all-reduce" and kind == "tensor+sequence":
        yield "all-reduced, where a reduce-scatter would do", left / 2


def _runs(row: Row) -> float:
    return (1 if row.trips is None else row.trips) * row.taken
