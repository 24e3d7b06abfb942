"""A matrix product whose weight gradient turns over the smaller of its two operands.

The gradient of `y = x w` with respect to `w` contracts x and the cotangent of y over their rows,
which both have in front. A backend whose matrix product reads its left operand row by row, as
XLA's on CPUs does, first writes the left one transposed. JAX always puts the cotangent there;
for products that widen (to `mlp`, to `vocab`) it is the large one. Where the compiler lays out
operands freely, as on TPUs, the order makes no difference.
"""

import functools
import math

import jax

Axes = tuple[int, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: jax.Array, w: jax.Array, contracted: int = 1) -> jax.Array:
    """Returns x w, summed over the last `contracted` dims of x and as many leading ones of w.

    Args:
      x: [..., *inputs].
      w: [*inputs, *outputs].
      contracted: number of `inputs` dims.

    Returns:
      [..., *outputs] in the dtype of x.

    >>> import jax.numpy as jnp
    >>> dense(jnp.ones((5, 2, 3)), jnp.ones((2, 3, 4)), 2).shape
    (5, 4)
    """
    return _contract(x, w, _last(x, contracted), tuple(range(contracted)))


def _dense_fwd(
    x: jax.Array, w: jax.Array, contracted: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dense(x, w, contracted), (x, w)


def _dense_bwd(
    contracted: int, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    outputs = w.ndim - contracted
    g_x = _contract(g, w, _last(g, outputs), _last(w, outputs))
    return g_x, weight_gradient(x, g, contracted, outputs)


dense.defvjp(_dense_fwd, _dense_bwd)


def weight_gradient(x: jax.Array, g: jax.Array, inputs: int = 1, outputs: int = 1) -> jax.Array:
    """Returns xᵀ g, contracted over the dims before the last `inputs` of x, `outputs` of g."""
    rows = tuple(range(x.ndim - inputs))
    width_x = math.prod(x.shape[len(rows) :])
    width_g = math.prod(g.shape[len(rows) :])
    if width_x <= width_g:
        return _contract(x, g, rows, rows)
    turned = _contract(g, x, rows, rows)
    return turned.transpose(*range(outputs, outputs + inputs), *range(outputs))


def _last(x: jax.Array, dims: int) -> Axes:
    return tuple(range(x.ndim - dims, x.ndim))


def _contract(a: jax.Array, b: jax.Array, axes_a: Axes, axes_b: Axes) -> jax.Array:
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())))
