"""How a value is sharded, by mesh axis and not by size, and how many bytes a device then holds.

Bytes are sums over sets of axes: `{axes: bytes}` says that so many bytes are split over these
axes. So one propagation through a program holds for every size of the mesh:

    f32[8, 64] with dim 0 split over data and fsdp  →  {{data, fsdp}: 2048}
    on data=2, fsdp=4                               →  2048 / (2 · 4) = 256 bytes a device
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import PartitionSpec

from ..rules import axes_of

_SMALLEST_TILED = 16  # dims smaller than this are tiled in other ways

MICRO = "micro"
"""The axis of micro-batches: it splits rows as a mesh axis does, but its parts run in turn."""

Axes = tuple[str, ...]
SymbolicBytes = dict[frozenset[str], float]


@dataclasses.dataclass(frozen=True)
class SymbolicSharding:
    """Sharding of one value."""

    dims: tuple[Axes, ...]  # mesh axes that split each dim
    # mesh axes over which it is a partial sum, not yet reduced
    partial: frozenset[str] = frozenset()
    is_param: bool = False  # whether it is sharded as a parameter is, and gathered where it is used

    @property
    def axes(self) -> frozenset[str]:
        """Mesh axes that split any dim."""
        return frozenset(axis for dim in self.dims for axis in dim)

    def with_dims(self, dims: Iterable[Axes]) -> "SymbolicSharding":
        """The same with other dims."""
        return dataclasses.replace(self, dims=tuple(dims))

    def without(self, axes: Iterable[str]) -> "SymbolicSharding":
        """The same with no dim split over these axes."""
        return self.with_dims(tuple(a for a in dim if a not in axes) for dim in self.dims)


def replicated(rank: int) -> SymbolicSharding:
    """A value that every device holds whole."""
    return SymbolicSharding(((),) * rank)


def sharding_of_spec(spec: PartitionSpec, rank: int, *, is_param: bool = False) -> SymbolicSharding:
    """The sharding that a `PartitionSpec` declares.

    >>> sharding_of_spec(PartitionSpec(None, ("a", "b")), 3).dims
    ((), ('a', 'b'), ())
    """
    dims = [axes_of(entry) for entry in spec]
    return SymbolicSharding((*dims, *[()] * (rank - len(dims))), is_param=is_param)


def drop_repeated_axes(dims: Iterable[Axes]) -> tuple[Axes, ...]:
    """Keeps each axis only where it comes first: an axis can split a value once."""
    used: set[str] = set()
    out = []
    for dim in dims:
        out.append(tuple(axis for axis in dim if axis not in used))
        used.update(dim)
    return tuple(out)


def reshape_dims(dims: Sequence[Axes], old: Sequence[int], new: Sequence[int]) -> tuple[Axes, ...]:
    """Axes of a reshaped value: those of a group of dims go to its first dim larger than 1.

    >>> reshape_dims([("data",), (), ("tensor",), ()], (8, 16, 4, 2), (8, 16, 8))
    (('data',), (), ('tensor',))
    """
    out: list[Axes] = []
    i = j = 0
    # Walks both shapes and closes a group where the products agree: (8, 16, 4, 2) → (8, 16, 8)
    # has the groups 8 → 8, 16 → 16 and 4 · 2 → 8.
    while j < len(new):
        start, i, j = i, i + 1, j + 1
        a = old[start] if start < len(old) else 1
        b, first = new[j - 1], j - 1
        while a != b and (i < len(old) or j < len(new)):
            if a < b and i < len(old):
                a, i = a * old[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            else:
                break
        axes = tuple(axis for dim in dims[start:i] for axis in dim)
        group: list[Axes] = [()] * (j - first)
        at = next((n for n, size in enumerate(new[first:j]) if size > 1), 0)
        group[at] = axes
        out += group
    return tuple(out[: len(new)])


def symbolic_bytes(
    shape: Sequence[int], itemsize: float, sharding: SymbolicSharding
) -> SymbolicBytes:
    """Bytes of one value on a device."""
    return {sharding.axes: math.prod(shape) * itemsize}


def padding_factor(shape: Sequence[int], sharding: SymbolicSharding, tile_width: int) -> float:
    """Bytes in memory for each byte of a value, where one dim fills tiles of a width.

    Compilers choose that dim; of the unsplit dims, the one that wastes least is taken.

    >>> padding_factor((8, 64, 96), SymbolicSharding(((), ("fsdp",), ())), 128)
    1.3333333333333333
    """
    sizes = [
        n for n, axes in zip(shape, sharding.dims, strict=True) if not axes and n >= _SMALLEST_TILED
    ]
    return min((-(-n // tile_width) * tile_width / n for n in sizes), default=1.0)


def add_bytes(
    into: SymbolicBytes, other: Mapping[frozenset[str], float], sign: float = 1.0
) -> None:
    """Adds `sign` times `other` to `into`."""
    for axes, size in other.items():
        into[axes] = into.get(axes, 0.0) + sign * size


def count_shards(axes: Iterable[str], sizes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Number of shards that a set of axes makes: f64[meshes]."""
    shards = np.ones(len(next(iter(sizes.values()))))
    for axis in axes:
        shards = shards * sizes[axis]
    return shards
