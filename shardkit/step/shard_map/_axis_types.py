"""Follows which mesh axes the values of a traced loss vary over, without tracing it again.

JAX types a value on shards by the mesh axes along which devices hold different numbers, and wants
the carry of a loop to have one type. A carry that starts from a constant and takes up rows does
not: constants are equal everywhere, rows are not.

    h = jnp.zeros((rows, 16))        {}          the same on every device
    h = jnp.tanh(h @ u + x)          {data}      after one turn

`follow_types` finds the type that such a carry has after any number of turns.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from jax.extend import core
from jax.sharding import NamedSharding

from ..._core.equations import count_scan_operands, open_jaxpr

AxisTypes = frozenset[str]
Followed = tuple[list[AxisTypes], bool]

# Primitives whose results are equal on the devices that they name.
_REDUCING = frozenset({"psum", "pmax", "pmin"})
# Parameters that name mesh axes, in collectives.
_AXES = ("axes", "axis_name")
_INNER = ("jaxpr", "call_jaxpr")


class FlowRule(abc.ABC):
    """What the results of an operation are, as sets of names, given what its operands are."""

    @abc.abstractmethod
    def result(self, equation: core.JaxprEqn, inputs: Sequence[AxisTypes]) -> AxisTypes:
        """The set of each result of an equation that is neither a loop, nor a branch, nor a call.

        In loops it is asked again with larger sets, until they are what any number of turns gives.
        """

    def inside(self, equation: core.JaxprEqn) -> "FlowRule":
        """The rule for the programs inside an equation."""
        del equation
        return self


@final
class _AxisRule(FlowRule):
    """Results vary over the axes of the operands, and over those that a collective names."""

    def result(self, equation: core.JaxprEqn, inputs: Sequence[AxisTypes]) -> AxisTypes:
        axes = frozenset(a for key in _AXES for a in _names(equation.params.get(key)))
        joined = frozenset[str]().union(*inputs)
        return joined - axes if equation.primitive.name in _REDUCING else joined | axes


_AXES_OF_COLLECTIVES = _AxisRule()


def follow_types(
    jaxpr: Any, inputs: Sequence[AxisTypes], rule: FlowRule = _AXES_OF_COLLECTIVES
) -> Followed:
    """Returns the types of the results of a program, open or closed, that was traced without types.

    Also whether some loop or branch inside has values whose types have to be widened, which JAX
    refuses to do by itself. Constants have no types. Another `rule` follows other sets.
    """
    jaxpr = open_jaxpr(jaxpr)[0]
    types: dict[Any, AxisTypes] = dict.fromkeys(jaxpr.constvars, frozenset())
    types.update(zip(jaxpr.invars, inputs, strict=True))
    widened = False

    def read(variable: Any) -> AxisTypes:
        return frozenset() if isinstance(variable, core.Literal) else types[variable]

    for equation in jaxpr.eqns:
        results, inside = _follow_equation(equation, [read(v) for v in equation.invars], rule)
        types.update(zip(equation.outvars, results, strict=True))
        widened = widened or inside
    return [read(v) for v in jaxpr.outvars], widened


def loop_types(
    body: Callable[[Sequence[AxisTypes]], Followed], carry: Sequence[AxisTypes]
) -> tuple[list[AxisTypes], Followed]:
    """Returns the types of a carry after any number of turns, and what the last turn gives.

    `body` takes types of a carry, and gives those of its results, the next carry first.
    """
    carry = list(carry)
    while True:
        results, inside = body(carry)
        # Types only grow, and there are finitely many axes, so this ends.
        after = [a | b for a, b in zip(carry, results, strict=False)]
        if after == carry:
            return carry, (results, inside)
        carry = after


def rename_axes(jaxpr: Any, names: Mapping[str, tuple[str, ...]]) -> Any:
    """Returns a program whose collectives are over other axes, several in place of one."""
    inner, _ = open_jaxpr(jaxpr)
    renamed = inner.replace(eqns=[_rename_equation(e, names) for e in inner.eqns])
    return renamed if inner is jaxpr else jaxpr.replace(jaxpr=renamed)


def _rename_equation(
    equation: core.JaxprEqn, names: Mapping[str, tuple[str, ...]]
) -> core.JaxprEqn:
    def rename(key: str, value: Any) -> Any:
        if key in _AXES and any(name in names for name in _names(value)):
            return tuple(new for old in _names(value) for new in names.get(old, (old,)))
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            return rename_axes(value, names)
        if isinstance(value, NamedSharding):
            return None  # on the mesh of the trace; on shards nothing is split
        return tuple(rename("", x) for x in value) if key == "branches" else value

    params = {key: rename(key, value) for key, value in equation.params.items()}
    return equation.replace(params=params)


def split_scan(
    equation: core.JaxprEqn, operands: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Splits the operands of a scan: constants, carry, and what it takes slices of."""
    consts, carried = count_scan_operands(equation)
    every = list(operands)
    return every[:consts], every[consts : consts + carried], every[consts + carried :]


def split_while(
    equation: core.JaxprEqn, operands: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Splits the operands of a while loop: constants of its condition, of its body, carry."""
    tested, used = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    every = list(operands)
    return every[:tested], every[tested : tested + used], every[tested + used :]


def scan_types(
    equation: core.JaxprEqn, inputs: Sequence[AxisTypes], rule: FlowRule = _AXES_OF_COLLECTIVES
) -> tuple[Any, Followed]:
    """The types of a scan's carry, and of its results."""
    fixed, carry, slices = split_scan(equation, inputs)
    body = equation.params["jaxpr"]
    return loop_types(lambda carry: follow_types(body, [*fixed, *carry, *slices], rule), carry)


def while_types(
    equation: core.JaxprEqn, inputs: Sequence[AxisTypes], rule: FlowRule = _AXES_OF_COLLECTIVES
) -> tuple[Any, Followed]:
    """The types of a while loop's carry, which are those of its results.

    Where devices take other numbers of turns, whatever a turn changes varies over them.
    """
    tested, fixed, carry = split_while(equation, inputs)
    condition, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]

    def turn(carry: Sequence[AxisTypes]) -> Followed:
        ((goes_on,), in_condition) = follow_types(condition, [*tested, *carry], rule)
        after, in_body = follow_types(body, [*fixed, *carry], rule)
        return [types | goes_on for types in after], in_condition or in_body

    return loop_types(turn, carry)


def branch_types(
    equation: core.JaxprEqn, inputs: Sequence[AxisTypes], rule: FlowRule = _AXES_OF_COLLECTIVES
) -> Followed:
    """The types of a conditional's results: a device may take another branch than the next."""
    which, *operands = inputs
    followed = [follow_types(branch, operands, rule) for branch in equation.params["branches"]]
    outs = [which.union(*types) for types in zip(*(outs for outs, _ in followed), strict=True)]
    equal = all(types == outs for types, _ in followed)
    return outs, not equal or any(inside for _, inside in followed)


def _follow_equation(equation: core.JaxprEqn, inputs: list[AxisTypes], rule: FlowRule) -> Followed:
    name, params, inside = equation.primitive.name, equation.params, rule.inside(equation)
    if name == "scan":
        carry, (results, widened) = scan_types(equation, inputs, inside)
        started = split_scan(equation, inputs)[1]
        return [*carry, *results[len(carry) :]], widened or carry != started
    if name == "while":
        carry, (_, widened) = while_types(equation, inputs, inside)
        return carry, widened or carry != split_while(equation, inputs)[2]
    if name == "cond":
        return branch_types(equation, inputs, inside)
    for inner in _INNER:
        if inner in params and len(open_jaxpr(params[inner])[0].invars) == len(inputs):
            return follow_types(params[inner], inputs, inside)
    return [rule.result(equation, inputs)] * len(equation.outvars), False


def _names(axes: Any) -> tuple[str, ...]:
    entries = axes if isinstance(axes, tuple | list) else (axes,)
    return tuple(axis for axis in entries if isinstance(axis, str))
