"""Which lines of the loss each of its constraints decides the layout of."""

import dataclasses
import functools
import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from .._core.equations import is_written_in, name_derivative_rule, source_of_equation
from .._core.scope_markers import OF_THE_STEP
from .._core.source import Source
from ..nn._constrain import constrain_p
from ..report import (
    PRODUCTS,
    GoverningConstraint,
    OddDeclaration,
    PlacedLeaf,
    SplitDim,
    find_readers,
)
from ..rules import axes_of
from ._activations import Activations
from ._constraint_names import find_shards, name_layout, without_shards
from ._disagreements import Declared, Disagreements, Group
from ._missing_rows import find_missing_rows
from ._split_dims import DeclaredLayout, find_split_dims

# Operations that compute each element of their result from one element of each operand.
_ELEMENTWISE = frozenset(
    """abs add add_any ceil clamp convert_element_type copy cos custom_jvp_call custom_vjp_call div
    erf exp exp2 expm1 floor integer_pow jit log log1p logistic max min mul name neg pow
    reduce_precision rsqrt select_n shardkit_record shardkit_without_gradient sign sin
    sqrt square stop_gradient sub tanh""".split()
)
_SHARD_MAP = "shard_map"
_STATE = "model_state"
_MOST = 32
_Dims = tuple[tuple[str, ...] | None, ...]
_Line = tuple[str, int]
_Found = tuple[GoverningConstraint, Any, _Dims, bool]


def find_governing_constraints(
    jaxpr: core.Jaxpr, activations: Activations, placed: Sequence[PlacedLeaf], rows: Collection[str]
) -> tuple[list[GoverningConstraint], list[OddDeclaration], list[SplitDim]]:
    """Returns each constraint of a traced step with the lines before it that it governs.

    Those are the element-wise operations that its array comes from, and the operation before these.
    Beside them the constraints, and the layouts of leaves, that all other declarations disagree
    with, and the dims that operations need whole. `placed` are the step's arguments, in order.
    """
    found = list(_find_constraints(jaxpr, activations))
    lines = [(one.source.file, one.source.line) for one, *_ in found]
    constrained = [
        (n, variable, dims) for n, (_, variable, dims, _) in zip(lines, found, strict=True)
    ]
    sizes = dict(activations.mesh.shape)

    def compare(placed: Sequence[PlacedLeaf], rows: Collection[str]) -> Disagreements:
        leaves = list(_declared_leaves(jaxpr, placed, rows))
        whole = {
            who
            for leaf, (who, *_) in leaves
            if leaf.part != "batch" and not {*leaf.axes()} - {*rows}
        }
        return Disagreements(jaxpr, [*(one for _, one in leaves), *constrained], sizes, whole)

    disagreements = compare(placed, rows)
    leaves = _declared_leaves(jaxpr, placed, rows)
    suspects = _Suspects(
        dict(reversed([*zip(lines, found, strict=True)])),  # the first of each line
        [(leaf, of) for leaf, of in leaves if not _splits_rows(leaf, rows)],
    )
    wrong = _find_wrong(disagreements, suspects)
    missing = find_missing_rows(placed, rows, sizes, wrong, compare)
    wrong |= dict.fromkeys(missing.axes, frozenset[Hashable](missing.leaves))
    odd = [
        *missing.declarations(_find_lines(jaxpr, placed, missing.leaves), disagreements),
        *_odd_constraints(disagreements, suspects, wrong, activations),
        *_odd_leaves(disagreements, suspects, wrong, jaxpr),
    ]
    forward = {line for line, (*_, backward) in zip(lines, found, strict=True) if not backward}
    return (
        [
            one
            for line, (one, *_, backward) in zip(lines, found, strict=True)
            # The backward pass repeats constraints for cotangents, which come from other lines.
            if not backward or line not in forward
        ],
        odd,
        [
            one
            for one in find_split_dims(disagreements, suspects.declarations(activations))
            if one.axis not in missing.axes
        ],
    )


def _find_lines(
    jaxpr: core.Jaxpr, placed: Sequence[PlacedLeaf], leaves: Collection[PlacedLeaf]
) -> dict[PlacedLeaf, list[Source]]:
    """The lines that read each of some leaves."""
    variables = zip(placed, jaxpr.invars, strict=False)
    return {
        leaf: [line for line, _ in find_readers(jaxpr, variable)]
        for leaf, variable in variables
        if leaf in leaves
    }


class _Suspects:
    """Declarations that can be wrong.

    Attributes:
      constraints: by line.
      leaves: with their variables, by declaration.
      units: a declaration → those of several leaves of one rule and layout that it is one of.
    """

    def __init__(
        self, constraints: Mapping[_Line, _Found], leaves: Iterable[tuple[PlacedLeaf, Declared]]
    ) -> None:
        self.constraints = constraints
        self.leaves: dict[Hashable, list[tuple[PlacedLeaf, Any]]] = {}
        of_rules: dict[Hashable, dict[Hashable, None]] = {}
        for leaf, (who, variable, dims) in leaves:
            self.leaves.setdefault(who, []).append((leaf, variable))
            rule = leaf.declared_by, leaf.leaf.shape, tuple(dims)
            if leaf.part != "batch" and len(leaf.leaf.shape) > 1:
                # Of the matrices of a rule some can be right: one counts with its average alone.
                rule = *rule, re.sub(r"\d+", "", leaf.leaf.path)
            of_rules.setdefault(rule, {})[who] = None
        self.units = {who: frozenset(whose) for whose in of_rules.values() for who in whose}

    def declarations(self, activations: Activations) -> dict[Hashable, DeclaredLayout]:
        """All of them, with what can be said otherwise."""
        constraints = {
            line: DeclaredLayout(
                f"the constraint at {one.source}",
                variable,
                dims,
                source=one.source,
                names=one.names,
                shards=find_shards(dims, variable.aval.shape, activations),
            )
            for line, (one, variable, dims, _) in self.constraints.items()
        }
        leaves = {
            who: DeclaredLayout(
                f"{leaf.declared_by} of {leaf.name}",
                variable,
                leaf.dims(),
                tuple(one for one, _ in self.leaves[who]),
            )
            for who, ((leaf, variable), *_) in self.leaves.items()
        }
        return constraints | leaves

    def names(self, disagreements: Disagreements) -> dict[int, set[str]]:
        """What parameters call the dims of each class."""
        found: dict[int, set[str]] = {}
        for leaf, variable in (member for members in self.leaves.values() for member in members):
            roots = disagreements.classes_of(variable, leaf.dims())
            for root, name in zip(roots, leaf.leaf.axes or (), strict=False):
                found.setdefault(root, set()).update({name} if name else ())
        return found

    def over(self, who: Hashable) -> set[str]:
        """The axes that a leaf brings in."""
        return {*self.leaves[who][0][0].axes()}


def _find_wrong(disagreements: Disagreements, suspects: _Suspects) -> dict[str, Group]:
    """By mesh axis, the declarations without which all others agree."""
    possible = {
        axis: {*suspects.constraints, *(w for w in suspects.leaves if axis in suspects.over(w))}
        for axis in disagreements.axes
    }
    # Model state comes before a parameter that it is the average of.
    of_state = {who for who, ((leaf, _), *_) in suspects.leaves.items() if leaf.part == _STATE}
    likely = suspects.constraints, of_state
    least = disagreements.find_least(possible, suspects.units, likely)
    at_odds = (axis for axis in disagreements.axes if not disagreements.agree(axis))
    certain = {axis: frozenset.intersection(*sets) for axis, sets in least.items()}
    return dict.fromkeys(at_odds, frozenset[Hashable]()) | certain


def _odd_constraints(
    disagreements: Disagreements,
    suspects: _Suspects,
    wrong: Mapping[str, Group],
    activations: Activations,
) -> Iterator[OddDeclaration]:
    called = suspects.names(disagreements)
    for line, (one, variable, dims, _) in suspects.constraints.items():
        axes = frozenset(axis for axis, group in wrong.items() if line in group)
        if axes:
            group = frozenset[Hashable]().union(*(wrong[axis] for axis in axes))
            layout = disagreements.layout_of_others(wrong, variable, dims, axes)
            text = f"the constraint at {one.source}"
            shape = cast(Any, variable).aval.shape
            lines = frozenset(disagreements.sums_over(group, axes))
            odd = OddDeclaration(one.source, axes, text, shape=shape, layout=layout, sums=lines)
            roots = disagreements.classes_of(variable, dims)
            of_params = [called.get(root, ()) for root in roots]
            named = name_layout(odd, one.names, dims, of_params, activations.rules)
            yield without_shards(named, find_shards(dims, shape, activations))


def _odd_leaves(
    disagreements: Disagreements, suspects: _Suspects, wrong: Mapping[str, Group], jaxpr: core.Jaxpr
) -> Iterator[OddDeclaration]:
    """The leaves, or all of one shape and layout by one rule, that are wrong over an axis.

    Over axes where it is not certain which ones are, those of each matrix that is multiplied and
    that others lay out over the same axes otherwise: of two that disagree, the one for whose
    product something is moved can be changed.
    """
    odd: list[tuple[Group, OddDeclaration]] = []
    told = set[Hashable]()
    for who in suspects.leaves:
        axes = {axis for axis, group in wrong.items() if who in group}
        whose = frozenset({who}).union(*(wrong[axis] for axis in axes))
        unit = suspects.units[who] & whose if axes else frozenset({who})
        members = [
            member for one in suspects.leaves if one in unit for member in suspects.leaves[one]
        ]
        leaf, variable = members[0]
        over = {a for a in suspects.over(who) if disagreements.splits(unit, a)}
        readers = find_readers(jaxpr, variable) if (over or axes) and who not in told else []
        if not readers:
            continue
        told |= unit
        without = {axis: wrong.get(axis, frozenset()) | whose for axis in over | axes}
        lay_out = functools.partial(disagreements.layout_of_others, without, variable, leaf.dims())
        multiplied = leaf.part == "params" and readers[0][1] in PRODUCTS
        either = not axes and multiplied
        if either and (layout := lay_out(over)) != leaf.dims():
            certain = {axis for axis, group in wrong.items() if group}
            axes = {a for dim in layout for a in dim or () if a in over - certain}
        if axes and (either or lay_out(axes) != leaf.dims()):
            one = OddDeclaration(
                readers[0][0],
                frozenset(axes),
                f"{leaf.declared_by} of {leaf.name}",
                shape=leaf.leaf.shape,
                layout=lay_out(axes, keep=not either and (multiplied or readers[0][1] == "gather")),
                sums=frozenset(disagreements.sums_over(whose, axes)),
                readers=frozenset((line.file, line.line) for line, _ in readers),
                leaves=tuple(leaf for leaf, _ in members),
                either=either,
            )
            odd.append((whose, one))
    for whose, one in odd:
        rule = one.leaves[0].declared_by
        beside = tuple(
            other
            for of, other in odd
            if not one.either and of == whose and other.leaves[0].declared_by == rule
        )
        yield dataclasses.replace(one, beside=tuple(other for other in beside if other is not one))


def _find_constraints(jaxpr: core.Jaxpr, activations: Activations) -> Iterator[_Found]:
    """Each constraint with a line, its array, its dims, and whether it is of the backward pass."""
    made_by = {id(value): eqn for eqn in jaxpr.eqns for value in eqn.outvars}
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") == OF_THE_STEP:
            continue
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _find_constraints(inner, activations)
        line = source_of_equation(eqn)
        if line is None:
            continue
        source = name_derivative_rule(eqn, line)
        names = eqn.params["names"] if eqn.primitive is constrain_p else ()
        for value, result, entries in _constrained(eqn, activations):
            lines = frozenset(_lines_before(value, made_by))
            dims = tuple(
                None if dim is PartitionSpec.UNCONSTRAINED else axes_of(dim) for dim in entries
            )
            known = tuple(dim for dim in dims if dim is not None)
            is_open = None in dims or not _splits_all(eqn)
            governing = GoverningConstraint(source, known, lines, open=is_open, names=names)
            yield governing, result, dims, "transpose(" in str(eqn.source_info.name_stack)


def _declared_leaves(
    jaxpr: core.Jaxpr, placed: Sequence[PlacedLeaf], rows: Collection[str]
) -> Iterator[tuple[PlacedLeaf, Declared]]:
    """What rules say of parameters, model state and the batch.

    Axes of rows only store a matrix in shards.
    The batch spec, and the rule of a vector, say which dims are split, not that others are not.
    Leaves of one name, shape and layout in several layers are of one declaration.
    """
    for leaf, variable in zip(placed, jaxpr.invars, strict=False):
        if leaf.part == "opt_state":
            continue
        dims = leaf.dims()
        if leaf.part != "batch":
            dims = tuple(tuple(a for a in dim if a not in rows) for dim in dims)
        silent = leaf.part == "batch" or len(leaf.leaf.shape) < 2
        name = "/".join(part for part in leaf.name.split("/") if not part.isdigit())
        last = re.sub(r"\d+", "", "/".join(name.rsplit("/", 2)[-2:]))
        who = leaf.declared_by, leaf.part, last, leaf.leaf.shape, dims
        yield leaf, (who, variable, tuple(dim or None if silent else dim for dim in dims))


def _splits_rows(leaf: PlacedLeaf, rows: Collection[str]) -> bool:
    """Whether a leaf of the batch is split by its rows alone, as the batch is."""
    first = {axis for dim in leaf.dims()[:1] for axis in dim}
    return leaf.part == "batch" and {*leaf.axes()} <= first & {*rows}


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
