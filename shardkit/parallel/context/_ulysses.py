"""All-to-all attention: each device gets the whole length of some heads (arXiv:2309.14509)."""

from typing import final

import jax
from jax.sharding import PartitionSpec

from ...nn._blockwise import BlockOptions
from ._attention_layout import AttentionLayout
from ._blockwise import Cotangents, Gradients, Keys, Partial, Queries, attend, attend_backward


@final
class UlyssesAttention(AttentionLayout):
    """Exchanges length for heads, attends to whole rows, and exchanges back."""

    def compute_spec(self, ndim: int) -> PartitionSpec:
        """Lengths are whole; heads are split over the axis as well."""
        return PartitionSpec(*(self.row_axes or None, None, (*self.head_axes, self.axis))[:ndim])

    def move_to_compute(self, x: jax.Array, options: BlockOptions) -> jax.Array:
        """Sends every other device its heads; segments, which have no heads, are gathered."""
        if x.ndim == 2:
            return jax.lax.all_gather(x, self.axis, axis=1, tiled=True)
        return jax.lax.all_to_all(x, self.axis, 2, 1, tiled=True)

    def move_from_compute(self, x: jax.Array, options: BlockOptions) -> jax.Array:
        """Sends every other device its part of the length."""
        return jax.lax.all_to_all(x, self.axis, 1, 2, tiled=True)

    def attend_shard(self, queries: Queries, keys: Keys, options: BlockOptions) -> Partial:
        """Whole rows of some heads: nothing is left to exchange."""
        return attend(queries, keys, options)

    def attend_shard_backward(
        self, queries: Queries, keys: Keys, cotangents: Cotangents, options: BlockOptions
    ) -> Gradients:
        """The same for the gradients."""
        return attend_backward(queries, keys, cotangents, options)
