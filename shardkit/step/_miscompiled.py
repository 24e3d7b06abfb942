"""Refuses an executable that combines parts of arrays which do not belong together."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.errors import Problem, StepError, raise_all
from .._core.tree import list_leaves
from .._core.types import PyTree
from ..report import PlacedLeaf, read_miscompiled
from ..rules import format_mesh

OnMiscompiled = Literal["error", "report"]


def check_miscompiled(
    compiled: jax.stages.Compiled, args: tuple[PyTree, ...], results: PyTree, mesh: Mesh
) -> None:
    """Raises StepError if the partitioner lost the order of devices in an executable.

    It names each operation with the shape and the dim that it gets wrong.
    """
    sizes = tuple(mesh.shape.items())
    if sum(size > 1 for _, size in sizes) < 2:  # a single axis has a single order
        return
    shardings = compiled.input_shardings[0], compiled.output_shardings
    leaves, returned = (
        _place(tree, placed) for tree, placed in zip((args, results), shardings, strict=True)
    )
    found = read_miscompiled(compiled.as_text() or "", leaves, returned, sizes)
    problems = [Problem(finding.scope or "the step", finding.why, finding.fix) for finding in found]
    headline = f"XLA computes wrong numbers on mesh {format_mesh(mesh.shape)}."
    fix = 'another order of axes as above; on_miscompiled="report" runs the program as it is'
    raise_all(StepError, headline, problems, fix)


def _place(tree: PyTree, shardings: PyTree) -> Sequence[PlacedLeaf]:
    def spec(sharding: Any) -> PartitionSpec:
        return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()

    placed = jax.tree.leaves(shardings)
    return [
        PlacedLeaf("the arguments", leaf, spec(sharding))
        for leaf, sharding in zip(list_leaves(tree), placed, strict=True)
    ]
