"""Bugs of ring attention, for steps of `strategies.context()`."""

from typing import Any

import jax.numpy as jnp

from ..parallel import attend_backward
from .mutations import Mutation


def _shifted(neighbours: Any) -> Any:
    return lambda n: [(i, (j + 1) % n) for i, j in neighbours(n)]


def _not_rescaled(merge: Any) -> Any:
    """What was found so far keeps the weight that it had before more keys came."""

    def wrong(one: Any, other: Any) -> Any:
        out, lse = merge(one, other)
        return out + one[0] * (1 - jnp.exp(one[1] - lse)[..., None]), lse

    return wrong


def _left_behind(attend_shard_backward: Any) -> Any:
    """Each device keeps the gradients of its keys and values that it found itself."""

    def wrong(self: Any, queries: Any, keys: Any, cotangents: Any, causal: bool) -> Any:
        dq, _, _ = attend_shard_backward(self, queries, keys, cotangents, causal)
        return dq, *attend_backward(queries, keys, cotangents, causal)[1:]

    return wrong


_RING = "shardkit.parallel.context._ring."

CONTEXT_MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "ring shifted",
        "blocks go to the device after the next one",
        ("loss",),
        ((_RING + "neighbours", _shifted),),
    ),
    Mutation(
        "softmax not rescaled",
        "parts of attention are added without the weight of the ones before",
        ("loss",),
        ((_RING + "merge", _not_rescaled),),
    ),
    Mutation(
        "gradient left behind",
        "what other devices add to the gradients of keys and values does not come home",
        ("grad_norm",),
        ((_RING + "RingAttention.attend_shard_backward", _left_behind),),
    ),
)
