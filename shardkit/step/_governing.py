"""Which lines of the loss each of its constraints decides the layout of."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from .._core.equations import source_of_equation
from ..nn._constrain import constrain_p
from ..report import GoverningConstraint, PlacedLeaf
from ..rules import axes_of
from ._activations import Activations
from ._disagreements import Declared, find_disagreeing

# Operations that compute each element of their result from one element of each operand.
_ELEMENTWISE = frozenset(
    """abs add add_any ceil clamp convert_element_type copy cos custom_jvp_call custom_vjp_call div
    erf exp exp2 expm1 floor integer_pow jit log log1p logistic max min mul name neg pow
    reduce_precision rsqrt select_n shardkit_record sign sin sqrt square stop_gradient sub
    tanh""".split()
)
_MOST = 32


def find_governing_constraints(
    jaxpr: core.Jaxpr, activations: Activations, placed: Sequence[PlacedLeaf]
) -> list[GoverningConstraint]:
    """Returns each constraint of a traced step with the lines before it that it governs.

    Those are the element-wise operations that its array comes from, and the operation before these.

    Args:
      jaxpr: the step.
      activations: what its logical names mean.
      placed: its arguments, in their order.
    """
    found = list(_find_constraints(jaxpr, activations))
    lines = [(one.source.file, one.source.line) for one, *_ in found]
    declared: list[Declared] = [*_declared_leaves(jaxpr, placed)]
    for line, (_, variable, dims, _) in zip(lines, found, strict=True):
        declared.append((line, variable, dims))
    alone = find_disagreeing(jaxpr, declared, lines)
    forward = {line for line, (*_, backward) in zip(lines, found, strict=True) if not backward}
    return [
        dataclasses.replace(one, disagrees=alone[line])
        for line, (one, *_, backward) in zip(lines, found, strict=True)
        # The backward pass repeats constraints for cotangents, which come from other lines.
        if not backward or line not in forward
    ]


_Dims = tuple[tuple[str, ...] | None, ...]


def _find_constraints(
    jaxpr: core.Jaxpr, activations: Activations
) -> Iterator[tuple[GoverningConstraint, Any, _Dims, bool]]:
    """Each constraint with a line, its array, its dims, and whether it is of the backward pass."""
    made_by = {id(value): eqn for eqn in jaxpr.eqns for value in eqn.outvars}
    for eqn in jaxpr.eqns:
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _find_constraints(inner, activations)
        entries = _constrained_dims(eqn, activations)
        source = source_of_equation(eqn) if entries is not None else None
        if entries is not None and source is not None:
            lines = frozenset(_lines_before(eqn.invars[0], made_by))
            dims = tuple(
                None if dim is PartitionSpec.UNCONSTRAINED else axes_of(dim) for dim in entries
            )
            known = tuple(dim for dim in dims if dim is not None)
            governing = GoverningConstraint(source, known, lines, open=None in dims)
            yield governing, eqn.outvars[0], dims, "transpose(" in str(eqn.source_info.name_stack)


def _declared_leaves(jaxpr: core.Jaxpr, placed: Sequence[PlacedLeaf]) -> Iterator[Declared]:
    """What rules say of matrices and of the batch; axes of rows only store a matrix in shards."""
    rows = {axis for leaf in placed if leaf.part == "batch" for axis in leaf.axes()}
    for leaf, variable in zip(placed, jaxpr.invars, strict=False):
        if leaf.part == "batch":  # whose spec says which dims are split, not that others are not
            yield leaf.name, variable, tuple(dim or None for dim in leaf.dims())
        elif leaf.part == "params" and len(leaf.leaf.shape) > 1:
            dims = (tuple(a for a in dim if a not in rows) for dim in leaf.dims())
            yield leaf.name, variable, tuple(dims)


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
