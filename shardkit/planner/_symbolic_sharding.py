"""How a value lies on the mesh, by axis and not by size, and how many bytes that makes.

Bytes are sums of terms: `{axes: bytes}` says that so many bytes are split over these axes. So one
walk through a program holds for every size of the mesh.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import PartitionSpec

from ..rules import axes_of

_LEAST = 16  # of smaller dims whole tiles are made in other ways

MICRO = "micro"
"""The axis of micro-batches: it splits rows as a mesh axis does, and is worked off in turn."""

Axes = tuple[str, ...]
SymbolicBytes = dict[frozenset[str], float]


@dataclasses.dataclass(frozen=True)
class SymbolicSharding:
    """Layout of one value.

    Attributes:
      dims: mesh axes that split each dim.
      partial: mesh axes over which it is a sum not yet made.
      stored: it lies as a parameter does, and is gathered where it is used.
    """

    dims: tuple[Axes, ...]
    partial: frozenset[str] = frozenset()
    stored: bool = False

    @property
    def axes(self) -> frozenset[str]:
        """Mesh axes that split any dim."""
        return frozenset(axis for dim in self.dims for axis in dim)

    def with_dims(self, dims: Iterable[Axes]) -> "Laid":
        """The same with other dims."""
        return dataclasses.replace(self, dims=tuple(dims))


def replicated(rank: int) -> SymbolicSharding:
    """A value that every device has."""
    return SymbolicSharding(((),) * rank)


def sharding_of_spec(spec: PartitionSpec, rank: int, *, stored: bool = False) -> SymbolicSharding:
    """The layout that a spec says.

    >>> sharding_of_spec(PartitionSpec(None, ("a", "b")), 3).dims
    ((), ('a', 'b'), ())
    """
    dims = [axes_of(entry) for entry in spec]
    return SymbolicSharding((*dims, *[()] * (rank - len(dims))), stored=stored)


def drop_repeated_axes(dims: Iterable[Axes]) -> tuple[Axes, ...]:
    """Each axis only where it comes first: it can split a value once."""
    seen: set[str] = set()
    out = []
    for dim in dims:
        out.append(tuple(axis for axis in dim if axis not in seen))
        seen.update(dim)
    return tuple(out)


def reshape_dims(dims: Sequence[Axes], old: Sequence[int], new: Sequence[int]) -> tuple[Axes, ...]:
    """Axes of a reshaped value: those of a group of dims go to its first dim that is no 1.

    >>> reshaped([("data",), (), ("tensor",), ()], (8, 16, 4, 2), (8, 16, 8))
    (('data',), (), ('tensor',))
    """
    out: list[Axes] = []
    i = j = 0
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
        joined = tuple(axis for dim in dims[start:i] for axis in dim)
        group: list[Axes] = [()] * (j - first)
        at = next((n for n, size in enumerate(new[first:j]) if size > 1), 0)
        group[at] = joined
        out += group
    return tuple(out[: len(new)])


def symbolic_bytes(
    aval_shape: Sequence[int], itemsize: float, laid: SymbolicSharding
) -> SymbolicBytes:
    """Bytes of one value on a device."""
    return {laid.axes: math.prod(aval_shape) * itemsize}


def padding_factor(shape: Sequence[int], laid: SymbolicSharding, lanes: int) -> float:
    """Bytes in memory for each byte of a value, where one dim fills tiles of so many elements.

    Compilers choose that dim; of those that are whole, the one that wastes least is taken.

    >>> padding((8, 64, 96), Laid(((), ("fsdp",), ())), 128)
    1.3333333333333333
    """
    sizes = [n for n, axes in zip(shape, laid.dims, strict=True) if not axes and n >= _LEAST]
    return min((-(-n // lanes) * lanes / n for n in sizes), default=1.0)


def add_bytes(into: SymbolicBytes, more: Mapping[frozenset[str], float], sign: float = 1.0) -> None:
    """Adds terms to terms."""
    for axes, size in more.items():
        into[axes] = into.get(axes, 0.0) + sign * size


def count_shards(axes: Iterable[str], sizes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Number of parts that axes make: f64[meshes]."""
    parts = np.ones(len(next(iter(sizes.values()))))
    for axis in axes:
        parts = parts * sizes[axis]
    return parts
