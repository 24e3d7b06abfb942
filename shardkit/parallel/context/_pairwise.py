"""Ring attention where not all devices take part: blocks are exchanged pair by pair.

On some backends a permute waits for every device of a program, so it must not be in a branch that
only some of them take, as the ticks of a pipeline are. Collectives with `axis_index_groups` wait
for their group alone. So each of n devices meets every other one in n-1 rounds of a tournament; the
two devices of a pair exchange K and V, and then the gradients that each computed for the other. The
bytes are those of a ring: n-1 blocks forward, and both ways backward. n is even.
"""

import functools
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.scope_markers import annotate_branch_counts
from ..._core.types import PyTree
from ...nn._blockwise import BlockOptions
from ._blockwise import Cotangents, Gradients, Keys, Partial, Queries, attend, attend_backward
from ._ring import (
    KEY_LENGTH,
    QUERY_LENGTH,
    RingSchedule,
    accumulate_block,
    accumulate_block_backward,
)
from ._zigzag import Pairs, ZigzagAttention


def tournament(n: int) -> np.ndarray:
    """Rounds in which each of an even number of devices meets every other one once.

    It is i32[n - 1, n], the partner of each device in each round.

    >>> tournament(4).tolist()
    [[3, 2, 1, 0], [2, 3, 0, 1], [1, 0, 3, 2]]
    """
    # The circle method: devices 0 … n-2 sit on a circle and meet their mirror image about a
    # diameter that turns with the rounds; the device on the diameter meets device n-1.
    rounds, devices = np.arange(n - 1)[:, None], np.arange(n - 1)
    partners = (2 * rounds - devices) % (n - 1)
    partners = np.where(partners == devices, n - 1, partners)
    return np.concatenate([partners, np.arange(n - 1)[:, None]], 1).astype(np.int32)


@final
class PairwiseExchange(ZigzagAttention):
    """Exchanges keys and values with every other device of the axis, one after another."""

    def exchange_pairs(self, x: jax.Array, pairs: Pairs) -> jax.Array:
        """A gather in groups of two."""
        groups = sorted([i, j] for i, j in pairs if i < j)
        both = jax.lax.all_gather(x, self.axis, axis_index_groups=groups)
        is_first = jnp.asarray([i < j for i, j in sorted(pairs)])[jax.lax.axis_index(self.axis)]
        return jnp.where(is_first, both[1], both[0])

    def attend_shard(self, queries: Queries, keys: Keys, options: BlockOptions) -> Partial:
        """One device's queries against its own keys, then against those of each partner."""
        ring = RingSchedule(self.axis, self.size, options.causal)
        partial = ring.split(attend(queries, keys, options), QUERY_LENGTH)
        queries, keys = ring.split(queries, QUERY_LENGTH), ring.split(keys, KEY_LENGTH)

        def body(partial: Partial, round_: jax.Array) -> tuple[Partial, None]:
            block, visible = self._exchange(keys, round_), ring.visible_from(self._partner(round_))
            return accumulate_block(partial, queries, block, visible, options), None

        partial, _ = jax.lax.scan(body, partial, jnp.arange(self.size - 1))
        return ring.concatenate(partial, QUERY_LENGTH)

    def attend_shard_backward(
        self, queries: Queries, keys: Keys, cotangents: Cotangents, options: BlockOptions
    ) -> Gradients:
        """Gradients of the queries stay; those of a partner's block are sent back at once."""
        ring = RingSchedule(self.axis, self.size, options.causal)
        dq, *grads = attend_backward(queries, keys, cotangents, options)
        sums = ring.split(dq, QUERY_LENGTH), ring.split(tuple(grads), KEY_LENGTH)
        queries, cotangents = ring.split((queries, cotangents), QUERY_LENGTH)
        keys = ring.split(keys, KEY_LENGTH)

        def body(sums: Any, round_: jax.Array) -> tuple[Any, None]:
            dq, own = sums
            block, visible = self._exchange(keys, round_), ring.visible_from(self._partner(round_))
            dq, grads = accumulate_block_backward(
                dq, queries, cotangents, block, visible, options=options
            )
            return (dq, jax.tree.map(jnp.add, own, self._exchange(grads, round_))), None

        (dq, grads), _ = jax.lax.scan(body, sums, jnp.arange(self.size - 1))
        return ring.concatenate(dq, QUERY_LENGTH), *ring.concatenate(grads, KEY_LENGTH)

    def _partner(self, round_: jax.Array) -> jax.Array:
        return jnp.asarray(tournament(self.size))[round_, jax.lax.axis_index(self.axis)]

    def _exchange(self, tree: PyTree, round_: jax.Array) -> Any:
        """Exchanges arrays with the partner of a round."""

        def exchange(pairs: Pairs, tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: self.exchange_pairs(x, pairs), tree)

        rounds = [list(enumerate(row)) for row in tournament(self.size).tolist()]
        with annotate_branch_counts(np.ones(len(rounds), np.int64)):
            return jax.lax.switch(round_, [functools.partial(exchange, r) for r in rounds], tree)
