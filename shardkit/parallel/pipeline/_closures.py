"""Refuses parameters that a pipelined function closes over, for they would get no gradient."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core

from ..._core.equations import user_line
from ..._core.errors import Problem
from ..._core.tracing import equations
from ..._core.tree import short_type


def closure_problems(
    name: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> Iterator[Problem]:
    """Every differentiated array that a function uses and does not take as an argument.

    A pipeline computes the gradients of its arguments together with the loss, so it knows of no
    other array. `name` is that of the argument of `sk.nn.layer_stack`: `layer`; arguments may be
    abstract.
    """
    traced = jax.make_jaxpr(function)(*args)
    constant = jnp.zeros(()) + 0.0
    for variable, value in zip(traced.jaxpr.constvars, traced.consts, strict=True):
        # While a loss is differentiated, what depends on its parameters is traced by another
        # tracer than what does not, such as a table of positions.
        if isinstance(value, Tracer) and type(value) is not type(constant):
            where, code = _first_use(traced.jaxpr, variable)
            subject = f"{name} {short_type(value.shape, value.dtype)}"
            why = "closes over an array that depends on the parameters, or on what jax.vmap maps"
            why += f" over: `{code}` ({where}); a pipeline would give it no gradient"
            yield Problem(subject, why, _FIXES[name])


_FIXES = {
    "first": "first takes it from outer_params: layer_stack(..., outer_params={..., 'scale': w})",
    "layer": "layer takes it from its weights: layers={..., 'scale': w of shape [layers, ...]}",
    "last": "last takes it from outer_params: layer_stack(..., outer_params={..., 'scale': w})",
}


def _first_use(jaxpr: core.Jaxpr, variable: Any) -> tuple[str, str]:
    used = (e for e in equations(jaxpr) if any(v is variable for v in e.invars))
    equation = next(used, None)
    return user_line(equation) if equation is not None else ("", "")
