"""Finds the declarations that all others disagree with: a constraint, a rule, the batch's layout.

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
import dataclasses
import itertools
import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from jax.extend import core

from .._core.equations import source_of_equation
from .._core.source import Source
from ._dim_classes import DimClasses

Axes = tuple[str, ...]
Declared = tuple[Hashable, Any, Sequence[Axes | None]]
"""Whose declaration, of which variable, mesh axes per dim; None: says nothing of the dim."""
Sides = tuple[set[Hashable], set[Hashable]]
Group = frozenset[Hashable]
"""Declarations that can only be wrong together: one, or those of leaves of one rule."""


@dataclasses.dataclass(frozen=True)
class SplitClass:
    """A dim that an operation takes together or needs whole, and that is split over an axis."""

    source: Source  # the operation's line
    axis: str  # the mesh axis
    root: int  # the dim's class
    users: Group  # the declarations that split it
    kept: tuple[int, ...]  # classes of other dims of the operation that nothing splits


_MUCH = 16
_FEW = 4  # declarations that are wrong at once


class Disagreements:
    """Where the declarations of a traced step disagree.

    Args:
      jaxpr: the traced step.
      declared: layouts of its variables, at any depth.
      sizes: of the mesh axes.
      weak: declarations that split nothing, and only count where no others disagree.
    """

    def __init__(
        self,
        jaxpr: core.Jaxpr,
        declared: Sequence[Declared],
        sizes: Mapping[str, int],
        weak: Collection[Hashable] = (),
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
        # Keys of 2 heads are whole over 4 devices since nothing divides them.
        excused: dict[tuple[int, str], set[Hashable]] = collections.defaultdict(set)
        self._undivided = set(self._find_undivided(declared, sizes, excused))
        for cut in {(root, axis) for root, axis, _ in self._undivided}:
            excused.pop(cut, None)  # somebody splits them all the same
        self._conflicts: dict[str, list[Sides]] = collections.defaultdict(list)
        for (root, axis), users in self._split.items():
            others = self._named[root] - users - excused[root, axis]
            self._conflicts[axis].append((users, others))
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

    def _find_undivided(
        self,
        declared: Sequence[Declared],
        sizes: Mapping[str, int],
        excused: Mapping[tuple[int, str], set[Hashable]],
    ) -> Iterator[tuple[int, str, int]]:
        """Adds what splits of a dim say of the two that it is reshaped to: keys of 2 heads by 4.

        The columns of the keys, 16 by 4, are 2 heads of 8: each device has half of a head. So the
        elements of heads are split too, where those of 8 queries are whole. Who leaves such columns
        whole is `excused`. Yields the class of such a dim, the axis, and the dim's size.
        """
        by_class: dict[tuple[int, int], list[tuple[Hashable, Axes]]] = collections.defaultdict(list)
        for who, variable, dims in declared:
            for dim, axes in enumerate(dims):
                if axes is not None:
                    key = self._classes.find(variable, dim), variable.aval.shape[dim]
                    by_class[key].append((who, axes))
        for first, second, heads, size in self._classes.merged:
            root, inner = self._classes.root(first), self._classes.root(second)
            for who, axes in by_class[root, size]:
                self._named[inner] |= {who} if axes else set()
                for axis in (axis for axis in axes if heads % sizes[axis]):
                    self._split[inner, axis].add(who)
                    yield root, axis, size
                for axis in (axis for axis in sizes if not axes and heads % sizes[axis]):
                    excused[root, axis].add(who)

    def find_least(
        self,
        suspects: Mapping[str, Collection[Hashable]],
        units: Mapping[Hashable, Hashable],
        likely: Sequence[Collection[Hashable]],
    ) -> dict[str, list[Group]]:
        """By mesh axis, the fewest declarations without which there is no conflict over it.

        `suspects` are by mesh axis the declarations that can be wrong over it, `units` what several
        are one of, as a rule of several leaves; sets with more of `likely` suspects come first,
        constraints before others. Returns the sets that are as small and as likely: those that also
        leave no conflict with weak ones of their size come before others, then those that alone
        split anything over the axis, then those after which the most is multiplied in parts over
        it, and least of that summed.
        """
        least: dict[str, list[Group]] = {}
        for axis, pairs in self._conflicts.items():
            strong = [(one, other - self._weak) for one, other in pairs]
            whose = {*suspects.get(axis, ())}
            if _agree(strong):  # what is whole can be wrong where all others are not
                strong, whose = pairs, whose | self._weak
            sets = _smallest(strong, whose, units)
            # More disagree than can be told: constraints are held to what they meet alone.
            met = [pair for pair in strong if set().union(*pair) & {*likely[0]}]
            sets = sets or _smallest(met, whose & {*likely[0]}, units)
            if sets:
                least[axis] = self._most_likely(axis, sets, likely)
        return least

    def _most_likely(
        self, axis: str, sets: Sequence[Group], likely: Sequence[Collection[Hashable]]
    ) -> list[Group]:
        users = {who for (_, a), of in self._split.items() if a == axis for who in of}
        kept = list(sets)
        for suspects in likely:
            most = max(len(one & {*suspects}) for one in kept)
            kept = [one for one in kept if len(one & {*suspects}) == most]
        heavy = self._with_weak(self._conflicts[axis], kept)
        kept = [one for one in kept if _agree(_without(one, heavy))] or kept
        kept = [one for one in kept if users <= one] or kept
        costs = {one: self._cost(axis, one) for one in kept if len(kept) > 1}
        return [one for one in kept if costs.get(one) == min(costs.values(), default=None)]

    def _cost(self, axis: str, group: Group) -> tuple[int, int]:
        """Multiplications that others do not divide over an axis, and elements that they sum."""
        whole = sum(
            size
            for numbers, size in self._classes.products
            if not any(self._users(self._classes.root(n), axis, group) for n in numbers)
        )
        eqns = {
            id(eqn): math.prod(cast(Any, eqn.outvars[0]).aval.shape)
            for number, eqn in self._classes.contracted
            if self._users(self._classes.root(number), axis, group)
        }
        return whole, sum(eqns.values())

    def _with_weak(self, pairs: Sequence[Sides], suspects: Collection[Group]) -> list[Sides]:
        """Conflicts with those weak declarations whose matrices are about as large as a suspect.

        What is small, as a router beside its experts, is cut to a layout for little.
        """
        least = min((self._sizes[who] for group in suspects for who in group), default=0)
        light = {who for who in self._weak if _MUCH * self._sizes[who] < least}
        return [(one, other - light) for one, other in pairs]

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes over which declarations may be in conflict."""
        return (*self._conflicts,)

    @property
    def declared(self) -> Group:
        """All declarations that split something."""
        return frozenset().union(*self._split.values())

    def agree(self, axis: str) -> bool:
        """Whether nothing is in conflict over an axis."""
        return _agree(self._conflicts[axis])

    def find_split(self) -> Iterator[SplitClass]:
        """Yields the dims that operations take together or need whole, over each axis of theirs."""
        for number, source, kept in self._classes.needed:
            root = self._classes.root(number)
            others = dict.fromkeys(self._classes.root(one) for one in kept)
            split = {one for (one, _), users in self._split.items() if users}
            free = tuple(one for one in others if one not in split)
            for axis in self._conflicts:
                if users := self.users(root, axis):
                    yield SplitClass(source, axis, root, frozenset(users), free)

    def classes_of(self, variable: Any, dims: Sequence[Axes | None]) -> list[int]:
        """The class of each dim of a declared variable."""
        return [self._classes.find(variable, dim) for dim in range(len(dims))]

    def splits(self, group: Group, axis: str) -> bool:
        """Whether a declaration splits over an axis what another one says is not split so."""
        return any(group & one and other for one, other in self._conflicts[axis])

    def sums_over(
        self, group: Group, over: Collection[str]
    ) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Products and sums over a dim that a declaration alone splits over some axes.

        Where they sum another dim, too, that others split over these, they are sums without it.
        Yields their file, line, and the shape of their result.
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
        wrong: Mapping[str, Group],
        variable: Any,
        dims: Sequence[Axes | None],
        over: Collection[str],
        *,
        keep: bool = False,
    ) -> tuple[Axes | None, ...]:
        """The dims of a declaration without some axes, with those that the others split them over.

        `wrong` are by axis the declarations that do not count as others, itself among them. With
        `keep`, an axis that no dim has any more is put on the last one of which the others say
        nothing.
        """
        agreed: list[Axes | None] = []
        roots = [self._classes.find(variable, dim) for dim in range(len(dims))]
        own = frozenset.intersection(*(wrong[axis] for axis in over))
        for root, axes, size in zip(roots, dims, variable.aval.shape, strict=True):
            come = dict.fromkeys(axis for axis in axes or () if axis not in over)
            for order, whose in self._orders[root].items():
                come |= dict.fromkeys(
                    a
                    for a in order
                    if whose - own - wrong.get(a, own) and (root, a, size) not in self._undivided
                )
            agreed.append(None if axes is None else (*come,))
        split = {axis for axes in agreed for axis in axes or ()}
        for axis in (axis for axes in dims if keep for axis in axes or () if axis not in split):
            free = [d for d, root in enumerate(roots) if self._is_free(root, axis, wrong[axis])]
            if free:
                agreed[free[-1]] = (*(agreed[free[-1]] or ()), axis)
        return tuple(agreed)

    def users(self, root: int, axis: str) -> set[Hashable]:
        """The declarations that split a class over an axis."""
        return self._split.get((root, axis), set())

    def _users(self, root: int, axis: str, group: Group) -> set[Hashable]:
        return self.users(root, axis) - group

    def _is_free(self, root: int, axis: str, group: Group) -> bool:
        """Whether no other declaration is at odds with a class that is split over an axis."""
        beside = (other for one, other in self._classes.pairs if one == root)
        beside = itertools.chain(
            beside, (one for one, other in self._classes.pairs if other == root)
        )
        return self._named[root] <= group and not any(
            self._users(other, axis, group) for other in beside
        )


def _smallest(
    conflicts: Sequence[Sides], suspects: set[Hashable], units: Mapping[Hashable, Hashable]
) -> list[Group]:
    """The smallest sets of suspects without which nothing is in conflict, of up to `_FEW` units.

    Of the first conflict that is left, all of one side have to go: so each step tries both.
    """
    found = dict[Group, int]()
    tried, least = set[Group](), _FEW

    def end(group: Group) -> None:
        nonlocal least
        size = len({units.get(who, who) for who in group})
        if group in tried or size > least:
            return
        tried.add(group)
        left = next((sides for sides in _without(group, conflicts) if all(sides)), None)
        if left is None:
            found[group], least = size, size
        for side in left or ():
            if side <= suspects:
                end(group | side)

    end(frozenset())
    return [group for group, size in found.items() if group and size == least]


def _without(group: Group, conflicts: Iterable[Sides]) -> list[Sides]:
    return [(one - group, other - group) for one, other in conflicts]


def _agree(conflicts: Iterable[Sides]) -> bool:
    return not any(all(sides) for sides in conflicts)
