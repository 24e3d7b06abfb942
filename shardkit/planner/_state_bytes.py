"""Exact bytes of one device: every rule resolved, once for all meshes that share its result."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from .._core.errors import ShardkitError
from .._core.tree import nbytes
from .._core.types import Accumulate, PyTree
from ..parallel import DeviceBytes, Strategy, axes_splitting, planned_kinds
from ..rules import axes_of
from ..step import StepLayout
from ._costs import EXPERTS, LENGTH, PIPE
from ._space import make_strategy, split_axes
from ._trace import TracedModel

_GRADIENT_BYTES = 4  # gradients accumulate in f32


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Exact bytes of one device on one mesh."""

    state: int  # parameters, optimizer state, model_state, counter and key
    batch: int  # its share of the batch
    # its gradients in f32, unreduced over rows, as one reduction per step needs them
    unreduced: int
    reduced: int  # its gradients in f32, sharded as the parameters are
    outside_stages: int  # part of `unreduced` that no stage of a pipeline has for itself
    update_gather: float  # bytes it sends to gather the parameters that it updated in parts
    strategy: Strategy  # of the layout, without options of its attention and pipeline

    def extra_sends(
        self, sizes: Mapping[str, int], batch_scale: float = 1.0
    ) -> Iterator[tuple[str, float]]:
        """Mesh axis and bytes of each kind that sends what no propagation by axis names finds."""
        device = DeviceBytes(sizes, self.batch * batch_scale, self.reduced, self.update_gather)
        for kind in self.strategy.kinds:
            if sizes.get(kind.axis, 1) > 1 and (sent := kind.extra_bytes(device)):
                yield kind.axis, sent


@dataclasses.dataclass(frozen=True)
class StateBytesResolver:
    """The exact bytes of one model's layouts, each resolved when it is first asked for.

    Parameters and optimizer state depend only on the axes that split more than the batch; with
    ZeRO also on the axes of rows. Meshes that differ in other axes share a resolution, and only
    their batch is counted anew:

        data=2, fsdp=4 and data=4, fsdp=2, context=1   two resolutions, for fsdp=4 and fsdp=2
        data=2, fsdp=4 and data=4, fsdp=4              one, for fsdp=4
    """

    model: TracedModel
    cache: dict[tuple[Any, ...], StateBytes | str] = dataclasses.field(default_factory=dict)
    strategies: dict[tuple[Any, ...], Strategy] = dataclasses.field(default_factory=dict)

    def resolve(self, sizes: Mapping[str, int], zero: int) -> StateBytes | str:
        """Exact bytes of a layout, or why it is not legal."""
        batch = self._batch_bytes(sizes)
        if batch is None:
            return self.resolve_alone(sizes, zero)
        of_batch = {"length"} if zero else {"rows", "length"}
        ignored = {k.axis for k in planned_kinds() if k.splits and k.splits <= of_batch}
        relevant = {axis: n for axis, n in sizes.items() if axis not in ignored}
        key = (min(zero, 1), *relevant.items())
        if key not in self.cache:
            self.cache[key] = self.resolve_alone(relevant or dict.fromkeys(sizes, 1), zero)
        shared = self.cache[key]
        if isinstance(shared, str):
            return shared
        used = (min(zero, 1), *split_axes(sizes))
        if used not in self.strategies:
            self.strategies[used] = self._make_strategy(sizes, zero)
        return dataclasses.replace(shared, batch=batch, strategy=self.strategies[used])

    def resolve_alone(self, sizes: Mapping[str, int], zero: int) -> StateBytes | str:
        """The same by resolving everything on this one mesh."""
        try:
            strategy = self._make_strategy(sizes, zero)
            return count_state_bytes(self.model.layout(split_axes(sizes), strategy), strategy)
        except Exception as error:  # rules are a user's code, and may raise anything
            return first_reason(error)

    def _make_strategy(self, sizes: Mapping[str, int], zero: int) -> Strategy:
        return make_strategy(sizes, zero, like=self.model.spec.strategy)

    def _batch_bytes(self, sizes: Mapping[str, int]) -> int | None:
        """Bytes of the batch on one device; None where it does not split."""
        shards = (count_row_shards(sizes), sizes.get(LENGTH, 1))
        total = 0
        for x in jax.tree.leaves(self.model.spec.batch):
            if any(size % n for size, n in zip(x.shape, shards, strict=False)):
                return None
            total += nbytes(x.shape, x.dtype) // math.prod(shards[: len(x.shape)])
        return total


def count_row_shards(sizes: Mapping[str, int]) -> int:
    """Number of shards that the mesh splits rows into."""
    return math.prod(sizes.get(axis, 1) for axis in axes_splitting("rows"))


def count_state_bytes(layout: StepLayout, strategy: Strategy) -> StateBytes:
    """Exact bytes from the shardings of a layout, which this strategy resolved to."""
    arrays, shardings = layout.state, layout.shardings
    names = ("params", "opt_state", "model_state")
    state = sum(_shard_bytes(getattr(shardings, n), getattr(arrays, n)) for n in names)
    state += sum(nbytes(x.shape, x.dtype) for x in (arrays.step, arrays.key, arrays.halted))
    rows = set(layout.row_axes) - {EXPERTS}  # gradients of experts are not summed over it
    mesh = next(iter(jax.tree.leaves(shardings.params))).mesh.shape
    unreduced = reduced = outside_stages = 0
    update_gather = 0.0
    updates = jax.tree.leaves(layout.update) if layout.update is not None else []
    for i, (sharding, x) in enumerate(_pairs(shardings.params, arrays.params)):
        elements = math.prod(sharding.shard_shape(x.shape))
        axes = {axis for entry in sharding.spec for axis in axes_of(entry)}
        # bf16[4096, 4096] over fsdp=8, which splits rows: 8 MiB reduced, 64 MiB unreduced in f32.
        gathered = elements * math.prod(mesh[a] for a in axes & rows) * _GRADIENT_BYTES
        reduced += elements * _GRADIENT_BYTES
        unreduced += gathered
        outside_stages += 0 if PIPE in axes else gathered
        if updates:
            updated = math.prod(updates[i].shard_shape(x.shape))
            update_gather += (elements - updated) * x.dtype.itemsize
    return StateBytes(
        state=state,
        batch=_shard_bytes(layout.batch_shardings, layout.batch),
        unreduced=unreduced,
        reduced=reduced,
        outside_stages=outside_stages,
        update_gather=update_gather,
        strategy=strategy,
    )


def accumulator_bytes(exact: StateBytes, accumulate: Accumulate) -> int:
    """Bytes of the accumulator of micro-batches' gradients."""
    if accumulate.micro_batches == 1:
        return 0
    return exact.unreduced if accumulate.reduce == "end" else exact.reduced


def first_reason(error: Exception) -> str:
    """The first problem of an error, without its headline; of a user's code, what it raised."""
    lines = str(error).splitlines()
    if not isinstance(error, ShardkitError):
        return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"
    return " ".join(lines[1 if len(lines) > 1 else 0].split())


def _pairs(shardings: PyTree, arrays: PyTree) -> list[tuple[Any, Any]]:
    return list(zip(jax.tree.leaves(shardings), jax.tree.leaves(arrays), strict=True))


def _shard_bytes(shardings: PyTree, arrays: PyTree) -> int:
    return sum(nbytes(s.shard_shape(x.shape), x.dtype) for s, x in _pairs(shardings, arrays))
