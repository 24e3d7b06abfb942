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
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, cast

from jax.extend import core

from .._core.equations import count_scan_operands

Axes = tuple[str, ...]
Declared = tuple[Hashable, Any, Sequence[Axes | None]]
"""Whose declaration, of which variable, mesh axes per dim; None: says nothing of the dim."""
Sides = tuple[set[Hashable], set[Hashable]]

_DROPPING = ("reduce_", "argm")


def find_disagreeing(
    jaxpr: core.Jaxpr, declared: Sequence[Declared], suspects: Iterable[Hashable]
) -> dict[Hashable, frozenset[str]]:
    """The mesh axes over which one of the suspects alone disagrees with the other declarations.

    For each suspect those on which there is no conflict without it, and which have no other suspect
    of which this is true. Declarations are layouts of the program's variables, at any depth.
    """
    classes = _Classes(jaxpr)
    split: dict[tuple[int, str], set[Hashable]] = collections.defaultdict(set)
    named: dict[int, set[Hashable]] = collections.defaultdict(set)
    for who, variable, dims in declared:
        for dim, axes in enumerate(dims):
            if axes is not None:
                root = classes.find(variable, dim)
                named[root].add(who)
                for axis in axes:
                    split[root, axis].add(who)
    conflicts: dict[str, list[Sides]] = collections.defaultdict(list)
    for (root, axis), users in split.items():
        conflicts[axis].append((users, named[root] - users))
    for one, other in classes.pairs:
        for axis in {axis for root, axis in split if root == one}:
            if (other, axis) in split:
                a, b = split[one, axis], split[other, axis]
                conflicts[axis].append((a - b, b - a))
    possible = set(suspects)
    ending = {
        axis: {who for who in possible if _agree_without(who, pairs, possible)}
        for axis, pairs in conflicts.items()
        if not _agree_without(None, pairs, possible)
    }
    return {
        who: frozenset(axis for axis, whom in ending.items() if whom == {who}) for who in possible
    }


def _agree_without(who: Hashable, conflicts: Sequence[Sides], suspects: set[Hashable]) -> bool:
    """Whether no suspect is on either side of a conflict any more. Rules may differ: of a bias."""
    sides = [(one - {who}, other - {who}) for one, other in conflicts]
    return not any(one and other and (one | other) & suspects for one, other in sides)


class _Classes:
    """Classes of the dims of a program's variables, by union of what operations pass on."""

    def __init__(self, jaxpr: core.Jaxpr) -> None:
        self._parents: list[int] = []
        self._numbers: dict[tuple[int, int], int] = {}
        self._arrays: list[tuple[int, ...]] = []
        self._follow(jaxpr)
        self.pairs = {  # two classes that are dims of one array
            pair
            for array in self._arrays
            for pair in itertools.combinations({self._root(n) for n in array}, 2)
        }

    def find(self, variable: Any, dim: int) -> int:
        """The class of a dim, as a number."""
        return self._root(self._number(variable, dim))

    def _number(self, variable: Any, dim: int) -> int:
        key = id(variable), dim
        if key not in self._numbers:
            shape = variable.aval.shape
            first = len(self._parents)
            self._parents += range(first, first + len(shape))
            self._numbers |= {(id(variable), i): first + i for i in range(len(shape))}
            self._arrays.append(tuple(range(first, first + len(shape))))
        return self._numbers[key]

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def _join(self, one: Any, other: Any, pairs: Iterable[tuple[int, int]]) -> None:
        if isinstance(one, core.Literal) or isinstance(other, core.Literal):
            return
        for i, j in pairs:
            a, b = (self._root(self._number(*of)) for of in ((one, i), (other, j)))
            self._parents[a] = b

    def _follow(self, jaxpr: core.Jaxpr) -> None:
        for eqn in jaxpr.eqns:
            bodies = list(core.jaxprs_in_params(eqn.params))
            for body in bodies:
                self._follow(body)
                self._call(eqn, body)
            if not bodies:
                for one, other, pairs in _passed_on(eqn):
                    self._join(one, other, pairs)

    def _call(self, eqn: core.JaxprEqn, body: core.Jaxpr) -> None:
        """Joins what is passed to a body and what it returns; a loop's arrays have a dim more."""
        passed = zip(reversed(eqn.invars), reversed(body.invars), strict=False)
        returned = zip(reversed(eqn.outvars), reversed(body.outvars), strict=False)
        for outside, inside in (*passed, *returned):
            self._join(outside, inside, _last_dims(outside, inside))
        if eqn.primitive.name == "scan":
            fixed, carried = count_scan_operands(eqn)
            inputs = body.invars[fixed : fixed + carried]
            for one, other in zip(inputs, body.outvars[:carried], strict=True):
                self._join(one, other, _last_dims(one, other))


def _last_dims(one: Any, other: Any) -> Iterator[tuple[int, int]]:
    a, b = (getattr(v.aval, "ndim", 0) for v in (one, other))
    return ((a - n, b - n) for n in range(1, min(a, b) + 1))


_Passed = Iterator[tuple[Any, Any, Iterable[tuple[int, int]]]]


def _passed_on(eqn: core.JaxprEqn) -> _Passed:
    """Pairs of variables of an operation, with the dims of theirs that are the same."""
    name, params = eqn.primitive.name, eqn.params
    if not eqn.outvars:  # all of its results were dropped
        return
    ins, out = cast(Sequence[Any], eqn.invars), cast(Any, eqn.outvars[0])
    if name == "dot_general":
        yield from _product(eqn)
    elif name == "broadcast_in_dim":
        yield ins[0], out, _equal(ins[0], out, enumerate(params["broadcast_dimensions"]))
    elif name == "transpose":
        yield ins[0], out, ((i, n) for n, i in enumerate(params["permutation"]))
    elif name == "reshape":
        yield ins[0], out, _reshape(ins[0].aval.shape, out.aval.shape)
    elif name == "squeeze" or (name.startswith(_DROPPING) and "axes" in params):
        dropped = params["dimensions"] if name == "squeeze" else params["axes"]
        left = (i for i in range(ins[0].aval.ndim) if i not in dropped)
        yield ins[0], out, ((i, n) for n, i in enumerate(left))
    elif name == "gather":
        yield from _gather(params["dimension_numbers"], ins[0], ins[1], out)
    elif name.startswith("scatter"):
        yield from _scatter(params["dimension_numbers"], ins[1], ins[2], out)
        yield ins[0], out, _equal(ins[0], out)
    elif name == "conv_general_dilated":
        lhs, rhs, result = params["dimension_numbers"]
        yield ins[0], out, [(lhs[0], result[0])]
        yield ins[0], ins[1], [(lhs[1], rhs[1])]
        yield ins[1], out, [(rhs[0], result[1])]
    elif name in ("stack", "unstack"):
        parts = ins if name == "stack" else cast(Sequence[Any], eqn.outvars)
        left = [i for i in range(parts[0].aval.ndim + 1) if i != params["axis"]]
        yield from ((v, out if name == "stack" else ins[0], enumerate(left)) for v in parts)
    else:  # element by element, or slices of the same rank
        yield from ((v, out, _equal(v, out)) for v in (*ins, *eqn.outvars[1:]))


def _equal(
    one: Any, other: Any, pairs: Iterable[tuple[int, int]] | None = None
) -> list[tuple[int, int]]:
    """Those of some pairs of dims that have one size; by default of all, if ranks are equal."""
    a, b = (getattr(v.aval, "shape", ()) for v in (one, other))
    if pairs is None:
        pairs = ((i, i) for i in range(len(a))) if len(a) == len(b) else ()
    return [(i, j) for i, j in pairs if a[i] == b[j]]


def _product(eqn: core.JaxprEqn) -> _Passed:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = cast(Sequence[Any], eqn.invars)
    yield left, right, [*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)]
    free = [i for i in range(left.aval.ndim) if i not in (*lc, *lb)]
    yield left, eqn.outvars[0], ((i, n) for n, i in enumerate((*lb, *free)))
    other = [i for i in range(right.aval.ndim) if i not in (*rc, *rb)]
    yield right, eqn.outvars[0], ((i, n) for n, i in enumerate(other, len(lb) + len(free)))


def _gather(numbers: Any, table: Any, indices: Any, out: Any) -> _Passed:
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    sliced = [i for i in range(table.aval.ndim) if i not in dropped]
    yield table, out, _equal(table, out, zip(sliced, numbers.offset_dims, strict=False))
    rows = (n for n in range(out.aval.ndim) if n not in numbers.offset_dims)
    yield indices, out, zip(range(indices.aval.ndim - 1), rows, strict=False)


def _scatter(numbers: Any, indices: Any, updates: Any, out: Any) -> _Passed:
    inserted = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = [i for i in range(out.aval.ndim) if i not in inserted]
    yield updates, out, _equal(updates, out, zip(numbers.update_window_dims, windows, strict=False))
    rows = (n for n in range(updates.aval.ndim) if n not in numbers.update_window_dims)
    yield indices, updates, zip(range(indices.aval.ndim - 1), rows, strict=False)


def _reshape(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The slowest dims of the groups that a reshape keeps apart: (8, 16, 4) → (8, 64) has two."""
    i = j = 0
    while i < len(old) and j < len(new):
        if old[i] == 1 or new[j] == 1:
            i, j = i + (old[i] == 1), j + (new[j] == 1)
            continue
        yield i, j
        a, b, i, j = old[i], new[j], i + 1, j + 1
        while a != b:
            if a < b and i < len(old):
                a, i = a * old[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            else:
                return
