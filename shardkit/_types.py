"""The small vocabulary that models, losses and steps share."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted mean that stays exact when it is split: `total / weight`.

    A loss that returns `Mean(sum of token losses, number of valid tokens)` is the same number
    under any accumulation and any sharding, also when examples weigh differently. A mean of
    means would not be.

    Attributes:
      total: f32[], the weighted sum; gradients flow through it.
      weight: f32[], the sum of weights; treated as a constant. A mean of no weight is 0.
    """

    total: Any
    weight: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named:
    """An array with the logical axis names of its dims, as `init` may return it.

    `compile_step` reads the names and hands the bare array to the loss, so that a plain
    function over dicts can name its dims as flax modules do:
    `{"kernel": sk.Named(kernel, ("embed", "mlp"))}`.

    Attributes:
      value: the array.
      axes: one logical axis name or None per dim.
    """

    value: Any
    axes: tuple[str | None, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Variables:
    """What `init` returns for a model with mutable state: parameters, and the rest.

    Attributes:
      params: pytree that the optimizer updates.
      extra: pytree that the loss replaces each step (batch statistics, counters).
    """

    params: Any
    extra: Any
