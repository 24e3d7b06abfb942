"""How the operations of a program pass layouts on: one rule for each form of operation."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ._symbolic_sharding import Axes, SymbolicSharding, drop_repeated_axes, replicated, reshape_dims

Shapes = Sequence[tuple[int, ...]]
Rule = Callable[[Any, Sequence[SymbolicSharding], Shapes, Sequence[int]], SymbolicSharding]

MATERIALIZED = frozenset(
    {
        "dot_general",
        "conv_general_dilated",
        "gather",
        "concatenate",
        "sort",
        "top_k",
        "cumsum",
        "cumlogsumexp",
        "dynamic_update_slice",
        "scatter",
        "scatter-add",
        "random_bits",
        "threefry2x32",
    }
)
"""Operations whose results are written to memory; the others are fused into their readers."""

KEEPS_PARTIAL = frozenset(
    {"convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "neg", "select_n"}
)
"""Operations that a sum may be made behind."""

REDUCTIONS = ("reduce_", "argm")


def _broadcast(
    op: Any, ins: Sequence[SymbolicSharding], shapes: Shapes, out: Sequence[int]
) -> SymbolicSharding:
    dims: list[Axes] = [()] * len(out)
    if ins:
        for i, target in enumerate(op.params["broadcast_dimensions"]):
            dims[target] = ins[0].dims[i] if shapes[0][i] == out[target] else ()
    return SymbolicSharding(tuple(dims), stored=bool(ins) and ins[0].stored)


def _transpose(
    op: Any, ins: Sequence[SymbolicSharding], shapes: Shapes, out: Sequence[int]
) -> SymbolicSharding:
    return ins[0].with_dims(ins[0].dims[i] for i in op.params["permutation"])


def _reshape(
    op: Any, ins: Sequence[SymbolicSharding], shapes: Shapes, out: Sequence[int]
) -> SymbolicSharding:
    return ins[0].with_dims(reshape_dims(ins[0].dims, shapes[0], out))


def _squeeze(
    op: Any, ins: Sequence[SymbolicSharding], shapes: Shapes, out: Sequence[int]
) -> SymbolicSharding:
    gone = {d % len(shapes[0]) for d in op.params["dimensions"]}
    return ins[0].with_dims(dim for i, dim in enumerate(ins[0].dims) if i not in gone)


def _reduce(
    op: Any, ins: Sequence[SymbolicSharding], shapes: Shapes, out: Sequence[int]
) -> SymbolicSharding:
    gone = set(op.params["axes"])
    lost = frozenset(a for i, dim in enumerate(ins[0].dims) if i in gone for a in dim)
    dims = (dim for i, dim in enumerate(ins[0].dims) if i not in gone)
    return SymbolicSharding(tuple(dims), ins[0].partial | lost)


def _gather(
    op: Any, ins: Sequence[SymbolicSharding], shapes: Shapes, out: Sequence[int]
) -> SymbolicSharding:
    """Rows of a table: dims of the indices, then those of the slices; a split table gives sums."""
    numbers, table, places = op.params["dimension_numbers"], ins[0], ins[1]
    offsets = set(numbers.offset_dims)
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    sliced = iter(dim for i, dim in enumerate(table.dims) if i not in gone)
    rows = iter(places.dims)
    dims = [next(sliced, ()) if i in offsets else next(rows, ()) for i in range(len(out))]
    # Which rows are where decides first, as for a product with them.
    taken = {axis for i, dim in enumerate(dims) if i not in offsets for axis in dim}
    dims = [
        tuple(a for a in dim if a not in taken) if i in offsets else dim
        for i, dim in enumerate(dims)
    ]
    lost = {a for i in numbers.collapsed_slice_dims for a in table.dims[i]} - taken
    return SymbolicSharding(drop_repeated_axes(dims), frozenset(lost))


def _scatter(
    op: Any, ins: Sequence[SymbolicSharding], shapes: Shapes, out: Sequence[int]
) -> SymbolicSharding:
    numbers, updates = op.params["dimension_numbers"], ins[2]
    windows = list(numbers.update_window_dims)
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    order = iter(windows)
    dims = [() if i in gone else updates.dims[next(order)] for i in range(len(out))]
    lost = {a for i, dim in enumerate(updates.dims) if i not in windows for a in dim}
    for batch, index in zip(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    ):
        dims[batch] = ins[1].dims[index]
        lost -= set(dims[batch])
    return SymbolicSharding(drop_repeated_axes(dims), frozenset(lost) - {"micro"})


def shard_scatter(op: Any, laid: SymbolicSharding, want: Sequence[Axes]) -> SymbolicSharding:
    """The sum that a scatter adds up, of which each device makes the rows that it wants."""
    taken = laid.axes | laid.partial
    inserted = op.params["dimension_numbers"].inserted_window_dims
    return laid.with_dims(
        tuple(a for a in want[i] if a not in taken) if i in inserted else dim
        for i, dim in enumerate(laid.dims)
    )


def _elementwise(
    op: Any, ins: Sequence[SymbolicSharding], shapes: Shapes, out: Sequence[int]
) -> SymbolicSharding:
    """Elementwise, or anything like it: each dim as the operand that splits it most."""
    dims: list[Axes] = [()] * len(out)
    fit = [one for one, shape in zip(ins, shapes, strict=True) if len(shape) == len(out)]
    for one, shape in zip(ins, shapes, strict=True):
        if len(shape) != len(out):
            continue
        for i, dim in enumerate(one.dims):
            if shape[i] == out[i] and len(dim) > len(dims[i]):
                dims[i] = dim
    partial = frozenset().union(*(one.partial for one in fit)) if fit else frozenset()
    stored = bool(fit) and all(one.stored for one in fit)
    return SymbolicSharding(drop_repeated_axes(dims), partial, stored)


def _replicate(
    op: Any, ins: Sequence[SymbolicSharding], shapes: Shapes, out: Sequence[int]
) -> SymbolicSharding:
    return replicated(len(out))


_RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "gather": _gather,
    "scatter-add": _scatter,
    "scatter": _scatter,
    "iota": _replicate,
}


def propagate(
    op: Any, ins: Sequence[SymbolicSharding], shapes: Shapes, out: Sequence[int]
) -> SymbolicSharding:
    """Layout of an operation's result from those of its operands."""
    rule = _RULES.get(op.name)
    if rule is None:
        reduces = op.name.startswith(REDUCTIONS) and "axes" in op.params
        rule = _reduce if reduces else _elementwise
    return rule(op, ins, shapes, out)


def conflicting_axes(
    own: SymbolicSharding, other: SymbolicSharding, pairs: Mapping[int, int]
) -> set[str]:
    """Axes of one operand that the other has on a dim that is not the same one."""
    found = set()
    for i, dim in enumerate(own.dims):
        beside = other.dims[pairs[i]] if i in pairs else ()
        found |= {axis for axis in dim if axis in other.axes and axis not in beside}
    return found


def contract(
    op: Any, left: SymbolicSharding, right: SymbolicSharding, shape: Sequence[int]
) -> tuple[list[Axes], list[str], float]:
    """Dims of a product's result, axes that its sum runs over, FLOPs per element of it."""
    (lc, rc), (lb, rb) = op.params["dimension_numbers"]
    dims = [
        tuple(dict.fromkeys((*left.dims[a], *right.dims[b]))) for a, b in zip(lb, rb, strict=True)
    ]
    dims += [dim for i, dim in enumerate(left.dims) if i not in (*lc, *lb)]
    dims += [dim for i, dim in enumerate(right.dims) if i not in (*rc, *rb)]
    lost = [a for i, j in zip(lc, rc, strict=True) for a in (*left.dims[i], *right.dims[j])]
    return dims, lost, 2.0 * math.prod(shape[i] for i in lc)
