"""Ring attention: queries stay, blocks of keys and values rotate (arXiv:2310.01889).

Each device attends to its own block, then to that of its predecessor, and so on: n−1 permutes to
the next device. Partial softmaxes merge in f32. The backward pass rotates the blocks again, with
the gradients of each, to which every device on the way adds its share, in f32.

Under a causal mask the length is in zig-zag order, so every device holds a low and a high piece.
Of the four pairs of pieces between two devices, two are always visible, whole: the high queries see
the low keys, and then either low see low (the block is of a device whose pieces enclose this one's)
or high see high. With n = 4, device 1 holds pieces 2 and 5; of the block of device 3 (1 and 6) it
sees 1 with both of its own, of the block of device 2 (3 and 4) it sees both with its piece 5. So
every step costs every device the same, without a mask and without a branch.
"""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from ..._core.types import PyTree
from ...nn._blockwise import BlockOptions
from ._blockwise import (
    Cotangents,
    Gradients,
    Keys,
    Partial,
    Queries,
    attend,
    attend_backward,
    merge,
)
from ._zigzag import Pairs, ZigzagAttention, lower_piece

QUERY_LENGTH, KEY_LENGTH = 3, 2
"""The dim of the length in [B, K, G, T, …], and in [B, K, S, H]."""


def neighbours(n: int) -> Pairs:
    """`(sender, receiver)` of each device on a ring of n."""
    return [(i, (i + 1) % n) for i in range(n)]


@final
class RingAttention(ZigzagAttention):
    """Rotates keys and values round the devices of the axis."""

    def exchange_pairs(self, x: jax.Array, pairs: Pairs) -> jax.Array:
        """One permute."""
        return jax.lax.ppermute(x, self.axis, pairs)

    def attend_shard(self, queries: Queries, keys: Keys, options: BlockOptions) -> Partial:
        """One device's queries against its own keys, then against each block that rotates in."""
        ring = RingSchedule(self.axis, self.size, options.causal)
        partial = ring.split(attend(queries, keys, options), QUERY_LENGTH)
        queries, keys = ring.split(queries, QUERY_LENGTH), ring.split(keys, KEY_LENGTH)

        def body(carry: tuple[Partial, Keys], step: jax.Array) -> tuple[Any, None]:
            partial, block = carry
            following = ring.rotate(block)  # in flight while this block is attended to
            return (
                accumulate_block(partial, queries, block, ring.visible(step), options),
                following,
            ), None

        start = partial, ring.rotate(keys)
        (partial, block), _ = jax.lax.scan(body, start, jnp.arange(1, self.size - 1))
        partial = accumulate_block(partial, queries, block, ring.visible(self.size - 1), options)
        return ring.concatenate(partial, QUERY_LENGTH)

    def attend_shard_backward(
        self, queries: Queries, keys: Keys, cotangents: Cotangents, options: BlockOptions
    ) -> Gradients:
        """Gradients of the queries stay; those of a block follow it and end on its device."""
        ring, last = RingSchedule(self.axis, self.size, options.causal), self.size - 1
        dq, dk, dv = attend_backward(queries, keys, cotangents, options)
        dq = ring.split(dq, QUERY_LENGTH)
        queries, cotangents = ring.split((queries, cotangents), QUERY_LENGTH)
        keys = ring.split(keys, KEY_LENGTH)

        # Where block A of device 0 is, and g, the sum of its gradients, with n = 4. The block is
        # sent on before a step computes; g can only follow after it, so it rotates one step later.
        #
        #   step       1         2         3        home
        #   device 1   A → g=1
        #   device 2             A, g+2
        #   device 3                       A, g+3
        #   device 0                                g, added to what device 0 found itself

        def add_block(dq: Any, block: Keys, step: Any) -> tuple[jax.Array, Any]:
            visible = ring.visible(step)
            return accumulate_block_backward(
                dq, queries, cotangents, block, visible, options=options
            )

        def add_to_sums(dq: Any, sums: Any, block: Keys, step: Any) -> tuple[jax.Array, Any]:
            arriving = ring.rotate(sums)  # in flight while this block is computed with
            dq, grads = add_block(dq, block, step)
            return dq, jax.tree.map(jnp.add, arriving, grads)

        def body(carry: Any, step: jax.Array) -> tuple[Any, None]:
            dq, sums, block = carry
            following = ring.rotate(block)
            return (*add_to_sums(dq, sums, block, step), following), None

        block = ring.rotate(keys)
        following = ring.rotate(block) if last > 1 else block
        dq, sums = add_block(dq, block, 1)
        if last > 1:
            start = dq, sums, following
            (dq, sums, block), _ = jax.lax.scan(body, start, jnp.arange(2, last))
            dq, sums = add_to_sums(dq, sums, block, last)
        dk_sum, dv_sum = ring.concatenate(ring.rotate(sums), KEY_LENGTH)
        return ring.concatenate(dq, QUERY_LENGTH), dk + dk_sum, dv + dv_sum


@dataclasses.dataclass(frozen=True)
class RingSchedule:
    """Which block is where on a ring of n devices, and which pieces of it are visible.

    A device's part of the length is one piece or, causally, two.
    """

    axis: str
    n: int
    causal: bool

    def split(self, tree: PyTree, dim: int) -> Any:
        """Cuts the length of arrays into pieces, stacked in dim 0; segments have it in dim 1."""
        pieces = 2 if self.causal else 1

        def cut(x: jax.Array) -> jax.Array:
            return jnp.stack(jnp.split(x, pieces, 1 if x.ndim == 2 else dim))

        return jax.tree.map(cut, tree)

    def concatenate(self, tree: PyTree, dim: int) -> Any:
        """The inverse of `split`."""
        return jax.tree.map(lambda x: jnp.concatenate(list(x), dim), tree)

    def rotate(self, tree: PyTree) -> Any:
        """Sends arrays to the next device and receives those of the device before."""
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, neighbours(self.n)), tree)

    def visible(self, step: Any) -> tuple[jax.Array, jax.Array]:
        """Visible pieces of the block that is here after so many rotations."""
        return self.visible_from((jax.lax.axis_index(self.axis) - step) % self.n)

    def visible_from(self, device: Any) -> tuple[jax.Array, jax.Array]:
        """Pieces of this device's queries, and for each a visible piece of a device's block."""
        if not self.causal:
            return jnp.zeros(1, int), jnp.zeros(1, int)
        own, other = lower_piece(jax.lax.axis_index(self.axis), self.n), lower_piece(device, self.n)
        same = jnp.where(other < own, 0, 1)  # low see low, or high see high
        return jnp.stack([jnp.ones_like(same), same]), jnp.stack([jnp.zeros_like(same), same])


def accumulate_block(
    partial: Partial,
    queries: Queries,
    block: Keys,
    visible: tuple[jax.Array, jax.Array],
    options: BlockOptions,
) -> Partial:
    """Merges attention to the visible pieces of another device's block into a partial result.

    Result, queries and block are stacked by `RingSchedule.split`; its `visible` pairs the pieces,
    which have no causal mask among them.
    """
    whole = options._replace(causal=False)

    def body(partial: Partial, pair: tuple[jax.Array, jax.Array]) -> tuple[Partial, None]:
        i, j = pair
        new = attend(_index(queries, i), _index(block, j), whole)
        return _set(partial, i, merge(_index(partial, i), new)), None

    return jax.lax.scan(body, partial, visible)[0]


def accumulate_block_backward(
    dq: jax.Array,
    queries: Queries,
    cotangents: Cotangents,
    block: Keys,
    visible: tuple[jax.Array, jax.Array],
    options: BlockOptions,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Adds a block's share to the gradient of the queries; returns the gradients of its k and v.

    The sum so far is f32. All arrays are stacked, and pieces visible, as for `accumulate_block`.
    """
    whole = options._replace(causal=False)
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (block.k, block.v))

    def body(carry: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (dq, sums), (i, j) = carry, pair
        of_queries = _index(queries, i), _index(cotangents, i)
        dq_piece, *grads = attend_backward(of_queries[0], _index(block, j), of_queries[1], whole)
        dq = _set(dq, i, _index(dq, i) + dq_piece)
        sums = _set(sums, j, jax.tree.map(jnp.add, _index(sums, j), tuple(grads)))
        return (dq, sums), None

    return jax.lax.scan(body, (dq, zeros), visible)[0]


def _index(pieces: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), pieces)


def _set(pieces: Any, i: Any, values: Any) -> Any:
    update = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, value: update(x, value, i, 0), pieces, values)
