"""The products of `sk.nn` and of the reference model, all of which go through `dot_general`.

So another way to multiply, such as fp8 products with scales, is a change of this file alone: every
product below, and each product of its gradient, is one `dot_general` or one `ragged_dot_general`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

Axes = tuple[int, ...]


def dot_general(a: jax.Array, b: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """`jax.lax.dot_general`: the one place where two dense arrays are multiplied."""
    return jax.lax.dot_general(a, b, *args, **kwargs)


def ragged_dot_general(
    a: jax.Array, b: jax.Array, sizes: jax.Array, numbers: jax.lax.RaggedDotDimensionNumbers
) -> jax.Array:
    """`jax.lax.ragged_dot_general`: the one place where rows meet the matrix of their group."""
    return jax.lax.ragged_dot_general(a, b, sizes, numbers)


def einsum(spec: str, a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns `jnp.einsum(spec, a, b)`, accumulated in `dtype` and of that dtype if one is given.

    >>> einsum("th,sh->ts", jnp.ones((2, 3)), jnp.ones((4, 3))).shape
    (2, 4)
    """
    return jnp.einsum(spec, a, b, preferred_element_type=dtype, _dot_general=dot_general)


def matmul(x: jax.Array, w: jax.Array, dtype: Any = None, precision: Any = None) -> jax.Array:
    """Returns x w for x [..., inputs] and w [inputs, outputs], in `dtype` if one is given."""
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    return dot_general(x, w, numbers, precision=precision, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: jax.Array, w: jax.Array, contracted: int = 1) -> jax.Array:
    """Returns x w, summed over the last `contracted` dims of x and as many leading ones of w.

    x is [..., *inputs], w [*inputs, *outputs]; the result, [..., *outputs], has the dtype of x. Its
    weight gradient is that of `weight_gradient`.

    >>> project(jnp.ones((5, 2, 3)), jnp.ones((2, 3, 4)), 2).shape
    (5, 4)
    """
    return _contract(x, w, _last(x, contracted), tuple(range(contracted)))


def _project_bwd(
    contracted: int, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    outputs = w.ndim - contracted
    g_x = _contract(g, w, _last(g, outputs), _last(w, outputs))
    return g_x, weight_gradient(x, g, contracted, outputs)


project.defvjp(lambda x, w, contracted: (project(x, w, contracted), (x, w)), _project_bwd)


def weight_gradient(x: jax.Array, g: jax.Array, inputs: int = 1, outputs: int = 1) -> jax.Array:
    """Returns xᵀ g: [*inputs, *outputs], summed over the rows that both have in front.

    x is [rows, …, *inputs]; g, the cotangent of x w, is [rows, …, *outputs]. The smaller operand is
    the left one. XLA's matrix product on CPUs reads its left operand row by row, so it first writes
    a transposed copy of it. JAX's own rule puts the cotangent there, which is the large one where a
    product widens (to `mlp`, to `vocab`). Compilers that choose layouts freely, as for TPUs, make
    the same program of both orders.
    """
    rows = tuple(range(x.ndim - inputs))
    width_x = math.prod(x.shape[len(rows) :])
    width_g = math.prod(g.shape[len(rows) :])
    if width_x <= width_g:
        return _contract(x, g, rows, rows)
    transposed = _contract(g, x, rows, rows)
    return transposed.transpose(*range(outputs, outputs + inputs), *range(outputs))


def _last(x: jax.Array, dims: int) -> Axes:
    return tuple(range(x.ndim - dims, x.ndim))


def _contract(a: jax.Array, b: jax.Array, axes_a: Axes, axes_b: Axes) -> jax.Array:
    return dot_general(a, b, ((axes_a, axes_b), ((), ())))
