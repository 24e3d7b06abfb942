"""All-to-all attention: each device gets the whole length of some heads (arXiv:2309.14509)."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from ._attention_layout import Way
from ._blockwise import attend, attend_backward


class HeadExchange(Way):
    """Exchanges length for heads, attends to whole rows, and exchanges back."""

    def inner(self, ndim: int) -> PartitionSpec:
        """Lengths are whole, heads split over the axis too."""
        return PartitionSpec(*(self.rows or None, None, (*self.heads, self.axis))[:ndim])

    def moved_in(self, x: jax.Array, causal: bool) -> jax.Array:
        """Sends every other device its heads; what has no heads is gathered."""
        if x.ndim == 2:
            return jax.lax.all_gather(x, self.axis, axis=1, tiled=True)
        return jax.lax.all_to_all(x, self.axis, 2, 1, tiled=True)

    def moved_out(self, x: jax.Array, causal: bool) -> jax.Array:
        """Sends every other device its part of the length."""
        return jax.lax.all_to_all(x, self.axis, 1, 2, tiled=True)

    def part(self, q: jax.Array, k: jax.Array, v: jax.Array, ids: Any, causal: bool) -> Any:
        """Whole rows of few heads: nothing is left to exchange."""
        return attend(q, k, v, None if ids is None else (ids, ids), causal)

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
        """The same for the gradients."""
        both = None if ids is None else (ids, ids)
        return attend_backward(q, k, v, both, causal, lse, delta, g)
