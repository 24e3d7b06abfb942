"""Which lines of the loss each of its constraints decides the layout of."""

from collections.abc import Iterator
from typing import Any

from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from .._core.equations import source_of_equation
from ..nn._constrain import constrain_p
from ..report import GoverningConstraint
from ..rules import axes_of
from ._activations import Activations

# Operations that compute each element of their result from one element of each operand.
_ELEMENTWISE = frozenset(
    """abs add add_any ceil clamp convert_element_type copy cos custom_jvp_call custom_vjp_call div
    erf exp exp2 expm1 floor integer_pow jit log log1p logistic max min mul name neg pow
    reduce_precision rsqrt select_n shardkit_record sign sin sqrt square stop_gradient sub
    tanh""".split()
)
_MOST = 32


def find_governing_constraints(
    jaxpr: core.Jaxpr, activations: Activations
) -> Iterator[GoverningConstraint]:
    """Yields each constraint of a traced step with the lines before it that it governs.

    Those are the element-wise operations that its array comes from, and the operation before these.
    """
    made_by = {id(value): eqn for eqn in jaxpr.eqns for value in eqn.outvars}
    for eqn in jaxpr.eqns:
        for inner in core.jaxprs_in_params(eqn.params):
            yield from find_governing_constraints(inner, activations)
        dims = _constrained_dims(eqn, activations)
        source = source_of_equation(eqn) if dims is not None else None
        if dims is not None and source is not None:
            # The backward pass constrains cotangents, which come from other lines.
            if "transpose(" not in str(eqn.source_info.name_stack):
                lines = frozenset(_lines_before(eqn.invars[0], made_by))
                known = tuple(
                    axes_of(dim) for dim in dims if dim is not PartitionSpec.UNCONSTRAINED
                )
                yield GoverningConstraint(source, known, lines, open=len(known) < len(dims))


def _lines_before(value: Any, made_by: dict[int, core.JaxprEqn]) -> Iterator[tuple[str, int]]:
    values, visited = [value], set[int]()
    while values and len(visited) < _MOST:
        eqn = made_by.get(id(values.pop()))
        if eqn is None or id(eqn) in visited:
            continue
        visited.add(id(eqn))
        if source := source_of_equation(eqn):
            yield source.file, source.line
        if eqn.primitive.name in _ELEMENTWISE:
            values += [v for v in eqn.invars if getattr(v.aval, "shape", ()) == value.aval.shape]


def _constrained_dims(eqn: core.JaxprEqn, activations: Activations) -> tuple[Any, ...] | None:
    """The entry of its spec for each dim of a constraint's array; None for other equations."""
    if eqn.primitive is constrain_p and eqn.params["finer"] is None:
        spec = activations.spec(eqn.params["names"], eqn.params["inside"])
    elif eqn.primitive.name == "sharding_constraint" and isinstance(
        eqn.params["sharding"], NamedSharding
    ):
        spec = eqn.params["sharding"].spec
    else:
        return None
    aval: Any = eqn.invars[0].aval
    return (*spec, *[None] * (aval.ndim - len(spec)))
