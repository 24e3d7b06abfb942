"""Finds the constraint that forces the layout of an operation before it.

A partitioner carries a constraint backwards, into the operation that makes the array, so that the
collective is next to an operation that nothing is wrong with. On mesh (data=2, tensor=4):

    logits = x @ w                                  x: P('data'), w: P(None, 'tensor')
    logits = constrain(logits, P('data', None))     governs `x @ w`

The product could stay split over tensor. It does not, since the constraint has no tensor; so the
all-gather of w over tensor comes from the constraint's line.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from ..._core.source import Source
from .._placed_leaf import PlacedLeaf
from ..memory._saved import is_shard_summed

Line = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class GoverningConstraint:
    """A constraint and the lines whose results it decides.

    Attributes:
      source: its own line.
      dims: mesh axes that split each dim of the constrained array, without those left open.
      lines: `(file, line)` of the operations between it and the last product before it.
      open: it leaves a dim to the partitioner, as `jax.vmap` does with the one that it maps.
      names: logical axes of the dims, of `sk.nn.constrain`; () of another one.
    """

    source: Source
    dims: tuple[tuple[str, ...], ...]
    lines: frozenset[Line]
    open: bool = False
    names: tuple[str | None, ...] = ()

    def forbids(self, axes: Sequence[str], batch_axes: Collection[str]) -> bool:
        """Whether it keeps a result from being split as its operands are.

        That is the case if it splits no dim over one of the axes, or if it splits over an axis of
        the batch's rows a dim that is not the first.
        """
        split = {axis for dim in self.dims for axis in dim}
        inner = {axis for dim in self.dims[1:] for axis in dim}
        absent = any(a not in split for a in axes) and not self.open
        return absent or any(a in batch_axes and a in inner for a in axes)


@dataclasses.dataclass(frozen=True)
class OddDeclaration:
    """A declaration that all others disagree with, or that of a matrix in place of another one.

    Attributes:
      source: the line of the constraint, or the one that first reads the leaf.
      axes: mesh axes over which all other declarations agree without it.
      declared_by: what it is, `the constraint at model.py:42 in attend`.
      shape: of the array that it lays out.
      layout: mesh axes that split each dim where the others decide; None of a dim left open.
      sums: products and sums over a dim that it alone splits over these axes: file, line, and the
        shape of the result.
      readers: the lines that read the leaf, `source` among them; () of a constraint.
      leaves: those of the parameters, the model state or the batch that it lays out; () of a
        constraint.
      names: of a constraint by `sk.nn.constrain`, the logical axes that say `layout`; () where none
        do, and of others.
      mapped: logical axes that activations should map to other mesh axes: where parameters have
        the same names.
      either: they are matrices of which another one, that disagrees, can be changed as well.
      beside: what the same rule says of other leaves, where it disagrees only with all of these.
    """

    source: Source
    axes: frozenset[str]
    declared_by: str
    shape: tuple[int, ...]
    layout: tuple[tuple[str, ...] | None, ...]
    sums: frozenset[tuple[str, int, tuple[int, ...]]]
    readers: frozenset[Line] = frozenset()
    leaves: tuple[PlacedLeaf, ...] = ()
    names: tuple[str | None, ...] = ()
    mapped: tuple[tuple[str, tuple[str, ...]], ...] = ()
    either: bool = False
    beside: tuple["OddDeclaration", ...] = ()

    @property
    def together(self) -> tuple[str, ...]:
        """What it is, and those beside it."""
        return tuple(sorted(one.declared_by for one in (self, *self.beside)))

    def makes_sum(
        self,
        at: Source,
        operands: Iterable[Sequence[int]],
        axes: Sequence[str],
        sizes: Mapping[str, int],
    ) -> bool:
        """Whether one of the arrays that are reduced over axes at a line is one of its `sums`."""
        shapes = [shape for file, line, shape in self.sums if (file, line) == (at.file, at.line)]
        pairs = itertools.product(operands, shapes)
        return any(is_shard_summed(local, whole, axes, sizes) for local, whole in pairs)

    def dims(self, sizes: Mapping[str, int]) -> tuple[tuple[str, ...] | None, ...]:
        """`layout` on a mesh, each axis once, without those that do not divide their dim."""
        dims: list[tuple[str, ...] | None] = []
        used = set[str]()
        for size, axes in zip(self.shape, self.layout, strict=True):
            kept: list[str] = []
            for axis in axes or ():
                if (
                    axis not in used
                    and size % math.prod(sizes[name] for name in (*kept, axis)) == 0
                ):
                    kept.append(axis)
            used |= {*kept}
            dims.append(None if axes is None else tuple(kept))
        return tuple(dims)


@dataclasses.dataclass(frozen=True)
class SplitDim:
    """A dim that an operation needs whole, or sums over devices.

    Attributes:
      source: the operation's line.
      axis: the mesh axis that splits it.
      declarations: all that split it so, each with a layout of its own in which the axis splits
        another dim of the operation, or none; () of matrices that could only all be whole.
    """

    source: Source
    axis: str
    declarations: tuple[OddDeclaration, ...]


def layouts_of_others(
    declarations: Iterable[OddDeclaration], sizes: Mapping[str, int]
) -> dict[str, dict[PlacedLeaf, tuple[tuple[str, ...], ...]]]:
    """By part of the step, as `"params"`, the leaves of declarations as they would be on a mesh."""
    parts: dict[str, dict[PlacedLeaf, tuple[tuple[str, ...], ...]]] = {}
    for one in (one for first in declarations for one in (first, *first.beside)):
        dims = tuple(axes or () for axes in one.dims(sizes))
        for leaf in one.leaves:
            parts.setdefault(leaf.part, {})[leaf] = dims
    return parts


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
