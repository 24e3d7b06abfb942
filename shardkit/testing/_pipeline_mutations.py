"""Bugs to inject into steps of `strategies.pipeline()`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .mutations import Mutation


def _change_arrivals(change: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Any], Any]:
    """Changes i32[ticks, stages]: the slot that an arriving message is stored in.

    `change(arrivals, nowhere)`: a value of `nowhere` stores no message.
    """

    def replace(ticks: Any) -> Any:
        def wrong(table: Any) -> Any:
            plan = ticks(table)
            changed = {
                name: change(plan.columns[name], plan.slots) for name in ("arrival0", "arrival1")
            }
            return dataclasses.replace(plan, columns={**plan.columns, **changed})

        return wrong

    return replace


def _delay_arrivals(arrivals: np.ndarray, nowhere: int) -> np.ndarray:
    return np.roll(arrivals, 1, axis=0)


def _drop_last_arrival(arrivals: np.ndarray, nowhere: int) -> np.ndarray:
    changed = arrivals.copy()
    for tick, stage in np.argwhere(arrivals != nowhere)[-1:]:
        changed[tick, stage] = nowhere
    return changed


def _shift_destinations(ticks: Any) -> Any:
    def wrong(table: Any) -> Any:
        plan = ticks(table)
        stages = plan.columns["branch"].shape[1]
        shifted = tuple(
            tuple(tuple((src, (dst + 1) % stages) for src, dst in pairs) for pairs in exchange)
            for exchange in plan.exchanges
        )
        return dataclasses.replace(plan, exchanges=shifted)

    return wrong


_TICKS = "shardkit.parallel.pipeline._spmd_program.tick_program"

PIPELINE_MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "wrong neighbour",
        "after each tick a stage sends one stage too far",
        ("gradients", "loss"),
        ((_TICKS, _shift_destinations),),
    ),
    Mutation(
        "a tick late",
        "messages are stored one tick late",
        ("gradients",),
        ((_TICKS, _change_arrivals(_delay_arrivals)),),
    ),
    Mutation(
        "lost at a boundary",
        "one message between two stages is dropped",
        ("gradients",),
        ((_TICKS, _change_arrivals(_drop_last_arrival)),),
    ),
)
