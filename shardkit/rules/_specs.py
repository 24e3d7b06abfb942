"""Partition specs as data: their text, their normal form, and the mesh axes of each dim."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from jax.sharding import PartitionSpec

Axes = str | tuple[str, ...] | None


class HasShape(Protocol):
    """A `jax.sharding.Mesh`, or a `MeshSpec` without -1."""

    @property
    def shape(self) -> Mapping[Any, Any]:
        """`{axis: size}`."""
        ...


def mesh_sizes(mesh: Mapping[str, int] | HasShape) -> dict[str, int]:
    """Returns `{axis: size}` of a mesh, a `MeshSpec` without -1, or a mapping."""
    return dict(mesh if isinstance(mesh, Mapping) else mesh.shape)


def axes_of(entry: Axes) -> tuple[str, ...]:
    """Lists the mesh axes of one entry of a spec.

    >>> axes_of(None), axes_of("data"), axes_of(("fsdp", "tensor"))
    ((), ('data',), ('fsdp', 'tensor'))
    """
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def spec_from_axes(entries: Iterable[Iterable[str]]) -> PartitionSpec:
    """Returns the spec, in normal form, that has these mesh axes in each dim.

    >>> spec_from_axes([("data", "fsdp"), (), ("tensor",), ()])
    P(('data', 'fsdp'), None, 'tensor')
    """
    dims: list[Axes] = []
    for entry in map(tuple, entries):
        dims.append(entry if len(entry) > 1 else entry[0] if entry else None)
    while dims and dims[-1] is None:
        dims.pop()
    return PartitionSpec(*dims)


def normalize_spec(spec: PartitionSpec) -> PartitionSpec:
    """Drops trailing Nones and unwraps tuples of one, so that equal layouts compare equal.

    >>> normalize_spec(PartitionSpec(("data",), None))
    P('data',)
    """
    return spec_from_axes(map(axes_of, spec))


def shard_count(axes: Iterable[str], mesh: Mapping[str, int]) -> int:
    """Returns the number of shards into which mesh axes split a dim: the product of their sizes."""
    return math.prod(mesh[axis] for axis in axes)


def count_shards(spec: PartitionSpec, mesh: Mapping[str, int]) -> int:
    """Returns the number of different shards into which a spec splits an array."""
    return math.prod(shard_count(axes_of(entry), mesh) for entry in spec)


def format_spec(spec: PartitionSpec) -> str:
    """Returns `P(None, 'tensor')`, on every version of JAX.

    >>> format_spec(PartitionSpec(None, ("fsdp", "tensor"))), format_spec(PartitionSpec("data"))
    ("P(None, ('fsdp', 'tensor'))", "P('data')")
    """
    names = (
        "P.UNCONSTRAINED" if e is PartitionSpec.UNCONSTRAINED else repr(e) for e in spec.partitions
    )
    return f"P({', '.join(names)})"


def format_mesh(mesh: Mapping[str, int]) -> str:
    """Returns `(data=2, tensor=4)`."""
    return f"({', '.join(f'{axis}={size}' for axis, size in mesh.items())})"
