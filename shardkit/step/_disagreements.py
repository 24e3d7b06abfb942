"""Finds the constraint that all other declarations disagree with.

The dims of a traced step's arrays fall into classes: dims that operations pass on to one another,
so that a layout of one is the layout of all. On mesh (data=2, tensor=4):

    logits = x @ head                      x: P('data', None), head: P(None, 'tensor')
    hot = constrain(hot, P('tensor'))      rows of hot, of x, of labels: one class
    loss = sum(hot * log_softmax(logits))  classes of `logits`: rows, and columns of head

An axis is in conflict if one declaration splits a class over it and another does not, or if two
split two dims of one array over it. Rows are over `data` by the batch, over `tensor` by the
constraint; columns are over `tensor` by head's rule. Without the constraint nothing is in conflict,
so the partitioner moves arrays over `tensor` because of it, wherever it moves them.
"""

import collections
import itertools
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any, cast

from jax.extend import core

from .._core.equations import source_of_equation
from ._dim_classes import DimClasses

Axes = tuple[str, ...]
Declared = tuple[Hashable, Any, Sequence[Axes | None]]
"""Whose declaration, of which variable, mesh axes per dim; None: says nothing of the dim."""
Sides = tuple[set[Hashable], set[Hashable]]
Group = frozenset[Hashable]
"""Declarations that can only be wrong together: one, or those of leaves of one rule."""

_MUCH = 16


class Disagreements:
    """Where the declarations of a traced step disagree.

    Args:
      jaxpr: the traced step.
      declared: layouts of its variables, at any depth.
      weak: declarations that split nothing, and only count where no others disagree.
    """

    def __init__(
        self, jaxpr: core.Jaxpr, declared: Sequence[Declared], weak: Collection[Hashable] = ()
    ) -> None:
        self._weak = set(weak)
        self._classes = DimClasses(jaxpr, (variable for _, variable, _ in declared))
        self._split: dict[tuple[int, str], set[Hashable]] = collections.defaultdict(set)
        self._named: dict[int, set[Hashable]] = collections.defaultdict(set)
        self._orders: dict[int, dict[Axes, set[Hashable]]] = collections.defaultdict(dict)
        self._sizes: dict[Hashable, int] = {}
        for who, variable, dims in declared:
            self._sizes[who] = variable.aval.size
            for dim, axes in enumerate(dims):
                if axes is not None:
                    root = self._classes.find(variable, dim)
                    self._named[root].add(who)
                    self._orders[root].setdefault(axes, set()).add(who)
                    for axis in axes:
                        self._split[root, axis].add(who)
        self._conflicts: dict[str, list[Sides]] = collections.defaultdict(list)
        for (root, axis), users in self._split.items():
            self._conflicts[axis].append((users, self._named[root] - users))
        for orders in self._orders.values():
            for one, other in itertools.permutations(orders, 2):
                if {*one} == {*other}:
                    for axis in one:
                        self._conflicts[axis].append((orders[one], orders[other]))
        for one, other in self._classes.pairs:
            for axis in {axis for root, axis in self._split if root == one}:
                if (other, axis) in self._split:
                    a, b = self._split[one, axis], self._split[other, axis]
                    self._conflicts[axis] += [(a - b, b - a), (b - a, a - b)]

    def find_ending(
        self, suspects: Iterable[Group], others: Iterable[Hashable] = ()
    ) -> dict[str, set[Group]]:
        """By mesh axis, the suspects without which there is no conflict over it.

        A suspect is a declaration, or several of one rule. Of one axis with a single suspect, this
        alone disagrees with all declarations. Of several, those count that also leave no conflict
        with weak ones of their size, then one that alone splits anything over the axis. Conflicts
        of which neither a suspect nor one of the `others` is a side may stay: rules may differ.
        """
        possible = set(suspects)
        parties = set(others).union(*possible)
        ending: dict[str, set[Group]] = {}
        for axis, pairs in self._conflicts.items():
            strong = [(one, other - self._weak) for one, other in pairs]
            if _agree_without(frozenset(), strong, parties):
                strong = pairs
            if not _agree_without(frozenset(), strong, parties):
                found = {group for group in possible if _agree_without(group, strong, parties)}
                heavy = self._with_weak(pairs, found)
                found = {group for group in found if _agree_without(group, heavy, parties)} or found
                users = {who for (_, a), of in self._split.items() if a == axis for who in of}
                ending[axis] = {group for group in found if users <= group} or found
        return ending

    def _with_weak(self, pairs: Sequence[Sides], suspects: Collection[Group]) -> list[Sides]:
        """Conflicts with those weak declarations whose matrices are about as large as a suspect.

        What is small, as a router beside its experts, is cut to a layout for little.
        """
        least = min((self._sizes[who] for group in suspects for who in group), default=0)
        light = {who for who in self._weak if _MUCH * self._sizes[who] < least}
        return [(one, other - light) for one, other in pairs]

    def splits(self, group: Group, axis: str) -> bool:
        """Whether a declaration splits over an axis what another one says is not split so."""
        return any(group & one and other for one, other in self._conflicts[axis])

    def sums_over(
        self, group: Group, over: Collection[str]
    ) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Products and sums over a dim that a declaration alone splits over some axes.

        Where they sum another dim, too, that others split over these, they are sums without it.

        Yields:
          Their file, line, and the shape of their result.
        """
        own, of_others = list[core.JaxprEqn](), set[int]()
        for number, eqn in self._classes.contracted:
            root = self._classes.root(number)
            users = set().union(*(self._split.get((root, axis), ()) for axis in over))
            own += [eqn] if users and users <= group else []
            of_others |= {id(eqn)} if users - group else set()
        for eqn in own:
            if id(eqn) not in of_others and (source := source_of_equation(eqn)):
                yield source.file, source.line, cast(Any, eqn.outvars[0]).aval.shape

    def layout_of_others(
        self,
        group: Group,
        variable: Any,
        dims: Sequence[Axes | None],
        over: Collection[str],
        *,
        keep: bool = False,
    ) -> tuple[Axes | None, ...]:
        """The dims of a declaration without some axes, with those that the others split them over.

        With `keep`, an axis that no dim has any more is put on the last one of which the others say
        nothing.
        """
        agreed: list[Axes | None] = []
        roots = [self._classes.find(variable, dim) for dim in range(len(dims))]
        for root, axes in zip(roots, dims, strict=True):
            kept = tuple(axis for axis in axes or () if axis not in over)
            of_others = (order for order, whose in self._orders[root].items() if whose - group)
            come = dict.fromkeys(itertools.chain(kept, *of_others))
            agreed.append(None if axes is None else (*come,))
        split = {axis for axes in agreed for axis in axes or ()}
        for axis in (axis for axes in dims if keep for axis in axes or () if axis not in split):
            free = [dim for dim, root in enumerate(roots) if self._is_free(root, axis, group)]
            if free:
                agreed[free[-1]] = (*(agreed[free[-1]] or ()), axis)
        return tuple(agreed)

    def _users(self, root: int, axis: str, group: Group) -> set[Hashable]:
        """The other declarations that split a class over an axis."""
        return self._split.get((root, axis), set()) - group

    def _is_free(self, root: int, axis: str, group: Group) -> bool:
        """Whether no other declaration is at odds with a class that is split over an axis."""
        beside = (other for one, other in self._classes.pairs if one == root)
        beside = itertools.chain(
            beside, (one for one, other in self._classes.pairs if other == root)
        )
        return self._named[root] <= group and not any(
            self._users(other, axis, group) for other in beside
        )


def _agree_without(group: Group, conflicts: Sequence[Sides], parties: set[Hashable]) -> bool:
    """Whether no party is on either side of a conflict any more, and one has ended."""
    left = [(one - group, other - group) for one, other in conflicts]
    ended = not group or any(
        sides != before and not all(sides) and all(before)
        for sides, before in zip(left, conflicts, strict=True)
    )
    return ended and not any(one and other and (one | other) & parties for one, other in left)
