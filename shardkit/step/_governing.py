"""Which lines of the loss each of its constraints decides the layout of."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from .._core.equations import is_written_in, source_of_equation
from ..nn._constrain import constrain_p
from ..report import GoverningConstraint, PlacedLeaf
from ..rules import axes_of
from ._activations import Activations
from ._disagreements import Declared, find_disagreeing

# Operations that compute each element of their result from one element of each operand.
_ELEMENTWISE = frozenset(
    """abs add add_any ceil clamp convert_element_type copy cos custom_jvp_call custom_vjp_call div
    erf exp exp2 expm1 floor integer_pow jit log log1p logistic max min mul name neg pow
    reduce_precision rsqrt select_n shardkit_record shardkit_without_gradient sign sin
    sqrt square stop_gradient sub tanh""".split()
)
_SHARD_MAP = "shard_map"
_MOST = 32


def find_governing_constraints(
    jaxpr: core.Jaxpr, activations: Activations, placed: Sequence[PlacedLeaf]
) -> list[GoverningConstraint]:
    """Returns each constraint of a traced step with the lines before it that it governs.

    Those are the element-wise operations that its array comes from, and the operation before these.
    `placed` are the step's arguments, in their order.
    """
    found = list(_find_constraints(jaxpr, activations))
    lines = [(one.source.file, one.source.line) for one, *_ in found]
    declared: list[Declared] = [*_declared_leaves(jaxpr, placed)]
    declared += [
        (n, variable, dims) for n, (_, variable, dims, _) in zip(lines, found, strict=True)
    ]
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
        source = source_of_equation(eqn)
        if source is None:
            continue
        for value, result, entries in _constrained(eqn, activations):
            lines = frozenset(_lines_before(value, made_by))
            dims = tuple(
                None if dim is PartitionSpec.UNCONSTRAINED else axes_of(dim) for dim in entries
            )
            known = tuple(dim for dim in dims if dim is not None)
            is_open = None in dims or not _splits_all(eqn)
            governing = GoverningConstraint(source, known, lines, open=is_open)
            yield governing, result, dims, "transpose(" in str(eqn.source_info.name_stack)


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


def _constrained(
    eqn: core.JaxprEqn, activations: Activations
) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """What a constraint, or a `shard_map` of the user's, says of arrays.

    Yields the array before, the array that is laid out so, and the entry of its spec for each dim.
    """
    layouts: list[tuple[Any, Any, Any]] = []
    if eqn.primitive is constrain_p and eqn.params["finer"] is None:
        spec = activations.spec(eqn.params["names"], eqn.params["inside"])
        layouts = [(eqn.invars[0], eqn.outvars[0], spec)]
    elif eqn.primitive.name == "sharding_constraint":
        sharding = eqn.params["sharding"]
        if isinstance(sharding, NamedSharding):
            layouts = [(eqn.invars[0], eqn.outvars[0], sharding.spec)]
    elif eqn.primitive.name == _SHARD_MAP and not is_written_in(eqn, "shardkit"):
        taken = zip(eqn.invars, eqn.params["in_specs"], strict=True)
        given = zip(eqn.outvars, eqn.params["out_specs"], strict=True)
        layouts = [(v, v, spec) for v, spec in taken if not isinstance(v, core.Literal)]
        layouts += [(v, v, spec) for v, spec in given]
    for before, after, spec in layouts:
        aval: Any = after.aval
        yield before, after, (*spec, *[None] * (aval.ndim - len(spec)))


def _splits_all(eqn: core.JaxprEqn) -> bool:
    """Whether what a spec does not split is whole: not over axes that a `shard_map` leaves out."""
    if eqn.primitive.name != _SHARD_MAP:
        return True
    return {*eqn.params["newly_manual_axes"]} == {*eqn.params["mesh"].axis_names}
