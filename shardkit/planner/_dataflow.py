"""What a flat program shows before propagation: readers, casts, and layouts that results need."""

from collections.abc import Mapping, Sequence

import numpy as np

from ._program import FlatProgram, Op
from ._propagation import KEEPS_PARTIAL
from ._symbolic_sharding import Axes, reshape_dims

Dims = tuple[Axes, ...]

_KEEPS_SHAPE = frozenset(
    {"convert_element_type", "add_any", "add", "sub", "mul", "div", "neg", "shardkit_constrain"}
)


def refines(finer: Dims, coarser: Dims) -> bool:
    """Whether any dim that `coarser` splits is split further by `finer`."""
    return any(b and b != a and set(b) <= set(a) for a, b in zip(finer, coarser, strict=True))


def splits_more(finer: Dims, coarser: Dims) -> bool:
    """Whether `finer` splits all that `coarser` does, and something more."""
    pairs = list(zip(finer, coarser, strict=True))
    return all(set(b) <= set(a) for a, b in pairs) and any(set(b) < set(a) for a, b in pairs)


def find_readers(flat: FlatProgram) -> dict[int, list[Op]]:
    """Operations that read each value."""
    readers: dict[int, list[Op]] = {}
    for op in flat.ops:
        for number in op.ins:
            if number is not None:
                readers.setdefault(number, []).append(op)
    return readers


def find_narrowed(flat: FlatProgram, readers: Mapping[int, list[Op]]) -> dict[int, int]:
    """Bytes per element of values whose one reader casts them to a narrower type."""
    widths = {}
    for number, ops in readers.items():
        if len(ops) == 1 and ops[0].name == "convert_element_type" and number not in flat.inputs:
            width = np.dtype(ops[0].params["new_dtype"]).itemsize
            if width < flat.avals[number].dtype.itemsize:
                widths[number] = width
    return widths


def propagate_backward(flat: FlatProgram, outputs: Sequence[Dims | None]) -> dict[int, Dims]:
    """Layouts that results must have, carried back through elementwise ops and reshapes."""
    required: dict[int, Dims] = {
        n: dims for n, dims in zip(flat.outputs, outputs, strict=True) if n is not None and dims
    }
    for op in reversed(flat.ops):
        dims = required.get(op.outs[0])
        if dims is None or op.body is not None:
            continue
        shape = tuple(flat.avals[op.outs[0]].shape)
        for number in op.ins:
            if number is None or number in required:
                continue
            before = tuple(flat.avals[number].shape)
            if op.name in _KEEPS_SHAPE and before == shape:
                required[number] = dims
            elif op.name == "transpose":
                order = op.params["permutation"]
                required[number] = tuple(dims[order.index(i)] for i in range(len(order)))
            elif op.name == "reshape":
                required[number] = reshape_dims(dims, shape, before)
    return required


def find_accumulator(flat: FlatProgram, readers: Mapping[int, list[Op]], number: int) -> int | None:
    """The value that a product is only added to, where nothing else reads it: done in place."""
    ops = readers.get(number, [])
    while len(ops) == 1 and ops[0].name in KEEPS_PARTIAL and len(ops[0].ins) == 1:
        number = ops[0].outs[0]
        ops = readers.get(number, [])
    if len(ops) != 1 or ops[0].name != "add_any":
        return None
    other = next((n for n in ops[0].ins if n is not None and n != number), None)
    if other is None or flat.avals[other].shape != flat.avals[number].shape:
        return None
    return other if len(readers[other]) == 1 else None


def find_dim_sizes(flat: FlatProgram, name: str) -> frozenset[int]:
    """Sizes of the dims that `sk.nn.constrain` gives a name, also in the bodies of loops."""
    sizes: set[int] = set()
    for op in flat.ops:
        if op.body is not None:
            sizes |= find_dim_sizes(op.body, name)
        elif op.name == "shardkit_constrain":
            shape = flat.avals[op.outs[0]].shape
            sizes |= {n for dim, n in zip(op.params["names"], shape, strict=True) if dim == name}
    return frozenset(sizes)
