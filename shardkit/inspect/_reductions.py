"""How often each gradient byte is reduced over a mesh axis in one step."""

import math
from collections.abc import Mapping, Sequence

from ._hlo import shapes_of
from ._ledger import Ledger, Row
from ._program import Placed

_KINDS = ("all-reduce", "reduce-scatter")


def gradient_reductions(ledger: Ledger, axis: str) -> list[Row]:
    """Rows that may reduce gradients over an axis.

    All-reduces and reduce-scatters of arrays, outside of the forward pass and its repetition.
    """
    return [
        row
        for row in ledger.where(axis)
        if row.kind in _KINDS and row.phase not in ("forward", "recompute") and _elements(row)
    ]


def reductions_per_step(
    ledger: Ledger, axis: str, leaves: Sequence[Placed], sizes: Mapping[str, int]
) -> float:
    """Elements reduced over an axis per step, in units of one device's gradient.

    1.0 says that every gradient is reduced once, in one collective or in many, whole or layer by
    layer in a loop; with accumulation of k inside of the loop it is k. One parameter out of
    several that is reduced twice shows as a fraction above 1. Dtypes do not matter, scalars
    (losses, norms) do not count. It means something for axes that split the rows of the batch;
    over others the backward pass also reduces activations.

    A device's gradient is what it holds before the reduction: split over the axes that split the
    parameter, other than `axis` itself. A row that spans other such axes too is counted as if it
    had been reduced over those first.

    Args:
      ledger: the collectives.
      axis: a mesh axis.
      leaves: the arguments of the step, its parameters among them.
      sizes: mesh axis → size.
    """
    params = [leaf for leaf in leaves if leaf.part == "params"]
    gradient = sum(math.prod(leaf.leaf.shape) / _ways(leaf.axes(), axis, sizes) for leaf in params)
    splitting = {name for leaf in params for name in leaf.axes()}
    reduced = sum(
        _elements(row) * (row.trips or 1) / _ways(splitting & set(row.axes), axis, sizes)
        for row in gradient_reductions(ledger, axis)
    )
    return reduced / gradient if gradient else 0.0


def _ways(axes: Sequence[str] | set[str], axis: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[name] for name in axes if name != axis)


def _elements(row: Row) -> int:
    """Elements of the arrays of a row; scalars are none."""
    counts = [math.prod(shape.dims) for text in row.operands for shape in shapes_of(text)]
    return sum(count for count in counts if count > 1)
