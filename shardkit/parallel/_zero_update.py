"""ZeRO: the update is computed on finer shards than those of the parameters."""

import dataclasses
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from .._core.errors import Problem, StepError, raise_all
from .._core.tree import Leaf
from ..rules import axes_of, shard_count, spec_from_axes


@dataclasses.dataclass(frozen=True)
class Zero:
    """Splits the update of every parameter over one more mesh axis than the parameter itself.

    Attributes:
      axis: the mesh axis.
      stage: 1: gradients are whole over `axis` and sliced for the update; 2: they stay split.
      last: logical axes that are split only if no other dim divides. The gradient of a stacked
        parameter is computed layer by layer, so along `layers` there is nothing to scatter.
    """

    axis: str
    stage: int = 1
    last: tuple[str, ...] = ("layers",)

    def __post_init__(self) -> None:
        """Refuses other stages."""
        if type(self.stage) is not int or self.stage not in (1, 2):
            why = "stage 1 splits optimizer state, stage 2 gradients too, stage 3 is fsdp"
            fix = f"stage=2, or strategies.fsdp({self.axis!r})"
            problem = Problem(f"stage={self.stage!r}", why, fix)
            raise_all(StepError, "strategies.zero(...) is declared wrongly.", [problem])

    def spec(self, leaf: Leaf, spec: PartitionSpec, sizes: Mapping[str, int]) -> PartitionSpec:
        """Returns the spec that a parameter's update is split by.

        The axis is added to a dim that is split already, so that gradients summed over both axes
        are summed once; else to the dim with most elements on a device. If the axis divides no dim,
        the parameter keeps its spec.

        >>> import numpy as np
        >>> up = Leaf("up", (2, 8, 16), np.dtype("float32"), ("layers", "embed", "mlp"))
        >>> Zero("data").spec(up, PartitionSpec(None, None, "tensor"), {"data": 2, "tensor": 4})
        P(None, None, ('tensor', 'data'))
        """
        dims = [axes_of(entry) for entry in (*spec, *[None] * (len(leaf.shape) - len(spec)))]
        names = leaf.axes or (None,) * len(dims)
        local = [n // shard_count(axes, sizes) for n, axes in zip(leaf.shape, dims, strict=True)]
        divisible = [dim for dim, n in enumerate(local) if n and n % sizes[self.axis] == 0]
        if not divisible or any(self.axis in axes for axes in dims):
            return spec
        best = max(divisible, key=lambda d: (names[d] not in self.last, bool(dims[d]), local[d]))
        dims[best] = (*dims[best], self.axis)
        return spec_from_axes(dims)


def update_specs(
    zero: Zero | None,
    params: Sequence[Leaf],
    specs: Mapping[str, PartitionSpec],
    sizes: Mapping[str, int],
) -> dict[str, PartitionSpec]:
    """Returns, by path, the spec that each parameter's update is split by: its own without ZeRO.

    A parameter without a spec of its own is left out.
    """
    return {
        leaf.path: zero.spec(leaf, specs[leaf.path], sizes) if zero else specs[leaf.path]
        for leaf in params
        if leaf.path in specs
    }
