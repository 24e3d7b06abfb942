"""Bugs to inject into ring attention, for steps of `strategies.context()`."""

from typing import Any

import jax.numpy as jnp

from ..parallel import attend_backward
from .mutations import Mutation


def _shift_ring(neighbours: Any) -> Any:
    return lambda n: [(i, (j + 1) % n) for i, j in neighbours(n)]


def _skip_rescaling(merge: Any) -> Any:
    """Adds the partial output of earlier keys without rescaling it by the new log-sum-exp."""

    def wrong(earlier: Any, later: Any) -> Any:
        # merge gives out = earlier * exp(earlier_lse - lse) + later * exp(later_lse - lse).
        out, lse = merge(earlier, later)
        return out + earlier[0] * (1 - jnp.exp(earlier[1] - lse)[..., None]), lse

    return wrong


def _keep_local_gradients(attend_shard_backward: Any) -> Any:
    """Each device keeps only the local part of the gradients of its keys and values."""

    def wrong(self: Any, queries: Any, keys: Any, cotangents: Any, options: Any) -> Any:
        dq, _, _ = attend_shard_backward(self, queries, keys, cotangents, options)
        return dq, *attend_backward(queries, keys, cotangents, options)[1:]

    return wrong


_RING = "shardkit.parallel.context._ring."

CONTEXT_MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "ring shifted",
        "blocks are sent one device too far",
        ("loss",),
        ((_RING + "neighbours", _shift_ring),),
    ),
    Mutation(
        "softmax not rescaled",
        "partial outputs are added without rescaling",
        ("loss",),
        ((_RING + "merge", _skip_rescaling),),
    ),
    Mutation(
        "gradient left behind",
        "gradients of keys and values lose the contributions of other devices",
        ("grad_norm",),
        ((_RING + "RingAttention.attend_shard_backward", _keep_local_gradients),),
    ),
)
