"""`sk.nn.use_param`: marks where a weight is used, so that a strategy can gather it there."""

import jax

from ._manual_axis_rules import gather_param, on_shards
from ._overridable import overridable


def use_param(x: jax.Array, *names: str | None) -> jax.Array:
    """Marks a weight at its use, inside the layer that uses it.

    A weight that is split over an axis such as `fsdp` is gathered for the forward pass, dropped,
    and gathered again for the backward pass; the mark does not change this. Under
    `strategies.fsdp(reshard_after_forward=False)` it is gathered once and kept in between.

    In `mode="shard_map"` the mark is the gather. A weight without one is gathered before the loss,
    so mark weights inside the layer, to hold the whole weights of one layer at a time.

    Args:
      x: the weight, any shape and dtype; of one layer, if layers are stacked and scanned.
      *names: one logical axis name per dim, None for a dim that stays whole:
        `sk.nn.use_param(w, "embed", "mlp")`.

    Returns:
      `x`, unchanged in value.

    >>> import jax.numpy as jnp
    >>> use_param(jnp.ones((2, 3)), "embed", "mlp").shape
    (2, 3)
    """
    return (gather_param if on_shards() else overridable("use_param", gather_param))(x, names)
