"""Loops that take the rows of a batch in turn, read as one operation on all of them."""

from typing import Any

import jax
from jax.extend import core

from ..._core.equations import count_scan_operands
from ._equation import dtype_of, shape_of

_ADDING = ("add", "add_any")


def without_turns(scan: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """A loop as one operation on all that it takes in turn; None if one turn needs another.

    `jax.lax.map(f, rows)` is `jax.vmap(f)(rows)`. Its gradient adds to a carry what each row gives
    for a weight, which is a sum over rows:

        carry = carry + g(row), in every turn     is     carry + jax.vmap(g)(rows).sum(0)

    Args:
      scan: an equation of `jax.lax.scan`.

    Returns:
      A program of the equation's operands and results.
    """
    closed = scan.params["jaxpr"]
    body, (consts, carried) = closed.jaxpr, count_scan_operands(scan)
    carry = range(consts, consts + carried)
    terms = [_terms(body, body.invars[at], body.outvars[at - consts]) for at in carry]
    if any(term is None for term in terms):
        return None
    added = [variable for term in terms for variable in term or ()]
    parts = core.ClosedJaxpr(body.replace(outvars=[*added, *body.outvars[carried:]]), closed.consts)

    def run(*operands: Any) -> list[Any]:
        fixed, xs = operands[: carry.stop], operands[carry.stop :]
        results = jax.vmap(lambda *slices: core.jaxpr_as_fun(parts)(*fixed, *slices))(*xs)
        sums = iter(results[: len(added)])
        ends = [
            sum((next(sums).sum(0) for _ in term or ()), start)
            for term, start in zip(terms, operands[consts : carry.stop], strict=True)
        ]
        return [*ends, *results[len(added) :]]

    operands = (jax.ShapeDtypeStruct(shape_of(v), dtype_of(v)) for v in scan.invars)
    try:
        return jax.make_jaxpr(run)(*operands)
    except Exception:  # of an operation that has no rule for many rows, in a type of its own
        return None


def _terms(body: core.Jaxpr, carry: Any, end: Any) -> list[Any] | None:
    """What a turn adds to a carry; none if it leaves it; None if it does something else with it."""
    terms: list[Any] = []
    while carry is not end:
        users = [eqn for eqn in body.eqns if any(operand is carry for operand in eqn.invars)]
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
    reads = [*body.outvars, *(operand for eqn in body.eqns for operand in eqn.invars)]
    # A running sum that a turn reads, or hands out, depends on the turns before.
    return None if terms and sum(read is end for read in reads) > 1 else terms
