"""Computes an update with its matrices at their owners."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.extend import core
from jax.sharding import Mesh, NamedSharding

from ..._core.equations import is_written_in
from ..._core.rewriting import inline_calls
from ..._core.scope_markers import OWNED, UNDIVIDED
from ..._core.tracing import equations, record_fact
from ..._core.types import Params, PyTree
from ...rules import axes_of
from ..optim._extra_args import LossAskedError, call_update
from ._groups import Group, find_groups, subprogram
from ._move import count_bytes, run_group
from ._parts import PRODUCTS, MatrixPart, has_products, variables
from ._retrace import OwnersArgs, Retrace, RetraceError


def update_by_owners(
    optimizer: optax.GradientTransformation, args: OwnersArgs, shardings: PyTree, *, declared: bool
) -> tuple[Params, PyTree] | None:
    """Computes an update whose matrices are divided over the devices that split them.

    `args` are gradients, optimizer state, parameters and loss, while a step is traced. If
    `declared`, the user says that the optimizer does with one matrix what it does with several;
    else only products that optax makes are divided: Python of others may ask how many there are, or
    how large, and the program of one matrix would be another one.

    Returns the updates and the new state; None if no parameter is split, or the optimizer computes
    the loss. Matrices that cannot be told apart stay, and the partitioner divides each product.
    """
    leaves: list[NamedSharding] = jax.tree.leaves(shardings)
    specs, mesh = [sharding.spec for sharding in leaves], leaves[0].mesh
    assert isinstance(mesh, Mesh)
    axes = {axis for spec in specs for entry in spec for axis in axes_of(entry)}
    if all(mesh.shape[axis] == 1 for axis in axes):
        return None

    def update(*args: Any) -> tuple[Params, PyTree]:
        return call_update(optimizer, *args)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type), args
    )
    try:
        raw, out = jax.make_jaxpr(update, return_shape=True)(*shapes)
    except LossAskedError:  # its products are not those of an update
        return None
    program, groups = raw, []
    multiplies = has_products(raw.jaxpr)
    divides = multiplies and (declared or _is_of_optax(raw.jaxpr))
    if divides:
        program, retrace = inline_calls(raw), Retrace(update, optimizer.init, shapes, mesh)
        with contextlib.suppress(RetraceError):
            groups = find_groups(program, retrace.find_parts(program), specs, retrace)
            groups = groups if _can_be_apart(program.jaxpr, groups) else []
    if not groups:  # the trace is there: tracing the optimizer once more would take longer
        results = core.jaxpr_as_fun(raw)(*jax.tree.leaves(args))
        updates, opt_state = jax.tree.unflatten(jax.tree.structure(out), results)
        undivided = multiplies and not divides
        return record_fact(updates, UNDIVIDED) if undivided else updates, opt_state
    results = _run(program, groups, mesh, jax.tree.leaves(args))
    updates, opt_state = jax.tree.unflatten(jax.tree.structure(out), results)
    return record_fact(updates, OWNED, *count_bytes(groups, mesh.shape)), opt_state


def _is_of_optax(jaxpr: Any) -> bool:
    """Whether all products of matrices are made by lines of optax."""
    return all(
        is_written_in(eqn, "optax") for eqn in equations(jaxpr) if eqn.primitive.name in PRODUCTS
    )


def _can_be_apart(jaxpr: Any, groups: Sequence[Group]) -> bool:
    """Whether each part depends on nothing that follows from the result of another."""
    parts = [part for group in groups for part in group.parts]
    _, after = _split_equations(jaxpr, parts)
    late = {v for eqn in after for v in eqn.outvars}
    return not any(late.intersection((*part.arrays, *part.shared)) for part in parts)


def _run(
    program: core.ClosedJaxpr, groups: Sequence[Group], mesh: Mesh, args: Sequence[Any]
) -> list[Any]:
    """What leads to the groups, the groups, and what follows from their results."""
    jaxpr = program.jaxpr
    parts = [part for group in groups for part in group.parts]
    before, after = _split_equations(jaxpr, parts)
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *args), strict=True))
    given = list(values)
    ends = [v for v in jaxpr.outvars if not isinstance(v, core.Literal)]
    used = [v for eqn in after for v in variables(eqn)]
    needed = [v for part in parts for v in (*part.arrays, *part.shared)]
    made = {v for eqn in before for v in eqn.outvars}
    early = [v for v in dict.fromkeys([*needed, *used, *ends]) if v in made]
    first = core.jaxpr_as_fun(subprogram(jaxpr, before, given, early))(*values.values())
    values.update(zip(early, first, strict=True))
    for group in groups:
        values.update(run_group(group, mesh, values))
    last = subprogram(jaxpr, after, list(values), jaxpr.outvars)
    return core.jaxpr_as_fun(last)(*values.values())


def _split_equations(
    jaxpr: Any, parts: Sequence[MatrixPart]
) -> tuple[list[core.JaxprEqn], list[core.JaxprEqn]]:
    """The equations that no part decides, and those that follow from results of parts."""
    late = {v for part in parts for v in part.results}
    own = frozenset[int]().union(*(part.own for part in parts))
    before, after = [], []
    for place, eqn in enumerate(jaxpr.eqns):
        if place in own:
            continue
        if late.intersection(variables(eqn)):
            after.append(eqn)
            late.update(eqn.outvars)
        else:
            before.append(eqn)
    return before, after
