"""Finds the dims that an operation needs whole and that declarations split.

All declarations can agree on a layout that costs much. On mesh (data=2, tensor=4):

    scores = x @ table.T       table[vocab, embed]: P(None, 'tensor'): [rows, vocab] is summed
    best = jnp.sort(h, -1)     h = x @ w, w: P(None, 'tensor'): the columns of h are moved

The product keeps the dim `vocab` of the table, which can be split instead. The sort keeps no other
dim of `w`, which can be whole. So can what a constraint splits that nothing else does.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from .._core.source import Source
from ..nn._constrain import MAPPED
from ..report import OddDeclaration, PlacedLeaf, SplitDim
from ._constraint_names import without_shards
from ._disagreements import Axes, Disagreements, SplitClass


class DeclaredLayout(NamedTuple):
    """What a constraint, or the rule of leaves, says of an array."""

    text: str  # what it is
    variable: Any  # the array
    dims: Sequence[Axes | None]  # mesh axes per dim; None of a dim left open
    leaves: tuple[PlacedLeaf, ...] = ()  # those of the rule; () of a constraint
    source: Source | None = None  # the line of a constraint
    names: tuple[str | None, ...] = ()  # the logical axes of one that has some
    shards: int | None = None  # its dim over gradient shards

    def change(self, at: Source, axis: str, layout: tuple[Axes | None, ...]) -> OddDeclaration:
        """What it would say instead."""
        columns = [*zip(self.names, self.dims, layout, strict=False)]
        named = all(axes == wanted or not wanted for _, axes, wanted in columns)
        named = named and MAPPED not in self.names
        names = tuple(name if axes == wanted else None for name, axes, wanted in columns)
        odd = OddDeclaration(
            self.source or at,
            frozenset({axis}),
            self.text,
            shape=cast(Any, self.variable).aval.shape,
            layout=layout,
            sums=frozenset(),
            leaves=self.leaves,
            names=names if named else (),
        )
        return without_shards(odd, self.shards)


def find_split_dims(
    disagreements: Disagreements, declarations: Mapping[Any, DeclaredLayout]
) -> Iterator[SplitDim]:
    """Yields the split dims of each line, with another layout of all that split them."""
    for split in disagreements.find_split():
        if not split.users <= declarations.keys():
            continue
        users = [one for who, one in declarations.items() if who in split.users]
        classes = [disagreements.classes_of(one.variable, one.dims) for one in users]
        to = next((one for one in split.kept if all(one in roots for roots in classes)), None)
        changed = []
        for one, roots in zip(users, classes, strict=True):
            dims = zip(roots, one.dims, strict=True)
            layout = tuple(_move(split, to, root, axes) for root, axes in dims)
            changed.append(one.change(split.source, split.axis, layout))
        # Several matrices that agree are a pair, and no mistake.
        paired = to is None and len(users) > 1 and all(one.leaves for one in users)
        yield SplitDim(split.source, split.axis, () if paired else tuple(changed))
    for who, one in declarations.items():
        roots = disagreements.classes_of(one.variable, one.dims) if one.source else ()
        split = {
            (root, axis) for root, axes in zip(roots, one.dims, strict=False) for axis in axes or ()
        }
        for axis in {axis for root, axis in split if disagreements.users(root, axis) == {who}}:
            layout = (axes and tuple(a for a in axes if a != axis) for axes in one.dims)
            at = cast(Source, one.source)
            yield SplitDim(at, axis, (one.change(at, axis, tuple(layout)),))


def _move(split: SplitClass, to: int | None, root: int, axes: Axes | None) -> Axes | None:
    if axes is None:
        return None
    left = tuple(axis for axis in axes if axis != split.axis or root != split.root)
    return (*left, split.axis) if root == to else left
