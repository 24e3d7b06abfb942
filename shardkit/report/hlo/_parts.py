"""Which part of a global array each device holds, carried through the instructions of a program.

A dim of a device's array starts at some index of the same dim of the global array. On a mesh
data=2, tensor=2, `x[8, 6]` with spec `P("data", "tensor")` is `f32[4,3]` on each device:

    starts of dim 0   (0, 0, 4, 4)      of dim 1   (0, 3, 0, 3)      one for each device

A dim whose starts are unknown is None, so what is not understood is never compared. A dim along
which all elements are alike, as of zeros, may start anywhere: `ANYWHERE` agrees with all starts.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from ._groups import Mesh
from ._hlo import Instruction, Shape

Starts = tuple[int, ...]
Dims = tuple[Starts | None, ...]
ANYWHERE: Starts = ()
_LAYOUT = re.compile(r"\]\{([\d,]*)")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What each device holds of one array."""

    dims: Dims  # where each dim starts on each device; None where that is unknown
    # the array itself, i64[devices, *shape], of an integer table or index; else None
    values: np.ndarray | None = dataclasses.field(default=None, compare=False)
    # `dims`, if reshapes have only put dims of one element between others, of which nothing is said
    # here; else None. `[4] → [1, 4]` may do that or split a dim of 32 into 8 x 4; both are the same
    # after `[4] → [1, 4] → [4]`.
    inserted: Dims | None = None

    @classmethod
    def unknown(cls, shape: Shape) -> "Parts":
        """Of an array of which nothing is known."""
        return cls((None,) * len(shape.dims))


def held_parts(shape: Sequence[int], dims: Sequence[Sequence[str]], mesh: Mesh) -> Parts:
    """What each device of a mesh holds of an array whose dims are split over these axes."""
    sizes = dict(mesh)
    coordinates = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    at = dict(zip(sizes, coordinates, strict=True))
    starts = []
    for size, axes in zip(shape, dims, strict=True):
        tiles = np.zeros(math.prod(sizes.values()), int)
        for axis in axes:
            tiles = tiles * sizes[axis] + at[axis]
        pieces = math.prod(sizes[axis] for axis in axes)
        starts.append(tuple(map(int, tiles * -(-size // pieces))))
    return Parts(tuple(starts))


def join(first: Parts, second: Parts) -> Parts:
    """What holds of both; other dims are unknown."""
    pairs = zip(first.dims, second.dims, strict=True)
    a, b = first.values, second.values
    alike = a is not None and b is not None and np.array_equal(a, b)
    return Parts(
        tuple(join_starts(*pair) for pair in pairs),
        a if alike else None,
        _join_inserted(first.inserted, second.inserted),
    )


def _join_inserted(a: Dims | None, b: Dims | None) -> Dims | None:
    return None if a is None or b is None else tuple(map(join_starts, a, b))


def join_starts(a: Starts | None, b: Starts | None) -> Starts | None:
    """Starts of a dim that is one of two, or holds parts of both.

    >>> join_starts((0, 4), ANYWHERE), join_starts((0, 4), (4, 0))
    ((0, 4), None)
    """
    if ANYWHERE in (a, b):
        return b if a == ANYWHERE else a
    return a if a == b else None


def gather(dim: Starts | None, size: int, groups: Sequence[np.ndarray]) -> Starts | None:
    """Starts of a dim after an all-gather; None where the pieces are not one run in order."""
    if not dim:
        return dim
    starts = list(dim)
    for group in groups:
        first = dim[group[0]]
        if any(dim[member] != first + i * size for i, member in enumerate(group)):
            return None
        for member in group:
            starts[member] = first
    return tuple(starts)


def gather_in_order(dim: Starts | None, size: int, groups: Sequence[np.ndarray]) -> Starts | None:
    """Starts after an all-gather of the same pieces in the order in which they make one run."""
    if dim is None:
        return None
    starts = dim
    in_order = [np.array(sorted(group, key=starts.__getitem__)) for group in groups]
    return gather(dim, size, in_order)


def scatter(dim: Starts | None, size: int, groups: Sequence[np.ndarray]) -> Starts | None:
    """Starts of a dim after a reduce-scatter into pieces of `size`."""
    if not dim:
        return dim
    starts = list(dim)
    for group in groups:
        for i, member in enumerate(group):
            starts[member] += i * size
    return tuple(starts)


def permute(dim: Starts | None, pairs: np.ndarray) -> Starts | None:
    """Starts after a permute that puts the axes of the mesh into another order; else None.

    Such an order leaves the first and the last device in place. A shift along a dim, which a model
    asks for, does not: what it moves belongs to other indices than before.
    """
    if dim == ANYWHERE or (dim and all(dim[a] == dim[b] for a, b in pairs)):
        return dim  # a shift of a half along another dim; who gets nothing has zeros
    source = {int(target): int(sender) for sender, target in pairs}
    last = len(source) - 1
    if dim is None or last != len(dim) - 1 or (source[0], source[last]) != (0, last):
        return None
    return tuple(dim[source[device]] for device in range(len(dim)))


def transpose(parts: Parts, order: Sequence[int]) -> Parts:
    """Follows dims into another order."""
    inserted = parts.inserted and tuple(parts.inserted[dim] for dim in order)
    return Parts(tuple(parts.dims[dim] for dim in order), inserted=inserted)


def differs_within(dim: Starts, groups: Sequence[np.ndarray]) -> bool:
    """Whether devices of one group hold different parts."""
    return dim != ANYWHERE and any(len({dim[i] for i in group}) > 1 for group in groups)


def reshape(parts: Parts, source: Sequence[int], target: Sequence[int]) -> Parts:
    """Follows dims through a reshape, in groups of dims with the same number of elements.

    `[2, 3, 4] → [6, 4]` has the groups `[2, 3] → [6]` and `[4] → [4]`. The outermost dim of a group
    carries the starts; the others must start at 0 on every device.

    A dim of one element on each device tells little: `[1, 4] → [4]` may be a reshape of the whole
    `[8, 4]`, or what is left of a sum over its 8 rows; `[4] → [1, 4]` may split a dim or add one.
    Where every device has the first element, there is no other. So `[2, 4] → [2, 1, 4]` may keep
    its last dim or split it in two.
    """
    if parts.inserted and 1 not in target:
        return Parts(_longer_dims(parts.inserted, source, target) or (None,) * len(target))
    inserted = _longer_dims(parts.inserted or _certain(parts, source), source, target)
    return dataclasses.replace(_reshape(parts, source, target), inserted=inserted)


def _reshape(parts: Parts, source: Sequence[int], target: Sequence[int]) -> Parts:
    """The same without what dims of one element have been inserted."""
    if _loses_a_dim(parts, source, target):
        return Parts((None,) * len(target))
    pairs = zip(source, parts.dims, strict=True)
    kept = [(size, at) for size, at in pairs if size > 1 or at is None or any(at)]
    source, parts = [size for size, _ in kept], Parts(tuple(at for _, at in kept))
    dims: list[Starts | None] = [None] * len(target)
    for inside, outside in _equal_groups(source, target):
        old, new = [source[dim] for dim in inside], [target[dim] for dim in outside]
        starts = [parts.dims[dim] for dim in inside]
        for dim, moved in zip(outside, _regroup(starts, old, new), strict=True):
            dims[dim] = moved
    if list(target).count(1) > source.count(1):
        dims = [starts if starts is None or not any(starts) else None for starts in dims]
    return Parts(tuple(dims))


def _certain(parts: Parts, source: Sequence[int]) -> Sequence[Starts | None] | None:
    """The starts of all dims, if those of one element are not parts of longer ones."""
    ones = [at for size, at in zip(source, parts.dims, strict=True) if size == 1]
    return parts.dims if all(at and not any(at) for at in ones) else None


def _longer_dims(
    dims: Sequence[Starts | None] | None, source: Sequence[int], target: Sequence[int]
) -> Dims | None:
    """The starts where a reshape moves nothing but dims of one element, which get None."""
    if dims is None or [n for n in source if n > 1] != [n for n in target if n > 1]:
        return None
    longer = iter(at for at, size in zip(dims, source, strict=True) if size > 1)
    return tuple(next(longer) if size > 1 else None for size in target)


def _loses_a_dim(parts: Parts, source: Sequence[int], target: Sequence[int]) -> bool:
    """Whether one element of a split dim is gone, which may have become a part of any other dim.

    A transpose moves it for nothing: `[8, 4, 1, 4, 4, 32] → [128, 128]` of patches, whose third dim
    is split, may have it in its rows or in its columns. The outermost is taken to stay there.
    """
    ones = [
        dim
        for dim, (starts, size) in enumerate(zip(parts.dims, source, strict=True))
        if size == 1 and (starts is None or any(starts))
    ]
    return len([dim for dim in ones if dim]) > list(target[1:]).count(1)


def _regroup(
    starts: Sequence[Starts | None], old: Sequence[int], new: Sequence[int]
) -> Sequence[Starts | None]:
    """Starts of the dims that one group of dims becomes."""
    if old == new:
        return starts
    outer, *inner = starts
    unclear = any(size == 1 for size in (*old, new[0]))
    if not outer or any(s is None or any(s) for s in inner) or (unclear and any(outer)):
        return [None] * len(new)
    before, after = math.prod(old[1:]), math.prod(new[1:])
    merged = tuple(start * before for start in outer)
    if any(start % after for start in merged):
        return [None] * len(new)
    # A device's one element of a dim that begins here may be any of the whole dim; and where one of
    # the old dims may start anywhere, so may what it has become a part of.
    begin = None if ANYWHERE in inner else (0,) * len(merged)
    whole = [None if size == 1 else begin for size in new[1:]]
    first = None if new[0] == 1 else tuple(start // after for start in merged)
    return [first, *whole]


def _equal_groups(
    source: Sequence[int], target: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims with equal numbers of elements: [(of source, of target)]."""
    groups: list[tuple[list[int], list[int]]] = []
    inside: list[int] = []
    outside: list[int] = []
    i = j = 0
    while i < len(source) or j < len(target):
        sizes = math.prod(source[d] for d in inside), math.prod(target[d] for d in outside)
        if i < len(source) and (sizes[0] <= sizes[1] or j == len(target)):
            inside.append(i)
            i += 1
        else:
            outside.append(j)
            j += 1
        size = math.prod(source[d] for d in inside)
        if size == math.prod(target[d] for d in outside) and (size > 1 or len(source) == i):
            if inside and outside:
                groups.append((inside, outside))
                inside, outside = [], []
    if groups and inside:  # single elements at the end
        groups[-1][0].extend(inside)
    return groups


def bitcast(parts: Parts, source: Instruction, target: Instruction) -> Parts:
    """Follows dims through a bitcast: a reshape of the dims in the order they have in memory."""
    before, after = _memory_order(source), _memory_order(target)
    old, new = source.shapes[0].dims, target.shapes[0].dims
    if _loses_a_dim(parts, old, new) and not parts.inserted:
        return Parts((None,) * len(new))
    physical = transpose(parts, before)
    moved = reshape(physical, [old[d] for d in before], [new[d] for d in after])

    def logical(dims: Sequence[Starts | None]) -> Dims:
        return tuple(dims[after.index(dim)] for dim in range(len(new)))

    return Parts(logical(moved.dims), inserted=moved.inserted and logical(moved.inserted))


def _memory_order(of: Instruction) -> list[int]:
    """Dims of an array from the slowest to the fastest in memory."""
    match = _LAYOUT.search(of.type)
    fastest = [int(dim) for dim in match.group(1).split(",") if dim] if match else []
    return fastest[::-1] or list(range(len(of.shapes[0].dims)))
