"""Finds the constraint that forces the layout of an operation before it.

A partitioner carries a constraint backwards, into the operation that makes the array, so that the
collective is next to an operation that nothing is wrong with. On mesh (data=2, tensor=4):

    logits = x @ w                                  x: P('data'), w: P(None, 'tensor')
    logits = constrain(logits, P('data', None))     governs `x @ w`

The product could stay split over tensor. It does not, since the constraint has no tensor; so the
all-gather of w over tensor comes from the constraint's line.
"""

import dataclasses
from collections.abc import Collection, Sequence

from ..._core.source import Source

Line = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class GoverningConstraint:
    """A constraint and the lines whose results it decides.

    Attributes:
      source: its own line.
      dims: mesh axes that split each dim of the constrained array, without those left open.
      lines: `(file, line)` of the operations between it and the last product before it.
      open: it leaves a dim to the partitioner, as `jax.vmap` does with the one that it maps.
      disagrees: mesh axes over which all other declarations agree without it.
    """

    source: Source
    dims: tuple[tuple[str, ...], ...]
    lines: frozenset[Line]
    open: bool = False
    disagrees: frozenset[str] = frozenset()

    def forbids(self, axes: Sequence[str], batch_axes: Collection[str]) -> bool:
        """Whether it keeps a result from being split as its operands are.

        That is the case if it splits no dim over one of the axes, or if it splits over an axis of
        the batch's rows a dim that is not the first.
        """
        split = {axis for dim in self.dims for axis in dim}
        inner = {axis for dim in self.dims[1:] for axis in dim}
        absent = any(a not in split for a in axes) and not self.open
        return absent or any(a in batch_axes and a in inner for a in axes)


def find_governing(
    source: Source,
    axes: Sequence[str],
    constraints: Sequence[GoverningConstraint],
    batch_axes: Collection[str],
    *,
    any_split: bool = False,
) -> Source | None:
    """The line of the only constraint that governs an operation and forbids its layout, or None.

    `source` is the line of the operation next to a collective over `axes`. With `any_split` a
    constraint that splits over these axes counts too. So it is for a weight that is gathered: were
    its own dim of the product split, nothing would be.
    """
    line = (source.file, source.line)
    lines = {
        (one.source.file, one.source.line): one.source
        for one in constraints
        if line in one.lines and (any_split or one.forbids(axes, batch_axes))
    }
    return next(iter(lines.values())) if len(lines) == 1 else None
