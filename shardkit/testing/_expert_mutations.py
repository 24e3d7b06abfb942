"""Bugs to inject into a step whose model has experts and whose strategy splits them."""

from typing import Any

import jax.numpy as jnp

from .mutations import Mutation


def _average_choices(combine: Any) -> Any:
    return lambda rows, share: combine(rows, jnp.ones_like(share) / share.shape[-1])


def _shift_experts(to_experts: Any) -> Any:
    return lambda groups, x: jnp.roll(to_experts(groups, x), x.shape[2] // groups.devices, axis=2)


def _count_all_tokens(router_statistics: Any) -> Any:
    return lambda logits, choice, capacity, counted: router_statistics(logits, choice, capacity)


_EXPERT = "shardkit.parallel.expert."

EXPERT_MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "combine weights dropped",
        "all chosen experts have the same weight",
        ("loss",),
        ((_EXPERT + "_expert.combine", _average_choices),),
    ),
    Mutation(
        "wrong destination",
        "tokens are sent to the experts of the next device",
        ("loss",),
        ((_EXPERT + "_dispatch.ExpertGroups.to_experts", _shift_experts),),
    ),
    Mutation(
        "router losses not weighted",
        "the router losses count tokens of weight 0",
        ("loss", "metrics"),
        (("shardkit.lm._mixture.router_statistics", _count_all_tokens),),
    ),
)
