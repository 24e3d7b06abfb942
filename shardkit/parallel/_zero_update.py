"""ZeRO: an update computed on shards that are finer than those of the parameters."""

import dataclasses
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from .._core.errors import Problem, StepError, raise_all
from .._core.tree import Leaf
from ..rules import axes_of, shard_count, spec_from_axes


@dataclasses.dataclass(frozen=True)
class Zero:
    """Splits the update of every parameter over one mesh axis more than the parameter itself.

    Attributes:
      axis: the mesh axis.
      stage: 1: gradients are whole over `axis` and sliced for the update; 2: they are left split.
      last: logical axes that are split only where no other dim divides. The gradient of a stacked
        parameter is made layer by layer, so along `layers` there is nothing to scatter.
    """

    axis: str
    stage: int = 1
    last: tuple[str, ...] = ("layers",)

    def __post_init__(self) -> None:
        """Refuses a stage that there is not."""
        if type(self.stage) is not int or self.stage not in (1, 2):
            why = "stage 1 splits optimizer state, stage 2 gradients too, stage 3 is fsdp"
            fix = f"stage=2, or strategies.fsdp({self.axis!r})"
            problem = Problem(f"zero(stage={self.stage!r})", why, fix)
            raise_all(StepError, "There is no such stage of ZeRO.", [problem])

    def spec(self, leaf: Leaf, spec: PartitionSpec, sizes: Mapping[str, int]) -> PartitionSpec:
        """Returns the spec in which a parameter is updated.

        A dim that is split already takes the axis besides, otherwise the one with most elements on
        a device: gradients that are summed over both axes are then summed once. A parameter of
        which no dim divides keeps its spec.

        Args:
          leaf: the parameter.
          spec: its own spec, resolved.
          sizes: `{mesh axis: size}`.

        >>> import numpy as np
        >>> up = Leaf("up", (2, 8, 16), np.dtype("float32"), ("layers", "embed", "mlp"))
        >>> Zero("data").spec(up, PartitionSpec(None, None, "tensor"), {"data": 2, "tensor": 4})
        P(None, None, ('tensor', 'data'))
        """
        dims = [axes_of(entry) for entry in (*spec, *[None] * (len(leaf.shape) - len(spec)))]
        names = leaf.axes or (None,) * len(dims)
        local = [n // shard_count(axes, sizes) for n, axes in zip(leaf.shape, dims, strict=True)]
        fitting = [dim for dim, n in enumerate(local) if n and n % sizes[self.axis] == 0]
        if not fitting or any(self.axis in axes for axes in dims):
            return spec
        best = max(fitting, key=lambda d: (names[d] not in self.last, bool(dims[d]), local[d]))
        dims[best] = (*dims[best], self.axis)
        return spec_from_axes(dims)


def update_specs(
    zero: Zero | None,
    params: Sequence[Leaf],
    specs: Mapping[str, PartitionSpec],
    sizes: Mapping[str, int],
) -> dict[str, PartitionSpec]:
    """Returns the spec by path in which each parameter is updated, its own without ZeRO.

    Args:
      zero: the declaration, or None.
      params: the parameters.
      specs: their own specs by path; a parameter that has none is left out.
      sizes: `{mesh axis: size}`.
    """
    own = {leaf.path: (leaf, specs[leaf.path]) for leaf in params if leaf.path in specs}
    if zero is None:
        return {path: spec for path, (_, spec) in own.items()}
    return {path: zero.spec(leaf, spec, sizes) for path, (leaf, spec) in own.items()}
