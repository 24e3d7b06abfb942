"""Which lines of the loss each of its constraints decides the layout of."""

import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any, cast

from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from .._core.equations import is_written_in, source_of_equation
from ..nn._constrain import constrain_p
from ..report import GoverningConstraint, OddDeclaration, PlacedLeaf, find_first_reader
from ..rules import axes_of
from ._activations import Activations
from ._disagreements import Declared, Disagreements

# Operations that compute each element of their result from one element of each operand.
_ELEMENTWISE = frozenset(
    """abs add add_any ceil clamp convert_element_type copy cos custom_jvp_call custom_vjp_call div
    erf exp exp2 expm1 floor integer_pow jit log log1p logistic max min mul name neg pow
    reduce_precision rsqrt select_n shardkit_record shardkit_without_gradient sign sin
    sqrt square stop_gradient sub tanh""".split()
)
_SHARD_MAP = "shard_map"
_MOST = 32
_Dims = tuple[tuple[str, ...] | None, ...]
_Line = tuple[str, int]
_Found = tuple[GoverningConstraint, Any, _Dims, bool]


def find_governing_constraints(
    jaxpr: core.Jaxpr,
    activations: Activations,
    placed: Sequence[PlacedLeaf],
    rows: Collection[str],
) -> tuple[list[GoverningConstraint], list[OddDeclaration]]:
    """Returns each constraint of a traced step with the lines before it that it governs.

    Those are the element-wise operations that its array comes from, and the operation before these.
    Beside them the constraints, and the layouts of leaves, that all other declarations disagree
    with. `placed` are the step's arguments, in their order.
    """
    found = list(_find_constraints(jaxpr, activations))
    lines = [(one.source.file, one.source.line) for one, *_ in found]
    leaves = list(_declared_leaves(jaxpr, placed, rows))
    declared: list[Declared] = [declaration for _, declaration in leaves]
    declared += [
        (n, variable, dims) for n, (_, variable, dims, _) in zip(lines, found, strict=True)
    ]
    disagreements = Disagreements(jaxpr, declared)
    odd = list(_odd_constraints(disagreements, zip(lines, found, strict=True)))
    known = {*rows, *(axis for one in odd for axis in one.axes)}
    odd += _odd_leaves(disagreements, jaxpr, leaves, set(lines), known)
    forward = {line for line, (*_, backward) in zip(lines, found, strict=True) if not backward}
    return [
        one
        for line, (one, *_, backward) in zip(lines, found, strict=True)
        # The backward pass repeats constraints for cotangents, which come from other lines.
        if not backward or line not in forward
    ], odd


def _odd_constraints(
    disagreements: Disagreements, found: Iterable[tuple[_Line, _Found]]
) -> Iterator[OddDeclaration]:
    known = dict(reversed(list(found)))  # the first of each line
    for line, axes in disagreements.find_alone(known).items():
        one, variable, dims, _ = known[cast(_Line, line)]
        if axes:
            layout = disagreements.layout_of_others(line, variable, dims, axes)
            text = f"the constraint at {one.source}"
            shape = cast(Any, variable).aval.shape
            lines = frozenset(disagreements.sums_over(line, axes))
            yield OddDeclaration(one.source, axes, text, shape=shape, layout=layout, sums=lines)


def _odd_leaves(
    disagreements: Disagreements,
    jaxpr: core.Jaxpr,
    leaves: Sequence[tuple[PlacedLeaf, Declared]],
    lines: set[_Line],
    known: Collection[str],
) -> Iterator[OddDeclaration]:
    """Those over axes that leaves bring in where all others say that nothing is split.

    Of matrices that are multiplied also those that others lay out over the same axes otherwise:
    of two that disagree, the one for whose product something is moved can be changed. Axes `known`
    are left out: those of rows, and those that a constraint is at odds over.
    """
    alone = disagreements.find_alone((who for _, (who, *_) in leaves), lines)
    groups: dict[Hashable, list[tuple[PlacedLeaf, Any]]] = {}
    for leaf, (who, variable, _) in leaves:
        groups.setdefault(who, []).append((leaf, variable))
    for who, members in groups.items():
        leaf, variable = members[0]
        split = {a for a in leaf.axes() if a not in known and disagreements.splits(who, a)}
        reader = find_first_reader(jaxpr, variable) if split else None
        if reader is None:
            continue
        multiplied = leaf.part == "params" and reader[1]
        layout = disagreements.layout_of_others(who, variable, leaf.dims(), split)
        axes = split & alone[who]
        if multiplied and layout != leaf.dims():
            axes |= {axis for dim in layout for axis in dim or () if axis in split}
        if axes:
            yield OddDeclaration(
                reader[0],
                frozenset(axes),
                f"{leaf.declared_by} of {leaf.name}",
                shape=leaf.leaf.shape,
                layout=disagreements.layout_of_others(who, variable, leaf.dims(), axes),
                sums=frozenset(disagreements.sums_over(who, axes)),
                leaves=tuple(leaf for leaf, _ in members),
                multiplied=multiplied,
            )


def _find_constraints(jaxpr: core.Jaxpr, activations: Activations) -> Iterator[_Found]:
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


def _declared_leaves(
    jaxpr: core.Jaxpr, placed: Sequence[PlacedLeaf], rows: Collection[str]
) -> Iterator[tuple[PlacedLeaf, Declared]]:
    """What rules say of parameters and of the batch; axes of rows only store a matrix in shards.

    The batch spec, and the rule of a vector, say which dims are split, not that others are not.
    Leaves of one name, shape and layout in several layers are of one declaration.
    """
    for leaf, variable in zip(placed, jaxpr.invars, strict=False):
        if leaf.part not in ("params", "batch"):
            continue
        dims = leaf.dims()
        if leaf.part == "params":
            dims = tuple(tuple(a for a in dim if a not in rows) for dim in dims)
        silent = leaf.part == "batch" or len(leaf.leaf.shape) < 2
        name = "/".join(part for part in leaf.name.split("/") if not part.isdigit())
        last = re.sub(r"\d+", "", "/".join(name.rsplit("/", 2)[-2:]))
        who = leaf.part, last, leaf.leaf.shape, dims
        yield leaf, (who, variable, tuple(dim or None if silent else dim for dim in dims))


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
