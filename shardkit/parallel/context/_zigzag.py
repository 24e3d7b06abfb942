"""The zig-zag layout of a length over n devices, which gives each the same causal work.

In order, device i holds pieces 2i and 2i+1 of 2n. Causal work grows with the position, so it is
equal only where every device holds a piece p together with its mirror image 2n−1−p. Any assignment
of such pairs will do; this one keeps piece 2i in place and swaps the other with device n−1−i: half
of each array moves, to one partner. With n = 4:

    in order   01 23 45 67
    zig-zag    07 25 34 16
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ...nn._blockwise import BlockOptions
from ._attention_layout import AttentionLayout

Pairs = list[tuple[int, int]]


class ZigzagAttention(AttentionLayout, abc.ABC):
    """Layouts in which the length stays split, in zig-zag order under a causal mask."""

    def compute_spec(self, ndim: int) -> PartitionSpec:
        """Lengths are split as in the input."""
        return self.input_spec(ndim)

    def move_to_compute(self, x: jax.Array, options: BlockOptions) -> jax.Array:
        """Swaps half of a device's [rows, length, …] with its partner; both halves then rise."""
        if not options.causal:  # all devices have the same work as it is
            return x
        kept, sent = jnp.split(x, 2, axis=1)
        received = self.exchange_pairs(sent, self._partners)
        return jnp.concatenate(self._swap_if_upper(kept, received), 1)

    def move_from_compute(self, x: jax.Array, options: BlockOptions) -> jax.Array:
        """The inverse."""
        if not options.causal:
            return x
        kept, received = self._swap_if_upper(*jnp.split(x, 2, axis=1))
        return jnp.concatenate((kept, self.exchange_pairs(received, self._partners)), 1)

    @abc.abstractmethod
    def exchange_pairs(self, x: jax.Array, pairs: Pairs) -> jax.Array:
        """Returns what the partner of each device holds; `pairs` names both directions."""

    @property
    def _partners(self) -> Pairs:
        return [(i, self.size - 1 - i) for i in range(self.size)]

    def _swap_if_upper(self, kept: jax.Array, received: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both in rising order: piece 2i precedes its mirror image on the first n/2 devices."""
        keeps_lower = 2 * jax.lax.axis_index(self.axis) < self.size
        low, high = jnp.where(keeps_lower, kept, received), jnp.where(keeps_lower, received, kept)
        return low, high


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
