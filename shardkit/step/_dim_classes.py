"""Classes of the dims of a program's arrays: those that operations pass on to one another.

Of `h = x @ w` the rows of h are those of x, its columns those of w, and the columns of x are the
rows of w. A layout of one dim of a class is the layout of all, unless something is moved.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from jax.extend import core

from .._core.equations import count_scan_operands, source_of_equation
from .._core.source import Source
from .._core.tracing import equations

_DROPPING = ("reduce_", "argm")
# Operations that need all of a dim on each device, and the parameter that says which one.
_WHOLE = {
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), "axis"),
    "sort": "dimension",
    "top_k": "axis",
}
_PIECES = frozenset("slice dynamic_slice concatenate pad".split())
_WINDOWS = "reduce_window", "select_and_"


class DimClasses:
    """Classes of the dims of a program's variables, by union of what operations pass on.

    JAX traces a jitted function once for all calls with equal shapes: two calls of `jax.nn.relu`
    share a body, whose dims are of two classes. So a variable of a body counts once for each call;
    only where something in it is declared do all its calls share their classes.
    """

    def __init__(self, jaxpr: core.Jaxpr, declared: Iterable[Any]) -> None:
        self._parents: list[int] = []
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._arrays: list[tuple[int, ...]] = []
        self._declared = {id(variable) for variable in declared}
        self._shared: dict[int, bool] = {}
        self._calls = 0
        self.contracted: list[tuple[int, core.JaxprEqn]] = []
        # Dims that an operation takes together or needs whole, and the dims that it keeps.
        self.needed: list[tuple[int, Source, list[int]]] = []
        self.products: list[tuple[list[int], int]] = []  # numbers of their dims, multiplications
        # Of each reshape (2, 8) ↔ 16: the numbers of 2 and 8, and the sizes 2 and 16.
        self.merged: list[tuple[int, int, int, int]] = []
        self._follow(jaxpr, 0)
        self.pairs = {  # two classes that are dims of one array
            pair
            for array in self._arrays
            for pair in itertools.combinations({self.root(n) for n in array}, 2)
        }

    def find(self, variable: Any, dim: int) -> int:
        """The class of a dim of a declared variable, as a number."""
        return self.root(self._number(0, variable, dim))

    def _number(self, call: int, variable: Any, dim: int) -> int:
        key = call, id(variable), dim
        if key not in self._numbers:
            shape = variable.aval.shape
            first = len(self._parents)
            self._parents += range(first, first + len(shape))
            self._numbers |= {(call, id(variable), i): first + i for i in range(len(shape))}
            self._arrays.append(tuple(range(first, first + len(shape))))
        return self._numbers[key]

    def root(self, number: int) -> int:
        """The class of a numbered dim."""
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def _join(self, one: Any, other: Any, pairs: Iterable[tuple[int, int]], *calls: int) -> None:
        """Joins dims of two variables, each of the call that it is in."""
        if isinstance(one, core.Literal) or isinstance(other, core.Literal):
            return
        for i, j in pairs:
            ends = ((calls[0], one, i), (calls[-1], other, j))
            a, b = (self.root(self._number(*end)) for end in ends)
            self._parents[a] = b

    def _follow(self, jaxpr: core.Jaxpr, call: int, within: Source | None = None) -> None:
        """Follows a jaxpr; what JAX traced before has the line of the call `within` which it is."""
        for eqn in jaxpr.eqns:
            bodies = list(core.jaxprs_in_params(eqn.params))
            for body in bodies:
                inner = 0 if self._is_shared(body) else self._calls + 1
                self._calls = max(self._calls, inner)
                self._follow(body, inner, source_of_equation(eqn) or within)
                self._call(eqn, body, call, inner)
            if not bodies:
                for one, other, pairs in _passed_on(eqn):
                    self._join(one, other, pairs, call)
                self.contracted += (
                    (self._number(call, variable, dim), eqn)
                    for variable, dim in _contracted(eqn)
                    if not isinstance(variable, core.Literal)
                )
                source = source_of_equation(eqn) or within
                needed = self._needed(eqn, call) if source else ()
                self.needed += ((dim, source, kept) for dim, kept in needed if source)
                if eqn.primitive.name == "dot_general":
                    self.products.append(self._product(eqn, call))
                if eqn.primitive.name == "reshape" and isinstance(eqn.invars[0], core.Var):
                    self.merged += self._merged(cast(Any, eqn.invars[0]), eqn.outvars[0], call)

    def _needed(self, eqn: core.JaxprEqn, call: int) -> Iterator[tuple[int, list[int]]]:
        if not eqn.invars or isinstance(eqn.invars[0], core.Literal):
            return
        array, name, params = cast(Any, eqn.invars[0]), eqn.primitive.name, eqn.params
        if name == "dot_general":
            dims, keeping = params["dimension_numbers"][0][0], cast(Any, eqn.outvars[0])
        elif name in _WHOLE:
            dims, keeping = [params.get(_WHOLE[name], -1) % array.aval.ndim], array
        else:
            return
        for dim in dims:
            left = (i for i in range(keeping.aval.ndim) if keeping is not array or i != dim)
            kept = [self._number(call, keeping, i) for i in left]
            yield self._number(call, array, dim), kept

    def _product(self, eqn: core.JaxprEqn, call: int) -> tuple[list[int], int]:
        operands = [cast(Any, v) for v in eqn.invars if not isinstance(v, core.Literal)]
        numbers = [self._number(call, v, dim) for v in operands for dim in range(v.aval.ndim)]
        ((contracted, _), _), left = eqn.params["dimension_numbers"], cast(Any, eqn.invars[0])
        summed = math.prod(left.aval.shape[dim] for dim in contracted)
        return numbers, summed * math.prod(cast(Any, eqn.outvars[0]).aval.shape)

    def _merged(self, old: Any, new: Any, call: int) -> Iterator[tuple[int, int, int, int]]:
        for ours, theirs in _reshape_groups(old.aval.shape, new.aval.shape):
            for variable, dims, others in ((old, ours, theirs), (new, theirs, ours)):
                if len(dims) > 1 and len(others) == 1:
                    first, second = (self._number(call, variable, dim) for dim in dims[:2])
                    sizes = [variable.aval.shape[dim] for dim in dims]
                    yield first, second, sizes[0], math.prod(sizes)

    def _is_shared(self, body: core.Jaxpr) -> bool:
        """Whether something is declared in a body."""
        if id(body) not in self._shared:
            inner = (v for eqn in equations(body) for v in (*eqn.invars, *eqn.outvars))
            self._shared[id(body)] = any(id(v) in self._declared for v in inner)
        return self._shared[id(body)]

    def _call(self, eqn: core.JaxprEqn, body: core.Jaxpr, call: int, inner: int) -> None:
        """Joins what is passed to a body and what it returns; a loop's arrays have a dim more."""
        passed = zip(reversed(eqn.invars), reversed(body.invars), strict=False)
        returned = zip(reversed(eqn.outvars), reversed(body.outvars), strict=False)
        for outside, inside in (*passed, *returned):
            self._join(outside, inside, _last_dims(outside, inside), call, inner)
        if eqn.primitive.name == "scan":
            fixed, carried = count_scan_operands(eqn)
            inputs = body.invars[fixed : fixed + carried]
            for one, other in zip(inputs, body.outvars[:carried], strict=True):
                self._join(one, other, _last_dims(one, other), inner)
            if source := source_of_equation(eqn):
                for array in cast(Sequence[Any], eqn.invars[fixed + carried :]):
                    if not isinstance(array, core.Literal):
                        first, *kept = (
                            self._number(call, array, i) for i in range(array.aval.ndim)
                        )
                        self.needed.append((first, source, kept))


def _contracted(eqn: core.JaxprEqn) -> Iterator[tuple[Any, int]]:
    """The dims of operands that a product or a sum takes together."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
    elif name == "conv_general_dilated":
        contracted = params["dimension_numbers"].lhs_spec[1:2]
    else:
        contracted = params["axes"] if name.startswith(_DROPPING) and "axes" in params else ()
    yield from ((eqn.invars[0], dim) for dim in contracted)


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
        yield ins[0], out, _equal(ins[0], out, [(lhs[0], result[0])])
        yield ins[0], out, zip(lhs[2:], result[2:], strict=True)  # with what is next to a shard
        yield ins[0], ins[1], _equal(ins[0], ins[1], [(lhs[1], rhs[1])])
        yield ins[1], out, _equal(ins[1], out, [(rhs[0], result[1])])
        if params["feature_group_count"] == ins[0].aval.shape[lhs[1]]:  # channel by channel
            yield ins[0], out, _equal(ins[0], out, [(lhs[1], result[1])])
    elif name in ("stack", "unstack"):
        parts = ins if name == "stack" else cast(Sequence[Any], eqn.outvars)
        left = [i for i in range(parts[0].aval.ndim + 1) if i != params["axis"]]
        yield from ((v, out if name == "stack" else ins[0], enumerate(left)) for v in parts)
    elif name in _PIECES or name.startswith(_WINDOWS):  # of which a layout of the whole is one too
        yield from ((v, out, _pieces(v, out)) for v in ins)
    else:  # element by element
        yield from ((v, out, _equal(v, out)) for v in (*ins, *eqn.outvars[1:]))


def _equal(
    one: Any, other: Any, pairs: Iterable[tuple[int, int]] | None = None
) -> list[tuple[int, int]]:
    """Those of some pairs of dims that have one size; by default of all, if ranks are equal."""
    a, b = (getattr(v.aval, "shape", ()) for v in (one, other))
    if pairs is None:
        pairs = ((i, i) for i in range(len(a))) if len(a) == len(b) else ()
    return [(i, j) for i, j in pairs if a[i] == b[j]]


def _pieces(piece: Any, whole: Any) -> list[tuple[int, int]]:
    """All dims of two arrays of one rank but those of which one element is taken or added."""
    a, b = (getattr(v.aval, "shape", ()) for v in (piece, whole))
    dims = range(len(a)) if len(a) == len(b) else ()
    return [(i, i) for i in dims if a[i] == b[i] or min(a[i], b[i]) > 1]


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
    batching = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    yield table, indices, zip(*batching, strict=True)


def _scatter(numbers: Any, indices: Any, updates: Any, out: Any) -> _Passed:
    inserted = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = [i for i in range(out.aval.ndim) if i not in inserted]
    yield updates, out, _equal(updates, out, zip(numbers.update_window_dims, windows, strict=False))
    rows = (n for n in range(updates.aval.ndim) if n not in numbers.update_window_dims)
    yield indices, updates, zip(range(indices.aval.ndim - 1), rows, strict=False)
    batching = numbers.operand_batching_dims, numbers.scatter_indices_batching_dims
    yield out, indices, zip(*batching, strict=True)


def _reshape(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The slowest dims of the groups that a reshape keeps apart: (8, 16, 4) → (8, 64) has two."""
    return ((ours[0], theirs[0]) for ours, theirs in _reshape_groups(old, new))


def _reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """The dims before and after of each group that a reshape keeps apart, without those of 1."""
    i = j = 0
    while i < len(old) and j < len(new):
        if old[i] == 1 or new[j] == 1:
            i, j = i + (old[i] == 1), j + (new[j] == 1)
            continue
        ours, theirs = [i], [j]
        a, b, i, j = old[i], new[j], i + 1, j + 1
        while a != b:
            if a < b and i < len(old):
                ours.append(i)
                a, i = a * old[i], i + 1
            elif b < a and j < len(new):
                theirs.append(j)
                b, j = b * new[j], j + 1
            else:
                return
        yield ours, theirs
