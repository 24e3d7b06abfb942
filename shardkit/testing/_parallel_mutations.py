"""Bugs to inject into what a strategy computes: context, experts and pipelines."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..parallel import attend_backward
from .mutations import Mutation, mutation

_RING = "shardkit.parallel.context._ring."
_EXPERT = "shardkit.parallel.expert."
_TICKS = "shardkit.parallel.pipeline._spmd_program.tick_program"


@mutation("ring shifted", _RING + "neighbours", "loss")
def _ring_shifted(neighbours: Any, n: int) -> Any:
    """Blocks are sent one device too far."""
    return [(i, (j + 1) % n) for i, j in neighbours(n)]


@mutation("softmax not rescaled", _RING + "merge", "loss")
def _softmax_not_rescaled(merge: Any, earlier: Any, later: Any) -> Any:
    """Partial outputs are added without rescaling."""
    # merge gives out = earlier * exp(earlier_lse - lse) + later * exp(later_lse - lse).
    out, lse = merge(earlier, later)
    return out + earlier[0] * (1 - jnp.exp(earlier[1] - lse)[..., None]), lse


@mutation("gradient left behind", _RING + "RingAttention.attend_shard_backward", "grad_norm")
def _gradient_left_behind(backward: Any, ring: Any, *args: Any) -> Any:
    """Gradients of keys and values lose the contributions of other devices."""
    dq, _, _ = backward(ring, *args)
    return dq, *attend_backward(*args)[1:]


CONTEXT_MUTATIONS: tuple[Mutation, ...] = (
    _ring_shifted,
    _softmax_not_rescaled,
    _gradient_left_behind,
)


@mutation("combine weights dropped", _EXPERT + "_expert.combine", "loss")
def _combine_weights_dropped(combine: Any, rows: Any, share: Any) -> Any:
    """All chosen experts have the same weight."""
    return combine(rows, jnp.ones_like(share) / share.shape[-1])


@mutation("wrong destination", _EXPERT + "_dispatch.ExpertGroups.to_experts", "loss")
def _wrong_destination(to_experts: Any, groups: Any, x: Any) -> Any:
    """Tokens are sent to the experts of the next device."""
    return jnp.roll(to_experts(groups, x), x.shape[2] // groups.devices, axis=2)


@mutation("router losses not weighted", "shardkit.lm._mixture.router_statistics", "loss", "metrics")
def _router_losses_not_weighted(
    router_statistics: Any, logits: Any, choice: Any, capacity: Any, counted: Any
) -> Any:
    """The router losses count tokens of weight 0."""
    return router_statistics(logits, choice, capacity)


EXPERT_MUTATIONS: tuple[Mutation, ...] = (
    _combine_weights_dropped,
    _wrong_destination,
    _router_losses_not_weighted,
)


@mutation("wrong neighbour", _TICKS, "gradients", "loss")
def _wrong_neighbour(ticks: Any, table: Any) -> Any:
    """After each tick a stage sends one stage too far."""
    plan = ticks(table)
    stages = plan.columns["branch"].shape[1]
    shifted = tuple(
        tuple(tuple((src, (dst + 1) % stages) for src, dst in pairs) for pairs in exchange)
        for exchange in plan.exchanges
    )
    return dataclasses.replace(plan, exchanges=shifted)


def _change_arrivals(plan: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Changes i32[ticks, stages]: the slot that an arriving message is stored in."""
    changed = {name: change(plan.columns[name]) for name in ("arrival0", "arrival1")}
    return dataclasses.replace(plan, columns={**plan.columns, **changed})


@mutation("a tick late", _TICKS, "gradients")
def _a_tick_late(ticks: Any, table: Any) -> Any:
    """Messages are stored one tick late."""
    return _change_arrivals(ticks(table), lambda arrivals: np.roll(arrivals, 1, axis=0))


@mutation("lost at a boundary", _TICKS, "gradients")
def _lost_at_a_boundary(ticks: Any, table: Any) -> Any:
    """One message between two stages is dropped."""
    plan = ticks(table)

    def drop_last(arrivals: np.ndarray) -> np.ndarray:
        changed = arrivals.copy()
        for tick, stage in np.argwhere(arrivals != plan.slots)[-1:]:  # `slots` stores no message
            changed[tick, stage] = plan.slots
        return changed

    return _change_arrivals(plan, drop_last)


PIPELINE_MUTATIONS: tuple[Mutation, ...] = (_wrong_neighbour, _a_tick_late, _lost_at_a_boundary)
