"""What is known of a flat program before it is walked through: readers, casts, wanted layouts."""

from collections.abc import Mapping, Sequence

import numpy as np

from ._program import FlatProgram, Op
from ._propagation import KEEPS_PARTIAL
from ._symbolic_sharding import Axes, reshape_dims

Dims = tuple[Axes, ...]

_SAME_FORM = frozenset(
    {"convert_element_type", "add_any", "add", "sub", "mul", "div", "neg", "shardkit_constrain"}
)


def refines(finer: Dims, coarser: Dims) -> bool:
    """Whether a dim that one layout splits is split more by the other."""
    return any(b and b != a and set(b) <= set(a) for a, b in zip(finer, coarser, strict=True))


def splits_more(finer: Dims, coarser: Dims) -> bool:
    """Whether one layout splits all that the other does, and something more."""
    pairs = list(zip(finer, coarser, strict=True))
    return all(set(b) <= set(a) for a, b in pairs) and any(set(b) < set(a) for a, b in pairs)


def find_readers(flat: FlatProgram) -> dict[int, list[Op]]:
    """Operations that read each value."""
    found: dict[int, list[Op]] = {}
    for op in flat.ops:
        for number in op.ins:
            if number is not None:
                found.setdefault(number, []).append(op)
    return found


def find_narrowed(flat: FlatProgram, read_by: Mapping[int, list[Op]]) -> dict[int, int]:
    """Bytes per element of values that are read once, by a cast to a narrower type."""
    found = {}
    for number, ops in read_by.items():
        if len(ops) == 1 and ops[0].name == "convert_element_type" and number not in flat.inputs:
            width = np.dtype(ops[0].params["new_dtype"]).itemsize
            if width < flat.avals[number].dtype.itemsize:
                found[number] = width
    return found


def propagate_backward(flat: FlatProgram, outputs: Sequence[Dims | None]) -> dict[int, Dims]:
    """The layout that results must have, carried back through operations that keep their form."""
    found: dict[int, Dims] = {
        n: want for n, want in zip(flat.outputs, outputs, strict=True) if n is not None and want
    }
    for op in reversed(flat.ops):
        want = found.get(op.outs[0])
        if want is None or op.body is not None:
            continue
        shape = tuple(flat.avals[op.outs[0]].shape)
        for number in op.ins:
            if number is None or number in found:
                continue
            before = tuple(flat.avals[number].shape)
            if op.name in _SAME_FORM and before == shape:
                found[number] = want
            elif op.name == "transpose":
                order = op.params["permutation"]
                found[number] = tuple(want[order.index(i)] for i in range(len(order)))
            elif op.name == "reshape":
                found[number] = reshape_dims(want, shape, before)
    return found


def find_accumulator(flat: FlatProgram, read_by: Mapping[int, list[Op]], number: int) -> int | None:
    """What a product is only added to, where nothing else reads that: it happens in place."""
    ops = read_by.get(number, [])
    while len(ops) == 1 and ops[0].name in KEEPS_PARTIAL and len(ops[0].ins) == 1:
        number = ops[0].outs[0]
        ops = read_by.get(number, [])
    if len(ops) != 1 or ops[0].name != "add_any":
        return None
    other = next((n for n in ops[0].ins if n is not None and n != number), None)
    if other is None or flat.avals[other].shape != flat.avals[number].shape:
        return None
    return other if len(read_by[other]) == 1 else None


def find_dim_sizes(flat: FlatProgram, name: str) -> frozenset[int]:
    """Sizes of the dims to which `sk.nn.constrain` gives a name, also in the bodies of loops."""
    found: set[int] = set()
    for op in flat.ops:
        if op.body is not None:
            found |= find_dim_sizes(op.body, name)
        elif op.name == "shardkit_constrain":
            shape = flat.avals[op.outs[0]].shape
            found |= {n for one, n in zip(op.params["names"], shape, strict=True) if one == name}
    return frozenset(found)
