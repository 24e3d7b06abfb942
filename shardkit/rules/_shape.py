"""A rule by shape: split the largest dim that divides."""

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from .._core.errors import ShardingError
from .._core.options import check_arguments
from .._core.tree import Leaf
from ._rule import Decided, Decision, Entry, Passed
from ._specs import Axes, axes_of, shard_count, spec_from_axes


@dataclasses.dataclass(frozen=True)
class ShardLargest:
    """Splits the largest dim that divides. Made by `shard_largest`."""

    axes: tuple[str, ...]
    min_size: int

    def decide(self, leaf: Leaf, mesh: Mapping[str, int]) -> Decision:
        """Splits the largest divisible dim, replicates a small leaf, or passes."""
        elements = math.prod(leaf.shape)
        if elements < self.min_size:
            return Decided(PartitionSpec(), repr(self), why="fewer elements than min_size")
        if not set(self.axes) <= set(mesh):
            # `check_spec` names the axis that the mesh lacks.
            return Decided(spec_from_axes([self.axes]), repr(self))
        shards = shard_count(self.axes, mesh)
        fitting = [dim for dim, size in enumerate(leaf.shape) if size % shards == 0]
        if not fitting:
            return Passed(f"{self!r}: no dim of {list(leaf.shape)} is a multiple of {shards}")
        largest = max(fitting, key=lambda dim: leaf.shape[dim])
        return Decided(spec_from_axes([()] * largest + [self.axes]), repr(self))

    def entries(self) -> tuple[Entry, ...]:
        """Returns (): the rule is for every leaf."""
        return ()

    def __repr__(self) -> str:
        axes = self.axes[0] if len(self.axes) == 1 else self.axes
        size = f", min_size={self.min_size}" if self.min_size else ""
        return f"shard_largest({axes!r}{size})"


def shard_largest(axes: Axes, *, min_size: int = 0) -> ShardLargest:
    """Makes a rule that splits the largest dim of a leaf, whatever its path.

    It takes the largest of the dims that the mesh axes divide, the first among equals, and passes
    if they divide none.

    Args:
      axes: the mesh axis, or a tuple of axes that split one dim together.
      min_size: leaves with fewer elements are replicated: gathering them costs more than it saves.

    Returns:
      A rule.

    Raises:
      ShardingError: an argument is of another type.

    >>> shard_largest("fsdp", min_size=1024)
    shard_largest('fsdp', min_size=1024)
    """
    check_arguments(
        ShardingError,
        "shard_largest has wrong options.",
        axes=(axes, str | tuple[str, ...] | None),
        min_size=(min_size, int),
    )
    return ShardLargest(axes_of(axes), min_size)
