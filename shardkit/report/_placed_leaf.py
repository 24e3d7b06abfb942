"""An argument of a compiled step, with its spec."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._core.tree import Leaf, join_path, nbytes, short_dtype
from ._saved import LeafLayout
from .hlo._hlo import dtype_bits

PARTS = ("params", "opt_state", "model_state", "batch", "rest")


@dataclasses.dataclass(frozen=True)
class PlacedLeaf:
    """One argument of the executable: an array, the spec it has, and whether it is donated."""

    # which part of the step's input it belongs to: one of `PARTS`; the step counter and the random
    # key are "rest"
    part: str
    leaf: Leaf  # path, global shape and dtype
    spec: PartitionSpec  # its `PartitionSpec`, as resolved
    donated: bool = False  # the caller gives the buffer away, so an output should reuse it
    # the spec declares that every device holds all of it (`sk.REPLICATED`, or this leaf follows a
    # parameter so declared). Otherwise a copy on every device is a finding.
    declared_replicated: bool = False
    # the entry of the rule that decided its spec, `PathRules["**/up"]`; "" if unknown
    declared_by: str = ""
    frozen: bool = False  # a parameter without gradient
    # a frozen parameter that the backward pass does not need: no gradient flows through its
    # products, and it recomputes none of them
    forward_only: bool = False

    @property
    def name(self) -> str:
        """Its path with its part: `params/w`; of a bare array, `params`."""
        return join_path(self.part, self.leaf.path)

    def axes(self) -> tuple[str, ...]:
        """Mesh axes that split this array.

        >>> import numpy as np
        >>> leaf = Leaf("w", (8, 4), np.dtype("float32"))
        >>> PlacedLeaf("params", leaf, PartitionSpec(("data", "fsdp"), None)).axes()
        ('data', 'fsdp')
        """
        return tuple(axis for dim in self.spec for axis in _dim_axes(dim))

    def dims(self) -> tuple[tuple[str, ...], ...]:
        """Mesh axes that split each dim of the array; the spec may have fewer entries."""
        dims = [*self.spec, *[None] * (len(self.leaf.shape) - len(self.spec))]
        return tuple(map(_dim_axes, dims))

    def shard(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of one device's shard, where mesh axis `a` has `sizes[a]` devices."""
        ways = [math.prod(sizes[axis] for axis in dim) for dim in self.dims()]
        return tuple(-(-size // n) for size, n in zip(self.leaf.shape, ways, strict=True))

    def device_bytes(self, sizes: Mapping[str, int], dtype: str | None = None) -> int:
        """Bytes of one device's shard.

        Args:
          sizes: mesh axis → devices along it.
          dtype: XLA's name of a dtype to count floats as, `"bf16"`; None: the leaf's own.

        >>> import numpy as np
        >>> leaf = Leaf("w", (8, 4), np.dtype("float32"))
        >>> PlacedLeaf("params", leaf, PartitionSpec("data")).device_bytes({"data": 4})
        32
        """
        if dtype is None or not jnp.issubdtype(self.leaf.dtype, jnp.inexact):
            return nbytes(self.shard(sizes), self.leaf.dtype)
        return math.prod(self.shard(sizes)) * dtype_bits(dtype) // 8

    def layout(self, sizes: Mapping[str, int]) -> LeafLayout:
        """Returns its layout on a mesh as plain values, for a file."""
        return LeafLayout(
            part=self.part,
            path=self.leaf.path,
            shape=self.leaf.shape,
            dtype=short_dtype(self.leaf.dtype),
            names=self.leaf.axes,
            spec=self.dims(),
            shard=self.shard(sizes),
            device_bytes=self.device_bytes(sizes),
            declared_replicated=self.declared_replicated,
            declared_by=self.declared_by,
        )


def _dim_axes(dim: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a spec; `UNCONSTRAINED` counts as none."""
    if isinstance(dim, str):
        return (dim,)
    return dim if isinstance(dim, tuple) else ()
