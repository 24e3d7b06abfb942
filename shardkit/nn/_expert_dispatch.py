"""Tokens into the slots of their experts and back, and products of rows with expert matrices.

A row is one choice of one token. A bin is where a row goes: an expert, or a device that holds
several. Both directions are gathers, and so is the transpose of each: no wide array is scattered.

    tokens a b, 2 choices each   rows          a0  a1  b0  b1
                                 bin_R          1   0   1   1
    capacity 2, 2 bins           slot_R         2   0   3   4 = none: bin 1 is full
                                 row_S          1   4   0   2     4 = R: an empty slot

Dims: T tokens, K choices of each, R = T · K rows, S slots, X experts, E and F widths; `...` are
dims of independent groups, whose rows never meet.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from ._dot import einsum, ragged_dot_general

Runner = Callable[..., jax.Array]
"""`(function, *arrays) -> function(*arrays)`, on the devices that hold the arrays."""

# What `jax.lax.ragged_dot` computes: rows [m, k] in groups, each times its own matrix [g, k, n].
_ROWS = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
# Its transpose: for each group the sum over its rows, [m, k] and [m, n] to [g, k, n].
_SUM_OF_ROWS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def position_in_expert(bin_R: jax.Array, bins: int) -> jax.Array:
    """Returns i32[..., R]: how many rows before this one go to the same bin.

    `bin_R` is i32[..., R], the bin of each row, below `bins`.

    >>> position_in_expert(jnp.array([1, 0, 1, 1]), 2).tolist()
    [0, 0, 1, 2]
    """
    one_hot = jax.nn.one_hot(bin_R, bins, dtype=jnp.int32)
    before = jnp.cumsum(one_hot, -2) - one_hot
    return jnp.take_along_axis(before, bin_R[..., None], -1)[..., 0]


def assign_slots(bin_R: jax.Array, bins: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Assigns rows to the slots of their bins, first come first served.

    `bin_R` is i32[..., R], the bin of each row; one that finds the `capacity` slots of its bin full
    gets none. Returns i32[..., R], the slot of each row, S = bins · capacity where it has none; and
    i32[..., S], the row in each slot, R where there is none.

    >>> slot, row = assign_slots(jnp.array([1, 0, 1, 1]), 2, 2)
    >>> slot.tolist(), row.tolist()
    ([2, 0, 3, 4], [1, 4, 0, 2])
    """
    position = position_in_expert(bin_R, bins)
    slot_R = jnp.where(position < capacity, bin_R * capacity + position, bins * capacity)
    return slot_R, invert_slots(slot_R, bins * capacity)


def sort_by_expert(bin_R: jax.Array, bins: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts rows by their bins; rows of one bin keep their order.

    `bin_R` is i32[..., R], the bin of each row; `bins` for a row without one, which comes last.
    Returns i32[..., R], the row at each sorted position; i32[..., R], the sorted position of each
    row; and i32[..., bins], the number of rows of each bin.
    """
    row = jnp.argsort(bin_R, axis=-1, stable=True).astype(jnp.int32)
    sizes = jax.nn.one_hot(bin_R, bins, dtype=jnp.int32).sum(-2)
    return row, invert_slots(row, row.shape[-1]), sizes


def invert_slots(slot_R: jax.Array, size: int) -> jax.Array:
    """Returns i32[..., size]: the row in each slot, R where there is none."""
    rows = slot_R.shape[-1]

    def invert(slot: jax.Array) -> jax.Array:
        empty = jnp.full((size,), rows, jnp.int32)
        return empty.at[slot].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")

    for _ in slot_R.shape[:-1]:
        invert = jax.vmap(invert)
    return invert(slot_R)


def draw_row_words(key: jax.Array | None, choice_BTK: jax.Array) -> jax.Array | None:
    """Returns u32[B, T, K, 2]: the data of a key for each row, None for no key.

    Noise of a row is drawn from its own key, which moves with the row: where and among which others
    an expert computes it, the mesh decides.
    """
    return None if key is None else jax.random.bits(key, (*choice_BTK.shape, 2), jnp.uint32)


def dispatch_words(words: jax.Array | None, row_S: jax.Array) -> jax.Array | None:
    """Returns u32[..., S, 2]: the words of the row in each slot, zeros in an empty one.

    `words` are u32[..., 2] of as many rows, in dims of any sizes, or None for no key; `row_S` is
    i32[..., S], the row in each slot.
    """
    return None if words is None else _take_rows(words.reshape(*row_S.shape[:-1], -1, 2), row_S)


def row_keys(words: jax.Array | None, rows: jax.Array) -> jax.Array | None:
    """Returns key[..., S] for rows [..., S, E] and their words; None for no words."""
    if words is None:
        return None
    return jax.random.wrap_key_data(words.reshape(*rows.shape[:-1], 2), impl="threefry2x32")


def _take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x[..., N, E] by i32[..., M], zeros where there is no such row."""
    return jnp.take_along_axis(x, index[..., None], -2, mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(x_TE: jax.Array, row_S: jax.Array, slot_R: jax.Array, choices: int) -> jax.Array:
    """Returns [..., S, E]: the token in each slot, zeros in an empty one.

    Tokens are [..., T, E], each of them `choices` rows: `row_S` is i32[..., S], the row (token ·
    choices + choice) in each slot, and `slot_R` i32[..., R] the slot of each row.
    """
    return _take_rows(x_TE, row_S // choices)


def _dispatch_fwd(
    x_TE: jax.Array, row_S: jax.Array, slot_R: jax.Array, choices: int
) -> tuple[jax.Array, jax.Array]:
    return dispatch(x_TE, row_S, slot_R, choices), slot_R


def _dispatch_bwd(choices: int, slot_R: jax.Array, g_SE: jax.Array) -> tuple[Any, ...]:
    g_RE = _take_rows(g_SE, slot_R)
    *groups, rows, width = g_RE.shape
    return g_RE.reshape(*groups, rows // choices, choices, width).sum(-2), None, None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def gather_from_slots(y_SE: jax.Array, row_S: jax.Array, slot_R: jax.Array) -> jax.Array:
    """Returns [..., R, E]: the contents of each row's slot, zeros for a row without one."""
    return _take_rows(y_SE, slot_R)


def _collect_fwd(
    y_SE: jax.Array, row_S: jax.Array, slot_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return gather_from_slots(y_SE, row_S, slot_R), row_S


def _collect_bwd(row_S: jax.Array, g_RE: jax.Array) -> tuple[Any, ...]:
    return _take_rows(g_RE, row_S), None, None


gather_from_slots.defvjp(_collect_fwd, _collect_bwd)


def combine(y_RE: jax.Array, share_TK: jax.Array) -> jax.Array:
    """Returns [..., T, E]: the rows of each token, weighted and summed in f32."""
    wide = y_RE.reshape(*share_TK.shape, y_RE.shape[-1]).astype(jnp.float32)
    return (wide * share_TK[..., None]).sum(-2).astype(y_RE.dtype)


def batched_matmul(h_XCE: jax.Array, w_XEF: jax.Array) -> jax.Array:
    """Returns [..., X, C, F]: each expert's slots times its matrix."""
    return einsum("...xce,xef->...xcf", h_XCE, w_XEF)


def run_locally(function: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """Runs a function where it is called, for all groups and devices together."""
    return function(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged_matmul(
    h_GDRE: jax.Array, w_XEF: jax.Array, sizes_GDX: jax.Array, run: Runner = run_locally
) -> jax.Array:
    """Returns [G, D, R, F]: rows sorted by expert, each times its expert's matrix.

    Rows [G, D, R, E] are of G groups on D devices; those beyond the sum of the sizes are padding.
    Each device has X / D of the matrices [X, E, F], side by side; `sizes_GDX` is i32[G, D, X / D],
    rows of each of its experts in each group. `run` runs a function of arrays [G or 1, D, ...] on
    the devices that hold them: compilers for TPUs refuse a ragged product of several groups.
    """
    return _product(run, h_GDRE, w_XEF, sizes_GDX)


def _ragged_fwd(
    h_GDRE: jax.Array, w_XEF: jax.Array, sizes_GDX: jax.Array, run: Runner
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return ragged_matmul(h_GDRE, w_XEF, sizes_GDX, run), (h_GDRE, w_XEF, sizes_GDX)


def _ragged_bwd(run: Runner, saved: tuple[jax.Array, ...], g_GDRF: jax.Array) -> tuple[Any, ...]:
    h_GDRE, w_XEF, sizes_GDX = saved
    g_h = _product(run, g_GDRF, w_XEF.swapaxes(1, 2), sizes_GDX)
    g_w = _outer(run, h_GDRE, g_GDRF, sizes_GDX).sum(0)
    return g_h, g_w.reshape(w_XEF.shape).astype(w_XEF.dtype), None


ragged_matmul.defvjp(_ragged_fwd, _ragged_bwd)


def _product(run: Runner, h_GDRE: jax.Array, w_XEF: jax.Array, sizes_GDX: jax.Array) -> jax.Array:
    """Rows times the matrices of their experts, with the `vmap` rule that JAX's product lacks."""

    @custom_vmap
    def product(h: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return run(_multiply_groups, h, w.reshape(1, h.shape[1], -1, *w.shape[1:]), sizes)

    @product.def_vmap
    def _(size: int, mapped: Any, h: Any, w: Any, sizes: Any) -> tuple[jax.Array, bool]:
        if mapped[1]:  # other matrices for every element: one product after another
            args = zip((h, w, sizes), mapped, strict=True)
            full = tuple(x if m else jnp.broadcast_to(x, (size, *x.shape)) for x, m in args)
            return jax.lax.map(lambda args: product(*args), full), True
        h, sizes = merge_mapped_dim(h, mapped[0], size), merge_mapped_dim(sizes, mapped[2], size)
        out = product(h, w, sizes)
        return out.reshape(size, -1, *out.shape[1:]), True

    return product(h_GDRE, w_XEF, sizes_GDX)


def _outer(run: Runner, h_GDRE: jax.Array, g_GDRF: jax.Array, sizes_GDX: jax.Array) -> jax.Array:
    """[G, D, X / D, E, F]: for each expert the sum over its rows of h gᵀ."""

    @custom_vmap
    def outer(*args: jax.Array) -> jax.Array:
        return run(_sum_groups, *args)

    @outer.def_vmap
    def _(size: int, mapped: Any, *args: Any) -> tuple[jax.Array, bool]:
        out = outer(*(merge_mapped_dim(x, m, size) for x, m in zip(args, mapped, strict=True)))
        return out.reshape(size, -1, *out.shape[1:]), True

    return outer(h_GDRE, g_GDRF, sizes_GDX)


def merge_mapped_dim(x: jax.Array, mapped: bool, size: int) -> jax.Array:
    """Merges a dim that `vmap` maps with that of groups: [size, G, …] to [size · G, …]."""
    full = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
    return full.reshape(-1, *full.shape[2:])


def _multiply_groups(h_GDRE: jax.Array, w_1DXEF: jax.Array, sizes_GDX: jax.Array) -> jax.Array:
    w = jnp.broadcast_to(w_1DXEF, (h_GDRE.shape[0], *w_1DXEF.shape[1:]))
    return _map_groups(_ROWS, h_GDRE, w, sizes_GDX)


def _sum_groups(h_GDRE: jax.Array, g_GDRF: jax.Array, sizes_GDX: jax.Array) -> jax.Array:
    return _map_groups(_SUM_OF_ROWS, h_GDRE, g_GDRF, sizes_GDX)


def _map_groups(numbers: Any, *args: jax.Array) -> jax.Array:
    """Maps over both leading dims at once: JAX lowers one mapped dim of a ragged product."""

    def product(a: jax.Array, b: jax.Array, sizes: jax.Array) -> jax.Array:
        return ragged_dot_general(a, b, sizes, numbers)

    groups, devices = args[0].shape[:2]
    if groups == devices == 1:
        a, b, sizes = (x[0, 0] for x in args)
        return product(a, b, sizes)[None, None]
    out = jax.vmap(product)(*(x.reshape(-1, *x.shape[2:]) for x in args))
    return out.reshape(groups, devices, *out.shape[1:])
