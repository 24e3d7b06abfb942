"""Exact bytes of one device: every rule resolved, once for all meshes that it is the same on."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from .._core.errors import ShardkitError
from .._core.tree import nbytes
from .._core.types import Accumulate
from ..parallel import DeviceBytes, Kind, axes_splitting, planned_kinds
from ..step import Layout
from ._costs import EXPERTS, LENGTH, PIPE
from ._space import layout_of, used_axes
from ._trace import Model

_LANES_BYTES = 4  # gradients are added up in f32


@dataclasses.dataclass(frozen=True)
class Placed:
    """Exact bytes of one device on one mesh.

    Attributes:
      state: parameters, optimizer state, model_state, counter and key.
      batch: its share of the batch.
      lane: its gradients in f32, unreduced over rows, as one reduction per step needs them.
      shard: its gradients in f32 as the parameters lie.
      ends: of `lane`, what no stage of a pipeline has for itself.
      regathered: bytes one device sends to gather the parameters that it updated in parts.
      kinds: kinds of parallelism that are laid out.
    """

    state: int
    batch: int
    lane: int
    shard: int
    ends: int
    regathered: float
    kinds: tuple[Kind, ...] = ()

    def sent_beside(
        self, sizes: Mapping[str, int], batch_scale: float = 1.0
    ) -> Iterator[tuple[str, float]]:
        """Mesh axis and bytes that each kind sends beside what a walk finds by names of dims.

        Args:
          sizes: size of each mesh axis.
          batch_scale: as if the batch had so many times its rows.
        """
        held = DeviceBytes(sizes, self.batch * batch_scale, self.shard, self.regathered)
        for kind in self.kinds:
            if sizes.get(kind.axis, 1) > 1 and (sent := kind.extra_bytes(held)):
                yield kind.axis, sent


@dataclasses.dataclass(frozen=True)
class Places:
    """The layouts of one model, each resolved when it is first asked for.

    Rules see the axes that split more than the batch; where ZeRO splits the update, also those of
    the rows. So meshes that differ in other axes share a resolution, and only their batch is
    counted anew.
    """

    model: Model
    made: dict[tuple[Any, ...], Placed | str] = dataclasses.field(default_factory=dict)
    kinds: dict[tuple[Any, ...], tuple[Kind, ...]] = dataclasses.field(default_factory=dict)

    def of(self, sizes: Mapping[str, int], zero: int) -> Placed | str:
        """Exact bytes of a layout, or why there is none."""
        batch = self._batch(sizes)
        if batch is None:
            return self.resolved(sizes, zero)
        of_batch = {"length"} if zero else {"rows", "length"}
        unseen = {k.axis for k in planned_kinds() if k.splits and k.splits <= of_batch}
        seen = {axis: n for axis, n in sizes.items() if axis not in unseen}
        key = (min(zero, 1), *seen.items())
        if key not in self.made:
            self.made[key] = self.resolved(seen or dict.fromkeys(sizes, 1), zero)
        found = self.made[key]
        if isinstance(found, str):
            return found
        used = (min(zero, 1), *used_axes(sizes))
        if used not in self.kinds:
            self.kinds[used] = layout_of(sizes, zero).kinds
        return dataclasses.replace(found, batch=batch, kinds=self.kinds[used])

    def resolved(self, sizes: Mapping[str, int], zero: int) -> Placed | str:
        """The same by resolving everything on this one mesh."""
        try:
            strategy = layout_of(sizes, zero)
            return placed_bytes(self.model.layout(used_axes(sizes), strategy), strategy.kinds)
        except Exception as error:  # rules are a user's code, and may raise anything
            return reason(error)

    def _batch(self, sizes: Mapping[str, int]) -> int | None:
        """Bytes of the batch on one device; None where it does not split."""
        ways = (row_ways(sizes), sizes.get(LENGTH, 1))
        held = 0
        for x in jax.tree.leaves(self.model.declared.batch):
            if any(n % way for n, way in zip(x.shape, ways, strict=False)):
                return None
            held += nbytes(x.shape, x.dtype) // math.prod(ways[: len(x.shape)])
        return held


def row_ways(sizes: Mapping[str, int]) -> int:
    """Parts that the mesh splits rows into."""
    return math.prod(sizes.get(axis, 1) for axis in axes_splitting("rows"))


def placed_bytes(layout: Layout, kinds: tuple[Kind, ...]) -> Placed:
    """Exact bytes from the resolved shardings of kinds of parallelism."""
    state, where = layout.state, layout.shardings
    held = sum(_shard_bytes(getattr(where, n), getattr(state, n)) for n in ("params", "opt_state"))
    held += _shard_bytes(where.model_state, state.model_state)
    held += sum(nbytes(x.shape, x.dtype) for x in (state.step, state.key, state.halted))
    rows = set(layout.row_axes) - {EXPERTS}  # no lane ends along it
    mesh = next(iter(jax.tree.leaves(where.params))).mesh.shape
    lane = shard = ends = 0
    regathered = 0.0
    updated = jax.tree.leaves(layout.update) if layout.update is not None else []
    for i, (sharding, x) in enumerate(_pairs(where.params, state.params)):
        own = math.prod(sharding.shard_shape(x.shape))
        axes = {a for e in sharding.spec for a in ((e,) if isinstance(e, str) else e or ())}
        shard += own * _LANES_BYTES
        whole = own * math.prod(mesh[a] for a in axes & rows) * _LANES_BYTES
        lane += whole
        ends += 0 if PIPE in axes else whole
        if updated:
            part = math.prod(updated[i].shard_shape(x.shape))
            regathered += (own - part) * x.dtype.itemsize
    batch = _shard_bytes(layout.batch_shardings, layout.batch)
    return Placed(held, batch, lane, shard, ends, regathered, kinds)


def kept_bytes(placed: Placed, schedule: Accumulate) -> int:
    """Bytes of what micro-batches add up in."""
    if schedule.micro_batches == 1:
        return 0
    return placed.lane if schedule.reduce == "end" else placed.shard


def reason(error: Exception) -> str:
    """The first thing that does not fit, without the headline; of a user's code, what it raised."""
    lines = str(error).splitlines()
    if not isinstance(error, ShardkitError):
        return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"
    return " ".join(lines[1 if len(lines) > 1 else 0].split())


def _pairs(shardings: Any, arrays: Any) -> list[tuple[Any, Any]]:
    return list(zip(jax.tree.leaves(shardings), jax.tree.leaves(arrays), strict=True))


def _shard_bytes(shardings: Any, arrays: Any) -> int:
    return sum(nbytes(s.shard_shape(x.shape), x.dtype) for s, x in _pairs(shardings, arrays))
