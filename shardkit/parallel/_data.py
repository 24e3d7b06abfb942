"""Data parallelism: every device holds the model, each computes on its own rows.

`x[B_data, D] · W[D, F] → y[B_data, F]`

Collectives per step, n devices, G bytes of gradients: one all-reduce, 2(n−1)/n · G per device,
whatever the accumulation.

Use when the model, its gradients and the optimizer state fit on one device. Do not use when they do
not (`fsdp`), or when a device's share of the batch is too small to hide the all-reduce.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar, final

from jax.sharding import PartitionSpec

from ..report import LedgerRow, Program
from ..rules import REPLICATED
from ._kind import Kind, PlanChoice
from ._names import activations, check_strategy
from ._strategy import Strategy
from ._zero import zero


def data(axis: str = "data") -> Strategy:
    """Splits the rows of the batch over a mesh axis; parameters are replicated.

    Args:
      axis: name of the mesh axis.

    Returns:
      A strategy for any model, with or without logical names.

    >>> data().batch
    P('data',)
    """
    check_strategy("data", axis)
    return Strategy(
        params=REPLICATED,
        batch=PartitionSpec(axis),
        activations=activations({"batch": axis}),
        kinds=(Data(axis),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Data(Kind):
    """Rows split over an axis, parameters replicated; a planner also tries ZeRO there."""

    name: ClassVar[str] = "data"
    splits = frozenset({"rows"})
    collectives = frozenset({"all-reduce"})
    in_shard_map = True
    planned = "data and ZeRO"
    implied_by = frozenset({"batch"})
    factory = staticmethod(data)

    def minimum(self, program: Program) -> float:
        """One all-reduce of the gradients per step, whatever the accumulation."""
        return self.gradient_all_reduce_bytes(program)

    def excess(
        self, row: LedgerRow, rows: Sequence[LedgerRow], program: Program
    ) -> Iterator[tuple[str, float]]:
        """With several slices, the part of an all-reduce that is inside a slice."""
        if row.kind == "all-reduce" and not (row.full_axes or row.dcn):
            what = "of gradients all-reduced inside each slice, where a reduce-scatter would do"
            yield what, 0.5

    def planned_strategy(self, choice: PlanChoice) -> "functools.partial[Strategy]":
        """ZeRO of the chosen stage, or plain data parallelism."""
        return (
            functools.partial(zero, stage=choice.zero)
            if choice.zero
            else super().planned_strategy(choice)
        )
