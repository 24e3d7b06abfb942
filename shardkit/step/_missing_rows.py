"""Finds mesh axes that store parameters in shards and that the batch's rows are not split over.

On mesh (data=2, fsdp=4), with every matrix of a model over fsdp:

    batch=P("data")             the four devices of fsdp have the same rows: each product is taken
                                in parts over a dim of its weight, and activations are summed
    batch=P(("data", "fsdp"))   each has rows of its own, and weights are gathered

One spec is wrong there, however many rules could be changed instead. So it is told of an axis that
by its name stores parameters, and of one without a meaning over which one rule is at odds with
itself. With the rows over it, too, nothing may be in conflict.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from jax.sharding import PartitionSpec

from .._core.source import Source
from ..parallel import axes_splitting, known_kinds
from ..report import OddDeclaration, PlacedLeaf
from ._disagreements import Disagreements, Group


@dataclasses.dataclass(frozen=True)
class MissingRows:
    """Mesh axes that the rows of the batch lack.

    Attributes:
      axes: in the order of the mesh.
      leaves: of the batch whose rows lack them, as they should be.
    """

    axes: tuple[str, ...]
    leaves: Mapping[PlacedLeaf, tuple[tuple[str, ...], ...]]

    def declarations(
        self, readers: Mapping[PlacedLeaf, Sequence[Source]], disagreements: Disagreements
    ) -> Iterator[OddDeclaration]:
        """What each leaf that is read says, and should say."""
        sums = frozenset(disagreements.sums_over(disagreements.declared, self.axes))
        odd = [
            OddDeclaration(
                readers[leaf][0],
                frozenset(self.axes),
                f"{leaf.declared_by} of {leaf.name}",
                shape=leaf.leaf.shape,
                layout=dims,
                sums=sums,
                readers=frozenset((line.file, line.line) for line in readers[leaf]),
                leaves=(leaf,),
            )
            for leaf, dims in self.leaves.items()
            if readers[leaf]
        ]
        for one in odd:
            yield dataclasses.replace(one, beside=tuple(o for o in odd if o is not one))


def find_missing_rows(
    placed: Sequence[PlacedLeaf],
    rows: Collection[str],
    sizes: Mapping[str, int],
    wrong: Mapping[str, Group],
    compare: Callable[[Sequence[PlacedLeaf], Collection[str]], Disagreements],
) -> MissingRows:
    """Returns the axes that the rows of the batch lack.

    Args:
      placed: the step's arguments.
      rows: mesh axes that split the rows.
      sizes: of the mesh axes.
      wrong: by axis that is in conflict, the declarations without which all others agree; none
        where too many disagree.
      compare: the disagreements of other leaves with other axes of rows.
    """
    axes = tuple(a for a in sizes if a not in rows and _stores(a, placed, wrong))
    batch = [leaf for leaf in placed if leaf.part == "batch"]
    lacking = [leaf for leaf in batch if leaf.dims() and {*leaf.dims()[0]} & {*rows}]
    changed = {leaf: _with_rows(leaf, axes, sizes) for leaf in lacking if axes}
    divided = all(
        leaf.leaf.shape[0] % math.prod(sizes[axis] for axis in dims[0]) == 0
        for leaf, dims in changed.items()
    )
    if changed and divided:
        specs = {leaf: PartitionSpec(*dims) for leaf, dims in changed.items()}
        leaves = [dataclasses.replace(one, spec=specs.get(one, one.spec)) for one in placed]
        if all(map(compare(leaves, {*rows, *axes}).agree, axes)):
            return MissingRows(axes, changed)
    return MissingRows((), {})


def _with_rows(
    leaf: PlacedLeaf, axes: Sequence[str], sizes: Mapping[str, int]
) -> tuple[tuple[str, ...], ...]:
    first, *others = leaf.dims()
    return tuple(axis for axis in sizes if axis in (*first, *axes)), *others


def _stores(axis: str, placed: Sequence[PlacedLeaf], wrong: Mapping[str, Group]) -> bool:
    """Whether an axis stores parameters: by its name, or by one rule at odds with itself."""
    split = [leaf for leaf in placed if axis in leaf.axes()]
    rules = {leaf.declared_by for leaf in split if leaf.part == "params"}
    if not rules or any(leaf.part == "batch" for leaf in split):
        return False
    if axis in axes_splitting("rows", "weights"):
        return True
    named = axis in {kind.axis for kind in known_kinds()}
    return not named and len(rules) == 1 and axis in wrong and len(wrong[axis]) != 1
