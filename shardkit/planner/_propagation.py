"""How the operations of a program propagate shardings: one rule for each form of operation."""

import math
from collections.abc import Callable, Mapping, Sequence

from ._program import Op
from ._symbolic_sharding import (
    MICRO,
    Axes,
    SymbolicSharding,
    drop_repeated_axes,
    replicated,
    reshape_dims,
)

Shape = Sequence[int]
Shapes = Sequence[tuple[int, ...]]
Shardings = Sequence[SymbolicSharding]
Rule = Callable[[Op, Shardings, Shapes, Shape], SymbolicSharding]

MATERIALIZED = frozenset(
    """dot_general conv_general_dilated gather concatenate sort top_k cumsum cumlogsumexp
    dynamic_update_slice scatter scatter-add random_bits threefry2x32""".split()
)
"""Operations whose results are written to memory; the others are fused into their readers."""

KEEPS_PARTIAL = frozenset(
    {"convert_element_type", "transpose", "reshape", "squeeze", "neg", "select_n"}
)
"""Operations that a partial sum passes unreduced."""
STAYS_PARTIAL = KEEPS_PARTIAL | {"add_any", "gather", "scatter-add"}
"""Operations whose result may be a partial sum; of all others it is reduced at once."""

_REDUCTIONS = ("reduce_", "argm")


def is_materialized(op: Op) -> bool:
    """Whether an operation's result is written to memory."""
    return op.name in MATERIALIZED or op.name.startswith(_REDUCTIONS)


def _broadcast(op: Op, ins: Shardings, shapes: Shapes, out: Shape) -> SymbolicSharding:
    dims: list[Axes] = [()] * len(out)
    if ins:
        for i, target in enumerate(op.params["broadcast_dimensions"]):
            dims[target] = ins[0].dims[i] if shapes[0][i] == out[target] else ()
    return SymbolicSharding(tuple(dims), is_param=bool(ins) and ins[0].is_param)


def _transpose(op: Op, ins: Shardings, shapes: Shapes, out: Shape) -> SymbolicSharding:
    return ins[0].with_dims(ins[0].dims[i] for i in op.params["permutation"])


def _reshape(op: Op, ins: Shardings, shapes: Shapes, out: Shape) -> SymbolicSharding:
    return ins[0].with_dims(reshape_dims(ins[0].dims, shapes[0], out))


def _squeeze(op: Op, ins: Shardings, shapes: Shapes, out: Shape) -> SymbolicSharding:
    dropped = {d % len(shapes[0]) for d in op.params["dimensions"]}
    return ins[0].with_dims(dim for i, dim in enumerate(ins[0].dims) if i not in dropped)


def _reduce(op: Op, ins: Shardings, shapes: Shapes, out: Shape) -> SymbolicSharding:
    reduced = set(op.params["axes"])
    summed = frozenset(a for i, dim in enumerate(ins[0].dims) if i in reduced for a in dim)
    dims = (dim for i, dim in enumerate(ins[0].dims) if i not in reduced)
    return SymbolicSharding(tuple(dims), ins[0].partial | summed)


def _gather(op: Op, ins: Shardings, shapes: Shapes, out: Shape) -> SymbolicSharding:
    """Rows of a table: dims of the indices, then those of the slices; a split table gives sums.

    table[V_tensor, D_fsdp], indices[B_data] → rows[B_data, D_fsdp], partial over tensor
    """
    numbers, table, indices = op.params["dimension_numbers"], ins[0], ins[1]
    offsets = set(numbers.offset_dims)
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    sliced = iter(dim for i, dim in enumerate(table.dims) if i not in dropped)
    rows = iter(indices.dims)
    dims = [next(sliced, ()) if i in offsets else next(rows, ()) for i in range(len(out))]
    # The indices' axes win over those of the slices, as in a product with a one-hot matrix.
    used = {axis for i, dim in enumerate(dims) if i not in offsets for axis in dim}
    dims = [
        tuple(a for a in dim if a not in used) if i in offsets else dim
        for i, dim in enumerate(dims)
    ]
    summed = {a for i in numbers.collapsed_slice_dims for a in table.dims[i]} - used
    return SymbolicSharding(drop_repeated_axes(dims), frozenset(summed))


def _scatter(op: Op, ins: Shardings, shapes: Shapes, out: Shape) -> SymbolicSharding:
    """The reverse: dims of the windows; rows that other devices update are partial sums."""
    numbers, updates = op.params["dimension_numbers"], ins[2]
    windows = list(numbers.update_window_dims)
    inserted = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    order = iter(windows)
    dims = [() if i in inserted else updates.dims[next(order)] for i in range(len(out))]
    summed = {a for i, dim in enumerate(updates.dims) if i not in windows for a in dim}
    for batch, index in zip(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    ):
        dims[batch] = ins[1].dims[index]
        summed -= set(dims[batch])
    return SymbolicSharding(drop_repeated_axes(dims), frozenset(summed) - {MICRO})


def shard_scatter(op: Op, sharding: SymbolicSharding, required: Sequence[Axes]) -> SymbolicSharding:
    """Sharding of a scatter whose result has a required layout: each device adds its own rows."""
    used = sharding.axes | sharding.partial
    inserted = op.params["dimension_numbers"].inserted_window_dims
    return sharding.with_dims(
        tuple(a for a in required[i] if a not in used) if i in inserted else dim
        for i, dim in enumerate(sharding.dims)
    )


def _elementwise(op: Op, ins: Shardings, shapes: Shapes, out: Shape) -> SymbolicSharding:
    """Elementwise, or anything like it: each dim as the operand that splits it over most axes."""
    dims: list[Axes] = [()] * len(out)
    pairs = zip(ins, shapes, strict=True)
    same_rank = [(sharding, shape) for sharding, shape in pairs if len(shape) == len(out)]
    for sharding, shape in same_rank:
        for i, dim in enumerate(sharding.dims):
            if shape[i] == out[i] and len(dim) > len(dims[i]):
                dims[i] = dim
    partial = frozenset(axis for sharding, _ in same_rank for axis in sharding.partial)
    is_param = bool(same_rank) and all(sharding.is_param for sharding, _ in same_rank)
    return SymbolicSharding(drop_repeated_axes(dims), partial, is_param)


def _replicate(op: Op, ins: Shardings, shapes: Shapes, out: Shape) -> SymbolicSharding:
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


def propagate(op: Op, ins: Shardings, shapes: Shapes, out: Shape) -> SymbolicSharding:
    """Sharding of an operation's result from those of its operands."""
    rule = _RULES.get(op.name)
    if rule is None:
        reduces = op.name.startswith(_REDUCTIONS) and "axes" in op.params
        rule = _reduce if reduces else _elementwise
    return rule(op, ins, shapes, out)


def conflicting_axes(
    operand: SymbolicSharding, other: SymbolicSharding, pairs: Mapping[int, int]
) -> set[str]:
    """Axes of one operand that the other has on a dim that is not the same one."""
    axes = set()
    for i, dim in enumerate(operand.dims):
        paired = other.dims[pairs[i]] if i in pairs else ()
        axes |= {axis for axis in dim if axis in other.axes and axis not in paired}
    return axes


def contract(
    op: Op, left: SymbolicSharding, right: SymbolicSharding, shape: Shape
) -> tuple[list[Axes], list[str], float]:
    """Dims of a product's result, axes that its sum runs over, FLOPs per element of it."""
    (lc, rc), (lb, rb) = op.params["dimension_numbers"]
    dims = [
        tuple(dict.fromkeys((*left.dims[a], *right.dims[b]))) for a, b in zip(lb, rb, strict=True)
    ]
    dims += [dim for i, dim in enumerate(left.dims) if i not in (*lc, *lb)]
    dims += [dim for i, dim in enumerate(right.dims) if i not in (*rc, *rb)]
    summed = [a for i, j in zip(lc, rc, strict=True) for a in (*left.dims[i], *right.dims[j])]
    return dims, summed, 2.0 * math.prod(shape[i] for i in lc)
