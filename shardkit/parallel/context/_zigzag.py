"""The zig-zag layout of a length over n devices, which gives each the same causal work.

Cut into 2n pieces, the length has pieces 2i and 2i+1 on device i. Causal work grows with the
position, so it is equal only where every device holds a piece p together with its mirror image
2n−1−p. Any assignment of such pairs will do; this one keeps piece 2i where it is and swaps the
other with device n−1−i: half of each array moves, to one partner.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Partners = list[tuple[int, int]]
Swap = Callable[[jax.Array, str, Partners], jax.Array]


def zigzag_order(length: int, n: int) -> np.ndarray:
    """Positions as the devices hold them, one device after another: the plain reference.

    >>> zigzag_order(8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    pieces = np.arange(length).reshape(2 * n, -1)
    low = [int(lower_piece(i, n)) for i in range(n)]
    return np.concatenate([pieces[p] for i in low for p in (i, 2 * n - 1 - i)])


def lower_piece(device: Any, n: int) -> Any:
    """The first of a device's two pieces; the other is its mirror image."""
    return jnp.minimum(2 * device, 2 * n - 1 - 2 * device)


def permuted(x: jax.Array, axis: str, partners: Partners) -> jax.Array:
    """What the partner of each device holds."""
    return jax.lax.ppermute(x, axis, partners)


def to_zigzag(x: jax.Array, axis: str, n: int, swap: Swap = permuted) -> jax.Array:
    """Swaps half of what a device holds with its partner, both halves then in rising order.

    Args:
      x: [rows, length of one device, …].
      axis: mesh axis that splits the length.
      n: its size.
      swap: gets what the partner holds.
    """
    kept, sent = jnp.split(x, 2, axis=1)
    got = swap(sent, axis, _partners(n))
    halves = _select(_keeps_the_lower(axis, n), (kept, got), (got, kept))
    return jnp.concatenate(halves, 1)


def from_zigzag(x: jax.Array, axis: str, n: int, swap: Swap = permuted) -> jax.Array:
    """The inverse of `to_zigzag`."""
    low, high = jnp.split(x, 2, axis=1)
    kept, got = _select(_keeps_the_lower(axis, n), (low, high), (high, low))
    return jnp.concatenate((kept, swap(got, axis, _partners(n))), 1)


def _partners(n: int) -> Partners:
    return [(i, n - 1 - i) for i in range(n)]


def _keeps_the_lower(axis: str, n: int) -> jax.Array:
    """Whether the piece 2i, which stays, comes before the one that the partner sends."""
    return 2 * jax.lax.axis_index(axis) < n


def _select(which: jax.Array, one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
    return jnp.where(which, one[0], other[0]), jnp.where(which, one[1], other[1])
