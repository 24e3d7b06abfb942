"""How often each gradient byte is reduced over a mesh axis in one step."""

import math
from collections.abc import Mapping, Sequence

from .._placed_leaf import PlacedLeaf
from ..hlo._hlo import parse_shapes
from ._ledger import Ledger, LedgerRow

_TILE = 8 * 128
_ROUNDING = 1e-6  # of a share of trips, as a float
REDUCING = ("all-reduce", "reduce-scatter")


def gradient_reductions(
    ledger: Ledger, axis: str, leaves: Sequence[PlacedLeaf], sizes: Mapping[str, int]
) -> list[tuple[LedgerRow, float]]:
    """Arrays of gradients that are reduced over an axis, each with its row and its elements.

    These are all-reduces and reduce-scatters of arrays in the backward pass and the step's own
    reduction; in the forward pass, where some losses make their gradients, only those of arrays the
    size of a parameter's gradient. What the update reduces is the optimizer's own arithmetic.

    Elements are those of one execution on one device, as if other axes that split parameters had
    been reduced over before.
    """
    params = [leaf for leaf in leaves if leaf.part == "params"]
    splitting = {name for leaf in params for name in leaf.axes()}
    gradients = {_gradient_size(leaf, axis, sizes) for leaf in params}
    reductions = []
    for row in ledger.where(axis):
        # A reduction over slices continues one within each slice, which is counted already, unless
        # the axis is not split within a slice (`full_axes`).
        if row.kind not in REDUCING or (row.dcn and not row.full_axes):
            continue
        shards = _shard_count(splitting & set(row.axes), axis, sizes)
        for count, phase in _array_sizes(row):
            size = count / shards
            whole = phase == "forward" and size * row.counted_trips in gradients
            if phase in ("backward", "other") or whole:
                reductions.append((row, size))
    return reductions


def repeats_reductions(
    ledger: Ledger, axis: str, leaves: Sequence[PlacedLeaf], sizes: Mapping[str, int]
) -> bool:
    """Whether a loop reduces one gradient in several trips, as when it accumulates them.

    A loop over layers reduces a layer's gradient in each trip, so no more often than there are
    layers; loops over micro-batches or over the ticks of a pipeline reduce the same one again.
    """
    most: dict[float, int] = {}
    for leaf in leaves:
        if leaf.part == "params" and leaf.leaf.nbytes:
            size, layers = _gradient_size(leaf, axis, sizes), (*leaf.leaf.shape, 1)[0]
            most[size] = max(1, most.get(size, 1))
            most[size / layers] = max(layers, most.get(size / layers, 1))
    reductions = gradient_reductions(ledger, axis, leaves, sizes)
    return any(row.runs > most.get(size, row.runs) + _ROUNDING for row, size in reductions)


def reductions_per_step(
    ledger: Ledger, axis: str, leaves: Sequence[PlacedLeaf], sizes: Mapping[str, int]
) -> float:
    """Elements reduced over an axis per step, in units of one device's gradient.

    1.0 means that each gradient is reduced once, in one collective or in many, all layers at once
    or layer by layer in a loop. With k micro-batches that each reduce it is k. If one of several
    parameters is reduced twice, the result is a fraction above 1. Dtypes do not matter; scalars
    (losses, norms) do not count. Use it for axes that split the rows of the batch: over other axes
    the backward pass also reduces activations.

    A device's gradient is what it holds before the reduction: split over the axes that split the
    parameter, other than `axis` itself.
    """
    params = [leaf for leaf in leaves if leaf.part == "params"]
    gradient = sum(_gradient_size(leaf, axis, sizes) for leaf in params)
    rows = gradient_reductions(ledger, axis, leaves, sizes)
    reduced = sum(size * row.runs for row, size in rows)
    if any(row.dcn for row, _ in rows):
        # Between slices arrays are packed together with the loss, each padded to whole tiles.
        reduced -= min(max(0, reduced - gradient), _TILE * (len(params) + 1))
    return reduced / gradient if gradient else 0.0


def _gradient_size(leaf: PlacedLeaf, axis: str, sizes: Mapping[str, int]) -> float:
    """Elements of a parameter's gradient on one device, before it is reduced over `axis`."""
    return math.prod(leaf.leaf.shape) / _shard_count(leaf.axes(), axis, sizes)


def _shard_count(axes: Sequence[str] | set[str], axis: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[name] for name in axes if name != axis)


def _array_sizes(row: LedgerRow) -> list[tuple[int, str]]:
    """Elements and phase of each array of a row; scalars are left out."""
    counts = [math.prod(shape.dims) for text in row.operands for shape in parse_shapes(text)]
    return [(n, phase) for n, phase in zip(counts, row.phases, strict=True) if n > 1]
