"""One derivative of triangular solves for any number of right sides.

JAX multiplies in another order where there are fewer right sides than unknowns. Where these are
rows, its program on a part differs from that on the whole batch, though the numbers do not.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ..._core.rewriting import rewrite
from ..._core.tracing import equations

_SOLVE = "triangular_solve"


def derive_solves_alike(function: Callable[..., Any], program: core.Jaxpr) -> Callable[..., Any]:
    """Returns a function, to be followed, whose solves have the same derivative on any rows.

    Without a solve in its program, it is the function itself.
    """
    if not any(eqn.primitive.name == _SOLVE for eqn in equations(program)):
        return function

    def change(eqn: core.JaxprEqn) -> core.JaxprEqn:
        avals = [variable.aval for variable in eqn.invars]
        called = jax.make_jaxpr(jax.jit(_solve_with(**eqn.params)))(*avals).jaxpr.eqns[-1]
        return eqn.replace(primitive=called.primitive, params=called.params)

    return rewrite(function, {_SOLVE: change})


def _solve_with(**params: Any) -> Callable[..., jax.Array]:
    def solve(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.linalg.triangular_solve(a, b, **params)

    def differentiate(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        """`a x = b`, so `a dx = db - da x`."""
        (a, b), (da, db) = primals, tangents
        x = solve(a, b)
        cut, inside = (jnp.tril, -1) if params["lower"] else (jnp.triu, 1)
        da = cut(da, inside if params["unit_diagonal"] else 0)
        da = da.swapaxes(-1, -2) if params["transpose_a"] else da
        da = da.conj() if params["conjugate_a"] else da
        return x, solve(a, db - (da @ x if params["left_side"] else x @ da))

    derived = jax.custom_jvp(solve)
    derived.defjvp(differentiate)
    return derived
