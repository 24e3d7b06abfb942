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


def _left_behind(part_backward: Any) -> Any:
    """Each device keeps the gradients of its keys and values that it found itself."""

    def wrong(self: Any, q: Any, k: Any, v: Any, ids: Any, *rest: Any) -> Any:
        dq, _, _ = part_backward(self, q, k, v, ids, *rest)
        *found, causal = rest
        both = None if ids is None else (ids, ids)
        return dq, *attend_backward(q, k, v, both, causal, *found)[1:]

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
        ((_RING + "Ring.part_backward", _left_behind),),
    ),
)
