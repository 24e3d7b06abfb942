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

Under a window that is known when the program is traced, the length stays in order, and only the
blocks that a window reaches rotate: with 4 devices and a window of a block and a half, two permutes
in place of three, and no swap. The devices at the front hide the blocks that come from the end.
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
@dataclasses.dataclass(frozen=True)
class RingAttention(ZigzagAttention):
    """Rotates keys and values round the devices of the axis.

    Attributes:
      reach: how many blocks before a device's own the windows of its queries reach; None for all.
    """

    reach: int | None = None

    def move_to_compute(self, x: jax.Array, options: BlockOptions) -> jax.Array:
        """In zig-zag order; under a window that does not reach all blocks, in order."""
        return x if self.reach is not None else super().move_to_compute(x, options)

    def move_from_compute(self, x: jax.Array, options: BlockOptions) -> jax.Array:
        """The inverse."""
        return x if self.reach is not None else super().move_from_compute(x, options)

    def _schedule(self, options: BlockOptions) -> "RingSchedule":
        return RingSchedule(self.axis, self.size, options.causal, self.reach)

    def exchange_pairs(self, x: jax.Array, pairs: Pairs) -> jax.Array:
        """One permute."""
        return jax.lax.ppermute(x, self.axis, pairs)

    def attend_shard(self, queries: Queries, keys: Keys, options: BlockOptions) -> Partial:
        """One device's queries against its own keys, then against each block that rotates in."""
        ring = self._schedule(options)
        last, partial = ring.last, ring.split(attend(queries, keys, options), QUERY_LENGTH)
        queries, keys = ring.split(queries, QUERY_LENGTH), ring.split(keys, KEY_LENGTH)

        def body(carry: tuple[Partial, Keys], step: jax.Array) -> tuple[Any, None]:
            partial, block = carry
            following = ring.rotate(block)  # in flight while this block is attended to
            return (add_block(partial, block, step), following), None

        def add_block(partial: Partial, block: Keys, step: Any) -> Partial:
            seeing = ring.hide_later(queries, step)
            return accumulate_block(partial, seeing, block, ring.visible(step), options)

        if last:
            start = partial, ring.rotate(keys)
            (partial, block), _ = jax.lax.scan(body, start, jnp.arange(1, last))
            partial = add_block(partial, block, last)
        return ring.concatenate(partial, QUERY_LENGTH)

    def attend_shard_backward(
        self, queries: Queries, keys: Keys, cotangents: Cotangents, options: BlockOptions
    ) -> Gradients:
        """Gradients of the queries stay; those of a block follow it and end on its device."""
        ring = self._schedule(options)
        dq, dk, dv = attend_backward(queries, keys, cotangents, options)
        if not (last := ring.last):
            return dq, dk, dv
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
            seeing, visible = ring.hide_later(queries, step), ring.visible(step)
            return accumulate_block_backward(
                dq, seeing, cotangents, block, visible, options=options
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
        dk_sum, dv_sum = ring.concatenate(ring.rotate(sums, self.size - last), KEY_LENGTH)
        return ring.concatenate(dq, QUERY_LENGTH), dk + dk_sum, dv + dv_sum


@dataclasses.dataclass(frozen=True)
class RingSchedule:
    """Which block is where on a ring of n devices, and which pieces of it are visible.

    A device's part of the length is one piece or, in zig-zag order, two.
    """

    axis: str
    n: int
    causal: bool
    reach: int | None = None

    @property
    def last(self) -> int:
        """How often a block rotates."""
        return self.n - 1 if self.reach is None else self.reach

    @property
    def is_zigzag(self) -> bool:
        """Whether a device holds a low and a high piece of the length."""
        return self.causal and self.reach is None

    def split(self, tree: PyTree, dim: int) -> Any:
        """Cuts the length of arrays into pieces, stacked in dim 0; segments have it in dim 1."""
        pieces = 2 if self.is_zigzag else 1

        def cut(x: jax.Array) -> jax.Array:
            return jnp.stack(jnp.split(x, pieces, 1 if x.ndim == 2 else dim))

        return jax.tree.map(cut, tree)

    def concatenate(self, tree: PyTree, dim: int) -> Any:
        """The inverse of `split`."""
        return jax.tree.map(lambda x: jnp.concatenate(list(x), dim), tree)

    def rotate(self, tree: PyTree, by: int = 1) -> Any:
        """Sends arrays to the next device, or further, and receives those of one before."""
        pairs = [(sender, (receiver + by - 1) % self.n) for sender, receiver in neighbours(self.n)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)

    def hide_later(self, queries: Queries, step: Any) -> Queries:
        """Queries that see no key of a block that is here from behind their own, round the ring."""
        if self.reach is None or queries.first is None:
            return queries
        is_before = jax.lax.axis_index(self.axis) >= step
        nothing = jnp.iinfo(jnp.int32).max
        return queries._replace(first=jnp.where(is_before, queries.first, nothing))

    def visible(self, step: Any) -> tuple[jax.Array, jax.Array]:
        """Visible pieces of the block that is here after so many rotations."""
        return self.visible_from((jax.lax.axis_index(self.axis) - step) % self.n)

    def visible_from(self, device: Any) -> tuple[jax.Array, jax.Array]:
        """Pieces of this device's queries, and for each a visible piece of a device's block."""
        if not self.is_zigzag:
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
