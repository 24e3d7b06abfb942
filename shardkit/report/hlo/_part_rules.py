"""What an instruction does to the parts that devices hold of its operands, opcode by opcode."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ._hlo import Computation, Instruction
from ._parts import ANYWHERE, Dims, Parts, Starts, bitcast, join, join_starts, reshape, transpose
from ._scope import last_name

# (a dim of the first operand, starts of the dims that meet) -> their common starts.
Compare = Callable[[int, Starts | None, Starts | None], Starts | None]


@dataclasses.dataclass(frozen=True)
class Site:
    """An instruction, its computation, and how many devices run the program."""

    instruction: Instruction
    here: Computation
    devices: int

    @property
    def new(self) -> tuple[int, ...]:
        """Sizes of the result's dims."""
        return self.instruction.shapes[0].dims

    def old(self, operand: int = 0) -> tuple[int, ...]:
        """Sizes of an operand's dims."""
        return self.here.instructions[self.instruction.operands[operand]].shapes[0].dims

    def dims(self, attribute: str = "dimensions") -> tuple[int, ...]:
        """The dims that an attribute lists."""
        return read_ints(self.instruction.attrs.get(attribute, ""))

    def takes_turn(self, dim: int) -> bool:
        """Whether a dynamic slice is a loop of the model that takes an element of this dim.

        It is the same element on every device. A fusion names the slice after what uses it.
        """
        index = self.instruction.operands[1 + dim]
        by_index = "dynamic_index_in_dim" in self.here.instructions[index].op_name
        return by_index or last_name(self.instruction.op_name) == "dynamic_slice"


Rule = Callable[[Compare, Site, Sequence[Parts]], Parts]


def read_ints(text: str) -> tuple[int, ...]:
    """The numbers in a text, in order."""
    return tuple(map(int, re.findall(r"-?\d+", text)))


def _constant(_: Compare, at: Site, __: Sequence[Parts]) -> Parts:
    values, numbers = None, read_ints(at.instruction.arguments)
    integer = at.instruction.shapes[0].dtype[0] in "su"
    if integer and len(numbers) == np.prod(at.new) <= 4 * at.devices:
        table = np.array(numbers, np.int64).reshape(at.new)
        values = np.broadcast_to(table, (at.devices, *at.new))
    return Parts((None,) * len(at.new), values)


def _partition_id(_: Compare, at: Site, __: Sequence[Parts]) -> Parts:
    return Parts((), np.arange(at.devices))


def _reshape(_: Compare, at: Site, operands: Sequence[Parts]) -> Parts:
    (whole,) = operands
    if at.instruction.opcode == "bitcast":
        source = at.here.instructions[at.instruction.operands[0]]
        moved = bitcast(whole, source, at.instruction)
    else:
        moved = reshape(whole, at.old(), at.new)
    values = whole.values
    values = None if values is None else values.reshape(-1, *at.new)
    return dataclasses.replace(moved, values=values)


def _transpose(_: Compare, at: Site, operands: Sequence[Parts]) -> Parts:
    return transpose(operands[0], at.dims())


def _broadcast(_: Compare, at: Site, operands: Sequence[Parts]) -> Parts:
    dims: list[Starts | None] = [ANYWHERE] * len(at.new)
    for starts, dim in zip(operands[0].dims, at.dims(), strict=True):
        dims[dim] = starts
    return Parts(tuple(dims))


def _reduce(_: Compare, at: Site, operands: Sequence[Parts]) -> Parts:
    gone = at.dims()
    return Parts(tuple(s for dim, s in enumerate(operands[0].dims) if dim not in gone))


def _keep_whole_dims(_: Compare, at: Site, operands: Sequence[Parts]) -> Parts:
    """A slice, pad or concatenation: dims whose size it keeps."""
    pieces = operands if at.instruction.opcode == "concatenate" else operands[:1]
    sizes = zip(functools.reduce(join, pieces).dims, at.old(), at.new, strict=True)
    kept = (s if old == new or s == ANYWHERE else None for s, old, new in sizes)
    return Parts(tuple(kept), inserted=_keep_inserted(pieces, at))


def _keep_inserted(pieces: Sequence[Parts], at: Site) -> Dims | None:
    """Starts between inserted dims, of the dims whose size a slice of one piece keeps."""
    if len(pieces) > 1 or pieces[0].inserted is None:
        return None
    sizes = zip(pieces[0].inserted, at.old(), at.new, strict=True)
    return tuple(starts if old == new else None for starts, old, new in sizes)


def _dynamic_slice(_: Compare, at: Site, operands: Sequence[Parts]) -> Parts:
    whole, *index = operands
    offsets = [parts.values for parts in index]
    dims: list[Starts | None] = []
    sizes = zip(at.old(), at.new, map(at.takes_turn, range(len(index))), strict=True)
    for starts, offset, (old, new, turns) in zip(whole.dims, offsets, sizes, strict=True):
        known = None if offset is None else {*map(int, offset)}
        if old == new or not starts:
            dims.append(starts)
        elif offset is not None and known == {*range(0, old, new)}:
            dims.append(tuple(int(a + b) for a, b in zip(starts, offset, strict=True)))
        elif turns and new == 1 and not any(starts) and (known is None or len(known) == 1):
            dims.append(starts)
        else:
            dims.append(None)  # what a model cuts out, not the parts of all devices
    values = None
    if whole.values is not None and all(offset is not None for offset in offsets):
        tables = enumerate(whole.values)
        cuts = [[int(offset[d]) for offset in offsets if offset is not None] for d, _ in tables]
        values = np.stack([_cut(t, at.new, c) for t, c in zip(whole.values, cuts, strict=True)])
    return Parts(tuple(dims), values, _keep_inserted([whole], at))


def _cut(table: np.ndarray, sizes: Sequence[int], offsets: Sequence[int]) -> np.ndarray:
    """The slice of a table; XLA moves one that would leave it to its edge."""
    ends = zip(offsets, sizes, table.shape, strict=True)
    starts = [min(max(offset, 0), whole - size) for offset, size, whole in ends]
    return table[tuple(slice(a, a + size) for a, size in zip(starts, sizes, strict=True))]


def _dynamic_update(_: Compare, at: Site, operands: Sequence[Parts]) -> Parts:
    whole, piece, *_index = operands
    dims: list[Starts | None] = []
    # No partitioner writes one of the parts that devices hold: a dim of one has been inserted.
    of_piece = piece.inserted or piece.dims
    for a, b, old, new in zip(whole.dims, of_piece, at.old(), at.old(1), strict=True):
        if old == new:
            dims.append(b if a is None else join_starts(a, b))
        else:  # filled in turn by a loop or a scatter: all of it, or what is a device's own
            dims.append(None if a == ANYWHERE else a)
    return Parts(tuple(dims), inserted=tuple(dims) if piece.inserted else None)


def _dot(compare: Compare, at: Site, operands: Sequence[Parts]) -> Parts:
    left, right = operands
    batch = tuple(zip(at.dims("lhs_batch_dims"), at.dims("rhs_batch_dims"), strict=True))
    pairs = zip(at.dims("lhs_contracting_dims"), at.dims("rhs_contracting_dims"), strict=True)
    meeting = (*batch, *pairs)
    common = [compare(a, left.dims[a], right.dims[b]) for a, b in meeting]
    used = {a for a, _ in meeting}, {b for _, b in meeting}
    free = [
        [starts for dim, starts in enumerate(parts.dims) if dim not in gone]
        for parts, gone in zip((left, right), used, strict=True)
    ]
    return Parts((*common[: len(batch)], *free[0], *free[1]))


def _convolution(_: Compare, at: Site, operands: Sequence[Parts]) -> Parts:
    """Rows of the batch follow, unless they are groups of kernels."""
    inputs, _kernel, output = re.split(r"_|->", at.instruction.attrs["dim_labels"].strip())
    dims: list[Starts | None] = [None] * len(output)
    if "batch_group_count" not in at.instruction.attrs:
        dims[output.index("b")] = operands[0].dims[inputs.index("b")]
    return Parts(tuple(dims))


RULES: Mapping[str, Rule] = {
    "constant": _constant,
    "partition-id": _partition_id,
    "reshape": _reshape,
    "bitcast": _reshape,
    "transpose": _transpose,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "slice": _keep_whole_dims,
    "pad": _keep_whole_dims,
    "concatenate": _keep_whole_dims,
    "dynamic-slice": _dynamic_slice,
    "dynamic-update-slice": _dynamic_update,
    "dot": _dot,
    "convolution": _convolution,
}
