"""Functions some of whose equations are changed, at every depth of their trace."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core

# By name of the primitive: makes the equation that takes its place, or returns it as it is.
Changes = Mapping[str, Callable[[core.JaxprEqn], core.JaxprEqn]]


def rewrite(function: Callable[..., Any], changes: Changes) -> Callable[..., Any]:
    """Makes a function that traces another one and computes its trace with changes of equations.

    What is inside of an equation that the changes name is left alone. Derivative rules of its own
    keep the equations that they have: rewrite the gradient, not the loss, where they are to change
    as well.

    >>> zero = jax.make_jaxpr(jax.numpy.cos)(0.0).eqns[0]
    >>> cosine = {"sin": lambda eqn: eqn.replace(primitive=zero.primitive, params=zero.params)}
    >>> float(rewrite(jax.jit(jax.numpy.sin), cosine)(0.0))
    1.0
    """
    if not changes:
        return function

    def run(*args: Any) -> Any:
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = core.jaxpr_as_fun(_change(traced, changes))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run


def inline_calls(traced: core.ClosedJaxpr, checkpoints: bool = False) -> core.ClosedJaxpr:
    """Returns a trace in which every jitted function stands in place of its call, but in loops.

    `checkpoints`: so do functions under `jax.checkpoint`, for a program that is read alone.

    >>> traced = jax.make_jaxpr(lambda x: jax.jit(jax.numpy.sin)(x) + 1)(0.0)
    >>> [eqn.primitive.name for eqn in inline_calls(traced).eqns]
    ['sin', 'add']
    """

    def inline(eqn: core.JaxprEqn) -> core.JaxprEqn:
        inner = {name: _change(value, changes) for name, value in eqn.params.items()}
        kind: Any = type(inner["inline"])  # from JAX 0.11 on an enum
        return eqn.replace(params={**inner, "inline": True if kind is bool else kind["JAX_EARLY"]})

    def unwrap(eqn: core.JaxprEqn) -> core.JaxprEqn:
        inner = eqn.params["jaxpr"]
        inner = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
        function = jax.jit(core.jaxpr_as_fun(inner))
        (call,) = jax.make_jaxpr(function)(*(v.aval for v in eqn.invars)).eqns
        return inline(call.replace(invars=eqn.invars, outvars=eqn.outvars))

    changes: Changes = {"jit": inline, "pjit": inline}
    if checkpoints:
        changes = {**changes, "checkpoint": unwrap, "remat2": unwrap}
    return jax.make_jaxpr(core.jaxpr_as_fun(_change(traced, changes)))(*traced.in_avals)


def _change(value: Any, changes: Changes) -> Any:
    """Changes a jaxpr, or those in a parameter; the branches of a `cond` are a tuple of them."""
    if isinstance(value, core.Jaxpr):
        return value.replace(eqns=[_change_equation(eqn, changes) for eqn in value.eqns])
    if isinstance(value, core.ClosedJaxpr):  # JAX 0.12 has one class for both
        return value.replace(jaxpr=_change(value.jaxpr, changes))
    if type(value) in (tuple, list):
        return type(value)(_change(item, changes) for item in value)
    return value


def _change_equation(eqn: core.JaxprEqn, changes: Changes) -> core.JaxprEqn:
    if change := changes.get(eqn.primitive.name):
        return change(eqn)
    if not any(True for _ in core.jaxprs_in_params(eqn.params)):
        return eqn
    return eqn.replace(params={name: _change(value, changes) for name, value in eqn.params.items()})
