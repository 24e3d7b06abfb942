"""Rows into the slots of bins and back, and products of rows with the matrix of their bin.

A bin is an expert, or a device that holds some; a row is one choice of one token. Both ways are
gathers, and so is the transpose of each: nothing wide is ever scattered.

Dims: T tokens, K choices of each, R = T · K rows, S slots, X experts, E and F widths; `...` are
dims of independent groups, whose rows never meet.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

Ragged = jax.lax.RaggedDotDimensionNumbers
Spread = Callable[..., jax.Array]


def places(bin_R: jax.Array, bins: int) -> jax.Array:
    """i32[..., R]: how many rows before this one, in order, want the same bin.

    Args:
      bin_R: i32[..., R], the bin that each row wants, each below `bins`.
      bins: number of bins.

    >>> places(jnp.array([1, 0, 1, 1]), 2).tolist()
    [0, 0, 1, 2]
    """
    wanted = jax.nn.one_hot(bin_R, bins, dtype=jnp.int32)
    before = jnp.cumsum(wanted, -2) - wanted
    return jnp.take_along_axis(before, bin_R[..., None], -1)[..., 0]


def slots(bin_R: jax.Array, bins: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Gives rows the slots of their bins, first come first served.

    Args:
      bin_R: i32[..., R], the bin that each row wants.
      bins: number of bins.
      capacity: slots of each; a row that finds its bin full gets none.

    Returns:
      i32[..., R], the slot of each row, S = bins · capacity where it has none; and
      i32[..., S], the row in each slot, R where there is none.

    >>> slot, row = slots(jnp.array([1, 0, 1, 1]), 2, 2)
    >>> slot.tolist(), row.tolist()
    ([2, 0, 3, 4], [1, 4, 0, 2])
    """
    place = places(bin_R, bins)
    slot_R = jnp.where(place < capacity, bin_R * capacity + place, bins * capacity)
    return slot_R, inverse(slot_R, bins * capacity)


def in_order(bin_R: jax.Array, bins: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts rows by their bins; rows of one bin keep their order.

    Args:
      bin_R: i32[..., R], the bin of each row; `bins` for a row without one, which comes last.
      bins: number of bins.

    Returns:
      i32[..., R], the row at each place; i32[..., R], the place of each row; and
      i32[..., bins], the rows of each bin.
    """
    row = jnp.argsort(bin_R, axis=-1, stable=True).astype(jnp.int32)
    sizes = jax.nn.one_hot(bin_R, bins, dtype=jnp.int32).sum(-2)
    return row, inverse(row, row.shape[-1]), sizes


def inverse(slot_R: jax.Array, size: int) -> jax.Array:
    """i32[..., size]: the row in each slot, R where there is none."""
    rows = slot_R.shape[-1]

    def one(slot: jax.Array) -> jax.Array:
        empty = jnp.full((size,), rows, jnp.int32)
        return empty.at[slot].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")

    for _ in slot_R.shape[:-1]:
        one = jax.vmap(one)
    return one(slot_R)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x[..., N, E] by i32[..., M], zeros where there is no such row."""
    return jnp.take_along_axis(x, index[..., None], -2, mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(x_TE: jax.Array, row_S: jax.Array, slot_R: jax.Array, choices: int) -> jax.Array:
    """[..., S, E]: the token in each slot, zeros in an empty one.

    Args:
      x_TE: tokens, [..., T, E].
      row_S: i32[..., S], the row (token · choices + choice) in each slot.
      slot_R: i32[..., R], the slot of each row.
      choices: rows of one token.
    """
    return _take(x_TE, row_S // choices)


def _dispatch_fwd(
    x_TE: jax.Array, row_S: jax.Array, slot_R: jax.Array, choices: int
) -> tuple[jax.Array, jax.Array]:
    return dispatch(x_TE, row_S, slot_R, choices), slot_R


def _dispatch_bwd(choices: int, slot_R: jax.Array, g_SE: jax.Array) -> tuple[Any, ...]:
    g_RE = _take(g_SE, slot_R)
    *groups, rows, width = g_RE.shape
    return g_RE.reshape(*groups, rows // choices, choices, width).sum(-2), None, None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def collect(y_SE: jax.Array, row_S: jax.Array, slot_R: jax.Array) -> jax.Array:
    """[..., R, E]: what stands in the slot of each row, zeros for a row without one."""
    return _take(y_SE, slot_R)


def _collect_fwd(
    y_SE: jax.Array, row_S: jax.Array, slot_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return collect(y_SE, row_S, slot_R), row_S


def _collect_bwd(row_S: jax.Array, g_RE: jax.Array) -> tuple[Any, ...]:
    return _take(g_RE, row_S), None, None


collect.defvjp(_collect_fwd, _collect_bwd)


def combine(y_RE: jax.Array, share_TK: jax.Array) -> jax.Array:
    """[..., T, E]: the rows of each token, weighted and summed in f32."""
    wide = y_RE.reshape(*share_TK.shape, y_RE.shape[-1]).astype(jnp.float32)
    return (wide * share_TK[..., None]).sum(-2).astype(y_RE.dtype)


def even(h_XCE: jax.Array, w_XEF: jax.Array) -> jax.Array:
    """[..., X, C, F]: each expert's slots times its matrix."""
    return jnp.einsum("...xce,xef->...xcf", h_XCE, w_XEF)


def at_once(one: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """Computes all groups and devices in one place."""
    return one(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged(
    h_GDRE: jax.Array, w_XEF: jax.Array, sizes_GDX: jax.Array, spread: Spread = at_once
) -> jax.Array:
    """[G, D, R, F]: rows in order of their experts, each times the matrix of its own.

    Args:
      h_GDRE: rows of G groups on D devices; what lies behind the sum of the sizes is left out.
      w_XEF: a matrix for each expert; each device has X / D of them, side by side.
      sizes_GDX: i32[G, D, X / D], rows of each of a device's experts in each group.
      spread: `(one, *arrays) -> one(*arrays)` for arrays [G or 1, D, ...], on the devices that
        hold them: compilers for TPUs take no ragged product of several groups at once.
    """
    return _product(spread, h_GDRE, w_XEF, sizes_GDX)


def _ragged_fwd(
    h_GDRE: jax.Array, w_XEF: jax.Array, sizes_GDX: jax.Array, spread: Spread
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return ragged(h_GDRE, w_XEF, sizes_GDX, spread), (h_GDRE, w_XEF, sizes_GDX)


def _ragged_bwd(spread: Spread, saved: tuple[jax.Array, ...], g_GDRF: jax.Array) -> tuple[Any, ...]:
    h_GDRE, w_XEF, sizes_GDX = saved
    g_h = _product(spread, g_GDRF, w_XEF.swapaxes(1, 2), sizes_GDX)
    g_w = _outer(spread, h_GDRE, g_GDRF, sizes_GDX).sum(0)
    return g_h, g_w.reshape(w_XEF.shape).astype(w_XEF.dtype), None


ragged.defvjp(_ragged_fwd, _ragged_bwd)


def _product(
    spread: Spread, h_GDRE: jax.Array, w_XEF: jax.Array, sizes_GDX: jax.Array
) -> jax.Array:
    """Rows times the matrices of their experts, which JAX cannot map over as they are."""

    @custom_vmap
    def product(h: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return spread(_each_dot, h, w.reshape(1, h.shape[1], -1, *w.shape[1:]), sizes)

    @product.def_vmap
    def _(size: int, mapped: Any, h: Any, w: Any, sizes: Any) -> tuple[jax.Array, bool]:
        if mapped[1]:  # other matrices for every element: one product after another
            given = zip((h, w, sizes), mapped, strict=True)
            full = tuple(x if m else jnp.broadcast_to(x, (size, *x.shape)) for x, m in given)
            return jax.lax.map(lambda args: product(*args), full), True
        made = product(merged(h, mapped[0], size), w, merged(sizes, mapped[2], size))
        return made.reshape(size, -1, *made.shape[1:]), True

    return product(h_GDRE, w_XEF, sizes_GDX)


def _outer(spread: Spread, h_GDRE: jax.Array, g_GDRF: jax.Array, sizes_GDX: jax.Array) -> jax.Array:
    """[G, D, X / D, E, F]: for each expert the sum over its rows of h gᵀ."""

    @custom_vmap
    def outer(*args: jax.Array) -> jax.Array:
        return spread(_each_outer, *args)

    @outer.def_vmap
    def _(size: int, mapped: Any, *args: Any) -> tuple[jax.Array, bool]:
        made = outer(*(merged(x, m, size) for x, m in zip(args, mapped, strict=True)))
        return made.reshape(size, -1, *made.shape[1:]), True

    return outer(h_GDRE, g_GDRF, sizes_GDX)


def merged(x: jax.Array, mapped: bool, size: int) -> jax.Array:
    """A mapped dim and the groups behind it as more groups."""
    whole = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
    return whole.reshape(-1, *whole.shape[2:])


def _each_dot(h_GDRE: jax.Array, w_1DXEF: jax.Array, sizes_GDX: jax.Array) -> jax.Array:
    w = jnp.broadcast_to(w_1DXEF, (h_GDRE.shape[0], *w_1DXEF.shape[1:]))
    return _each(jax.lax.ragged_dot, h_GDRE, w, sizes_GDX)


def _each_outer(h_GDRE: jax.Array, g_GDRF: jax.Array, sizes_GDX: jax.Array) -> jax.Array:
    numbers = Ragged((((0,), (0,)), ((), ())), [0], [])

    def one(h: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot_general(h, g, sizes, numbers)

    return _each(one, h_GDRE, g_GDRF, sizes_GDX)


def _each(one: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """Maps over both leading dims at once: JAX lowers one mapped dim of a ragged product."""
    groups, devices = args[0].shape[:2]
    if groups == devices == 1:
        return one(*(x[0, 0] for x in args))[None, None]
    made = jax.vmap(one)(*(x.reshape(-1, *x.shape[2:]) for x in args))
    return made.reshape(groups, devices, *made.shape[1:])
