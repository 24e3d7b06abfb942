"""Bugs to inject into a step whose model has experts and whose strategy splits them."""

from typing import Any

import jax.numpy as jnp

from .mutations import Mutation


def _alike(combine: Any) -> Any:
    return lambda rows, share: combine(rows, jnp.ones_like(share) / share.shape[-1])


def _to_a_neighbour(to_experts: Any) -> Any:
    return lambda groups, x: jnp.roll(to_experts(groups, x), x.shape[2] // groups.devices, axis=2)


def _all_counted(router_statistics: Any) -> Any:
    return lambda logits, choice, capacity, counted: router_statistics(logits, choice, capacity)


_EXPERT = "shardkit.parallel.expert."

EXPERT_MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "combine weights dropped",
        "every chosen expert has the same say",
        ("loss",),
        ((_EXPERT + "_expert.combine", _alike),),
    ),
    Mutation(
        "wrong destination",
        "tokens go to the next device's experts",
        ("loss",),
        ((_EXPERT + "_dispatch.ExpertGroups.to_experts", _to_a_neighbour),),
    ),
    Mutation(
        "router losses not weighted",
        "tokens that do not count route into the losses",
        ("loss", "metrics"),
        (("shardkit.lm._mixture.router_statistics", _all_counted),),
    ),
)
