"""Rows that travel to the devices that want them, without padding on the links.

`jax.lax.ragged_all_to_all` where the platform has it. What arrives stands at the front of a room
that holds the most that could; only what was sent crosses the links.

Dims: G groups, whose rows never meet; D devices that send or receive; X experts; R rows of one
device, S rows of the room, E width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from ...nn._expert_dispatch import merge_mapped_dim

PLATFORMS = ("tpu", "gpu")
"""Platforms whose compilers carry `ragged_all_to_all` out; XLA's for CPUs refuses it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Way:
    """How many rows go from each device to each other one, and where they stand before and after.

    Attributes:
      sizes: i32[G, D, D], rows from one device (dim 1) to another (dim 2).
      here: i32[G, D, D], where they begin on the device that sends them.
      there: i32[G, D, D], where they begin on the device that receives them.
    """

    sizes: jax.Array
    here: jax.Array
    there: jax.Array

    @property
    def back(self) -> "Way":
        """The same rows to where they came from."""
        sizes, here, there = (x.swapaxes(1, 2) for x in (self.sizes, self.there, self.here))
        return Way(sizes, here, there)


def way_of(wanted_GDX: jax.Array) -> Way:
    """The way of rows that each device holds in order of the experts that they want.

    Every device receives from the first device first.

    Args:
      wanted_GDX: i32[G, D, X], rows of each device for each expert; each device has X / D of them.

    >>> way = way_of(jnp.array([[[1, 0, 2, 0], [0, 3, 1, 1]]]))
    >>> way.sizes.tolist(), way.here.tolist(), way.there.tolist()
    ([[[1, 2], [3, 2]]], [[[0, 1], [0, 3]]], [[[0, 0], [1, 2]]])
    """
    groups, devices, number = wanted_GDX.shape
    sizes = wanted_GDX.reshape(groups, devices, devices, number // devices).sum(-1)
    return Way(sizes, jnp.cumsum(sizes, 2) - sizes, jnp.cumsum(sizes, 1) - sizes)


def arrived(wanted_GDX: jax.Array, room: int) -> jax.Array:
    """i32[G, D, room]: which of its own experts each row of a device wants once they have come.

    Args:
      wanted_GDX: as `way_of` takes it.
      room: rows that a device has place for; behind those that came stands X / D.
    """
    groups, devices, number = wanted_GDX.shape
    own = number // devices
    pieces = wanted_GDX.reshape(groups, devices, devices, own).swapaxes(1, 2)
    ends = jnp.cumsum(pieces.reshape(groups, devices, -1), -1)
    find = functools.partial(jnp.searchsorted, side="right", method="compare_all")
    piece = jax.vmap(jax.vmap(find, (0, None)), (0, None))(ends, jnp.arange(room))
    return jnp.where(piece < devices * own, piece % own, own).astype(jnp.int32)


Spread = Callable[..., jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def exchange(spread: Spread, axis: str, room: int, x_GDRE: jax.Array, way: Way) -> jax.Array:
    """[G, D, room, E]: the rows of other devices, in the order of these; zeros behind them.

    Args:
      spread: `(one, *arrays) -> one(*arrays)` for arrays [G, D, ...], on the devices that hold
        them, where `one` may use the collectives of `axis`; or in one place.
      axis: mesh axis of the devices.
      room: rows that a device has place for.
      x_GDRE: rows of each device.
      way: which of them go where.
    """
    return _moved(spread, axis, room, x_GDRE, way)


def _exchange_fwd(
    spread: Spread, axis: str, room: int, x_GDRE: jax.Array, way: Way
) -> tuple[jax.Array, tuple[Way, int]]:
    return exchange(spread, axis, room, x_GDRE, way), (way, x_GDRE.shape[2])


def _exchange_bwd(
    spread: Spread, axis: str, room: int, saved: tuple[Way, int], g_GDSE: jax.Array
) -> tuple[Any, ...]:
    way, rows = saved
    return exchange(spread, axis, rows, g_GDSE, way.back), None


exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _moved(spread: Spread, axis: str, room: int, x_GDRE: jax.Array, way: Way) -> jax.Array:
    """The exchange, with lanes as more groups."""

    @custom_vmap
    def moved(*args: jax.Array) -> jax.Array:
        return spread(functools.partial(_here, axis, room), *args)

    @moved.def_vmap
    def _(size: int, mapped: Any, *args: Any) -> tuple[jax.Array, bool]:
        made = moved(*(merge_mapped_dim(x, m, size) for x, m in zip(args, mapped, strict=True)))
        return made.reshape(size, -1, *made.shape[1:]), True

    return moved(x_GDRE, way.sizes, way.back.sizes, way.here, way.there)


def _here(axis: str, room: int, x: jax.Array, *way: jax.Array) -> jax.Array:
    """The exchange of the groups of one place: one device's part of it, or everything."""
    sizes, sent_back, here, there = way
    devices = sizes.shape[-1]
    if x.shape[1] == devices:
        return jax.vmap(functools.partial(_in_one_place, room))(x, sizes, here, there)

    def one(x_RE: jax.Array, *own: jax.Array) -> jax.Array:
        sizes, arriving, here, there = own
        empty = jnp.zeros((room, x_RE.shape[-1]), x_RE.dtype)
        return jax.lax.ragged_all_to_all(x_RE, empty, here, sizes, there, arriving, axis_name=axis)

    given = (sizes, sent_back, here, there)
    return jnp.stack([one(x[g, 0], *(a[g, 0] for a in given))[None] for g in range(x.shape[0])])


def _in_one_place(
    room: int, x_DRE: jax.Array, sizes_DD: jax.Array, here_DD: jax.Array, there_DD: jax.Array
) -> jax.Array:
    """[D, room, E]: the same by a gather, where one place has the rows of all devices."""
    rows = x_DRE.shape[1]

    def received(sizes_D: jax.Array, here_D: jax.Array, there_D: jax.Array) -> jax.Array:
        at = jnp.arange(room)
        inside = (at >= there_D[:, None]) & (at < (there_D + sizes_D)[:, None])
        sender = jnp.argmax(inside, 0)
        row = sender * rows + here_D[sender] + at - there_D[sender]
        return jnp.where(inside.any(0), row, x_DRE.shape[0] * rows)

    index = jax.vmap(received, 1)(sizes_DD, here_DD, there_DD)
    flat = x_DRE.reshape(-1, x_DRE.shape[-1])
    return jnp.take(flat, index, axis=0, mode="fill", fill_value=0)
