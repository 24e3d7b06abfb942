"""Gives the loops of an unchanged model the types that JAX wants on shards.

A loop whose carry starts from a constant (a recurrent state, an online softmax) is refused by JAX
inside `shard_map`, see `_axis_types`. Such a loss is traced without types, and its program is
evaluated again with them (`_evaluate`), narrower carries cast to wider ones.
"""

from collections.abc import Callable

import jax
from jax.extend import core
from jax.sharding import Mesh

from ..._core.tracing import equations
from ..._core.types import PyTree
from ...nn._manual_axis_rules import Axes, varying_axes
from .._unbound_axes import batch_axes
from ._axis_types import AxisTypes, follow_types
from ._evaluate import Evaluator, ShardAxes, trace_untyped

_MAY_NEED_TYPES = frozenset({"scan", "while", "cond", "custom_vjp_call"})


def type_loops(
    run: Callable[..., PyTree], mesh: Mesh, rows: Axes, whole: core.ClosedJaxpr, *, is_local: bool
) -> Callable[..., PyTree]:
    """Returns a function of shards whose loops have types; one whose types JAX finds runs as it is.

    It is to be traced inside a `shard_map` over the whole mesh, whose axes `rows` split the rows.
    `whole` is the function traced on whole arrays; with `is_local` it is another one on shards.
    """
    axes = ShardAxes(mesh, rows, batch_axes(whole.jaxpr))
    loops = any(e.primitive.name in _MAY_NEED_TYPES for e in equations(whole.jaxpr))
    if not (loops or is_local or axes.batch):
        return run

    def typed(*args: PyTree) -> PyTree:
        flat, structure = jax.tree.flatten(args)
        program, shapes = trace_untyped(axes, lambda *flat: run(*structure.unflatten(flat)), flat)
        evaluator, types = Evaluator(axes), [varying_axes(x) for x in flat]
        captured = [frozenset[str]()] * len(program.captured)
        needed = follow_types(program.jaxpr, [*captured, *types])[1] or axes.batch
        if not needed and not _rules_widen(evaluator, program.jaxpr, frozenset().union(*types)):
            return run(*args)
        results = evaluator.run(program.jaxpr, [*program.captured, *flat])
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return typed


def _rules_widen(evaluator: Evaluator, jaxpr: core.Jaxpr, axes: AxisTypes) -> bool:
    """Whether a loop inside a derivative rule of the user's own needs a type."""
    for equation in equations(jaxpr):
        if equation.primitive.name != "custom_vjp_call":
            continue
        try:
            rule = evaluator.differentiate(
                equation, [variable.aval for variable in equation.invars]
            )
        except Exception:  # a rule that takes some arguments as constants; not seen here which
            return True
        backward = rule.trace_backward([variable.aval for variable in equation.outvars])
        for program in (rule.forward, backward):
            if follow_types(program.jaxpr, [axes] * len(program.jaxpr.invars))[1]:
                return True
    return False
