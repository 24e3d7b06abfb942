"""Ring attention where not all devices take part: blocks are swapped pair by pair.

A permute waits for every device of a program, on some backends, so it must not stand in a branch
that only some of them take, as the ticks of a pipeline are. Collectives in groups wait for their
group alone. So each of n devices meets every other one in n-1 rounds of a tournament, and in each
two of them swap their blocks: K and V, and back the gradients that each found for the other. What
is sent is what a ring sends, (n-1) blocks forward and both back; the number of devices is even.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.scope_markers import annotate_branch_counts
from ._blockwise import Part, attend, attend_backward
from ._ring import Ring, Trip, absorbed, absorbed_backward, paired
from ._zigzag import Partners, from_zigzag, to_zigzag


def tournament(n: int) -> np.ndarray:
    """Rounds in which each of an even number of devices meets every other one once.

    Returns:
      i32[n - 1, n], the partner of each device in each round.

    >>> tournament(4).tolist()
    [[3, 2, 1, 0], [2, 3, 0, 1], [1, 0, 3, 2]]
    """
    rounds, others = np.arange(n - 1)[:, None], np.arange(n - 1)
    met = (2 * rounds - others) % (n - 1)
    met = np.where(met == others, n - 1, met)
    return np.concatenate([met, np.arange(n - 1)[:, None]], 1).astype(np.int32)


def swapped(x: jax.Array, axis: str, partners: Partners) -> jax.Array:
    """What the partner of each device holds, by collectives in groups of two."""
    groups = sorted([i, j] for i, j in partners if i < j)
    both = jax.lax.all_gather(x, axis, axis_index_groups=groups)
    first = jnp.asarray([i < j for i, j in sorted(partners)])[jax.lax.axis_index(axis)]
    return jnp.where(first, both[1], both[0])


class Pairs(Ring):
    """Swaps keys and values with every other device of the axis, one after another."""

    def moved_in(self, x: jax.Array, causal: bool) -> jax.Array:
        """Zig-zag order, as on a ring."""
        return to_zigzag(x, self.axis, self.size, swapped) if causal else x

    def moved_out(self, x: jax.Array, causal: bool) -> jax.Array:
        """The inverse."""
        return from_zigzag(x, self.axis, self.size, swapped) if causal else x

    def part(self, q: jax.Array, k: jax.Array, v: jax.Array, ids: Any, causal: bool) -> Part:
        """One device's queries against its own keys, then against those of each partner."""
        trip = Trip(self.axis, self.size, causal)
        out, lse = attend(q, k, v, paired(ids, ids), causal)
        queries = trip.cut(q, 3), trip.cut(ids, 1)
        own = trip.cut(k, 2), trip.cut(v, 2), queries[1]

        def meet(found: Part, round_: jax.Array) -> tuple[Part, None]:
            partner = self._partner(round_)
            return absorbed(found, queries, self._swap(own, round_), trip.visible(partner)), None

        found = trip.cut(out, 3), trip.cut(lse, 3)
        (out, lse), _ = jax.lax.scan(meet, found, jnp.arange(self.size - 1))
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
        """Gradients of the queries stay, those of a partner's block are swapped back at once."""
        trip = Trip(self.axis, self.size, causal)
        dq, dk, dv = attend_backward(q, k, v, paired(ids, ids), causal, lse, delta, g)
        queries = (*(trip.cut(x, 3) for x in (q, lse, delta, g)), trip.cut(ids, 1))
        own = trip.cut(k, 2), trip.cut(v, 2), queries[-1]

        def meet(sums: Any, round_: jax.Array) -> tuple[Any, None]:
            dq, mine = sums
            block, pieces = self._swap(own, round_), trip.visible(self._partner(round_))
            dq, theirs = absorbed_backward(dq, queries, block, pieces)
            return (dq, jax.tree.map(jnp.add, mine, self._swap(theirs, round_))), None

        sums = trip.cut(dq, 3), (trip.cut(dk, 2), trip.cut(dv, 2))
        (dq, (dk, dv)), _ = jax.lax.scan(meet, sums, jnp.arange(self.size - 1))
        return trip.joined(dq, 3), trip.joined(dk, 2), trip.joined(dv, 2)

    def _partner(self, round_: jax.Array) -> jax.Array:
        return jnp.asarray(tournament(self.size))[round_, jax.lax.axis_index(self.axis)]

    def _swap(self, block: Any, round_: jax.Array) -> Any:
        def one(partners: Partners, block: Any) -> Any:
            return jax.tree.map(lambda x: swapped(x, self.axis, partners), block)

        rounds = [list(enumerate(row)) for row in tournament(self.size).tolist()]
        with annotate_branch_counts(np.ones(len(rounds), np.int64)):
            return jax.lax.switch(round_, [functools.partial(one, r) for r in rounds], block)
