"""Finds the parts of an update that act on whole matrices, in its jaxpr.

Around the products of one matrix an optimizer works on elements, which needs no move:

    m = 0.95 * m + 0.05 * g     elements                                   before
    x = m.reshape(n, -1) / ‖m‖  what leads from elements to the products   the part
    x = iterate(x @ x.T, x)     products of one matrix                     the part
    y = x.reshape(m.shape)      until it has the parameter's shape         the part
    p = p - 0.1 * y             elements                                   after

Parts depend on no other parts: what lies between two products belongs to the same part.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core

from ..rows import is_elementwise

_FACTORIZATIONS = frozenset(
    "cholesky qr eigh svd lu triangular_solve householder_product eig schur".split()
)
PRODUCTS = _FACTORIZATIONS | {"dot_general"}
"""Names of the operations that may act on whole matrices."""


@dataclasses.dataclass(frozen=True)
class MatrixPart:
    """A part of an update, as positions in its program."""

    equations: tuple[int, ...]  # positions of its equations
    # those of them that are in no other part, and not outside; the others depend on no parameter,
    # such as slices of coefficients, or follow from `arrays` element by element
    own: frozenset[int]
    # inputs that follow parameters, each with elements of one or more matrices
    arrays: tuple[Any, ...]
    shared: tuple[Any, ...]  # other inputs: coefficients, counts
    results: tuple[Any, ...]  # what the rest of the update uses of it
    # for each of `arrays`, the position of an argument of its shape that it was computed from,
    # element by element; None where there is none
    sources: tuple[int | None, ...]
    params: frozenset[int]  # positions of the arguments that are its gradients and parameters


def has_products(jaxpr: Any) -> bool:
    """Whether a program multiplies or factorizes matrices."""
    return any(map(_is_product, jaxpr.eqns))


def find_parts(jaxpr: Any, follows: Sequence[bool], params: Sequence[int]) -> list[MatrixPart]:
    """Returns the parts of an update, without jitted functions inside, in order.

    `follows` says of each argument whether it follows a parameter; `params` are the positions of
    those that are gradients and parameters.
    """
    return _Search(jaxpr, follows, params).parts()


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is known of one value."""

    follows: bool = False  # it depends on elements of parameters
    after: bool = False  # it depends on a product
    # it is an argument, a scalar, or computed from such ones element by element
    simple: bool = True
    source: int | None = None  # position of an argument of its shape that it was so computed from
    # positions of gradients and parameters that it was so computed from
    params: frozenset[int] = frozenset()


class _Search:
    """One search; equations are named by their positions."""

    def __init__(self, jaxpr: Any, follows: Sequence[bool], params: Sequence[int]) -> None:
        self.jaxpr = jaxpr
        self.values: dict[Any, _Value] = {var: _Value() for var in jaxpr.constvars}
        for place, (var, follow) in enumerate(zip(jaxpr.invars, follows, strict=True)):
            own = frozenset({place} & set(params))
            self.values[var] = _Value(follow, source=place if follow else None, params=own)
        self.made_by = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
        self.users: dict[Any, list[int]] = {}
        for place, eqn in enumerate(jaxpr.eqns):
            self._follow(eqn)
            for var in variables(eqn):
                self.users.setdefault(var, []).append(place)

    def parts(self) -> list[MatrixPart]:
        products = [i for i, eqn in enumerate(self.jaxpr.eqns) if self._acts_on_matrices(eqn)]
        part_of: dict[int, int] = {}
        for product in products:
            self._add_origins(product, part_of)
        self._add_ends(part_of)
        numbers = dict.fromkeys(part_of.values())
        return [self._part({i for i, n in part_of.items() if n == number}) for number in numbers]

    def _follow(self, eqn: core.JaxprEqn) -> None:
        operands = [self.values[v] for v in variables(eqn)]
        follows = any(value.follows for value in operands)
        after = any(value.after for value in operands) or (follows and _is_product(eqn))
        by_elements = is_elementwise(eqn) and all(value.simple for value in operands)
        for out in eqn.outvars:
            rank = len(_shape(out))
            alike = [self.values[v] for v in variables(eqn) if _shape(v) == _shape(out)]
            simple = not follows or (not after and (rank == 0 or by_elements))
            sources = [v.source for v in alike if v.source is not None] if simple else []
            own = frozenset[int]().union(*(v.params for v in alike)) if simple and rank else ()
            self.values[out] = _Value(
                follows, after, simple, sources[0] if sources else None, frozenset(own)
            )

    def _acts_on_matrices(self, eqn: core.JaxprEqn) -> bool:
        return _is_product(eqn) and any(self.values[v].follows for v in variables(eqn))

    def _add_origins(self, product: int, part_of: dict[int, int]) -> None:
        """Adds a product, and what leads to it from simple values, to a part."""
        number, waiting = product, [product]
        while waiting:
            place = waiting.pop()
            if part_of.get(place) == number:
                continue
            if place in part_of:  # shared with an earlier product: one part
                earlier = part_of[place]
                part_of.update({i: number for i, n in part_of.items() if n == earlier})
                continue
            part_of[place] = number
            waiting += [
                self.made_by[v]
                for v in variables(self.jaxpr.eqns[place])
                if not self.values[v].simple
            ]

    def _add_ends(self, part_of: dict[int, int]) -> None:
        """Adds what only concerns one part, such as a last sum, and drops what need not move."""
        outside: set[Any] = set()  # computed from parts, but not in one
        for place, eqn in enumerate(self.jaxpr.eqns):
            if place in part_of:
                continue
            used = variables(eqn)
            inside = {part_of[self.made_by[v]] for v in used if self.made_by.get(v) in part_of}
            others = [v for v in used if self.made_by.get(v) not in part_of]
            alone = len(inside) == 1 and not outside.intersection(used)
            if alone and not any(self.values[v].follows and _shape(v) for v in others):
                if all(_shape(out) for out in eqn.outvars):
                    part_of[place] = inside.pop()
                    continue
            if inside or outside.intersection(used):
                outside.update(eqn.outvars)
        self._drop_last_scalings(part_of)

    def _drop_last_scalings(self, part_of: dict[int, int]) -> None:
        """Leaves a scaling at the end, which differs from matrix to matrix, to the partitioner."""
        for place in sorted(part_of, reverse=True):
            eqn = self.jaxpr.eqns[place]
            own = [v for v in variables(eqn) if self.made_by.get(v) in part_of]
            used = any(i in part_of for var in eqn.outvars for i in self.users.get(var, ()))
            if used or not is_elementwise(eqn) or len(own) != 1:
                continue
            if _shape(own[0]) == _shape(eqn.outvars[0]):
                del part_of[place]

    def _part(self, own: set[int]) -> MatrixPart:
        places = own | set(self._constants(own))
        while more := set(self._derived(inputs := self._inputs(places))):
            places |= more
        arrays = tuple(v for v in inputs if self.values[v].follows and _shape(v))
        ends = {v for v in self.jaxpr.outvars if not isinstance(v, core.Literal)}
        of_own = [var for place in sorted(own) for var in self.jaxpr.eqns[place].outvars]
        return MatrixPart(
            equations=tuple(sorted(places)),
            own=frozenset(own),
            arrays=arrays,
            shared=tuple(v for v in inputs if v not in arrays),
            results=tuple(
                var
                for var in of_own
                if var in ends or any(i not in places for i in self.users.get(var, ()))
            ),
            sources=tuple(self.values[v].source for v in arrays),
            params=frozenset[int]().union(*(self.values[v].params for v in arrays)),
        )

    def _inputs(self, places: set[int]) -> list[Any]:
        eqns = [self.jaxpr.eqns[place] for place in sorted(places)]
        made = {var for eqn in eqns for var in eqn.outvars}
        return list(dict.fromkeys(v for eqn in eqns for v in variables(eqn) if v not in made))

    def _derived(self, inputs: Sequence[Any]) -> Iterator[int]:
        """Equations whose results need not be moved, since those of others are: `m * m` of `m`."""
        for var in inputs:
            place = self.made_by.get(var)
            if place is not None and _shape(var) and self.values[var].follows:
                used = [v for v in variables(self.jaxpr.eqns[place]) if _shape(v)]
                if used and set(used) <= set(inputs):
                    yield place

    def _constants(self, places: set[int]) -> Iterator[int]:
        """Equations that lead to these and depend on no parameter."""
        waiting = [v for place in places for v in variables(self.jaxpr.eqns[place])]
        seen = set(places)
        while waiting:
            var = waiting.pop()
            place = self.made_by.get(var)
            if place is None or place in seen or self.values[var].follows or not _shape(var):
                continue
            seen.add(place)
            yield place
            waiting += variables(self.jaxpr.eqns[place])


def variables(eqn: core.JaxprEqn) -> list[Any]:
    """The operands of an equation that are no literals."""
    return [v for v in eqn.invars if not isinstance(v, core.Literal)]


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(var.aval.shape)


def _is_product(eqn: core.JaxprEqn) -> bool:
    """Whether an equation factorizes matrices, or multiplies two with a matrix as result."""
    if eqn.primitive.name in _FACTORIZATIONS:
        return True
    if eqn.primitive.name == "dot_general":
        contracted, batch = eqn.params["dimension_numbers"]
        return all(
            len(_shape(eqn.invars[side])) > len(contracted[side]) + len(batch[side])
            for side in (0, 1)
        )
    return any(map(has_products, core.jaxprs_in_params(eqn.params)))
