"""Ring attention: queries stay, blocks of keys and values travel (arXiv:2310.01889).

Each device attends to its own block, then to that of its predecessor, and so on: n−1 permutes to
the next device. Parts of the softmax join in f32. The backward pass sends the blocks round again,
with the gradients of each that the devices on its way add to, in f32 as sums of several parts are.

Under a causal mask the length is in zig-zag order, so every device holds a low and a high piece.
Of the four pairs of pieces between two devices always two are visible, whole: the high queries see
the low keys, and then either low see low (the block is of a device whose pieces enclose this one's)
or high see high. So every step costs every device the same, without a mask and without a branch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ._attention_layout import Way
from ._blockwise import Part, attend, attend_backward, merge
from ._zigzag import from_zigzag, lower_piece, to_zigzag


def neighbours(n: int) -> list[tuple[int, int]]:
    """Who sends to whom on a ring of n devices."""
    return [(i, (i + 1) % n) for i in range(n)]


class Ring(Way):
    """Sends keys and values round the devices of the axis."""

    def inner(self, ndim: int) -> PartitionSpec:
        """Lengths are split as outside."""
        return self.outer(ndim)

    def moved_in(self, x: jax.Array, causal: bool) -> jax.Array:
        """Zig-zag order under a causal mask; without one all work is equal as it is."""
        return to_zigzag(x, self.axis, self.size) if causal else x

    def moved_out(self, x: jax.Array, causal: bool) -> jax.Array:
        """The inverse."""
        return from_zigzag(x, self.axis, self.size) if causal else x

    def part(self, q: jax.Array, k: jax.Array, v: jax.Array, ids: Any, causal: bool) -> Part:
        """One device's queries against its own keys, then against those that come round."""
        trip = Trip(self.axis, self.size, causal)
        out, lse = attend(q, k, v, paired(ids, ids), causal)
        queries = trip.cut(q, 3), trip.cut(ids, 1)
        block = trip.cut(k, 2), trip.cut(v, 2), queries[1]

        def absorb(found: Part, step: Any, block: Any) -> Part:
            return absorbed(found, queries, block, trip.visible(trip.origin(step)))

        def body(carry: Any, step: jax.Array) -> tuple[Any, None]:
            found, block = carry
            ahead = trip.pass_on(block)  # travels while this one is worked on
            return (absorb(found, step, block), ahead), None

        start = (trip.cut(out, 3), trip.cut(lse, 3)), trip.pass_on(block)
        (found, block), _ = jax.lax.scan(body, start, jnp.arange(1, self.size - 1))
        out, lse = absorb(found, self.size - 1, block)
        return trip.joined(out, 3), trip.joined(lse, 3)

    def part_backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        ids: Any,
        lse: jax.Array,
        delta: jax.Array,
        g: jax.Array,
        causal: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients of the queries stay, those of a block follow it until they are home."""
        trip = Trip(self.axis, self.size, causal)
        dq, dk, dv = attend_backward(q, k, v, paired(ids, ids), causal, lse, delta, g)
        queries = (*(trip.cut(x, 3) for x in (q, lse, delta, g)), trip.cut(ids, 1))
        block = trip.cut(k, 2), trip.cut(v, 2), queries[-1]

        def absorb(dq: jax.Array, step: Any, block: Any) -> tuple[jax.Array, Any]:
            return absorbed_backward(dq, queries, block, trip.visible(trip.origin(step)))

        def visit(dq: jax.Array, sums: Any, step: Any, block: Any) -> tuple[jax.Array, Any]:
            arriving = trip.pass_on(sums)
            dq, more = absorb(dq, step, block)
            return dq, _add(arriving, more)

        def body(carry: Any, step: jax.Array) -> tuple[Any, None]:
            dq, sums, block = carry
            ahead = trip.pass_on(block)
            return (*visit(dq, sums, step, block), ahead), None

        block, last = trip.pass_on(block), self.size - 1
        ahead = trip.pass_on(block) if last > 1 else block
        dq, sums = absorb(trip.cut(dq, 3), 1, block)
        if last > 1:
            start = dq, sums, ahead
            (dq, sums, block), _ = jax.lax.scan(body, start, jnp.arange(2, last))
            dq, sums = visit(dq, sums, last, block)
        dk_rest, dv_rest = (trip.joined(x, 2) for x in trip.pass_on(sums))
        return trip.joined(dq, 3), dk + dk_rest, dv + dv_rest


@dataclasses.dataclass(frozen=True)
class Trip:
    """One way round the ring: n devices, whose lengths count as one piece or, causally, as two."""

    axis: str
    n: int
    causal: bool

    def cut(self, x: Any, dim: int) -> Any:
        """The pieces of an array, stacked; None stays None."""
        pieces = 2 if self.causal else 1
        return jax.tree.map(lambda x: jnp.stack(jnp.split(x, pieces, dim)), x)

    def joined(self, pieces: jax.Array, dim: int) -> jax.Array:
        """The inverse of `cut`."""
        return jnp.concatenate(list(pieces), dim)

    def pass_on(self, block: Any) -> Any:
        """Sends a block to the next device, and gets the one of the device before."""
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, neighbours(self.n)), block)

    def origin(self, step: Any) -> Any:
        """The device whose block is here after so many steps."""
        return (jax.lax.axis_index(self.axis) - step) % self.n

    def visible(self, device: Any) -> tuple[jax.Array, jax.Array]:
        """Own pieces, and for each a piece that it sees whole of another device's block."""
        if not self.causal:
            return jnp.zeros(1, int), jnp.zeros(1, int)
        here = jax.lax.axis_index(self.axis)
        other = lower_piece(device, self.n)
        same = jnp.where(other < lower_piece(here, self.n), 0, 1)
        return jnp.stack([jnp.ones_like(same), same]), jnp.stack([jnp.zeros_like(same), same])


def absorbed(found: Part, queries: Any, block: Any, pieces: Any) -> Part:
    """Joins what queries found so far with what they find in the visible pieces of a block.

    Args:
      found: output and logarithms of softmax sums, their pieces stacked.
      queries: `(q, ids)`, stacked alike.
      block: `(k, v, ids)` of another device.
      pieces: as `Trip.visible` pairs them.
    """

    def one(found: Part, pair: tuple[jax.Array, jax.Array]) -> tuple[Part, None]:
        mine, theirs = pair
        (q, own_ids), (k, v, key_ids) = _at(queries, mine), _at(block, theirs)
        new = attend(q, k, v, paired(own_ids, key_ids), False)
        return _put(found, mine, merge(_at(found, mine), new)), None

    return jax.lax.scan(one, found, pieces)[0]


def absorbed_backward(
    dq: jax.Array, queries: Any, block: Any, pieces: Any
) -> tuple[jax.Array, Any]:
    """Adds to the gradient of the queries what a block gives; returns that of the block, f32.

    Args:
      dq: gradients of the queries so far, their pieces stacked.
      queries: `(q, lse, delta, g, ids)`, stacked alike.
      block: `(k, v, ids)` of another device.
      pieces: as `Trip.visible` pairs them.
    """
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), block[:2])

    def one(carry: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (dq, sums), (mine, theirs) = carry, pair
        (q, lse, delta, g, own_ids), (k, v, key_ids) = _at(queries, mine), _at(block, theirs)
        ids = paired(own_ids, key_ids)
        more, *of_block = attend_backward(q, k, v, ids, False, lse, delta, g)
        dq = _put(dq, mine, _at(dq, mine) + more)
        return (dq, _put(sums, theirs, _add(_at(sums, theirs), tuple(of_block)))), None

    return jax.lax.scan(one, (dq, sums), pieces)[0]


def paired(queries: Any, keys: Any) -> Any:
    """Segments of queries and keys, or None."""
    return None if queries is None else (queries, keys)


def _at(pieces: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), pieces)


def _put(pieces: Any, i: Any, new: Any) -> Any:
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, piece: put(x, piece, i, 0), pieces, new)


def _add(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)
