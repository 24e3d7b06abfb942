"""Loops that take the rows of a batch in turn, read as one operation on all of them.

The programs that are made here are followed, and never run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..._core.equations import bind, count_scan_operands
from ..._core.rewriting import inline_calls
from ._equation import dtype_of, shape_of
from ._states import Columns, PerRow, State

_ADDING = ("add", "add_any")
_READS, _WRITES = ("dynamic_slice", "gather"), ("dynamic_update_slice", "scatter", "scatter-add")

# What a carry is after all turns: `(start, [values of its variables in every turn]) → end`.
End = Callable[[Any, Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True)
class _Carry:
    """What the turns of a loop do with one of its carries."""

    variables: tuple[Any, ...]  # of the body, whose values in every turn the end is made of
    end: End  # makes it
    counts: int = 0  # what each turn adds to a counter; 0 of other carries
    # of `variables`, those of which one must be the turn's number: no turn meets what another wrote
    places: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class RowLoop:
    """A loop without its turns."""

    # of the loop's operands, gives its results and then the places of each carry that is written
    program: core.ClosedJaxpr
    places: tuple[int, ...]  # how many places there are of each such carry

    def turns_apart(self, places: Sequence[State]) -> bool:
        """Whether each turn has places of its own; `places` are states of the last results."""
        rest = iter(places)
        return all(any([_is_own(next(rest)) for _ in range(n)]) for n in self.places)


def _is_own(place: State) -> bool:
    parts = place.parts if isinstance(place, Columns) else (place,)
    return any(isinstance(part, PerRow) and part.role == "index" for part in parts)


def without_turns(scan: core.JaxprEqn) -> RowLoop | None:
    """A loop as one operation on all that it takes in turn; None if one turn needs another.

    `jax.lax.map(f, rows)` is `jax.vmap(f)(rows)`. A turn may also

        count the turns               carry + 1            is   jnp.arange(turns)
        add something to a carry      carry + g(row)       is   carry + jax.vmap(g)(rows).sum(0)
        write to a place of its own   carry.at[i].set(v)   is   carry.at[places].set(values)

    The gradient of the first adds what each row gives for a weight, that of a look-up adds to the
    place that was read.
    """
    closed = inline_calls(scan.params["jaxpr"], checkpoints=True)
    body, (consts, carried) = closed.jaxpr, count_scan_operands(scan)
    before, turns = consts + carried, scan.params["length"]
    pairs = zip(body.invars[consts:before], body.outvars[:carried], strict=True)
    carries = [
        _kept(body, carry, end)
        or _counter(body, carry, end, turns)
        or _sum(body, carry, end)
        or _written(body, carry, end)
        for carry, end in pairs
    ]
    if any(carry is None for carry in carries):
        return None
    known = [carry for carry in carries if carry is not None]
    variables = [variable for carry in known for variable in carry.variables]
    body = body.replace(outvars=[*variables, *body.outvars[carried:]])
    parts = core.jaxpr_as_fun(core.ClosedJaxpr(body, closed.consts))
    numbered = [consts + i for i, carry in enumerate(known) if carry.counts]
    literal_zero = [isinstance(v, core.Literal) and not np.any(v.val) for v in scan.invars]

    def run(*operands: Any) -> list[Any]:
        fixed, xs = operands[:before], operands[before:]

        def number(at: int) -> jax.Array:
            order = jnp.arange(turns, dtype=dtype_of(scan.invars[at]))
            order = order[::-1] if scan.params["reverse"] else order
            step = known[at - consts].counts
            order = order if step == 1 else step * order
            return order if literal_zero[at] else fixed[at] + order

        def turn(numbers: Sequence[Any], slices: Sequence[Any]) -> list[Any]:
            inner = list(fixed)
            for at, value in zip(numbered, numbers, strict=True):
                inner[at] = value
            return parts(*inner, *slices)

        results = iter(jax.vmap(turn, axis_size=turns)([number(at) for at in numbered], list(xs)))
        values = [[next(results) for _ in carry.variables] for carry in known]
        ends = [c.end(fixed[consts + i], values[i]) for i, c in enumerate(known)]
        ys = list(results)
        places = [values[i][at] for i, c in enumerate(known) for at in c.places or ()]
        return [*ends, *ys, *places]

    operands = (jax.ShapeDtypeStruct(shape_of(v), dtype_of(v)) for v in scan.invars)
    try:
        program = jax.make_jaxpr(run)(*operands)
    except Exception:  # of an operation that has no rule for many rows, in a type of its own
        return None
    return RowLoop(program, tuple(len(c.places) for c in known if c.places is not None))


def _kept(body: core.Jaxpr, carry: Any, end: Any) -> _Carry | None:
    """A carry that each turn hands on: the gradient of a sum is, through casts to its own dtype."""
    while end is not carry:
        made = _maker(body, end)
        if made is None or made.primitive.name != "convert_element_type":
            return None
        (end,) = made.invars
        if isinstance(end, core.Literal) or dtype_of(end) != dtype_of(carry):
            return None
    return _Carry((), lambda start, _: start)


def _counter(body: core.Jaxpr, carry: Any, end: Any, turns: int) -> _Carry | None:
    made = _maker(body, end)
    if made is None or made.primitive.name != "add" or dtype_of(carry).kind not in "iu":
        return None
    steps = [v for v in made.invars if v is not carry]
    if len(steps) != 1 or not isinstance(steps[0], core.Literal) or _uses(body, end):
        return None
    step = int(steps[0].val)
    return _Carry((), lambda start, _: start + step * turns, counts=step) if step else None


def _sum(body: core.Jaxpr, carry: Any, end: Any) -> _Carry | None:
    """A carry to which a turn adds terms."""
    terms: list[Any] = []
    while carry is not end:
        users = _uses(body, carry)
        if len(users) != 1 or any(result is carry for result in body.outvars):
            return None
        (user,) = users
        others = [operand for operand in user.invars if operand is not carry]
        if user.primitive.name in _ADDING and len(others) == 1:
            terms += others
        elif user.primitive.name != "convert_element_type":
            return None
        elif user.params["new_dtype"] != dtype_of(carry):
            return None
        (carry,) = user.outvars
    # A running sum that a turn reads, or hands out, depends on the turns before.
    if _uses(body, end) or sum(result is end for result in body.outvars) > 1:
        return None
    makers = [
        _placed_term(body, term) or _Carry((term,), lambda start, v: start + v[0].sum(0))
        for term in terms
    ]

    def add_up(start: Any, values: Sequence[Any]) -> Any:
        rest = iter(values)
        for maker in makers:
            start = maker.end(start, [next(rest) for _ in maker.variables])
        return start

    return _Carry(tuple(v for maker in makers for v in maker.variables), add_up)


def _placed_term(body: core.Jaxpr, term: Any) -> _Carry | None:
    """A term that is zero but in one place: the gradient of a look-up."""
    made = _maker(body, term)
    if made is None or made.primitive.name not in ("dynamic_update_slice", "scatter-add"):
        return None
    zeros = _maker(body, made.invars[0])
    filler = zeros.invars[0] if zeros and zeros.primitive.name == "broadcast_in_dim" else None
    if not isinstance(filler, core.Literal) or filler.val != 0 or len(_uses(body, term)) != 1:
        return None
    return _Carry(tuple(made.invars[1:]), lambda start, v: _write(made, start, v, adds=True))


def _written(body: core.Jaxpr, carry: Any, end: Any) -> _Carry | None:
    """A carry in which a turn reads and writes one place."""
    made = _maker(body, end)
    if made is None or made.primitive.name not in _WRITES or made.invars[0] is not carry:
        return None
    if _uses(body, end) or sum(v is end or v is carry for v in body.outvars) > 1:
        return None
    index = made.invars[1:2] if made.primitive.name != "dynamic_update_slice" else made.invars[2:]
    for user in _uses(body, carry):
        reads = user.primitive.name in _READS and user.invars[0] is carry
        if user is not made and not (reads and _same(user.invars[1:], index)):
            return None
        if not _touches_one(user, index):
            return None
    first = 0 if made.primitive.name != "dynamic_update_slice" else 1
    places = tuple(range(first, first + len(index)))
    return _Carry(tuple(made.invars[1:]), lambda start, v: _write(made, start, v), places=places)


def _touches_one(eqn: core.JaxprEqn, index: Sequence[Any]) -> bool:
    """Whether what it reads or writes has one element along each dim that an index moves."""
    params, name = eqn.params, eqn.primitive.name
    if name in ("dynamic_slice", "dynamic_update_slice"):
        sizes = params["slice_sizes"] if name in _READS else shape_of(eqn.invars[1])
        whole = shape_of(eqn.invars[0])
        return all(a in (1, b) for a, b in zip(sizes, whole, strict=True))
    numbers = params["dimension_numbers"]
    if len(shape_of(index[0])) != 1 or numbers.operand_batching_dims:
        return False
    if name == "gather":
        return set(numbers.start_index_map) <= set(numbers.collapsed_slice_dims)
    return set(numbers.scatter_dims_to_operand_dims) <= set(numbers.inserted_window_dims)


def _write(made: core.JaxprEqn, start: Any, values: Sequence[Any], adds: bool = False) -> Any:
    """Writes at the places of all turns at once what each writes at its own."""
    if made.primitive.name == "dynamic_update_slice":
        update, *index = values
        dims = tuple(range(start.ndim))
        numbers = jax.lax.ScatterDimensionNumbers(tuple(d + 1 for d in dims), (), dims)
        put = jax.lax.scatter_add if adds else jax.lax.scatter
        columns = jnp.concatenate([i[:, None] for i in index], -1)
        return put(start, columns, update, numbers, mode="clip")
    numbers = made.params["dimension_numbers"]
    window = tuple(d + 1 for d in numbers.update_window_dims)
    params = {**made.params, "dimension_numbers": numbers._replace(update_window_dims=window)}
    return bind(made.replace(params=params), [start, *values])[0]


def _maker(body: core.Jaxpr, variable: Any) -> core.JaxprEqn | None:
    return next((eqn for eqn in body.eqns if any(v is variable for v in eqn.outvars)), None)


def _uses(body: core.Jaxpr, variable: Any) -> list[core.JaxprEqn]:
    return [eqn for eqn in body.eqns if any(v is variable for v in eqn.invars)]


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        literals = isinstance(a, core.Literal) and isinstance(b, core.Literal)
        return a is b or (literals and a.val == b.val)

    return len(one) == len(other) and all(map(equal, one, other))
